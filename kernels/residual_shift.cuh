// The end of a residual block on CUDA: the kernels and their index arithmetic. Raw pointers, no torch headers.
//
// A thread has one unit of the run (16 bytes, or one element where groups or rows do not begin at 16), so its channels,
// group and norms are the same for every row and frame it visits. It works on frame s of the plain side and on wherever
// the shifted side holds that frame; what it reads there it also writes there, and nobody else does: outputs may
// replace inputs of the same form, and a thread that visits all frames in order may replace plain ones by shifted ones.
#pragma once

#include <type_traits>

#include "element.h"
#include "launch.h"
#include "residual_shift.h"

namespace tsm_jit {

constexpr int kResidualThreads = 256;
constexpr int kResidualGroups = 32;
constexpr int kRowsOfThread = 4;  // in one task: more would reach over more pages of memory at once

// How many blocks of a kernel a multiprocessor holds: the registers that this leaves are what its loads take.
constexpr int kBlocksOfSum = 2, kBlocksAlone = 4, kBlocksInOrder = 3, kBlocksOfPool = 2, kBlocksOfBackward = 2,
              kBlocksOfStatistics = 3;

struct ResidualArgs {
  int32_t frames, n_segment_shifted;
  Padding padding;
  int32_t rows, run;         // of a frame; in bytes
  int64_t row, frame, clip;  // distances in bytes, of a whole tensor
  int64_t unread_row, unread_clip;
  int32_t inner;
  int32_t rows_of_task, frames_of_task;
  int32_t chunks;  // tasks of as many frames
  int32_t tasks;
  int32_t n_groups;
  int32_t group_end[kResidualGroups];  // in bytes of the run
  int32_t group_offset[kResidualGroups];
  int32_t unread_begin[kResidualGroups];
};

// The kernels; host code that is compiled without nvcc sees no more of them.
template <class Element, int kLanes, bool kAdds>
__global__ void residual_forward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualForward f);
template <class Element, int kLanes>
__global__ void residual_forward_in_order(const __grid_constant__ ResidualArgs a,
                                          const __grid_constant__ ResidualForward f);
template <class Element, int kLanes>
__global__ void residual_pool(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualPool p);
template <class Element, int kLanes, int kRead>
__global__ void residual_backward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualBackward b);
template <class Element, int kLanes>
__global__ void relu_of_norm_sums(const __grid_constant__ ResidualArgs a, const __grid_constant__ ReluOfNormBackward b);
template <class Element, int kLanes>
__global__ void relu_of_norm_backward(const __grid_constant__ ResidualArgs a,
                                      const __grid_constant__ ReluOfNormBackward b);
template <class Element, int kLanes>
__global__ void sum_channels(const __grid_constant__ ResidualArgs a, const __grid_constant__ ChannelStatistics c);
template <class Element>
__global__ void finish_statistics(const __grid_constant__ ChannelStatistics c, int32_t channels, int64_t count);
template <class Wide>
__global__ void norm_gradients(const __grid_constant__ NormGradients n, int32_t channels);

#if !defined(TSM_JIT_NVRTC)

// A unit of activations as it lies in memory: words, out of which lanes are taken only where they are computed with, so
// that 16-bit lanes do not take a register each while loads are on their way.
template <class Element, int kLanes>
struct alignas(sizeof(typename Element::Stored) * kLanes) Pack {
  using Stored = typename Element::Stored;
  using Wide = typename Element::Wide;
  static constexpr bool kPairs = sizeof(Stored) == 2 && kLanes > 1;
  static constexpr int kWords = kPairs ? kLanes / 2 : kLanes;
  std::conditional_t<kPairs, uint32_t, Stored> word[kWords];

  __device__ Wide operator[](int k) const {
    if constexpr (kPairs) return Element::widen(static_cast<Stored>(word[k / 2] >> 16 * (k % 2)));
    if constexpr (!kPairs) return Element::widen(word[k]);
  }
  static __device__ Pack of(const Wide (&values)[kLanes]) {
    Pack pack;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kPairs) pack.word[w] = Element::narrow(values[2 * w], values[2 * w + 1]);
      if constexpr (!kPairs) pack.word[w] = Element::narrow(values[w]);
    }
    return pack;
  }
};

