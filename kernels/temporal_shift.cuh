// Temporal shift on CUDA: the kernels and their index arithmetic. Raw pointers, no torch headers.
//
// A thread owns a column: one unit (1 to 16 bytes) of one clip, through its frames. Neighbouring threads own
// neighbouring units and visit the frames in step, so every access is whole sectors of memory, whatever the offsets of
// the groups that a warp spans. Three ways to walk a column:
//
//     shift_out_of_place   a thread fills four frames of its column straight from their sources
//     shift_column         the column is read into shared memory, then written: in place, since all of it is read
//                          before anything is written, and for sums, which read a frame more than once
//     shift_stream         columns too long for shared memory, in place or summed: a few frames at a time, in the
//                          order in which every frame is read before it is overwritten
//
// All index arithmetic within a clip is 32-bit (a launch covers at most 2^31 columns); a division runs per block, and
// per thread only where a frame has several rows (channels_last).
#pragma once

#include "element.h"
#include "temporal_shift.h"

namespace tsm_jit {

constexpr int kThreads = 256;
constexpr int kFramesInFlight = 4;
constexpr int kMaxGroups = 32;

struct Args {
  const char* src;
  char* dst;
  Strides src_strides, dst_strides;
  uint32_t columns;  // of one clip: outer * run, in units
  uint32_t run;      // in units
  uint32_t tiles;    // blocks that cover the columns
  int32_t frames, n_segment_shifted;
  Padding padding;
  uint32_t group_end[kMaxGroups];  // in units; the last is `run`
  int32_t group_offset[kMaxGroups];
};

// The column of one thread.
template <class Unit>
struct Column {
  const char* src;  // at frame 0
  char* dst;
  int64_t src_frame, dst_frame;
  int32_t offset;

  __device__ Unit operator[](int32_t t) const { return *reinterpret_cast<const Unit*>(src + t * src_frame); }
  __device__ void set(int32_t t, Unit value) const { *reinterpret_cast<Unit*>(dst + t * dst_frame) = value; }
};

// The column of this thread in a block that is `tile` of `clip`; false beyond the last one.
template <class Unit>
__device__ bool find_column(const Args& a, uint32_t tile, uint32_t clip, Column<Unit>& column) {
  const uint32_t i = tile * blockDim.x + threadIdx.x;
  if (i >= a.columns) return false;
  const uint32_t row = a.columns == a.run ? 0 : i / a.run;
  const uint32_t unit = i - row * a.run;
  int group = 0;
  while (unit >= a.group_end[group]) ++group;
  const int64_t byte = static_cast<int64_t>(unit) * sizeof(Unit);
  column.src = a.src + clip * a.src_strides.clip + row * a.src_strides.outer + byte;
  column.dst = a.dst + clip * a.dst_strides.clip + row * a.dst_strides.outer + byte;
  column.src_frame = a.src_strides.frame;
  column.dst_frame = a.dst_strides.frame;
  column.offset = a.group_offset[group];
  return true;
}

// What out[t] becomes, for t < n_segment_shifted; `frames[t]` gives the values before the shift.
//
// Move: the value of its source frame.
struct Move {
  static constexpr int kBatch = kFramesInFlight;
  template <class Unit, class Frames>
  static __device__ Unit value(const Args& a, const Frames& frames, int32_t t, int32_t offset) {
    const int32_t from = source_frame(t, offset, a.n_segment_shifted, a.padding);
    return from == kNoFrame ? Unit{} : frames[from];
  }
  static __device__ bool changes(const Args& a, int32_t t, int32_t offset) {
    return source_frame(t, offset, a.n_segment_shifted, a.padding) != t;
  }
  static __device__ bool walks_back(int32_t offset) { return offset < 0; }
};

// Add: the adjoint of Move under `keep` and `replicate`, the sum of every frame that read t, rounded once. A single one
// is moved, which keeps bits that an addition might not.
template <class Element>
struct Add {
  static constexpr int kBatch = 1;  // its code is long
  template <class Unit, class Frames>
  static __device__ Unit value(const Args& a, const Frames& frames, int32_t t, int32_t offset) {
    using Stored = typename Element::Stored;
    constexpr int kLanes = sizeof(Unit) / sizeof(Stored);
    const int32_t moved = t - offset;
    const bool has_moved = 0 <= moved && moved < a.n_segment_shifted;
    FrameRange readers = padding_readers(t, offset, a.n_segment_shifted, a.padding);
    if (!has_moved && readers.begin == readers.end) return Unit{};
    Unit sum = frames[has_moved ? moved : readers.begin++];
    if (readers.begin == readers.end) return sum;
    Stored lane[kLanes];
    typename Element::Wide wide[kLanes];
    memcpy(lane, &sum, sizeof sum);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) wide[k] = Element::widen(lane[k]);
#pragma unroll 1
    for (int32_t r = readers.begin; r < readers.end; ++r) {
      const Unit term = frames[r];
      memcpy(lane, &term, sizeof term);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) wide[k] += Element::widen(lane[k]);
    }
#pragma unroll
    for (int k = 0; k < kLanes; ++k) lane[k] = Element::narrow(wide[k]);
    memcpy(&sum, lane, sizeof sum);
    return sum;
  }
  static __device__ bool changes(const Args&, int32_t, int32_t offset) { return offset != 0; }
  static __device__ bool walks_back(int32_t offset) { return offset > 0; }
};

