// CUDA kernels of the temporal shift.
//
//     out[n, t, o, c] = in[n, t + offset(c), o, c]           ShiftOp = Gather
//     its adjoint under the paddings that add                ShiftOp = GatherAdjoint
//
// Tensors        src, dst: [clips, frames, outer_size, inner_bytes] with strides in bytes; see core/shift.h
// Thread         one column: a Vec (1 to 16 bytes) of one clip at all frames that the thread visits
// Block          kThreads threads: columns x rows of threads that share the frames of a column
// Grid           x: columns of a frame; y: frames; z: clips
// Aliasing       src and dst are the same tensor (in place) or do not overlap
// Bytes moved    each byte that moves is read once and written once; in place the other groups are not touched
//
// Two kernels:
//     shift_tile     loads the frames of a block into shared memory, waits for all of them, then writes. All threads
//                    visit the same frame at the same time, so a warp accesses whole cache lines for any offsets.
//     shift_stream   for clips that do not fit into shared memory. Each thread walks its own column. In place it visits
//                    the frames in the order in which each is read before it is overwritten.
//
// Index arithmetic within a frame is 32-bit. temporal_shift_naive.cuh has the same operation in ten lines.
#pragma once

#include "core/dtype.h"
#include "core/launch.h"
#include "shift/temporal_shift.h"

namespace tsm_jit {

constexpr int kThreads = 128;
constexpr int kMaxGroups = 32;
constexpr int64_t kMaxBytes = int64_t{1} << 30;  // of a frame that one launch covers

struct ShiftArgs {
  const char* src;
  char* dst;
  Strides src_strides, dst_strides;
  int32_t frame_bytes;  // outer_size * inner_bytes
  int32_t inner_bytes;
  int32_t frames;            // frames to write: n_segment_shifted in place, else all
  int32_t frames_per_block;  // all of `frames`, or some
  int32_t max_offset;        // largest |offset|: how far from the frames of a block its sources lie
  int32_t n_segment_shifted;
  Padding padding;
  int32_t n_groups;
  int32_t group_end[kMaxGroups];  // in bytes of inner_bytes; the last one is inner_bytes
  int32_t group_offset[kMaxGroups];
};

// Declarations for host code. Without nvcc it is compiled against these alone.
struct Gather;
template <class Element>
struct GatherAdjoint;
template <class Vec, class ShiftOp>
__global__ void shift_tile(const __grid_constant__ ShiftArgs a);
template <class Vec, class ShiftOp>
__global__ void shift_stream(const __grid_constant__ ShiftArgs a);

#if !defined(TSM_JIT_NVRTC)

// The column of one thread.
template <class Vec>
struct Column {
  const char* src;  // frame 0
  char* dst;
  int64_t src_frame, dst_frame;  // distances in bytes from frame to frame
  int32_t group;                 // the group of the first byte
  int32_t offset;                // of this group
  int32_t group_end;             // end of this group, in bytes from the first byte of the Vec
  __device__ Vec operator[](int32_t t) const { return *reinterpret_cast<const Vec*>(src + t * src_frame); }
  __device__ void store(int32_t t, Vec value) const { *reinterpret_cast<Vec*>(dst + t * dst_frame) = value; }
};

// Finds the column of this thread. Returns false beyond the end of the frame. Block z = 0 takes the last clip: the
// kernel before wrote that clip last, so it may still be in L2.
template <class Vec>
__device__ bool find_column(const ShiftArgs& a, Column<Vec>& column) {
  const uint32_t byte = (blockIdx.x * blockDim.x + threadIdx.x) * sizeof(Vec);
  if (byte >= a.frame_bytes) return false;
  const uint32_t outer = a.frame_bytes == a.inner_bytes ? 0 : byte / a.inner_bytes;
  const int32_t begin = byte - outer * a.inner_bytes;
  column.group = 0;
  column.offset = a.group_offset[0];
  column.group_end = a.group_end[0] - begin;
  for (int g = 1; g < a.n_groups; ++g) {  // no early exit: the slowest thread of the warp decides anyway
    if (column.group_end > 0) continue;
    column.group = g;
    column.offset = a.group_offset[g];
    column.group_end = a.group_end[g] - begin;
  }
  const uint32_t clip = gridDim.z - 1 - blockIdx.z;
  column.src = a.src + clip * a.src_strides.clip + outer * a.src_strides.outer + begin;
  column.dst = a.dst + clip * a.dst_strides.clip + outer * a.dst_strides.outer + begin;
  column.src_frame = a.src_strides.frame;
  column.dst_frame = a.dst_strides.frame;
  return true;
}

// Returns bytes [0, begin) of `low` followed by bytes [begin, sizeof(Vec)) of `high`.
template <class Vec>
__device__ Vec merge_bytes(Vec low, Vec high, int32_t begin) {
  constexpr int kWords = (sizeof(Vec) + 3) / 4;
  uint32_t l[kWords] = {}, h[kWords] = {};
  memcpy(l, &low, sizeof low);
  memcpy(h, &high, sizeof high);
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t low_bytes = begin - 4 * w;  // of this word
    const uint32_t mask = low_bytes <= 0 ? 0 : low_bytes >= 4 ? ~0u : (1u << 8 * low_bytes) - 1;
    l[w] = (l[w] & mask) | (h[w] & ~mask);
  }
  memcpy(&low, l, sizeof low);
  return low;
}

