// Launches kernels that NVRTC compiled through the CUDA driver, as the CUDA runtime does. Needs no header of CUDA.
#include "driver.h"

#include <dlfcn.h>

#include <mutex>
#include <type_traits>

namespace tsm_jit {
namespace {

using Result = int;  // CUresult
constexpr Result kSuccess = 0;
constexpr int kMajor = 75, kMinor = 76;   // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_
constexpr int kMultiprocessorCount = 16;  // CU_DEVICE_ATTRIBUTE_
constexpr int kRelaxed = 2;               // CU_STREAM_CAPTURE_MODE_RELAXED

// Opened at the first launch, when torch has started it: an import must not.
struct Driver {
  const char* missing = nullptr;
  Result (*get_current)(void** context);
  Result (*get_device_of_current)(int* device);
  Result (*set_current)(void* context);
  Result (*get_device)(int* device, int ordinal);
  Result (*get_attribute)(int* value, int attribute, int device);
  Result (*retain_primary)(void** context, int device);
  Result (*exchange_capture_mode)(int* mode);
  Result (*load)(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned);
  Result (*get_kernel)(void** kernel, void* library, const char* name);
  Result (*launch)(void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared_bytes,
                   void* stream, const void** arguments, void** extra);
  Result (*get_error_string)(Result, const char** text);

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) {
      missing = "libcuda.so.1, the driver, cannot be loaded";
      return;
    }
    const auto find = [&](const char* name, auto& function) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) missing = "the driver is older than CUDA 12";
    };
    find("cuCtxGetCurrent", get_current);
    find("cuCtxGetDevice", get_device_of_current);
    find("cuCtxSetCurrent", set_current);
    find("cuDeviceGet", get_device);
    find("cuDeviceGetAttribute", get_attribute);
    find("cuDevicePrimaryCtxRetain", retain_primary);
    find("cuThreadExchangeStreamCaptureMode", exchange_capture_mode);
    find("cuLibraryLoadData", load);
    find("cuLibraryGetKernel", get_kernel);
    find("cuLaunchKernel", launch);
    find("cuGetErrorString", get_error_string);
  }

  const char* said(Result result) const {
    const char* text = nullptr;
    if (result == kSuccess) return nullptr;
    return get_error_string(result, &text) == kSuccess && text != nullptr ? text : "unknown error";
  }
};

const Driver& driver() {
  static const Driver opened;
  return opened;
}

// The device that this thread launches on.
struct Device {
  int32_t ordinal = -1;
  int device = 0;  // as the driver calls it
  int capability = 0;
  int multiprocessors = 0;
};
thread_local Device here;

// Loads what a first launch needs. A stream that is being captured allows that as little as an allocation, unless
// asked.
Result load(const Kernel& kernel, int64_t i) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (kernel.handles[i] != nullptr) return kSuccess;  // another thread was first
  const Driver& d = driver();
  Image& image = kernel.images[i];
  int mode = kRelaxed;
  Result result = d.exchange_capture_mode(&mode);
  if (result != kSuccess) return result;
  void *library = image.library, *handle = nullptr;
  if (library == nullptr) result = d.load(&library, image.code, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (result == kSuccess) {
    image.library = library;
    result = d.get_kernel(&handle, library, kernel.name);
  }
  if (result == kSuccess) kernel.handles[i].store(handle, std::memory_order_release);
  d.exchange_capture_mode(&mode);
  return result;
}

}  // namespace

const char* use_device(int32_t ordinal) {
  const Driver& d = driver();
  if (d.missing != nullptr) return d.missing;
  Result result = kSuccess;
  if (here.ordinal != ordinal) {
    Device found;
    int minor = 0;
    result = d.get_device(&found.device, ordinal);
    if (result == kSuccess) result = d.get_attribute(&found.capability, kMajor, found.device);
    if (result == kSuccess) result = d.get_attribute(&minor, kMinor, found.device);
    if (result == kSuccess) result = d.get_attribute(&found.multiprocessors, kMultiprocessorCount, found.device);
    if (result != kSuccess) return d.said(result);
    found.ordinal = ordinal;
    found.capability = 10 * found.capability + minor;
    here = found;
  }
  void* context = nullptr;
  int device = -1;
  result = d.get_current(&context);
  if (result == kSuccess && context != nullptr) result = d.get_device_of_current(&device);
  if (result != kSuccess || (context != nullptr && device == here.device)) return d.said(result);
  // As in a thread of autograd: the context that torch has on this device, which is kept as long as the process lives.
  result = d.retain_primary(&context, here.device);
  return d.said(result == kSuccess ? d.set_current(context) : result);
}

int32_t multiprocessors_by_driver() { return here.multiprocessors; }

const char* launch_by_driver(Kernel* kernel, const uint32_t (&sizes)[7], void* stream, const void** arguments) {
  const Driver& d = driver();
  int64_t i = 0;
  while (i < kernel->n_images &&
         (here.capability < kernel->images[i].lowest || here.capability > kernel->images[i].highest)) {
    ++i;
  }
  if (i == kernel->n_images) return "the kernels were compiled for other GPUs";
  void* handle = kernel->handles[i].load(std::memory_order_acquire);
  if (handle == nullptr) {
    if (const char* error = d.said(load(*kernel, i))) return error;
    handle = kernel->handles[i];
  }
  return d.said(d.launch(handle, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], stream,
                         arguments, nullptr));
}

}  // namespace tsm_jit
