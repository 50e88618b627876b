// Runs CUDA kernels on the CPU. Replaces kernels/core/launch.h, which it includes.
//
// Blocks run one after the other, and the threads of a block as coroutines. At a barrier a thread waits until all
// others have reached it. Between two barriers threads run from the first to the last one, then from the last to the
// first, so that a missing barrier gives a wrong result.
#pragma once

#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "../../../kernels/core/launch.h"

#define __device__
#define __shared__ thread_local  // static within a function, and may be extern; all coroutines are one thread
#define __launch_bounds__(...)

inline dim3 blockIdx, threadIdx, blockDim, gridDim;
using std::max;
using std::min;
template <class T>
T rsqrt(T x) {
  return 1 / std::sqrt(x);
}

namespace tsm_jit {
inline thread_local uint4 shared[48 * 1024 / sizeof(uint4)];
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

// Every thread of every block of the grid runs `body`.
inline void run(dim3 grid, dim3 block, size_t shared_bytes) {
  static std::vector<Thread> threads;
  const uint32_t n_threads = block.x * block.y;
  threads.resize(std::max<size_t>(threads.size(), n_threads));
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        ASAN_UNPOISON_MEMORY_REGION(tsm_jit::shared, sizeof tsm_jit::shared);
        std::memset(tsm_jit::shared, 0xA5, shared_bytes);
        const size_t rest = sizeof tsm_jit::shared - shared_bytes;
        ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(tsm_jit::shared) + shared_bytes, rest);
        for (uint32_t i = 0; i < n_threads; ++i) {
          Thread& thread = threads[i];
          thread.done = false;
          getcontext(&thread.context);
          thread.context.uc_stack.ss_sp = thread.stack.data();
          thread.context.uc_stack.ss_size = thread.stack.size();
          thread.context.uc_link = nullptr;
          makecontext(&thread.context, start, 0);
        }
        for (bool left = true, forward = true; left; forward = !forward) {
          left = false;
          for (uint32_t turn = 0; turn < n_threads; ++turn) {
            const uint32_t i = forward ? turn : n_threads - 1 - turn;
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
inline void __threadfence_system() {}
inline void __trap() { std::abort(); }
inline uint32_t atomicAdd(uint32_t* word, uint32_t value) {
  *word += value;
  return *word - value;
}

namespace tsm_jit {

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                   const Arguments&... arguments) {
  cuda_on_cpu::body = [&] { kernel(arguments...); };
  cuda_on_cpu::run(grid, block, shared_bytes);
  return nullptr;
}

// So few that blocks have several tasks, as with large activations on a GPU.
inline int32_t multiprocessors() { return 2; }

}  // namespace tsm_jit
