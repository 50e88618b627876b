// What the CUDA kernels of this folder share: how a thread finds its channels, rows and frames, and reads norms.
//
// A thread handles one vector of inner_bytes (16 bytes, or one element if groups or rows are not aligned to 16). So its
// channels, group and norms are the same for all rows and frames that it visits. It works on frame s of the unshifted
// layout, and on the place where the shifted layout holds frame s.
//
// Block      x: vectors of inner_bytes; y: rows, that is outer indices of a frame
// Grid       x: blocks that cover inner_bytes; y: blocks that share the tasks
// Task       rows_per_task rows of one frame, or of all frames of a clip
// Aliasing   a thread writes a place only after it has read it, and no other thread reads or writes it. So an output
//            may be the same tensor as an input of the same layout.
#pragma once

#include <type_traits>

#include "core/launch.h"
#include "residual/residual_stream.h"

namespace tsm_jit {

constexpr int kResidualThreads = 256;
constexpr int kResidualGroups = 32;
constexpr int kRowsPerThread = 4;  // in one task: more would touch more pages of memory at once

struct StreamArgs {
  int32_t frames, n_segment_shifted;
  Padding padding;
  int32_t rows, inner_bytes;  // of a frame
  int64_t row, frame, clip;   // distances in bytes, in activations
  int64_t boundary_row, boundary_clip;
  int32_t channel_numel;
  int32_t rows_per_task, frames_per_task;
  int32_t tasks_per_frame;
  int32_t tasks;
  int32_t n_groups;
  int32_t group_end[kResidualGroups];  // in bytes of inner_bytes
  int32_t group_offset[kResidualGroups];
  int32_t boundary_begin[kResidualGroups];
};

#if !defined(TSM_JIT_NVRTC)

// kLanes elements as they lie in memory: 16 bytes (as llm.c's Packed128) or one element. Pairs of 16-bit elements stay
// packed until they are used, so that loads in flight occupy few registers.
template <class Element, int kLanes>
struct alignas(sizeof(typename Element::storage_t) * kLanes) Packed {
  using storage_t = typename Element::storage_t;
  using acc_t = typename Element::acc_t;
  static constexpr bool kPairs = sizeof(storage_t) == 2 && kLanes > 1;
  static constexpr int kWords = kPairs ? kLanes / 2 : kLanes;
  std::conditional_t<kPairs, uint32_t, storage_t> word[kWords];

  __device__ acc_t operator[](int k) const {
    if constexpr (kPairs) return Element::to_acc(static_cast<storage_t>(word[k / 2] >> 16 * (k % 2)));
    if constexpr (!kPairs) return Element::to_acc(word[k]);
  }
  static __device__ Packed of(const acc_t (&values)[kLanes]) {
    Packed packed;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kPairs) packed.word[w] = Element::from_acc(values[2 * w], values[2 * w + 1]);
      if constexpr (!kPairs) packed.word[w] = Element::from_acc(values[w]);
    }
    return packed;
  }
};

// Vectors at equal distances in a tensor. A null tensor reads as zeros, and is not written.
template <class Vec>
struct StridedPtr {
  char* first;
  int64_t stride;  // in bytes

  __device__ StridedPtr(const void* tensor, int64_t offset, int64_t stride_bytes)
      : first(tensor == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(tensor)) + offset),
        stride(stride_bytes) {}

  __device__ Vec load(int32_t i) const {
    return first == nullptr ? Vec{} : *reinterpret_cast<const Vec*>(first + i * stride);
  }
  __device__ void store(int32_t i, const Vec& values) const {
    if (first != nullptr) *reinterpret_cast<Vec*>(first + i * stride) = values;
  }
};

// The work of one block at a time: rows [begin_row, end_row) of some frames of a clip.
struct Task {
  int32_t clip;
  FrameRange frames;
  int32_t begin_row, end_row;
};

// Rows first, first + step, ... of a thread in a task. Unrolled loops over them keep several loads in flight.
struct ThreadRows {
  int32_t first, step, end;

  __device__ bool has(int k) const { return first + k * step < end; }
};

// The vector of inner_bytes of this thread.
template <class Vec>
struct ChannelSlice {
  const StreamArgs& a;
  int32_t begin;  // in bytes of inner_bytes
  int32_t offset;
  int32_t boundary_begin, boundary_frame;  // in bytes of boundary's inner_bytes

