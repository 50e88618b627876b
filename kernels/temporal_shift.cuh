// Temporal shift on CUDA: the kernels and their index arithmetic. Raw pointers, no torch headers.
//
// A column is one unit (1 to 16 bytes) of one clip, through its frames. Two kernels:
//
//     shift_tile     a block takes neighbouring columns and some frames, in place all of them: it brings what these
//                    frames become into shared memory, then writes them. So each byte is read once and written once,
//                    in place nothing is written before all is read, and threads visit the frames in step: every access
//                    is whole lines of memory, whatever the offsets of the groups that a warp spans.
//     shift_stream   where shared memory has no room for that: a thread walks a column of its own, in place in the
//                    order in which every frame is read before it is overwritten
//
// All index arithmetic within a frame is 32-bit; the one division, per thread, is where a frame has several rows
// (channels_last).
#pragma once

#include "element.h"
#include "launch.h"
#include "temporal_shift.h"

namespace tsm_jit {

constexpr int kThreads = 128;
constexpr int kMaxGroups = 32;
constexpr int64_t kMaxBytes = int64_t{1} << 30;  // of a frame, that one launch covers

struct Args {
  const char* src;
  char* dst;
  Strides src_strides, dst_strides;
  int32_t bytes;            // of one frame: outer * run
  int32_t run;              // in bytes
  int32_t frames;           // to write: in place those that take part, else all
  int32_t frames_of_block;  // all, or some of them
  int32_t reach;            // how far from these the frames lie that they need
  int32_t n_segment_shifted;
  Padding padding;
  int32_t n_groups;
  int32_t group_end[kMaxGroups];  // in bytes of the run; the last is `run`
  int32_t group_offset[kMaxGroups];
  // Of what is kept in place: the distances of clips, rows and, of each group, frames; where each begins.
  char* unread;
  bool come_back;
  int64_t unread_clip, unread_row;
  int64_t unread_frame[kMaxGroups], unread_begin[kMaxGroups];
};

// The kernels; host code that is compiled without nvcc sees no more of them.
struct Move;
template <class Element>
struct Add;
template <class Unit, class Value>
__global__ void shift_tile(const __grid_constant__ Args a);
template <class Unit, class Value>
__global__ void shift_stream(const __grid_constant__ Args a);

#if !defined(TSM_JIT_NVRTC)

// The column of one thread.
template <class Unit>
struct Column {
  const char* src;  // at frame 0
  char* dst;
  int64_t src_frame, dst_frame;
  int32_t group;   // that holds the first byte
  int32_t offset;  // of this group
  int32_t end;     // of this group, in bytes of the unit
  char* unread;    // null if nothing is kept
  int64_t unread_frame;
  FrameRange kept{0, 0};  // the frames there

  __device__ bool keeps(int32_t t) const { return unread != nullptr && kept.begin <= t && t < kept.end; }
  __device__ Unit& aside(int32_t t) const { return *reinterpret_cast<Unit*>(unread + (t - kept.begin) * unread_frame); }
  __device__ Unit operator[](int32_t t) const { return *reinterpret_cast<const Unit*>(src + t * src_frame); }
  __device__ void set(int32_t t, Unit value) const { *reinterpret_cast<Unit*>(dst + t * dst_frame) = value; }
};

// The column of this thread in a block that is tile x of clip z from the end; false beyond the last one. From the end,
// as what came before wrote the last clip last, and that may still be in L2.
template <class Unit>
__device__ bool find_column(const Args& a, Column<Unit>& column) {
  const uint32_t byte = (blockIdx.x * blockDim.x + threadIdx.x) * sizeof(Unit);
  if (byte >= a.bytes) return false;
  const uint32_t row = a.bytes == a.run ? 0 : byte / a.run;
  const int32_t begin = byte - row * a.run;
  column.group = 0;
  column.offset = a.group_offset[0];
  column.end = a.group_end[0] - begin;
  for (int g = 1; g < a.n_groups; ++g) {  // all of them: as fast as the last thread of a warp, which decides
    if (column.end > 0) continue;
    column.group = g;
    column.offset = a.group_offset[g];
    column.end = a.group_end[g] - begin;
  }
  const uint32_t clip = gridDim.z - 1 - blockIdx.z;
  column.src = a.src + clip * a.src_strides.clip + row * a.src_strides.outer + begin;
  column.dst = a.dst + clip * a.dst_strides.clip + row * a.dst_strides.outer + begin;
  column.src_frame = a.src_strides.frame;
  column.dst_frame = a.dst_strides.frame;
  column.unread = a.unread;
  if (a.unread != nullptr) {
    column.unread += clip * a.unread_clip + row * a.unread_row + a.unread_begin[column.group] + begin;
    column.unread_frame = a.unread_frame[column.group];
    column.kept = unread_frames(a.come_back ? -column.offset : column.offset, a.n_segment_shifted);
  }
  return true;
}

// `low`, its bytes from `begin` on replaced by those of `high`.
template <class Unit>
__device__ Unit join(Unit low, Unit high, int32_t begin) {
  constexpr int kWords = (sizeof(Unit) + 3) / 4;
  uint32_t l[kWords] = {}, h[kWords] = {};
  memcpy(l, &low, sizeof low);
  memcpy(h, &high, sizeof high);
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t kept = begin - 4 * w;  // bytes of this word
    const uint32_t mask = kept <= 0 ? 0 : kept >= 4 ? ~0u : (1u << 8 * kept) - 1;
    l[w] = (l[w] & mask) | (h[w] & ~mask);
  }
  memcpy(&low, l, sizeof low);
  return low;
}

