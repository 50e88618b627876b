// The one way a kernel is launched: by the CUDA runtime or, where NVRTC compiled the kernels, by the CUDA driver.
//
// NVRTC reads the host code of a .cu file as well, and compiles the kernels that it launches. The same host code,
// compiled by a C++ compiler with TSM_JIT_NVRTC defined, then knows each by its declaration (driver.h).
#pragma once

#if defined(__CUDACC__) && !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#elif !defined(__CUDACC__)
#include <cstddef>
#include <cstdint>

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
  dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
#endif

#if defined(TSM_JIT_NVRTC)
#include "driver.h"
#endif

#if defined(__CUDACC__) || defined(TSM_JIT_NVRTC)

namespace tsm_jit {

template <class T>
struct Same {
  using type = T;
};

// On `stream` (a cudaStream_t) of the current device. Returns null, or what was wrong.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const typename Same<Parameters>::type&... arguments) {
#if defined(__CUDACC_RTC__)
  return nullptr;
#else
  const void* addresses[] = {&arguments...};
#if defined(__CUDACC__)
  const void* const function = reinterpret_cast<const void*>(kernel);  // CUDA 11 takes nothing else
  cudaLaunchKernel(function, grid, block, const_cast<void**>(addresses), shared_bytes,
                   static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  const uint32_t sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, static_cast<uint32_t>(shared_bytes)};
  return launch_by_driver(reinterpret_cast<Kernel*>(kernel), sizes, stream, addresses);
#endif
#endif
}

// Of the current device.
inline int32_t multiprocessors() {
#if defined(__CUDACC_RTC__)
  return 0;
#elif defined(__CUDACC__)
  int device = 0, count = 0;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#else
  return multiprocessors_by_driver();
#endif
}

}  // namespace tsm_jit
#endif
