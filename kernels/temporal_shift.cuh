// Temporal shift on CUDA: the kernels and their index arithmetic. Raw pointers, no torch headers.
//
// A thread owns a column: one unit (1 to 16 bytes) of one clip, through its frames. Neighbouring threads own
// neighbouring units, so every frame is read and written in whole cache lines. Three ways to walk a column:
//
//     shift_out_of_place   a thread fills four frames of its column; nothing orders the threads
//     shift_column         in place, up to 32 frames: the whole column goes through registers, all loads before any
//                          store, so the direction of a group does not matter and no warp waits for itself
//     shift_stream         in place, any number of frames: four frames at a time, in the order in which every frame is
//                          read before it is overwritten
//
// Each byte is touched once, hence the streaming loads and stores: they leave the L2 to whoever comes next.
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

struct Column {
  const char* src;  // at frame 0
  char* dst;
  int32_t offset;
};

// The column of this thread, for the slice of the grid that belongs to `clip`; false beyond the last one.
template <class Unit>
__device__ bool find_column(const Args& a, uint32_t tile, uint32_t clip, Column& column) {
  const uint32_t i = tile * kThreads + threadIdx.x;
  if (i >= a.columns) return false;
  const uint32_t row = a.columns == a.run ? 0 : i / a.run;
  const uint32_t unit = i - row * a.run;
  int group = 0;
  while (unit >= a.group_end[group]) ++group;
  const int64_t byte = static_cast<int64_t>(unit) * sizeof(Unit);
  column.src = a.src + clip * a.src_strides.clip + row * a.src_strides.outer + byte;
  column.dst = a.dst + clip * a.dst_strides.clip + row * a.dst_strides.outer + byte;
  column.offset = a.group_offset[group];
  return true;
}

template <class Unit>
__device__ Unit load(const Args& a, const Column& c, int32_t t) {
  return __ldcs(reinterpret_cast<const Unit*>(c.src + t * a.src_strides.frame));
}

template <class Unit>
__device__ void store(const Args& a, const Column& c, int32_t t, Unit value) {
  __stcs(reinterpret_cast<Unit*>(c.dst + t * a.dst_strides.frame), value);
}

// What out[t] is. `Move`: the value of its source frame.
struct Move {
  template <class Unit>
  static __device__ Unit value(const Args& a, const Column& c, int32_t t) {
    if (t >= a.n_segment_shifted) return load<Unit>(a, c, t);
    const int32_t from = source_frame(t, c.offset, a.n_segment_shifted, a.padding);
    return from == kNoFrame ? Unit{} : load<Unit>(a, c, from);
  }
  static __device__ bool walks_back(int32_t offset) { return offset < 0; }
};

// The sum of `moved` (unless it is kNoFrame) and of the frames in `readers`, rounded once; a single one is moved, which
// keeps bits that an addition might not. Few frames need it, so it is not worth its code in every unrolled step.
template <class Unit, class Element>
__device__ __noinline__ Unit sum_frames(const Args& a, const Column& c, int32_t moved, FrameRange readers) {
  using Stored = typename Element::Stored;
  constexpr int kLanes = sizeof(Unit) / sizeof(Stored);
  int32_t next = readers.begin;
  Unit sum = load<Unit>(a, c, moved != kNoFrame ? moved : next++);
  if (next == readers.end) return sum;
  Stored lane[kLanes];
  typename Element::Wide wide[kLanes];
  memcpy(lane, &sum, sizeof sum);
#pragma unroll
  for (int k = 0; k < kLanes; ++k) wide[k] = Element::widen(lane[k]);
#pragma unroll 1
  for (; next < readers.end; ++next) {
    const Unit term = load<Unit>(a, c, next);
    memcpy(lane, &term, sizeof term);
#pragma unroll
    for (int k = 0; k < kLanes; ++k) wide[k] += Element::widen(lane[k]);
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) lane[k] = Element::narrow(wide[k]);
  memcpy(&sum, lane, sizeof sum);
  return sum;
}

// `Add`: the adjoint of Move under `keep` and `replicate`, the sum of every frame that read t.
template <class Element>
struct Add {
  template <class Unit>
  static __device__ Unit value(const Args& a, const Column& c, int32_t t) {
    if (t >= a.n_segment_shifted || c.offset == 0) return load<Unit>(a, c, t);
    int32_t moved = t - c.offset;
    if (moved < 0 || moved >= a.n_segment_shifted) moved = kNoFrame;
    const FrameRange readers = padding_readers(t, c.offset, a.n_segment_shifted, a.padding);
    if (readers.begin < readers.end) return sum_frames<Unit, Element>(a, c, moved, readers);
    return moved == kNoFrame ? Unit{} : load<Unit>(a, c, moved);
  }
  static __device__ bool walks_back(int32_t offset) { return offset > 0; }
};