// The frames whose sum is out[t]: frame `first` (0 if it is kNoFrame) and the frames `others`.
struct SourceFrames {
  int32_t first;
  FrameRange others;

  // Is out[t] = in[t]?
  __device__ bool are_only(int32_t t) const { return first == t && others.begin >= others.end; }
};

// out[t] = in[t + offset], or padding.
struct Gather {
  static constexpr int32_t kSign = 1;  // a frame that moves comes from t + kSign * offset

  static __device__ SourceFrames sources(const ShiftArgs& a, int32_t t, int32_t offset) {
    return {t < a.n_segment_shifted ? source_frame(t, offset, a.n_segment_shifted, a.padding) : t, {0, 0}};
  }
  // Do the frames [first, last) of `out` read frame t as padding? May return true for too many frames.
  static __device__ bool is_padding_source(const ShiftArgs& a, int32_t t, int32_t offset, int32_t first, int32_t last) {
    const int32_t edge = offset > 0 ? a.n_segment_shifted - 1 : 0;
    return a.padding == Padding::circular || (a.padding == Padding::replicate && t == edge) ||
           (first <= t && t < last && sources(a, t, offset).are_only(t));
  }
  template <class Vec, class Frames>
  static __device__ Vec evaluate(const Frames& frames, SourceFrames from) {
    return from.first == kNoFrame ? Vec{} : frames[from.first];
  }
};

// The adjoint of Gather under `keep` and `replicate`: grad_in[s] is the sum of grad[t] over all t that read s. The sum
// is rounded once. A sum of one term is copied, which keeps bits that an addition might change (-0, NaN).
template <class Element>
struct GatherAdjoint {
  static constexpr int32_t kSign = -1;

  static __device__ SourceFrames sources(const ShiftArgs& a, int32_t t, int32_t offset) {
    if (t >= a.n_segment_shifted) return {t, {0, 0}};
    const FrameRange padded = padded_from(t, offset, a.n_segment_shifted, a.padding);
    const int32_t moved = t - offset;
    if (0 <= moved && moved < a.n_segment_shifted) return {moved, padded};
    if (padded.begin == padded.end) return {kNoFrame, padded};
    return {padded.begin, {padded.begin + 1, padded.end}};
  }
  static __device__ bool is_padding_source(const ShiftArgs& a, int32_t t, int32_t offset, int32_t first, int32_t last) {
    const int32_t source = Gather::sources(a, t, offset).first;
    return first <= source && source < last;
  }
  template <class Vec, class Frames>
  static __device__ Vec evaluate(const Frames& frames, SourceFrames from) {
    using storage_t = typename Element::storage_t;
    constexpr int kLanes = sizeof(Vec) / sizeof(storage_t);
    Vec result = Gather::evaluate<Vec>(frames, from);
    if (from.others.begin >= from.others.end) return result;
    storage_t lanes[kLanes];
    typename Element::acc_t sum[kLanes];
    memcpy(lanes, &result, sizeof result);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) sum[k] = Element::to_acc(lanes[k]);
#pragma unroll 1
    for (int32_t other = from.others.begin; other < from.others.end; ++other) {
      const Vec term = frames[other];
      memcpy(lanes, &term, sizeof term);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) sum[k] += Element::to_acc(lanes[k]);
    }
#pragma unroll
    for (int k = 0; k < kLanes; ++k) lanes[k] = Element::from_acc(sum[k]);
    memcpy(&result, lanes, sizeof result);
    return result;
  }
};

// Starts an asynchronous copy from global to shared memory. wait_for_copies waits for all copies of this thread.
template <class Vec>
__device__ void start_copy(Vec* shared, const char* from) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (sizeof(Vec) == 16) {  // .cg bypasses L1, as nothing is read twice
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    return;
  } else if constexpr (sizeof(Vec) >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(sizeof(Vec)) : "memory");
    return;
  }
#endif
  *shared = *reinterpret_cast<const Vec*>(from);
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The frames of one column in shared memory, from `first_frame` on. Neighbouring threads have neighbouring columns.
template <class Vec>
struct SharedColumn {
  Vec* first;
  int32_t first_frame;

  __device__ Vec& operator[](int32_t t) const { return first[(t - first_frame) * blockDim.x]; }
};

// Replaces those bytes of `value`, out[t] of the column's group, that belong to the groups after it. After the last
// group comes the first one of the next outer index.
template <class ShiftOp, class Vec>
__device__ Vec merge_groups(const ShiftArgs& a, const Column<Vec>& column, const SharedColumn<Vec>& frames, int32_t t,
                            Vec value) {
  for (int32_t end = column.group_end, group = column.group; end < static_cast<int32_t>(sizeof(Vec));) {
    if (++group == a.n_groups) group = 0;
    const SourceFrames from = ShiftOp::sources(a, t, a.group_offset[group]);
    value = merge_bytes(value, ShiftOp::template evaluate<Vec>(frames, from), end);
    end += a.group_end[group] - (group == 0 ? 0 : a.group_end[group - 1]);
  }
  return value;
}

