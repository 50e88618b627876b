// A management library for GPUs that are not there: NVML_GPUS lists their compute capabilities, as "75 90", and
// NVML_DRIVER has the CUDA version of their driver, as 13000.
#include <cstdlib>
#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<int> gpus() {
  const char* const listed = std::getenv("NVML_GPUS");
  std::istringstream words(listed ? listed : "");
  std::vector<int> found;
  for (int gpu; words >> gpu;) found.push_back(gpu);
  return found;
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
  *count = static_cast<unsigned>(gpus().size());
  return started ? 0 : 1;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  *device = reinterpret_cast<void*>(static_cast<size_t>(index) + 1);
  return started ? 0 : 1;
}

int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  const int gpu = gpus().at(reinterpret_cast<size_t>(device) - 1);
  *major = gpu / 10;
  *minor = gpu % 10;
  return started ? 0 : 1;
}

}  // extern "C"