// Four frames of a column, first, first + step, ...: all loads are in flight before the first store.
template <class Unit, class Value>
__device__ void fill_frames(const Args& a, const Column& c, int32_t first, int32_t step, int32_t n) {
  Unit value[kFramesInFlight];
#pragma unroll
  for (int k = 0; k < kFramesInFlight; ++k) {
    if (k < n) value[k] = Value::template value<Unit>(a, c, first + k * step);
  }
#pragma unroll
  for (int k = 0; k < kFramesInFlight; ++k) {
    if (k < n) store(a, c, first + k * step, value[k]);
  }
}

// Grid: tiles x groups of four frames x clips, in one dimension.
template <class Unit, class Value>
__global__ void __launch_bounds__(kThreads) shift_out_of_place(const __grid_constant__ Args a) {
  const uint32_t four = (a.frames + kFramesInFlight - 1) / kFramesInFlight;
  const uint32_t slice = blockIdx.x / a.tiles, tile = blockIdx.x - slice * a.tiles;
  const uint32_t clip = slice / four;
  const int32_t first = (slice - clip * four) * kFramesInFlight;
  Column c;
  if (find_column<Unit>(a, tile, clip, c)) fill_frames<Unit, Value>(a, c, first, 1, a.frames - first);
}

// Grid: tiles x clips. In place, so src and dst are one; frames past n_segment_shifted are not touched.
template <class Unit, int kMaxFrames>
__global__ void __launch_bounds__(kThreads) shift_column(const __grid_constant__ Args a) {
  const uint32_t clip = blockIdx.x / a.tiles;
  Column c;
  if (!find_column<Unit>(a, blockIdx.x - clip * a.tiles, clip, c) || c.offset == 0) return;
  const int32_t n = a.n_segment_shifted;
  const bool circular = a.padding == Padding::circular;

  Unit value[kMaxFrames];
#pragma unroll
  for (int t = 0; t < kMaxFrames; ++t) {
    if (t < n) value[t] = load<Unit>(a, c, t);
  }
  // The frames [begin, end) have no source: the last ones when the source lies ahead, the first when it lies behind.
  const int32_t begin = c.offset > 0 ? n - c.offset : 0, end = c.offset > 0 ? n : -c.offset;
  Unit padding{};
  if (a.padding == Padding::replicate) padding = load<Unit>(a, c, c.offset > 0 ? n - 1 : 0);

  // The index into registers must be known when compiling, so each value is sent to its target.
#pragma unroll
  for (int t = 0; t < kMaxFrames; ++t) {
    int32_t to = t - c.offset;
    if (circular) to += to < 0 ? n : (to >= n ? -n : 0);
    if (t < n && 0 <= to && to < n) store(a, c, to, value[t]);
  }
  if (a.padding == Padding::zeros || a.padding == Padding::replicate) {
    for (int32_t t = begin; t < end; ++t) store(a, c, t, padding);
  }
}

// Grid: tiles x clips. In place.
template <class Unit, class Value>
__global__ void __launch_bounds__(kThreads) shift_stream(const __grid_constant__ Args a) {
  const uint32_t clip = blockIdx.x / a.tiles;
  Column c;
  if (!find_column<Unit>(a, blockIdx.x - clip * a.tiles, clip, c) || c.offset == 0) return;
  const int32_t n = a.n_segment_shifted;

  if (a.padding == Padding::circular) {
    // A rotation is a set of cycles t -> t + offset; their number is gcd(offset, n).
    int32_t cycles = n, rest = c.offset > 0 ? c.offset : -c.offset;
    while (rest != 0) {
      const int32_t next = cycles % rest;
      cycles = rest;
      rest = next;
    }
    for (int32_t start = 0; start < cycles; ++start) {
      const Unit first = load<Unit>(a, c, start);
      int32_t t = start;
      for (int32_t from; (from = source_frame(t, c.offset, n, a.padding)) != start; t = from) {
        store(a, c, t, load<Unit>(a, c, from));
      }
      store(a, c, t, first);
    }
    return;
  }
  const bool back = Value::walks_back(c.offset);
  for (int32_t i = 0; i < n; i += kFramesInFlight) {
    fill_frames<Unit, Value>(a, c, back ? n - 1 - i : i, back ? -1 : 1, n - i);
  }
}

}  // namespace tsm_jit