// What becomes out[t]: the sum of the frames `first`, unless it is kNoFrame, and `others`.
struct Terms {
  int32_t first;
  FrameRange others;

  __device__ bool are_only(int32_t t) const { return first == t && others.begin >= others.end; }
};

// Move: the value of the source frame.
struct Move {
  // out[t] = in[t + kSign * offset], but for padding.
  static constexpr int32_t kSign = 1;

  static __device__ Terms terms(const Args& a, int32_t t, int32_t offset) {
    return {t < a.n_segment_shifted ? source_frame(t, offset, a.n_segment_shifted, a.padding) : t, {0, 0}};
  }
  // Beside the frames that move, is t read as padding of the frames [first, last)?
  static __device__ bool pads(const Args& a, int32_t t, int32_t offset, int32_t first, int32_t last) {
    const int32_t edge = offset > 0 ? a.n_segment_shifted - 1 : 0;
    return a.padding == Padding::circular || (a.padding == Padding::replicate && t == edge) ||
           (first <= t && t < last && terms(a, t, offset).are_only(t));
  }
  template <class Unit, class Frames>
  static __device__ Unit sum(const Frames& frames, Terms of) {
    return of.first == kNoFrame ? Unit{} : frames[of.first];
  }
};

// Add: the adjoint of Move under `keep` and `replicate`, the sum of every frame that read t, rounded once. A single one
// is moved, which keeps bits that an addition might not.
template <class Element>
struct Add {
  static constexpr int32_t kSign = -1;

  static __device__ Terms terms(const Args& a, int32_t t, int32_t offset) {
    if (t >= a.n_segment_shifted) return {t, {0, 0}};
    const FrameRange readers = padding_readers(t, offset, a.n_segment_shifted, a.padding);
    const int32_t moved = t - offset;
    if (0 <= moved && moved < a.n_segment_shifted) return {moved, readers};
    if (readers.begin == readers.end) return {kNoFrame, readers};
    return {readers.begin, {readers.begin + 1, readers.end}};
  }
  static __device__ bool pads(const Args& a, int32_t t, int32_t offset, int32_t first, int32_t last) {
    const int32_t read = Move::terms(a, t, offset).first;
    return first <= read && read < last;
  }
  template <class Unit, class Frames>
  static __device__ Unit sum(const Frames& frames, Terms of) {
    using Stored = typename Element::Stored;
    constexpr int kLanes = sizeof(Unit) / sizeof(Stored);
    Unit sum = Move::sum<Unit>(frames, of);
    if (of.others.begin >= of.others.end) return sum;
    Stored lane[kLanes];
    typename Element::Wide wide[kLanes];
    memcpy(lane, &sum, sizeof sum);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) wide[k] = Element::widen(lane[k]);
#pragma unroll 1
    for (int32_t other = of.others.begin; other < of.others.end; ++other) {
      const Unit term = frames[other];
      memcpy(lane, &term, sizeof term);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) wide[k] += Element::widen(lane[k]);
    }
#pragma unroll
    for (int k = 0; k < kLanes; ++k) lane[k] = Element::narrow(wide[k]);
    memcpy(&sum, lane, sizeof sum);
    return sum;
  }
};

// A copy to shared memory that no register waits for; `wait_for_copies` waits for all that this thread started.
template <class Unit>
__device__ void start_copy(Unit* shared, const char* from) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (sizeof(Unit) == 16) {  // past L1: nothing is read twice
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    return;
  } else if constexpr (sizeof(Unit) >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(sizeof(Unit)) : "memory");
    return;
  }
