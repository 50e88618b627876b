// Loads the kernels that NVRTC compiled, once per device; see nvrtc.h.
#include <array>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/launch.h"  // includes nvrtc.h

namespace tsm_jit {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // cudaDevAttr...
constexpr int kCaptureModeRelaxed = 2;                                     // cudaStreamCaptureModeRelaxed

struct DeviceKernels {
  std::once_flag once;
  std::unordered_map<const void*, const void*> kernels;  // host function: cudaKernel_t
  const char* error = nullptr;
};

int load_kernels(int device, DeviceKernels& loaded) {
  int major = 0, minor = 0;
  if (const int error = cudaDeviceGetAttribute(&major, kComputeCapabilityMajor, device)) return error;
  if (const int error = cudaDeviceGetAttribute(&minor, kComputeCapabilityMinor, device)) return error;
  const int capability = 10 * major + minor;
  std::unordered_map<int32_t, cudaLibrary_t> libraries;  // by source
  for (int32_t i = 0; i < n_nvrtc_images; ++i) {
    const NvrtcImage& image = nvrtc_images[i];
    const bool fits = image.min_capability <= capability && capability <= image.max_capability;
    if (!fits || libraries.count(image.source) != 0) continue;
    cudaLibrary_t& library = libraries[image.source];
    const int error = cudaLibraryLoadData(&library, image.code, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (error != 0) return error;
  }
  for (int32_t i = 0; i < n_nvrtc_kernels; ++i) {
    const NvrtcKernel& kernel = nvrtc_kernels[i];
    const auto library = libraries.find(kernel.source);
    if (library == libraries.end()) continue;
    cudaKernel_t handle = nullptr;
    if (const int error = cudaLibraryGetKernel(&handle, library->second, kernel.name)) return error;
    loaded.kernels.emplace(reinterpret_cast<const void*>(kernel.host_function), handle);
  }
  return 0;
}

}  // namespace

const void* nvrtc_kernel(const void* host_function, const char** error) {
  static std::array<DeviceKernels, kMaxDevices> devices;
  int device = 0;
  if (const int code = cudaGetDevice(&device)) {
    *error = cudaGetErrorString(code);
    return nullptr;
  }
  if (device >= kMaxDevices) {
    *error = "the device index must be less than 64";
    return nullptr;
  }
  DeviceKernels& loaded = devices[device];
  std::call_once(loaded.once, [&] {
    // Loading allocates, which the capture of a CUDA graph forbids unless the thread is in relaxed mode.
    int mode = kCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (const int code = load_kernels(device, loaded)) loaded.error = cudaGetErrorString(code);
    cudaThreadExchangeStreamCaptureMode(&mode);
  });
  const auto found = loaded.kernels.find(host_function);
  if (found != loaded.kernels.end()) return found->second;
  *error = loaded.error != nullptr ? loaded.error : "the kernels were compiled for other GPUs";
  return nullptr;
}

}  // namespace tsm_jit