  __device__ explicit ChannelSlice(const StreamArgs& args)
      : a(args), begin((blockIdx.x * blockDim.x + threadIdx.x) * static_cast<int32_t>(sizeof(Vec))) {
    int32_t group = 0;
    while (group < a.n_groups - 1 && a.group_end[group] <= begin) ++group;
    const int32_t group_begin = group == 0 ? 0 : a.group_end[group - 1];
    offset = a.group_offset[group];
    boundary_begin = a.boundary_begin[group] + begin - group_begin;
    boundary_frame = a.group_end[group] - group_begin;
  }
  __device__ bool exists() const { return begin < a.inner_bytes; }
  __device__ int32_t first_element() const { return begin / static_cast<int32_t>(sizeof(typename Vec::storage_t)); }

  // Calls visit(task) for the tasks of this block. By default the last task comes first. The kernel before wrote or
  // read the last rows last, so they may still be in L2. This kernel ends with the first rows, where the next one
  // begins.
  template <bool kLastFirst = true, class Visit>
  __device__ void for_each_task(Visit visit) const {
    const int32_t parts = ceil_div(a.frames, a.frames_per_task);  // of a clip
    for (int32_t i = blockIdx.y; i < a.tasks; i += gridDim.y) {
      const int32_t task = kLastFirst ? a.tasks - 1 - i : i;
      const int32_t part = task / a.tasks_per_frame, row = (task - part * a.tasks_per_frame) * a.rows_per_task;
      const int32_t clip = part / parts, s = (part - clip * parts) * a.frames_per_task;
      visit(Task{clip, FrameRange{s, min(s + a.frames_per_task, a.frames)}, row, min(row + a.rows_per_task, a.rows)});
    }
  }
  // Where a stream, shifted or not, holds frame s.
  __device__ ShiftedIndex index(int32_t s, bool is_shifted = true) const {
    return shifted_index(s, is_shifted ? offset : 0, a.n_segment_shifted, a.padding);
  }
  // Rows row, row + blockDim.y, ... of frame s: of an unshifted tensor, and of a tensor with boundary frames.
  __device__ StridedPtr<Vec> rows(const void* tensor, int32_t clip, int32_t s, int32_t row) const {
    return {tensor, clip * a.clip + s * a.frame + row * a.row + begin, a.row * blockDim.y};
  }
  __device__ StridedPtr<Vec> rows_at(const ShiftedIndex& index, const void* tensor, const void* boundary, int32_t clip,
                                     int32_t row) const {
    if (index.t != kNoFrame) return rows(tensor, clip, index.t, row);
    const int64_t frame = boundary_begin + index.boundary * boundary_frame;
    return {boundary, clip * a.boundary_clip + row * a.boundary_row + frame, a.boundary_row * blockDim.y};
  }
  // Rows row, row + 1, ... of a tensor of any number of rows without gaps.
  __device__ StridedPtr<Vec> consecutive_rows(const void* tensor, int64_t row) const {
    return {tensor, row * a.inner_bytes + begin, a.inner_bytes};
  }
  // All frames of a row, and all boundary frames of a row.
  __device__ StridedPtr<Vec> frames(const void* tensor, int32_t clip, int32_t row) const {
    return {tensor, clip * a.clip + row * a.row + begin, a.frame};
  }
  __device__ StridedPtr<Vec> boundary_frames(const void* boundary, int32_t clip, int32_t row) const {
    return {boundary, clip * a.boundary_clip + row * a.boundary_row + boundary_begin, boundary_frame};
  }
};

// Reads values per channel for the elements of a vector. If channel_numel is 1, a vector has one channel per element.
// Else it has at most two channels, and the first one has `rest` elements.
template <int kLanes>
struct ChannelReader {
  int32_t first, second, rest;

  __device__ ChannelReader(const StreamArgs& a, int32_t first_element) {
    first = first_element / a.channel_numel;
    rest = a.channel_numel - (first_element - first * a.channel_numel);
    second = first + (rest < kLanes);
  }
  // Reads kCount arrays of [channels] into `to`. All loads start before the first one is used. Every thread does this
  // first, and loads that wait for each other take as long as the rows of a small frame.
  template <class Element, int kCount, class acc_t>
  __device__ void read(const StreamArgs& a, const void* const (&data)[kCount], acc_t* const (&to)[kCount]) const {
    using Vec = Packed<Element, kLanes>;
    using storage_t = typename Element::storage_t;
    const auto from = [&](int i) { return static_cast<const storage_t*>(data[i]); };
    if (a.channel_numel == 1) {
      Vec values[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = *reinterpret_cast<const Vec*>(from(i) + first);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) to[i][k] = values[i][k];
      }
    } else {
      storage_t of_first[kCount], of_second[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        of_first[i] = from(i)[first];
        of_second[i] = from(i)[second];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) to[i][k] = Element::to_acc(k < rest ? of_first[i] : of_second[i]);
      }
    }
  }
};