#endif
  *shared = *reinterpret_cast<const Unit*>(from);
}

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Block: columns x some threads that share their frames. Grid: blocks that cover the bytes of a frame x those that
// cover the frames x clips. Shared memory: the block's frames, and those within reach, of its columns. A unit may hold
// the end of a group and, where rows follow each other without a gap, of a row.
template <class Unit, class Value>
__global__ void __launch_bounds__(kThreads) shift_tile(const __grid_constant__ Args a) {
  extern __shared__ uint4 shared[];
  Column<Unit> column;
  if (!find_column(a, column)) return;  // no barrier waits for a thread that is gone
  const int32_t offset = column.offset, n = a.n_segment_shifted;
  const bool in_place = a.src == a.dst, one_group = column.end >= static_cast<int32_t>(sizeof(Unit));
  if (in_place && one_group && offset == 0) return;
  const int32_t first = blockIdx.y * a.frames_of_block, last = min(first + a.frames_of_block, a.frames);
  const int32_t lowest = max(first - a.reach, 0), highest = min(last + a.reach, a.frames);
  struct {
    Unit* lowest;
    int32_t t;
    __device__ Unit& operator[](int32_t at) const { return lowest[(at - t) * blockDim.x]; }
  } const before{reinterpret_cast<Unit*>(shared) + threadIdx.x, lowest};

  // Which frames the column needs: those that move, and perhaps others.
  const int32_t begin = max(first + Value::kSign * offset, 0), end = min(min(last, n) + Value::kSign * offset, n);
  const bool pads = a.padding == Padding::keep ? !in_place || Value::kSign < 0 : a.padding != Padding::zeros;
  const bool others = pads || a.frames > n;
  const int64_t src_step = blockDim.y * column.src_frame, dst_step = blockDim.y * column.dst_frame;
  int32_t t = lowest + threadIdx.y;
  const char* src = column.src + t * column.src_frame;
  for (; t < highest; t += blockDim.y, src += src_step) {
    const bool moves = begin <= t && t < end;
    const bool is_kept = !a.come_back && column.keeps(t);
    if (moves || is_kept || !one_group || (others && Value::pads(a, t, offset, first, last))) {
      start_copy(&before[t], src);
    }
  }
  wait_for_copies();
  __syncthreads();
  t = first + threadIdx.y;
  char* dst = column.dst + t * column.dst_frame;
  for (; t < last; t += blockDim.y, dst += dst_step) {
    if (column.keeps(t)) {
      if (a.come_back) *reinterpret_cast<Unit*>(dst) = column.aside(t);
      if (a.come_back) continue;
      column.aside(t) = before[t];
    }
    const Terms terms = Value::terms(a, t, offset);
    if (in_place && one_group && terms.are_only(t)) continue;
    Unit value = Value::template sum<Unit>(before, terms);
    for (int32_t end = column.end, group = column.group; end < static_cast<int32_t>(sizeof(Unit));) {
      if (++group == a.n_groups) group = 0;
      value = join(value, Value::template sum<Unit>(before, Value::terms(a, t, a.group_offset[group])), end);
      end += a.group_end[group] - (group == 0 ? 0 : a.group_end[group - 1]);
    }
    *reinterpret_cast<Unit*>(dst) = value;
  }
}

// Grid: blocks that cover the bytes of a frame x any number that share the frames, in place one x clips. Every unit
// belongs to one group. Loops are not unrolled: a write might change what is read next, so nothing would overlap.
template <class Unit, class Value>
__global__ void __launch_bounds__(kThreads) shift_stream(const __grid_constant__ Args a) {
  Column<Unit> column;
  if (!find_column(a, column)) return;
  const int32_t n = a.n_segment_shifted, offset = column.offset;
  const bool in_place = a.src == a.dst;
  if (in_place && offset == 0) return;
  if constexpr (Value::kSign > 0) {  // sums have other paddings
    if (in_place && a.padding == Padding::circular) {
      // A rotation is a set of cycles t -> t + offset; their number is gcd(offset, n).
      int32_t cycles = n, rest = offset > 0 ? offset : -offset;
      while (rest != 0) {
        const int32_t next = cycles % rest;
        cycles = rest;
        rest = next;
      }
#pragma unroll 1
      for (int32_t start = 0; start < cycles; ++start) {
        const Unit first = column[start];
        int32_t t = start;
#pragma unroll 1
        for (int32_t from; (from = source_frame(t, offset, n, a.padding)) != start; t = from) {
          column.set(t, column[from]);
        }
        column.set(t, first);
      }
      return;
    }
  }
#pragma unroll 1
  for (int32_t t = column.kept.begin; column.keeps(t) && !a.come_back; ++t) column.aside(t) = column[t];
  const bool back = in_place && Value::kSign * offset < 0;
#pragma unroll 1
  for (int32_t done = blockIdx.y; done < a.frames; done += gridDim.y) {
    const int32_t t = back ? a.frames - 1 - done : done;
    const Terms terms = Value::terms(a, t, offset);
    if (!in_place || !terms.are_only(t)) column.set(t, Value::template sum<Unit>(column, terms));
  }
#pragma unroll 1
  for (int32_t t = column.kept.begin; column.keeps(t) && a.come_back; ++t) column.set(t, column.aside(t));
}

#endif

}  // namespace tsm_jit