// Units of one thread at equal distances in a tensor. Of a tensor that is not there zeros are read, and nothing is
// written.
template <class Values>
struct Line {
  char* first;
  int64_t step;  // in bytes

  __device__ Line(const void* tensor, int64_t offset, int64_t step_bytes)
      : first(tensor == nullptr ? nullptr : const_cast<char*>(static_cast<const char*>(tensor)) + offset),
        step(step_bytes) {}

  __device__ Values load(int32_t i) const {
    return first == nullptr ? Values{} : *reinterpret_cast<const Values*>(first + i * step);
  }
  __device__ void store(int32_t i, const Values& values) const {
    if (first != nullptr) *reinterpret_cast<Values*>(first + i * step) = values;
  }
};

// The unit of this thread, and the tasks that its block visits: some rows, of one frame or of all of a clip.
template <class Values>
struct Unit {
  const ResidualArgs& a;
  int32_t begin;  // in bytes of the run
  int32_t offset, unread, unread_frame;

  __device__ explicit Unit(const ResidualArgs& args)
      : a(args), begin((blockIdx.x * blockDim.x + threadIdx.x) * static_cast<int32_t>(sizeof(Values))) {
    int32_t group = 0;
    while (group < a.n_groups - 1 && a.group_end[group] <= begin) ++group;
    const int32_t group_begin = group == 0 ? 0 : a.group_end[group - 1];
    offset = a.group_offset[group];
    unread = a.unread_begin[group] + begin - group_begin;
    unread_frame = a.group_end[group] - group_begin;
  }
  __device__ bool exists() const { return begin < a.run; }
  __device__ int32_t first_element() const { return begin / static_cast<int32_t>(sizeof(typename Values::Stored)); }

  // visit(clip, frames, first row, last row): one frame, or in order all of them. The last task first: what came before
  // wrote, or read, the last rows last, and they may still be in L2; and the first are when the next kernel begins.
  template <bool kLastFirst = true, class Visit>
  __device__ void for_each_task(Visit visit) const {
    const int32_t parts = (a.frames + a.frames_of_task - 1) / a.frames_of_task;  // of a clip
    for (int32_t i = blockIdx.y; i < a.tasks; i += gridDim.y) {
      const int32_t task = kLastFirst ? a.tasks - 1 - i : i;
      const int32_t part = task / a.chunks, row = (task - part * a.chunks) * a.rows_of_task;
      const int32_t clip = part / parts, s = (part - clip * parts) * a.frames_of_task;
      visit(clip, FrameRange{s, min(s + a.frames_of_task, a.frames)}, row, min(row + a.rows_of_task, a.rows));
    }
  }
  // Every blockDim.y of the rows of frame s, from `row` on: in a plain tensor, and wherever the shifted stream has it.
  __device__ Line<Values> plain(const void* tensor, int32_t clip, int32_t s, int32_t row) const {
    return {tensor, clip * a.clip + s * a.frame + row * a.row + begin, a.row * blockDim.y};
  }
  __device__ Line<Values> at(const Place& place, const void* whole, const void* unread_frames, int32_t clip,
                             int32_t row) const {
    if (place.t != kNoFrame) return plain(whole, clip, place.t, row);
    const int64_t frame = unread + place.unread * unread_frame;
    return {unread_frames, clip * a.unread_clip + row * a.unread_row + frame, a.unread_row * blockDim.y};
  }
  // Row after row of a tensor without gaps, of any number of them.
  __device__ Line<Values> at_row(const void* tensor, int64_t row) const { return {tensor, row * a.run + begin, a.run}; }
  // The frames of a row: of a whole tensor, and the unread ones.
  __device__ Line<Values> frames(const void* tensor, int32_t clip, int32_t row) const {
    return {tensor, clip * a.clip + row * a.row + begin, a.frame};
  }
  __device__ Line<Values> unread_frames(const void* tensor, int32_t clip, int32_t row) const {
    return {tensor, clip * a.unread_clip + row * a.unread_row + unread, unread_frame};
  }
  // Where a stream, shifted or plain, has frame s.
  __device__ Place place(int32_t s, bool shifted = true) const {
    return place_of(s, shifted ? offset : 0, a.n_segment_shifted, a.padding);
  }
};

