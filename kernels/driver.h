// Kernels that NVRTC compiled, and how the CUDA driver launches them.
//
// The linker knows them: a kernel is declared, and nowhere defined, in C++; the build writes an assembler file in which
// its symbol is a `Kernel` (tsm_jit/_nvrtc.py). A kernel that is launched and that NVRTC did not compile does not link.
#pragma once

#include <atomic>
#include <cstdint>

namespace tsm_jit {

// A cubin or PTX, and the compute capabilities that it is right for, as 90.
struct Image {
  const void* code;
  int32_t lowest, highest;
  std::atomic<void*> library;  // once it is loaded
};

struct Kernel {
  const char* name;
  Image* images;  // the best first
  int64_t n_images;
  std::atomic<void*>* handles;  // in each image, once it was launched from there
};

// Before launches of this thread on a device: the driver knows no current device without a context. Null, or what is
// wrong.
const char* use_device(int32_t device);

// Of the device that this thread uses.
int32_t multiprocessors_by_driver();

// sizes: grid x, y, z, block x, y, z, bytes of shared memory. Null, or what is wrong.
const char* launch_by_driver(Kernel* kernel, const uint32_t (&sizes)[7], void* stream, const void** arguments);

}  // namespace tsm_jit
