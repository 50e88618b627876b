// A CUDA driver without a GPU: it writes down in the folder STUB what it is asked for, and keeps the images it is
// given. Device 0 is of compute capability 9.0, device 1 of 8.6. STUB_FAILS names a function that fails.
#include <elf.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

namespace {

constexpr int kOutOfMemory = 2, kNotFound = 500;
std::mutex mutex;
std::atomic<int> libraries;
thread_local int current = -1, mode = 0;  // the device of the context of this thread; its way with captured streams

std::string path(const std::string& name) { return std::string(std::getenv("STUB")) + "/" + name; }

template <class... Facts>
void note(const char* format, Facts... facts) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::FILE* file = std::fopen(path("calls").c_str(), "a");
  std::fprintf(file, format, facts...);
  std::fclose(file);
}

bool fails(const char* function) {
  const char* chosen = std::getenv("STUB_FAILS");
  return chosen != nullptr && std::strcmp(chosen, function) == 0;
}

struct Library {
  int number;
  std::string bytes;
};

struct Kernel {
  std::string name;
};

int devices[2];  // whose addresses are their contexts

}  // namespace

extern "C" {

int cuCtxGetCurrent(void** context) {
  *context = current < 0 ? nullptr : &devices[current];
  return 0;
}

int cuCtxGetDevice(int* device) {
  *device = current;
  return current < 0 ? kNotFound : 0;
}

int cuCtxSetCurrent(void* context) {
  current = static_cast<int>(static_cast<int*>(context) - devices);
  note("current %d\n", current);
  return 0;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int capability = device == 0 ? 90 : 86;
  *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 16 ? 132 : -1;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  note("retain %d\n", device);
  *context = &devices[device];
  return fails("cuDevicePrimaryCtxRetain") ? kOutOfMemory : 0;
}

int cuThreadExchangeStreamCaptureMode(int* wanted) {
  std::swap(mode, *wanted);
  return 0;
}

#ifndef OLD
int cuLibraryLoadData(void** library, const void* code, void*, void*, unsigned options, void*, void*, unsigned more) {
  if (fails("cuLibraryLoadData")) return kOutOfMemory;
  const auto* elf = static_cast<const Elf64_Ehdr*>(code);
  const bool is_elf = std::memcmp(elf->e_ident, ELFMAG, SELFMAG) == 0;
  const size_t size =
      is_elf ? elf->e_shoff + size_t{elf->e_shnum} * elf->e_shentsize : std::strlen(static_cast<const char*>(code));
  auto* const made = new Library{libraries++, std::string(static_cast<const char*>(code), size)};
  std::FILE* file = std::fopen(path("image" + std::to_string(made->number)).c_str(), "wb");
  std::fwrite(code, 1, size, file);
  std::fclose(file);
  note("load %d %s captured %d options %u\n", made->number, is_elf ? "cubin" : "PTX", mode, options + more);
  *library = made;
  return 0;
}
#endif

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  const auto* from = static_cast<const Library*>(library);
  note("get %s of %d\n", name, from->number);
  if (from->bytes.find(name) == std::string::npos) return kNotFound;
  *kernel = new Kernel{name};
  return 0;
}

int cuLaunchKernel(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z,
                   unsigned shared_bytes, void* stream, void** arguments, void** extra) {
  if (current < 0) return kNotFound;
  note("launch %s grid %u %u %u block %u %u %u shared %u stream %zu mode %d argument %zu extra %p device %d\n",
       static_cast<Kernel*>(kernel)->name.c_str(), grid_x, grid_y, grid_z, x, y, z, shared_bytes,
       reinterpret_cast<size_t>(stream), mode, *static_cast<size_t*>(arguments[0]), static_cast<void*>(extra), current);
  return fails("cuLaunchKernel") ? kOutOfMemory : 0;
}

int cuGetErrorString(int result, const char** text) {
  *text = result == kOutOfMemory ? "out of memory" : "not found";
  return 0;
}

}  // extern "C"