// Calls visit(k) for k < kCount as far as start + k * step is before `last`: their loads are in flight at once.
template <int kCount, class Visit>
__device__ void for_each_of(int32_t start, int32_t step, int32_t last, Visit visit) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (start + k * step < last) visit(k);
  }
}

// The channels of a unit: one each, or two, of which the first has `rest` elements here.
template <int kLanes>
struct Channels {
  int32_t first, second, rest;

  __device__ Channels(const ResidualArgs& a, int32_t first_element) {
    first = first_element / a.inner;
    rest = a.inner - (first_element - first * a.inner);
    second = first + (rest < kLanes);
  }
  // What each of `data`, one number for each channel, has for them. As vectors where that is possible, and all on their
  // way before one is waited for: every thread does this first, and one by one takes as long as the rows of a small
  // frame.
  template <class Element, int kCount, class Wide>
  __device__ void read(const ResidualArgs& a, const void* const (&data)[kCount], Wide* const (&to)[kCount]) const {
    using Values = Pack<Element, kLanes>;
    using Stored = typename Element::Stored;
    const auto from = [&](int i) { return static_cast<const Stored*>(data[i]); };
    if (a.inner == 1) {
      Values values[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = *reinterpret_cast<const Values*>(from(i) + first);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) to[i][k] = values[i][k];
      }
    } else {
      Stored here[kCount], next[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        here[i] = from(i)[first];
        next[i] = from(i)[second];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int k = 0; k < kLanes; ++k) to[i][k] = Element::widen(k < rest ? here[i] : next[i]);
      }
    }
  }
};

// A norm as scale * value + bias, for the channels of one unit; `bias` is added to.
template <class Element, int kLanes>
__device__ void read_norm(const ResidualArgs& a, const Norm& norm, const Channels<kLanes>& channels,
                          typename Element::Wide* scale, typename Element::Wide* bias) {
  using Wide = typename Element::Wide;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) scale[k] = 1;
  if (norm.mean == nullptr) return;
  Wide mean[kLanes], variance[kLanes], shift[kLanes];
  const auto read = [&](auto number) {
    channels.template read<decltype(number)>(a, {norm.mean, norm.variance, norm.weight, norm.bias},
                                             {mean, variance, scale, shift});
  };
  norm.in_float ? read(Native<float>{}) : read(Element{});
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    scale[k] *= rsqrt(variance[k] + static_cast<Wide>(norm.epsilon));
    bias[k] += shift[k] - mean[k] * scale[k];
  }
}

// The larger one, NaN if either is.
template <class Wide>
__device__ Wide larger(Wide a, Wide b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Wide) == sizeof(float)) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(b) : "f"(a));
    return b;
  }
#endif
  return b <= a || a != a ? a : b;
}

// What a block sums up by channel: each thread in registers, then those of the same channels through shared memory.
template <class Element, int kLanes, int kSums>
struct ChannelSums {
  using Wide = typename Element::Wide;
  Wide of[kSums][kLanes] = {};

  // Into [slices, rows, channels], of which each block of a column of the grid writes a slice: all its threads, each
  // for some channels.
  __device__ void store(const ResidualArgs& a, void* slices, int32_t rows) const {
    __shared__ Wide shared[kResidualThreads * kLanes];  // [rows of threads, channels of the block]
    const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x, width = blockDim.x * kLanes;
    const int32_t channels = a.run / static_cast<int32_t>(sizeof(typename Element::Stored));
    const int32_t first = blockIdx.x * width, last = min(first + width, channels);
    Wide* const slice = static_cast<Wide*>(slices) + int64_t{blockIdx.y} * rows * channels;
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kLanes; ++k) shared[thread * kLanes + k] = of[sum][k];
      __syncthreads();
#pragma unroll 1
      for (int32_t channel = first + thread; channel < last; channel += kResidualThreads) {
        Wide total = 0;
        for (uint32_t y = 0; y < blockDim.y; ++y) total += shared[y * width + channel - first];
        slice[sum * channels + channel] = total;
      }
    }
  }
};

