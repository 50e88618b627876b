// The kernel that sends and receives the edges of split clips, and the host function that launches it; see edges.h.
//
// Block          kEdgeThreads threads, which copy Vecs (1 to 16 bytes) of one part
// Grid           x: blocks that share each part; y: parts
// Order          the last block of a message to end counts the message, and signals if it sends
#pragma once

#include <algorithm>
#include <cstdio>

#include "core/common.h"
#include "core/launch.h"
#include "shift/edges.h"

namespace tsm_jit {

constexpr int kEdgeThreads = 256;
constexpr int kMaxEdgeParts = 16;        // of one launch: kernel parameters take at most 4 KB
constexpr int64_t kMaxEdgeBlocks = 128;  // of one launch: blocks that wait take room that other kernels need
constexpr int kEdgeVecs = 4;             // that a thread copies at once, to hide their latency

struct EdgeArgs {
  char* tensor;
  int64_t slot_bytes, milliseconds;
  bool sends;
  EdgePart parts[kMaxEdgeParts];
};

struct EdgeCounter {
  uint32_t messages;  // that were sent or received
  uint32_t blocks;    // of the current message that have ended
};

template <class Vec>
__global__ void move_edges(const __grid_constant__ EdgeArgs a);

#if !defined(TSM_JIT_NVRTC)

// Reads a word that another GPU writes. What that GPU wrote before is visible afterwards.
__device__ inline uint32_t load_acquire(const uint32_t* word) {
#if defined(__CUDA_ARCH__)
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
#else
  return *word;
#endif
}

__device__ inline void store_release(uint32_t* word, uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
#else
  *word = value;
#endif
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now = 0;
#if defined(__CUDA_ARCH__)
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
#endif
  return now;
}

__device__ inline void wait_for_signal(const uint32_t* signal, uint32_t number, int64_t milliseconds) {
  const uint64_t begin = nanoseconds();
  while (static_cast<int32_t>(load_acquire(signal) - number) < 0) {
    if (nanoseconds() - begin < static_cast<uint64_t>(milliseconds) * 1000000) continue;
    printf("tsm_jit: the frames of another rank did not come within %lld ms\n", static_cast<long long>(milliseconds));
    __trap();
  }
}

// The distance in bytes of Vec `i` from the first one in the tensor's box. 32 bits number the Vecs of a message.
template <class Vec>
__device__ int64_t box_offset(const EdgePart& part, uint32_t i) {
  const uint32_t run = part.size[kEdgeDims - 1] / sizeof(Vec);
  uint32_t rest = i / run;
  int64_t offset = (i - rest * run) * sizeof(Vec);
#pragma unroll 1
  for (int d = kEdgeDims - 2; rest != 0; --d) {
    const uint32_t size = part.size[d], next = rest / size;
    offset += (rest - next * size) * part.stride[d];
    rest = next;
  }
  return offset;
}

template <class Vec>
__global__ void __launch_bounds__(kEdgeThreads) move_edges(const __grid_constant__ EdgeArgs a) {
  const EdgePart& part = a.parts[blockIdx.y];
  auto* const signal = reinterpret_cast<uint32_t*>(part.signal);
  auto* const counter = reinterpret_cast<EdgeCounter*>(part.counter);
  const uint32_t number = counter->messages + 1;
  if (!a.sends) {
    if (threadIdx.x == 0) wait_for_signal(signal, number, a.milliseconds);
    __syncthreads();
  }
  char* const message = reinterpret_cast<char*>(part.mailbox) + number % 2 * a.slot_bytes + part.message_begin;
  char* const box = a.tensor + part.tensor_begin;
  const uint32_t n = part.bytes / sizeof(Vec), threads = gridDim.x * kEdgeThreads;
  for (uint32_t first = blockIdx.x * kEdgeThreads + threadIdx.x; first < n; first += kEdgeVecs * threads) {
    Vec values[kEdgeVecs], *to[kEdgeVecs];
#pragma unroll
    for (int v = 0; v < kEdgeVecs; ++v) {
      const uint32_t i = first + v * threads;
      to[v] = nullptr;
      if (i >= n) continue;
      auto* const in_message = reinterpret_cast<Vec*>(message) + i;
      auto* const in_tensor = reinterpret_cast<Vec*>(box + box_offset<Vec>(part, i));
      values[v] = a.sends ? *in_tensor : *in_message;
      to[v] = a.sends ? in_message : in_tensor;
    }
#pragma unroll
    for (int v = 0; v < kEdgeVecs; ++v) {
      if (to[v] != nullptr) *to[v] = values[v];
    }
  }
  if (a.sends) __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  const auto blocks = static_cast<uint32_t>(gridDim.x * part.n_parts);
  if (atomicAdd(&counter->blocks, 1u) + 1 < blocks) return;
  counter->blocks = 0;
  counter->messages = number;
  if (!a.sends) return;
  __threadfence_system();  // what other blocks wrote comes before the signal
  store_release(signal, number);
}

#endif

// The largest power of two, at most 16, that divides all addresses and distances.
inline int64_t edge_vec_bytes(const EdgePart* parts, int64_t n_parts, const void* tensor, int64_t slot_bytes) {
  uint64_t bits = 16 | reinterpret_cast<uintptr_t>(tensor) | slot_bytes;
  for (int64_t p = 0; p < n_parts; ++p) {
    const EdgePart& part = parts[p];
    if (part.bytes == 0) continue;
    bits |= part.mailbox | part.message_begin | part.tensor_begin | part.size[kEdgeDims - 1];
    for (int d = 0; d < kEdgeDims - 1; ++d) bits |= part.stride[d];
  }
  return common_power_of_two(bits);
}

template <class Vec>
const char* launch_edges(const EdgePart* parts, int64_t n_parts, EdgeArgs& a, void* stream) {
  int64_t most = 0;
  for (int64_t p = 0; p < n_parts; ++p) most = std::max(most, parts[p].bytes);
  // The same in all launches, as blocks of one message may be in several.
  const int64_t blocks_of_largest = ceil_div(most, static_cast<int64_t>(kEdgeThreads * sizeof(Vec)));
  const int64_t most_parts = std::min<int64_t>(kMaxEdgeParts, std::max<int64_t>(1, n_parts));
  const auto blocks = static_cast<uint32_t>(std::clamp(blocks_of_largest, int64_t{1}, kMaxEdgeBlocks / most_parts));
  for (int64_t first = 0; first < n_parts; first += kMaxEdgeParts) {
    const auto count = static_cast<uint32_t>(std::min<int64_t>(kMaxEdgeParts, n_parts - first));
    for (uint32_t p = 0; p < count; ++p) a.parts[p] = parts[first + p];
    if (const char* error = launch(move_edges<Vec>, dim3(blocks, count), dim3(kEdgeThreads), 0, stream, a)) {
      return error;
    }
  }
  return nullptr;
}

const char* move_edges_cuda(const EdgePart* parts, int64_t n_parts, void* tensor, bool sends, int64_t slot_bytes,
                            int64_t milliseconds, void* stream) {
  EdgeArgs a{};
  a.tensor = static_cast<char*>(tensor);
  a.slot_bytes = slot_bytes;
  a.milliseconds = milliseconds;
  a.sends = sends;
  return dispatch_vec(edge_vec_bytes(parts, n_parts, tensor, slot_bytes),
                      [&](auto vec) { return launch_edges<decltype(vec)>(parts, n_parts, a, stream); });
}

}  // namespace tsm_jit
