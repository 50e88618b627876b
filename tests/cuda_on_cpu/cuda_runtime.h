// Of CUDA what the kernels use, for a C++ compiler: blocks run one after the other, the threads of a block as
// coroutines. A barrier lets every other thread of the block come as far before any goes on.
#pragma once

#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(threads)

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

inline dim3 blockIdx, threadIdx, blockDim, gridDim;
using std::max;
using std::min;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace tsm_jit {
inline uint4 shared[48 * 1024 / sizeof(uint4)];
}

namespace cuda_on_cpu {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool done = false;
};
inline ucontext_t scheduler;
inline Thread* running = nullptr;
inline std::function<void()> body;

inline void pause() { swapcontext(&running->context, &scheduler); }

inline void start() {
  body();
  running->done = true;
  pause();
}

template <class Kernel, class Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, const Args& args) {
  static std::vector<Thread> threads;
  threads.resize(std::max<size_t>(threads.size(), block.x * block.y));
  gridDim = grid;
  blockDim = block;
  body = [&] { kernel(args); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        ASAN_UNPOISON_MEMORY_REGION(tsm_jit::shared, sizeof tsm_jit::shared);
        std::memset(tsm_jit::shared, 0xA5, sizeof tsm_jit::shared);
        const size_t rest = sizeof tsm_jit::shared - shared_bytes;
        ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(tsm_jit::shared) + shared_bytes, rest);
        for (uint32_t i = 0; i < block.x * block.y; ++i) {
          Thread& thread = threads[i];
          thread.done = false;
          getcontext(&thread.context);
          thread.context.uc_stack.ss_sp = thread.stack.data();
          thread.context.uc_stack.ss_size = thread.stack.size();
          thread.context.uc_link = nullptr;
          makecontext(&thread.context, start, 0);
        }
        for (bool left = true; left;) {
          left = false;
          for (uint32_t i = 0; i < block.x * block.y; ++i) {
            if (threads[i].done) continue;
            running = &threads[i];
            threadIdx = dim3(i % block.x, i / block.x);
            swapcontext(&scheduler, &running->context);
            left |= !running->done;
          }
        }
      }
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::pause(); }