// Grid: x covers frame_bytes, y the frames by frames_per_block, z the clips. Shared memory: for each column of the
// block its frames and max_offset more on both sides. A Vec may span groups and, if outer indices follow each other
// without a gap, outer indices.
template <class Vec, class ShiftOp>
__global__ void __launch_bounds__(kThreads) shift_tile(const __grid_constant__ ShiftArgs a) {
  extern __shared__ uint4 shared[];
  Column<Vec> column;
  if (!find_column(a, column)) return;  // the barrier does not wait for threads that have ended
  const int32_t offset = column.offset, n = a.n_segment_shifted;
  const bool in_place = a.src == a.dst, is_one_group = column.group_end >= static_cast<int32_t>(sizeof(Vec));
  if (in_place && is_one_group && offset == 0) return;
  const int32_t first = blockIdx.y * a.frames_per_block, last = min(first + a.frames_per_block, a.frames);
  const int32_t lowest = max(first - a.max_offset, 0), highest = min(last + a.max_offset, a.frames);
  const SharedColumn<Vec> frames{reinterpret_cast<Vec*>(shared) + threadIdx.x, lowest};

  // Load the frames of `in` that the block reads: those that move into [first, last), and padding.
  const FrameRange moving{max(first + ShiftOp::kSign * offset, 0), min(min(last, n) + ShiftOp::kSign * offset, n)};
  const bool padding_reads = a.padding == Padding::keep ? !in_place || ShiftOp::kSign < 0 : a.padding != Padding::zeros;
  const bool others_are_read = padding_reads || a.frames > n;
  const int64_t src_step = blockDim.y * column.src_frame, dst_step = blockDim.y * column.dst_frame;
  int32_t t = lowest + threadIdx.y;
  const char* src = column.src + t * column.src_frame;
  for (; t < highest; t += blockDim.y, src += src_step) {
    const bool moves = moving.begin <= t && t < moving.end;
    if (moves || !is_one_group || (others_are_read && ShiftOp::is_padding_source(a, t, offset, first, last))) {
      start_copy(&frames[t], src);
    }
  }
  wait_for_copies();
  __syncthreads();

  // Store the frames of `out`.
  t = first + threadIdx.y;
  char* dst = column.dst + t * column.dst_frame;
  for (; t < last; t += blockDim.y, dst += dst_step) {
    const SourceFrames from = ShiftOp::sources(a, t, offset);
    if (in_place && is_one_group && from.are_only(t)) continue;
    Vec value = ShiftOp::template evaluate<Vec>(frames, from);
    value = merge_groups<ShiftOp>(a, column, frames, t, value);
    *reinterpret_cast<Vec*>(dst) = value;
  }
}

// Rotates the frames of a column in place. A rotation is a set of gcd(n, offset) cycles t -> t + offset.
template <class Vec>
__device__ void rotate_in_place(const Column<Vec>& column, int32_t n, int32_t offset) {
  int32_t cycles = n, rest = offset > 0 ? offset : -offset;
  while (rest != 0) {  // Euclid's algorithm
    const int32_t next = cycles % rest;
    cycles = rest;
    rest = next;
  }
#pragma unroll 1
  for (int32_t start = 0; start < cycles; ++start) {
    const Vec first = column[start];
    int32_t t = start;
#pragma unroll 1
    for (int32_t from; (from = source_frame(t, offset, n, Padding::circular)) != start; t = from) {
      column.store(t, column[from]);
    }
    column.store(t, first);
  }
}

// Grid: x covers frame_bytes, y shares the frames (1 block in place), z the clips. Every Vec belongs to one group.
// Loops are not unrolled: a store might change the next value to load, so loads could not overlap anyway.
template <class Vec, class ShiftOp>
__global__ void __launch_bounds__(kThreads) shift_stream(const __grid_constant__ ShiftArgs a) {
  Column<Vec> column;
  if (!find_column(a, column)) return;
  const bool in_place = a.src == a.dst;
  if (in_place && column.offset == 0) return;
  if constexpr (ShiftOp::kSign > 0) {  // GatherAdjoint is for the paddings that add, and circular does not
    if (in_place && a.padding == Padding::circular) {
      rotate_in_place(column, a.n_segment_shifted, column.offset);
      return;
    }
  }
  const bool backward_in_time = in_place && ShiftOp::kSign * column.offset < 0;
#pragma unroll 1
  for (int32_t i = blockIdx.y; i < a.frames; i += gridDim.y) {
    const int32_t t = backward_in_time ? a.frames - 1 - i : i;
    const SourceFrames from = ShiftOp::sources(a, t, column.offset);
    if (!in_place || !from.are_only(t)) column.store(t, ShiftOp::template evaluate<Vec>(column, from));
  }
}

#endif

}  // namespace tsm_jit
