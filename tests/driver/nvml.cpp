// A management library for GPUs that are not there: NVML_GPUS lists their compute capabilities, as "75 90", and
// NVML_DRIVER has the CUDA version of their driver, as 13000.
#include <cstdlib>

namespace {

// How many are listed, or up to the one at index, whose capability is written.
unsigned read_gpus(unsigned index, int* capability) {
  const char* listed = std::getenv("NVML_GPUS");
  unsigned count = 0;
  for (char* end = nullptr; listed && count <= index; listed = end, ++count) {
    const long read = std::strtol(listed, &end, 10);
    if (end == listed) break;
    *capability = static_cast<int>(read);
  }
  return count;
}

bool started = false;

}  // namespace

extern "C" {

int nvmlInit_v2() { return started = true, 0; }

int nvmlShutdown() { return started = false, 0; }

int nvmlSystemGetCudaDriverVersion(int* version) {
  const char* const told = std::getenv("NVML_DRIVER");
  *version = told ? std::atoi(told) : 0;
  return started && told ? 0 : 1;
}

int nvmlDeviceGetCount_v2(unsigned* count) {
  int capability = 0;
  *count = read_gpus(64, &capability);
  return started ? 0 : 1;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  *device = reinterpret_cast<void*>(static_cast<size_t>(index) + 1);
  return started ? 0 : 1;
}

int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  int gpu = 0;
  read_gpus(static_cast<unsigned>(reinterpret_cast<size_t>(device)) - 1, &gpu);
  *major = gpu / 10;
  *minor = gpu % 10;
  return started ? 0 : 1;
}

}  // extern "C"