// The arithmetic of a unit, its norms read. Without a norm scale is 1 and bias 0: then it is the addition it looks
// like, to the bit.
template <class Element, int kLanes, bool kAdds>
struct EndOfBlock {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  Wide z_scale[kLanes], identity_scale[kLanes], bias[kLanes] = {}, lowest;

  __device__ EndOfBlock(const ResidualArgs& a, const ResidualForward& f, int32_t first_element)
      : lowest(f.relu ? 0 : -bits_as<float>(0x7f800000u)) {
    const Channels<kLanes> channels(a, first_element);
    read_norm<Element>(a, f.z_norm, channels, z_scale, bias);
    if constexpr (kAdds) read_norm<Element>(a, f.identity_norm, channels, identity_scale, bias);
  }
  __device__ Values operator()(const Values& z, const Values& identity) const {
    Wide x[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      Wide rest = bias[lane];
      if constexpr (kAdds) rest += identity[lane] * identity_scale[lane];
      x[lane] = larger(lowest, z[lane] * z_scale[lane] + rest);
    }
    return Values::of(x);
  }
};

// What these frames, which are written into a shifted `out`, pad.
template <class Values, class Outputs>
__device__ void pad(const Outputs& f, const Unit<Values>& unit, int32_t clip, FrameRange frames, int32_t row,
                    int32_t last) {
#pragma unroll 1
  for (int32_t s = frames.begin; s < frames.end; ++s) {
    const Place place = unit.place(s);
#pragma unroll 1
    for (int32_t t = place.pads.begin; t < place.pads.end; ++t) {
      const auto from = unit.at(place, f.out, f.unread_out, clip, row), to = unit.plain(f.out, clip, t, row);
#pragma unroll 1
      for (int32_t i = 0; row + i * static_cast<int32_t>(blockDim.y) < last; ++i) {
        to.store(i, unit.a.padding == Padding::zeros ? Values{} : from.load(i));
      }
    }
  }
}

// x where it is wanted as itself: pixel `row` of frame s.
template <class Values>
__device__ void store_plain(const ResidualForward& f, const Unit<Values>& unit, int32_t clip, int32_t s, uint32_t row,
                            const Values& x) {
  if (f.plain == nullptr) return;
  const ResidualArgs& a = unit.a;
  const uint32_t width = f.width, step = f.step, h = row / width, w = row - h * width;
  if (h % step != 0 || w % step != 0) return;
  const uint32_t columns = (width + step - 1) / step, rows = (a.rows / width + step - 1) / step;
  const int64_t pixel = (int64_t{clip} * a.frames + s) * rows * columns + h / step * columns + w / step;
  unit.at_row(f.plain, pixel).store(0, x);
}

// Block: units of the run x rows. Grid: blocks that cover the run x tasks. kAdds: is there an identity?
template <class Element, int kLanes, bool kAdds>
__global__ void __launch_bounds__(kResidualThreads, kAdds ? kBlocksOfSum : kBlocksAlone)
    residual_forward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualForward f) {
  using Values = Pack<Element, kLanes>;
  const Unit<Values> unit(a);
  if (!unit.exists()) return;
  const EndOfBlock<Element, kLanes, kAdds> end_of_block(a, f, unit.first_element());
  unit.for_each_task([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
    const int32_t s = frames.begin, row = first + threadIdx.y;
    const Place from = unit.place(s, f.identity_is_shifted), to = unit.place(s, kAdds && f.out_is_shifted);
    const auto z = unit.plain(f.z, clip, s, row), identity = unit.at(from, f.identity, f.unread, clip, row);
    const auto out = unit.at(to, f.out, f.unread_out, clip, row);
    Values of_z[kRowsOfThread], of_identity[kRowsOfThread];
    for_each_of<kRowsOfThread>(row, blockDim.y, last, [&](int k) {
      of_z[k] = z.load(k);
      if constexpr (kAdds) of_identity[k] = identity.load(k);
    });
    for_each_of<kRowsOfThread>(row, blockDim.y, last, [&](int k) {
      const Values x = end_of_block(of_z[k], of_identity[k]);
      out.store(k, x);
      if constexpr (kAdds) store_plain(f, unit, clip, s, row + k * blockDim.y, x);
    });
    if constexpr (kAdds) {
      if (f.out_is_shifted) pad(f, unit, clip, frames, row, last);
    }
  });
}