// Reads a norm as value * scale + bias. Sets `scale`; adds to `bias`, so that the biases of two norms add up.
template <class Element, int kLanes>
__device__ void read_norm(const StreamArgs& a, const Norm& norm, const ChannelReader<kLanes>& channels,
                          typename Element::acc_t* scale, typename Element::acc_t* bias) {
  using acc_t = typename Element::acc_t;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) scale[k] = 1;
  if (norm.mean == nullptr) return;
  acc_t mean[kLanes], variance[kLanes], norm_bias[kLanes];
  const void* const parts[] = {norm.mean, norm.variance, norm.weight, norm.bias};
  acc_t* const to[] = {mean, variance, scale, norm_bias};
  if (norm.is_float32) {
    channels.template read<Float32>(a, parts, to);
  } else {
    channels.template read<Element>(a, parts, to);
  }
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    scale[k] *= rsqrt(variance[k] + static_cast<acc_t>(norm.epsilon));
    bias[k] += norm_bias[k] - mean[k] * scale[k];
  }
}

// The larger one; NaN if either is NaN.
template <class acc_t>
__device__ acc_t max_or_nan(acc_t a, acc_t b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(acc_t) == sizeof(float)) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(b) : "f"(a));
    return b;
  }
#endif
  return b <= a || a != a ? a : b;
}

// Writes the padding that the frames of a task fill in a shifted `out`: copies of them, or zeros.
template <class Vec, class Outputs>
__device__ void write_padding(const Outputs& f, const ChannelSlice<Vec>& slice, const Task& task, int32_t row) {
#pragma unroll 1
  for (int32_t s = task.frames.begin; s < task.frames.end; ++s) {
    const ShiftedIndex index = slice.index(s);
#pragma unroll 1
    for (int32_t t = index.pads.begin; t < index.pads.end; ++t) {
      const auto from = slice.rows_at(index, f.out, f.boundary_out, task.clip, row);
      const auto to = slice.rows(f.out, task.clip, t, row);
#pragma unroll 1
      for (int32_t i = 0; row + i * static_cast<int32_t>(blockDim.y) < task.end_row; ++i) {
        to.store(i, slice.a.padding == Padding::zeros ? Vec{} : from.load(i));
      }
    }
  }
}

// kSums sums per channel: each thread adds in registers, then the threads of a block add up through shared memory.
template <class Element, int kLanes, int kSums>
struct ChannelSums {
  using acc_t = typename Element::acc_t;
  acc_t of[kSums][kLanes] = {};

  // Writes the sums of the block to slice blockIdx.y of [slices, rows, channels]. Each thread adds up some channels.
  __device__ void store(const StreamArgs& a, void* slices, int32_t rows) const {
    __shared__ acc_t shared[kResidualThreads * kLanes];  // [rows of threads, channels of the block]
    const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, width = blockDim.x * kLanes;
    const int32_t channels = a.inner_bytes / static_cast<int32_t>(sizeof(typename Element::storage_t));
    const int32_t first = blockIdx.x * width, last = min(first + width, channels);
    acc_t* const slice = static_cast<acc_t*>(slices) + int64_t{blockIdx.y} * rows * channels;
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kLanes; ++k) shared[thread * kLanes + k] = of[sum][k];
      __syncthreads();
#pragma unroll 1
      for (int32_t channel = first + thread; channel < last; channel += kResidualThreads) {
        acc_t total = 0;
        for (uint32_t y = 0; y < blockDim.y; ++y) total += shared[y * width + channel - first];
        slice[sum * channels + channel] = total;
      }
    }
  }
};

// Adds up the slices [n_slices, kSums, channels] of one channel per column of threads. Returns true in the thread that
// has the result.
template <int kSums, class acc_t>
__device__ bool add_slices(const void* slices, int32_t n_slices, int32_t channels, int32_t channel,
                           acc_t (&sums)[kSums]) {
  __shared__ acc_t shared[kSums][kResidualThreads];
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = 0;
  const int32_t last = channel < channels ? n_slices : 0;
#pragma unroll 4
  for (int32_t slice = threadIdx.y; slice < last; slice += blockDim.y) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      sums[k] += static_cast<const acc_t*>(slices)[(int64_t{slice} * kSums + k) * channels + channel];
    }
  }
#pragma unroll
  for (int k = 0; k < kSums; ++k) shared[k][thread] = sums[k];
  __syncthreads();
  if (threadIdx.y != 0 || channel >= channels) return false;
  for (uint32_t y = 1; y < blockDim.y; ++y) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) sums[k] += shared[k][y * blockDim.x + threadIdx.x];
  }
  return true;
}

#endif

}  // namespace tsm_jit