// Grid: tiles x groups of four frames x clips, in one dimension.
template <class Unit>
__global__ void __launch_bounds__(kThreads) shift_out_of_place(const __grid_constant__ Args a) {
  const uint32_t fours = (a.frames + kFramesInFlight - 1) / kFramesInFlight;
  const uint32_t slice = blockIdx.x / a.tiles, tile = blockIdx.x - slice * a.tiles;
  const uint32_t clip = slice / fours;
  const int32_t first = (slice - clip * fours) * kFramesInFlight;
  Column<Unit> column;
  if (!find_column(a, tile, clip, column)) return;
  Unit value[kFramesInFlight];
#pragma unroll
  for (int k = 0; k < kFramesInFlight; ++k) {
    const int32_t t = first + k;
    if (t < a.n_segment_shifted) {
      value[k] = Move::value<Unit>(a, column, t, column.offset);
    } else if (t < a.frames) {
      value[k] = column[t];
    }
  }
#pragma unroll
  for (int k = 0; k < kFramesInFlight; ++k) {
    if (first + k < a.frames) column.set(first + k, value[k]);
  }
}

// Grid: tiles x clips. Shared memory: n_segment_shifted units per thread, which no other thread looks at.
template <class Unit, class Value>
__global__ void __launch_bounds__(kThreads) shift_column(const __grid_constant__ Args a) {
  constexpr int kBatch = 2 * kFramesInFlight;
  extern __shared__ uint4 shared[];
  struct {
    Unit* frames;
    __device__ Unit& operator[](int32_t t) const { return frames[t * blockDim.x]; }
  } before{reinterpret_cast<Unit*>(shared) + threadIdx.x};
  const uint32_t clip = blockIdx.x / a.tiles;
  const bool in_place = a.src == a.dst;
  Column<Unit> column;
  if (!find_column(a, blockIdx.x - clip * a.tiles, clip, column) || (in_place && column.offset == 0)) return;

  const int32_t n = a.n_segment_shifted;
  for (int32_t first = 0; first < n; first += kBatch) {
    Unit value[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k < n) value[k] = column[first + k];
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k < n) before[first + k] = value[k];
    }
  }
  for (int32_t t = 0; t < n; ++t) {
    if (!in_place || Value::changes(a, t, column.offset)) {
      column.set(t, Value::template value<Unit>(a, before, t, column.offset));
    }
  }
  for (int32_t t = n; t < a.frames && !in_place; ++t) column.set(t, column[t]);
}

// Grid: tiles x clips.
template <class Unit, class Value>
__global__ void __launch_bounds__(kThreads) shift_stream(const __grid_constant__ Args a) {
  const uint32_t clip = blockIdx.x / a.tiles;
  const bool in_place = a.src == a.dst;
  Column<Unit> column;
  if (!find_column(a, blockIdx.x - clip * a.tiles, clip, column) || (in_place && column.offset == 0)) return;
  const int32_t n = a.n_segment_shifted;

  if (in_place && a.padding == Padding::circular) {
    // A rotation is a set of cycles t -> t + offset; their number is gcd(offset, n).
    int32_t cycles = n, rest = column.offset > 0 ? column.offset : -column.offset;
    while (rest != 0) {
      const int32_t next = cycles % rest;
      cycles = rest;
      rest = next;
    }
    for (int32_t start = 0; start < cycles; ++start) {
      const Unit first = column[start];
      int32_t t = start;
      for (int32_t from; (from = source_frame(t, column.offset, n, a.padding)) != start; t = from) {
        column.set(t, column[from]);
      }
      column.set(t, first);
    }
    return;
  }
  const bool back = Value::walks_back(column.offset);
  for (int32_t i = 0; i < n; i += Value::kBatch) {
    Unit value[Value::kBatch];
#pragma unroll
    for (int k = 0; k < Value::kBatch; ++k) {
      if (i + k < n) value[k] = Value::template value<Unit>(a, column, back ? n - 1 - i - k : i + k, column.offset);
    }
#pragma unroll
    for (int k = 0; k < Value::kBatch; ++k) {
      if (i + k < n) column.set(back ? n - 1 - i - k : i + k, value[k]);
    }
  }
  for (int32_t t = n; t < a.frames && !in_place; ++t) column.set(t, column[t]);
}

}  // namespace tsm_jit