// The same, frame after frame of a clip in the order in which one may be written where the group reads it.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksInOrder)
    residual_forward_in_order(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualForward f) {
  using Values = Pack<Element, kLanes>;
  constexpr int kBatch = kLanes == 1 ? 1 : 2;
  const Unit<Values> unit(a);
  if (!unit.exists()) return;
  const EndOfBlock<Element, kLanes, true> end_of_block(a, f, unit.first_element());
  unit.for_each_task([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
    const bool up = unit.offset > 0;
    const auto frame = [&](int32_t i) { return up ? i : frames.begin + frames.end - 1 - i; };
    for (int32_t row = first + threadIdx.y; row < last; row += blockDim.y) {
      const auto z = unit.frames(f.z, clip, row), identity = unit.frames(f.identity, clip, row);
      const auto out = unit.frames(f.out, clip, row), unread = unit.unread_frames(f.unread, clip, row);
      const auto unread_out = unit.unread_frames(f.unread_out, clip, row);
#pragma unroll 1
      for (int32_t start = frames.begin; start < frames.end; start += kBatch) {
        Values of_z[kBatch], of_identity[kBatch];
        for_each_of<kBatch>(start, 1, frames.end, [&](int k) {
          const Place from = unit.place(frame(start + k), f.identity_is_shifted);
          of_z[k] = z.load(frame(start + k));
          of_identity[k] = from.t != kNoFrame ? identity.load(from.t) : unread.load(from.unread);
        });
        for_each_of<kBatch>(start, 1, frames.end, [&](int k) {
          const Place to = unit.place(frame(start + k), f.out_is_shifted);
          const Values x = end_of_block(of_z[k], of_identity[k]);
          to.t != kNoFrame ? out.store(to.t, x) : unread_out.store(to.unread, x);
          if constexpr (kLanes == 1) store_plain(f, unit, clip, frame(start + k), row, x);
        });
      }
    }
    if (f.out_is_shifted) pad(f, unit, clip, frames, first + threadIdx.y, last);
  });
}

// A thread has one pixel of the result at a time, and the nine of its window in flight.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksOfPool)
    residual_pool(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualPool p) {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  constexpr int kWindow = 3, kStride = 2;
  const Unit<Values> unit(a);
  if (!unit.exists()) return;
  Wide scale[kLanes], bias[kLanes] = {};
  read_norm<Element>(a, p.z_norm, Channels<kLanes>(a, unit.first_element()), scale, bias);
  const int32_t columns = (p.width + kStride - 1) / kStride;
  unit.for_each_task([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
    const int32_t s = frames.begin;
    const Place place = unit.place(s);
    const auto z = unit.at_row(p.z, (int64_t{clip} * a.frames + s) * p.height * p.width);
    for (int32_t row = first + threadIdx.y; row < last; row += blockDim.y) {
      const int32_t top = row / columns * kStride - 1, left = row % columns * kStride - 1;
      const auto is_there = [&](int32_t h, int32_t w) { return 0 <= h && h < p.height && 0 <= w && w < p.width; };
      Values of_z[kWindow][kWindow];
#pragma unroll
      for (int i = 0; i < kWindow; ++i) {
#pragma unroll
        for (int j = 0; j < kWindow; ++j) {
          if (is_there(top + i, left + j)) of_z[i][j] = z.load((top + i) * p.width + left + j);
        }
      }
      Wide x[kLanes] = {};  // the least that a ReLU leaves
#pragma unroll
      for (int i = 0; i < kWindow; ++i) {
#pragma unroll
        for (int j = 0; j < kWindow; ++j) {
          if (!is_there(top + i, left + j)) continue;
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) {
            x[lane] = larger(x[lane], of_z[i][j][lane] * scale[lane] + bias[lane]);
          }
        }
      }
      const Values pooled = Values::of(x);
      unit.plain(p.plain, clip, s, row).store(0, pooled);
      unit.at(place, p.out, p.unread_out, clip, row).store(0, pooled);
    }
    if (p.out != nullptr) pad(p, unit, clip, frames, first + threadIdx.y, last);
  });
}

