// launch(): the only way in which this project launches a kernel.
//
// Four compilers read the .cu and .cuh files:
//   nvcc                           compiles device and host code
//   NVRTC                          compiles device code. It reads the host code to learn which kernels are launched.
//   C++ with TSM_JIT_NVRTC         compiles the host code for kernels that NVRTC compiled (nvrtc.h). It sees only the
//                                  declarations of kernels.
//   C++ otherwise                  compiles everything for tests/kernels/cuda_on_cpu, which defines launch() itself
#pragma once

#include <cstdint>

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#elif !defined(__CUDACC__)
#include <cstddef>

#define __global__
#define __grid_constant__

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  uint32_t x = 1, y = 1, z = 1;
  dim3(uint32_t nx = 1, uint32_t ny = 1, uint32_t nz = 1) : x(nx), y(ny), z(nz) {}
};
#endif

#if defined(TSM_JIT_NVRTC)
#include "core/nvrtc.h"
#endif

namespace tsm_jit {

// Returns f(Vec{}) with the Vec of this size: 16, 8, 4, 2 or 1 bytes.
template <class F>
const char* dispatch_vec(int64_t bytes, F f) {
  switch (bytes) {
    case 16: return f(uint4{});
    case 8: return f(uint2{});
    case 4: return f(uint32_t{});
    case 2: return f(uint16_t{});
    default: return f(uint8_t{});
  }
}

}  // namespace tsm_jit

#if defined(__CUDACC__) || defined(TSM_JIT_NVRTC)

namespace tsm_jit {

// Keeps a function parameter from being deduced, so that arguments convert to the parameters of the kernel.
template <class T>
struct Same {
  using type = T;
};

// Launches `kernel` on `stream` (a cudaStream_t) of the current device. Returns null or an error message.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const typename Same<Parameters>::type&... arguments) {
#if defined(__CUDACC_RTC__)
  return nullptr;
#else
  const void* addresses[] = {&arguments...};
  const void* function = reinterpret_cast<const void*>(kernel);
#if defined(TSM_JIT_NVRTC)
  const char* missing = nullptr;
  function = nvrtc_kernel(function, &missing);
  if (function == nullptr) return missing;
  using Stream = void*;
#else
  using Stream = cudaStream_t;
#endif
  cudaLaunchKernel(function, grid, block, const_cast<void**>(addresses), shared_bytes, static_cast<Stream>(stream));
  const auto error = cudaGetLastError();
  return error == 0 ? nullptr : cudaGetErrorString(error);
#endif
}

// The number of multiprocessors of the current device.
inline int32_t multiprocessors() {
#if defined(__CUDACC_RTC__)
  return 0;
#else
#if defined(TSM_JIT_NVRTC)
  constexpr int kMultiprocessorCount = 16;  // cudaDevAttrMultiProcessorCount
#else
  constexpr auto kMultiprocessorCount = cudaDevAttrMultiProcessorCount;
#endif
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == 0) cudaDeviceGetAttribute(&count, kMultiprocessorCount, device);
  return count;
#endif
}

}  // namespace tsm_jit
#endif
