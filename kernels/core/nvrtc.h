// How host code launches kernels that NVRTC compiled.
//
// nvcc turns `kernel<<<...>>>` into a host function that stands for the kernel, and a table that maps it to device
// code. NVRTC makes device code only, so the build (tsm_jit/_jit/nvrtc.py) generates `images.cpp`, which holds
//   - one empty host function per kernel, with the kernel's mangled name: its address stands for the kernel;
//   - `nvrtc_kernels`, which maps that address to the name;
//   - `nvrtc_images`, the compiled code, one image for each source and GPU architecture.
// At the first launch on a device, nvrtc.cpp loads the best image of each source with cudaLibraryLoadData. After that a
// launch is one hash look-up and one cudaLaunchKernel of the CUDA runtime that PyTorch uses. The headers of the CUDA
// toolkit are not needed. A kernel that is launched but was not compiled is a link error.
#pragma once

#include <cstddef>
#include <cstdint>

struct dim3;  // launch.h

// From cuda_runtime_api.h, CUDA 12.8 and later. cudaError_t is an enum, whose values other than 0 are errors.
extern "C" {
using cudaKernel_t = struct CUkern_st*;
using cudaLibrary_t = struct CUlib_st*;
int cudaGetDevice(int* device);
int cudaGetLastError();
const char* cudaGetErrorString(int error);
int cudaDeviceGetAttribute(int* value, int attribute, int device);
int cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes, void* stream);
int cudaLibraryLoadData(cudaLibrary_t* library, const void* code, const int* jit_options, void** jit_values,
                        unsigned n_jit_options, const int* options, void** values, unsigned n_options);
int cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name);
int cudaThreadExchangeStreamCaptureMode(int* mode);
}

namespace tsm_jit {

// Code for GPUs of compute capability min_capability..max_capability, as 90 for 9.0.
struct NvrtcImage {
  const void* code;
  int32_t source;  // images of the same source are alternatives; the best one comes first
  int32_t min_capability, max_capability;
};

struct NvrtcKernel {
  void (*host_function)();
  const char* name;
  int32_t source;
};

// In images.cpp.
extern const NvrtcImage nvrtc_images[];
extern const int32_t n_nvrtc_images;
extern const NvrtcKernel nvrtc_kernels[];
extern const int32_t n_nvrtc_kernels;

// The kernel that `host_function` stands for, on the current device. On failure returns null and sets `error`.
const void* nvrtc_kernel(const void* host_function, const char** error);

}  // namespace tsm_jit