// As above; each block of a column of the grid is a slice of the sums. kRead: of how many norms.
template <class Element, int kLanes, int kRead>
__global__ void __launch_bounds__(kResidualThreads, kBlocksOfBackward)
    residual_backward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualBackward b) {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  constexpr int kBatch = kLanes == 1 ? 1 : 2;
  const Unit<Values> unit(a);
  ChannelSums<Element, kLanes, 1 + kRead> sums;
  if (unit.exists()) {
    Wide mean[kRead][kLanes] = {};
    const Channels<kLanes> channels(a, unit.first_element());
#pragma unroll
    for (int n = 0; n < kRead; ++n) {
      if (b.normed[n] != nullptr) channels.template read<Native<Wide>>(a, {b.mean[n]}, {mean[n]});
    }
    unit.for_each_task([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
      const int32_t s = frames.begin, first_row = first + threadIdx.y, rows = blockDim.y;
      const Place place = unit.place(s), from = unit.place(s, b.out_is_shifted);
      const bool read_by_padding = b.out_is_shifted && a.padding != Padding::zeros;
      for (int32_t row = first_row; row < last; row += kBatch * rows) {
        const auto out = unit.at(from, b.out, b.unread_out, clip, row);
        const auto grad_a = unit.at(from, b.grad_a, b.grad_unread, clip, row);
        const auto grad_b = unit.at(from, b.grad_b, nullptr, clip, row);
        Values mask[kBatch], of_a[kBatch], of_b[kBatch], normed[kRead][kBatch];
        for_each_of<kBatch>(row, rows, last, [&](int k) {
          mask[k] = out.load(k);
          of_a[k] = grad_a.load(k);
          of_b[k] = grad_b.load(k);
#pragma unroll
          for (int n = 0; n < kRead; ++n) normed[n][k] = unit.plain(b.normed[n], clip, s, row).load(k);
        });
        const auto grad = unit.plain(b.grad, clip, s, row);
        const auto grad_shifted = unit.at(place, b.grad_shifted, b.grad_unread_in, clip, row);
        for_each_of<kBatch>(row, rows, last, [&](int k) {
          Wide total[kLanes];
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) total[lane] = of_a[k][lane] + of_b[k][lane];
#pragma unroll 1
          for (int32_t t = place.pads.begin; read_by_padding && t < place.pads.end; ++t) {
            const Values more_a = unit.plain(b.grad_a, clip, t, row).load(k);
            const Values more_b = unit.plain(b.grad_b, clip, t, row).load(k);
#pragma unroll
            for (int lane = 0; lane < kLanes; ++lane) total[lane] += more_a[lane] + more_b[lane];
          }
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) {
            if (mask[k][lane] <= 0) total[lane] = 0;
            sums.of[0][lane] += total[lane];
#pragma unroll
            for (int n = 0; n < kRead; ++n) sums.of[1 + n][lane] += total[lane] * (normed[n][k][lane] - mean[n][lane]);
          }
          const Values x = Values::of(total);
          grad.store(k, x);
          if (b.grad_shifted == nullptr) return;
          grad_shifted.store(k, x);
#pragma unroll 1
          for (int32_t t = place.pads.begin; t < place.pads.end; ++t) {
            unit.plain(b.grad_shifted, clip, t, row).store(k, Values{});
          }
        });
      }
    });
  }
  if (b.sums != nullptr) sums.store(a, b.sums, 1 + kNorms);
}

// The gradient of norm(z), given that of its ReLU, for the channels of one unit.
template <class Element, int kLanes, bool kLastFirst>
struct ReluOfNorm {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  Wide scale[kLanes], bias[kLanes] = {};

  __device__ ReluOfNorm(const ResidualArgs& a, const Norm& norm, const Channels<kLanes>& channels) {
    read_norm<Element>(a, norm, channels, scale, bias);
  }
  // Calls visit(line of `out`, place in it, z, masked) for all units of z. Masked is the gradient where the ReLU,
  // computed and rounded as by EndOfBlock, is not 0. NaN stays.
  template <class Visit>
  __device__ void for_each(const Unit<Values>& unit, const ReluOfNormBackward& b, Visit visit) const {
    unit.template for_each_task<kLastFirst>([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
      const int32_t s = frames.begin, row = first + threadIdx.y;
      const auto grad = unit.plain(b.grad, clip, s, row), z = unit.plain(b.z, clip, s, row);
      const auto out = unit.plain(b.out, clip, s, row);
      Values of_grad[kRowsOfThread], of_z[kRowsOfThread];
      for_each_of<kRowsOfThread>(row, blockDim.y, last, [&](int k) {
        of_grad[k] = grad.load(k);
        of_z[k] = z.load(k);
      });
      for_each_of<kRowsOfThread>(row, blockDim.y, last, [&](int k) {
        Wide x[kLanes];
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) x[lane] = of_z[k][lane] * scale[lane] + bias[lane];
        const Values rounded = Values::of(x);
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) x[lane] = rounded[lane] <= 0 ? 0 : of_grad[k][lane];
        visit(out, k, of_z[k], x);
      });
    });
  }
};

// Each block of a column of the grid is a slice of the sums.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksOfBackward)
    relu_of_norm_sums(const __grid_constant__ ResidualArgs a, const __grid_constant__ ReluOfNormBackward b) {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  const Unit<Values> unit(a);
  ChannelSums<Element, kLanes, 2> sums;
  if (unit.exists()) {
    const Channels<kLanes> channels(a, unit.first_element());
    const ReluOfNorm<Element, kLanes, true> relu(a, b.norm, channels);
    Wide mean[kLanes];
    channels.template read<Native<Wide>>(a, {b.norm.mean}, {mean});
    relu.for_each(unit, b, [&](const Line<Values>&, int, const Values& z, const Wide(&masked)[kLanes]) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        sums.of[0][lane] += masked[lane];
        sums.of[1][lane] += masked[lane] * (z[lane] - mean[lane]);
      }
    });
  }
  sums.store(a, b.sums, 1 + kNorms);
}

// The first task first: where the sums ended.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksOfBackward)
    relu_of_norm_backward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ReluOfNormBackward b) {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  const Unit<Values> unit(a);
  if (!unit.exists()) return;
  const Channels<kLanes> channels(a, unit.first_element());
  const ReluOfNorm<Element, kLanes, false> relu(a, b.norm, channels);
  Wide beside[kLanes] = {}, bias[kLanes] = {};
  const bool adds = b.beside.mean != nullptr;
  if (adds) read_norm<Element>(a, b.beside, channels, beside, bias);
  relu.for_each(unit, b, [&](const Line<Values>& out, int k, const Values& z, const Wide(&masked)[kLanes]) {
    Wide x[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      x[lane] = masked[lane] * relu.scale[lane] + bias[lane];
      if (adds) x[lane] += z[lane] * beside[lane];
    }
    out.store(k, Values::of(x));
  });
}

// The sums of x - x[0] and of its square by channel, for each slice: a block of a column of the grid. The first row is
// near the mean, so that the variance is no small difference of large numbers.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksOfStatistics)
    sum_channels(const __grid_constant__ ResidualArgs a, const __grid_constant__ ChannelStatistics c) {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  const Unit<Values> unit(a);
  ChannelSums<Element, kLanes, 2> sums;
  if (unit.exists()) {
    const Values origin = unit.plain(c.x, 0, 0, 0).load(0);
    unit.for_each_task([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
      const int32_t s = frames.begin, row = first + threadIdx.y;
      const auto x = unit.plain(c.x, clip, s, row);
      Values of_x[kRowsOfThread];
      for_each_of<kRowsOfThread>(row, blockDim.y, last, [&](int k) { of_x[k] = x.load(k); });
      for_each_of<kRowsOfThread>(row, blockDim.y, last, [&](int k) {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          const Wide distance = of_x[k][lane] - origin[lane];
          sums.of[0][lane] += distance;
          sums.of[1][lane] += distance * distance;
        }
      });
    });
  }
  sums.store(a, c.sums, 2);
}

// Adds up [slices, kSums, channels] for one channel in each column of threads; true in the one that has the result.
template <int kSums, class Wide>
__device__ bool add_slices(const void* slices, int32_t n_slices, int32_t channels, int32_t channel,
                           Wide (&sums)[kSums]) {
  __shared__ Wide shared[kSums][kResidualThreads];
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] = 0;
  const int32_t last = channel < channels ? n_slices : 0;
#pragma unroll 4
  for (int32_t slice = threadIdx.y; slice < last; slice += blockDim.y) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      sums[k] += static_cast<const Wide*>(slices)[(int64_t{slice} * kSums + k) * channels + channel];
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

// Mean and variance out of these sums; the running ones follow by `momentum`. Block: channels x threads that share the
// slices.
template <class Element>
__global__ void __launch_bounds__(kResidualThreads)
    finish_statistics(const __grid_constant__ ChannelStatistics c, int32_t channels, int64_t count) {
  using Wide = typename Element::Wide;
  const int32_t channel = blockIdx.x * blockDim.x + threadIdx.x;
  Wide sums[2];
  if (!add_slices(c.sums, c.slices, channels, channel, sums)) return;
  const Wide distance = sums[0] / count, raw = sums[1] / count - distance * distance;
  const Wide variance = raw < 0 ? 0 : raw;  // NaN stays
  const Wide mean = Element::widen(static_cast<const typename Element::Stored*>(c.x)[channel]) + distance;
  static_cast<Wide*>(c.mean)[channel] = mean;
  static_cast<Wide*>(c.variance)[channel] = variance;
  const Wide unbiased = count > 1 ? variance * count / (count - 1) : variance, momentum = c.momentum;
  Wide* const running_mean = static_cast<Wide*>(c.running_mean) + channel;
  Wide* const running_variance = static_cast<Wide*>(c.running_variance) + channel;
  *running_mean += momentum * (mean - *running_mean);
  *running_variance += momentum * (unbiased - *running_variance);
  if (channel == 0) ++*c.batches;
}

// Block: as above.
template <class Wide>
__global__ void __launch_bounds__(kResidualThreads)
    norm_gradients(const __grid_constant__ NormGradients n, int32_t channels) {
  const int32_t channel = blockIdx.x * blockDim.x + threadIdx.x;
  Wide sums[1 + kNorms];
  if (!add_slices(n.sums, n.slices, channels, channel, sums)) return;
  Wide* to = static_cast<Wide*>(n.made) + channel;
  *to = 0;
#pragma unroll
  for (int norm = 0; norm < kNorms; ++norm) {
    if (n.variance[norm] == nullptr) continue;
    const Wide variance = static_cast<const Wide*>(n.variance[norm])[channel];
    const Wide deviation = rsqrt(variance + static_cast<Wide>(n.epsilon[norm]));
    const Wide of_weight = sums[1 + norm] * deviation, of_bias = sums[0];
    const Wide factor = static_cast<const Wide*>(n.weight[norm])[channel] * deviation / -static_cast<Wide>(n.count);
    const Wide made[] = {of_weight, of_bias, factor * of_weight, factor * of_bias};
#pragma unroll
    for (int row = 0; row < 4; ++row) to[(1 + 4 * norm + row) * channels] = made[row];
  }
}

#endif

}  // namespace tsm_jit
