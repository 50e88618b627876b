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

struct ResidualArgs {
  int32_t frames, n_segment_shifted;
  Padding padding;
  int32_t rows, run, unread_run;  // of a frame, in bytes
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
template <class Element, int kLanes>
__global__ void residual_forward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualForward f);
template <class Element, int kLanes, int kRead>
__global__ void residual_backward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualBackward b);
template <class Element, int kLanes>
__global__ void sum_channels(const __grid_constant__ ResidualArgs a, const __grid_constant__ ChannelStatistics c);
template <class Element>
__global__ void finish_statistics(const __grid_constant__ ChannelStatistics c, int32_t channels, int64_t count);

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

// Where the thread's unit of one frame lies: in a whole tensor, or in the one of its unread frames.
struct Spot {
  int64_t first;  // in bytes, of row 0
  int32_t stride;
  bool is_unread;

  template <class Byte>
  __device__ Byte* in(Byte* whole, Byte* unread, int32_t row) const {
    Byte* const data = is_unread ? unread : whole;
    return data == nullptr ? nullptr : data + first + int64_t{row} * stride;
  }
  // Of a tensor that is not there: zeros.
  template <class Values>
  __device__ Values load(const void* whole, const void* unread, int32_t row) const {
    const char* from = in(static_cast<const char*>(whole), static_cast<const char*>(unread), row);
    return from == nullptr ? Values{} : *reinterpret_cast<const Values*>(from);
  }
  template <class Values>
  __device__ void store(void* whole, void* unread, int32_t row, Values values) const {
    char* to = in(static_cast<char*>(whole), static_cast<char*>(unread), row);
    if (to != nullptr) *reinterpret_cast<Values*>(to) = values;
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

  // visit(clip, frames, first row, last row)
  template <class Visit>
  __device__ void for_each_task(Visit visit) const {
    const int32_t parts = (a.frames + a.frames_of_task - 1) / a.frames_of_task;  // of a clip
    for (int32_t task = blockIdx.y; task < a.tasks; task += gridDim.y) {
      const int32_t part = task / a.chunks, row = (task - part * a.chunks) * a.rows_of_task;
      const int32_t clip = part / parts, s = (part - clip * parts) * a.frames_of_task;
      visit(clip, FrameRange{s, min(s + a.frames_of_task, a.frames)}, row, min(row + a.rows_of_task, a.rows));
    }
  }
  // visit(clip, frame, first row, last row)
  template <class Visit>
  __device__ void for_each_frame(Visit visit) const {
    for_each_task([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
      for (int32_t s = frames.begin; s < frames.end; ++s) visit(clip, s, first, last);
    });
  }
  __device__ Spot plain(int32_t clip, int32_t s) const {
    const int64_t frame = int64_t{clip} * a.frames + s;
    return {frame * a.rows * a.run + begin, a.run, false};
  }
  __device__ Spot at(const Place& place, int32_t clip) const {
    if (place.t != kNoFrame) return plain(clip, place.t);
    return {int64_t{clip} * a.rows * a.unread_run + unread + place.unread * unread_frame, a.unread_run, true};
  }
};

// Calls visit(k, start + k * step) for k < kCount as far as that is before `last`: their loads are in flight at once.
template <int kCount, class Visit>
__device__ void for_each_of(int32_t start, int32_t step, int32_t last, Visit visit) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const int32_t i = start + k * step;
    if (i < last) visit(k, i);
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
  // What `data`, one number for each channel, has for them. As a vector where that is possible: all threads do this
  // before their first access, and one by one takes as long as the rows of a small frame.
  template <class Element, class Wide>
  __device__ void read(const ResidualArgs& a, const void* data, Wide* to) const {
    using Values = Pack<Element, kLanes>;
    const auto* const from = static_cast<const typename Element::Stored*>(data);
    if (a.inner == 1) {
      const Values values = *reinterpret_cast<const Values*>(from + first);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) to[k] = values[k];
    } else {
      const Wide here = Element::widen(from[first]), next = Element::widen(from[second]);
#pragma unroll
      for (int k = 0; k < kLanes; ++k) to[k] = k < rest ? here : next;
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
  const auto read = [&](const void* data, Wide* to) {
    if (norm.in_float) {
      channels.template read<Native<float>>(a, data, to);
    } else {
      channels.template read<Element>(a, data, to);
    }
  };
  Wide mean[kLanes], variance[kLanes], shift[kLanes];
  read(norm.mean, mean);
  read(norm.variance, variance);
  read(norm.weight, scale);
  read(norm.bias, shift);
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    scale[k] *= rsqrt(variance[k] + static_cast<Wide>(norm.epsilon));
    bias[k] += shift[k] - mean[k] * scale[k];
  }
}

// The greater one; NaN stays.
template <class Wide>
__device__ Wide at_least(Wide lowest, Wide x) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Wide) == sizeof(float)) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(lowest));
    return x;
  }
#endif
  return x <= lowest ? lowest : x;
}

// What a block sums up by channel: each thread in registers, then the threads of a column through shared memory.
template <class Element, int kLanes, int kSums>
struct ChannelSums {
  using Wide = typename Element::Wide;
  Wide of[kSums][kLanes] = {};

  // Calls visit(channel, sums) for every channel of the block, in one thread each.
  template <class Visit>
  __device__ void for_each_channel_of_block(const ResidualArgs& a, int32_t begin, Visit visit) {
    __shared__ Wide shared[kLanes][kResidualThreads];
    const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int sum = 0; sum < kSums; ++sum) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kLanes; ++k) shared[k][thread] = of[sum][k];
      __syncthreads();
      if (threadIdx.y != 0) continue;
#pragma unroll
      for (int k = 0; k < kLanes; ++k) {
#pragma unroll 1
        for (uint32_t y = 1; y < blockDim.y; ++y) of[sum][k] += shared[k][y * blockDim.x + threadIdx.x];
      }
    }
    if (threadIdx.y != 0 || begin >= a.run) return;
#pragma unroll
    for (int k = 0; k < kLanes; ++k) {
      Wide sums[kSums];
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) sums[sum] = of[sum][k];
      visit(begin / static_cast<int32_t>(sizeof(typename Element::Stored)) + k, sums);
    }
  }
};

// Block: units of the run x rows. Grid: blocks that cover the run x tasks.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, 2)
    residual_forward(const __grid_constant__ ResidualArgs a, const __grid_constant__ ResidualForward f) {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  // Rows, or frames of one, whose loads are in flight at once.
  constexpr int kBatch = kLanes == 1 ? 1 : 4, kFrames = kLanes == 1 ? 1 : 2;
  const Unit<Values> unit(a);
  if (!unit.exists()) return;
  // Without a norm scale is 1 and bias 0: then this is the addition it looks like, to the bit.
  Wide z_scale[kLanes], identity_scale[kLanes], bias[kLanes] = {};
  const Channels<kLanes> channels(a, unit.first_element());
  read_norm<Element>(a, f.z_norm, channels, z_scale, bias);
  read_norm<Element>(a, f.identity_norm, channels, identity_scale, bias);
  const Wide lowest = f.relu ? 0 : -bits_as<float>(0x7f800000u);
  const auto end_of_block = [&](Values z, Values identity) {
    Wide x[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      x[lane] = at_least(lowest, z[lane] * z_scale[lane] + (identity[lane] * identity_scale[lane] + bias[lane]));
    }
    return Values::of(x);
  };
  const auto place_of_frame = [&](int32_t s) { return place_of(s, unit.offset, a.n_segment_shifted, a.padding); };
  // What these frames, which are written, pad.
  const auto pad = [&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
#pragma unroll 1
    for (int32_t s = frames.begin; f.out_is_shifted && s < frames.end; ++s) {
      const Place place = place_of_frame(s);
#pragma unroll 1
      for (int32_t t = place.pads.begin; t < place.pads.end; ++t) {
#pragma unroll 1
        for (int32_t row = first + threadIdx.y; row < last; row += blockDim.y) {
          Values x{};
          if (a.padding != Padding::zeros) x = unit.at(place, clip).template load<Values>(f.out, f.unread_out, row);
          unit.plain(clip, t).store(f.out, nullptr, row, x);
        }
      }
    }
  };
  unit.for_each_task([&](int32_t clip, FrameRange frames, int32_t first, int32_t last) {
    if (kLanes > 1 && a.frames_of_task == 1) {
      const int32_t s = frames.begin;
      const Place place = place_of_frame(s);
      const Spot plain = unit.plain(clip, s), shifted = unit.at(place, clip);
      const Spot in = f.identity_is_shifted ? shifted : plain, out = f.out_is_shifted ? shifted : plain;
      for (int32_t start = first + threadIdx.y; start < last; start += kBatch * blockDim.y) {
        Values z[kBatch], identity[kBatch];
        for_each_of<kBatch>(start, blockDim.y, last, [&](int k, int32_t row) {
          z[k] = plain.load<Values>(f.z, nullptr, row);
          identity[k] = in.load<Values>(f.identity, f.unread, row);
        });
        for_each_of<kBatch>(start, blockDim.y, last, [&](int k, int32_t row) {
          out.store(f.out, f.unread_out, row, end_of_block(z[k], identity[k]));
        });
      }
      pad(clip, frames, first, last);
      return;
    }
    // In the order in which a frame may be written where the group reads it.
    const bool up = unit.offset > 0;
    const auto frame = [&](int32_t i) { return up ? i : frames.begin + frames.end - 1 - i; };
    for (int32_t row = first + threadIdx.y; row < last; row += blockDim.y) {
#pragma unroll 1
      for (int32_t start = frames.begin; start < frames.end; start += kFrames) {
        Values z[kFrames], identity[kFrames];
        for_each_of<kFrames>(start, 1, frames.end, [&](int k, int32_t i) {
          const Spot plain = unit.plain(clip, frame(i));
          const Spot in = f.identity_is_shifted ? unit.at(place_of_frame(frame(i)), clip) : plain;
          z[k] = plain.load<Values>(f.z, nullptr, row);
          identity[k] = in.load<Values>(f.identity, f.unread, row);
        });
        for_each_of<kFrames>(start, 1, frames.end, [&](int k, int32_t i) {
          const Spot out = f.out_is_shifted ? unit.at(place_of_frame(frame(i)), clip) : unit.plain(clip, frame(i));
          out.store(f.out, f.unread_out, row, end_of_block(z[k], identity[k]));
        });
      }
    }
    pad(clip, frames, first, last);
  });
}

// As above; each block of a column of the grid is a slice of the sums. kRead: of how many norms.
template <class Element, int kLanes, int kRead>
__global__ void __launch_bounds__(kResidualThreads, 2)
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
      if (b.normed[n] != nullptr) channels.template read<Native<Wide>>(a, b.mean[n], mean[n]);
    }
    unit.for_each_frame([&](int32_t clip, int32_t s, int32_t first, int32_t last) {
      const Place place = place_of(s, unit.offset, a.n_segment_shifted, a.padding);
      const Spot plain = unit.plain(clip, s), shifted = unit.at(place, clip), out = b.out_is_shifted ? shifted : plain;
      const bool read_by_padding = b.out_is_shifted && a.padding != Padding::zeros;
      for (int32_t start = first + threadIdx.y; start < last; start += kBatch * blockDim.y) {
        Values mask[kBatch], of_a[kBatch], of_b[kBatch], normed[kRead][kBatch];
        for_each_of<kBatch>(start, blockDim.y, last, [&](int k, int32_t row) {
          mask[k] = out.load<Values>(b.out, b.unread_out, row);
          of_a[k] = out.load<Values>(b.grad_a, b.grad_unread, row);
          of_b[k] = out.load<Values>(b.grad_b, nullptr, row);
#pragma unroll
          for (int n = 0; n < kRead; ++n) normed[n][k] = plain.load<Values>(b.normed[n], nullptr, row);
        });
        for_each_of<kBatch>(start, blockDim.y, last, [&](int k, int32_t row) {
          Wide total[kLanes];
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) total[lane] = of_a[k][lane] + of_b[k][lane];
#pragma unroll 1
          for (int32_t t = place.pads.begin; read_by_padding && t < place.pads.end; ++t) {
            const auto more_a = unit.plain(clip, t).template load<Values>(b.grad_a, nullptr, row);
            const auto more_b = unit.plain(clip, t).template load<Values>(b.grad_b, nullptr, row);
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
          const Values grad = Values::of(total);
          plain.store(b.grad, nullptr, row, grad);
          if (b.grad_shifted == nullptr) return;
          shifted.store(b.grad_shifted, b.grad_unread_in, row, grad);
#pragma unroll 1
          for (int32_t t = place.pads.begin; t < place.pads.end; ++t) {
            unit.plain(clip, t).store(b.grad_shifted, nullptr, row, Values{});
          }
        });
      }
    });
  }
  if (b.sums == nullptr) return;
  const int32_t channels = a.run / static_cast<int32_t>(sizeof(typename Element::Stored));
  sums.for_each_channel_of_block(a, unit.begin, [&](int32_t channel, const Wide* of) {
    Wide* slice = static_cast<Wide*>(b.sums) + int64_t{blockIdx.y} * (1 + kNorms) * channels + channel;
#pragma unroll
    for (int sum = 0; sum < 1 + kRead; ++sum) slice[sum * channels] = of[sum];
  });
}

// The sums of x - x[0] and of its square by channel, for each slice: a block of a column of the grid. The first row is
// near the mean, so that the variance is no small difference of large numbers.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, 3)
    sum_channels(const __grid_constant__ ResidualArgs a, const __grid_constant__ ChannelStatistics c) {
  using Values = Pack<Element, kLanes>;
  using Wide = typename Element::Wide;
  constexpr int kBatch = kLanes == 1 ? 1 : 4;
  const Unit<Values> unit(a);
  ChannelSums<Element, kLanes, 2> sums;
  if (unit.exists()) {
    const Values origin = unit.plain(0, 0).template load<Values>(c.x, nullptr, 0);
    unit.for_each_frame([&](int32_t clip, int32_t s, int32_t first, int32_t last) {
      const Spot plain = unit.plain(clip, s);
      for (int32_t start = first + threadIdx.y; start < last; start += kBatch * blockDim.y) {
        Values x[kBatch];
        for_each_of<kBatch>(start, blockDim.y, last,
                            [&](int k, int32_t row) { x[k] = plain.load<Values>(c.x, nullptr, row); });
        for_each_of<kBatch>(start, blockDim.y, last, [&](int k, int32_t) {
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) {
            const Wide distance = x[k][lane] - origin[lane];
            sums.of[0][lane] += distance;
            sums.of[1][lane] += distance * distance;
          }
        });
      }
    });
  }
  const int32_t channels = a.run / static_cast<int32_t>(sizeof(typename Element::Stored));
  sums.for_each_channel_of_block(a, unit.begin, [&](int32_t channel, const Wide* of) {
    Wide* const slice = static_cast<Wide*>(c.sums) + int64_t{blockIdx.y} * 2 * channels + channel;
    slice[0] = of[0];
    slice[channels] = of[1];
  });
}

// Mean and variance out of these sums; the running ones follow by `momentum`. Block: channels x threads that share the
// slices.
template <class Element>
__global__ void __launch_bounds__(kResidualThreads)
    finish_statistics(const __grid_constant__ ChannelStatistics c, int32_t channels, int64_t count) {
  using Wide = typename Element::Wide;
  const int32_t channel = blockIdx.x * blockDim.x + threadIdx.x;
  __shared__ Wide shared[2][kResidualThreads];
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  Wide sums[2] = {};
  for (int32_t slice = threadIdx.y; slice < c.slices && channel < channels; slice += blockDim.y) {
    const Wide* const of = static_cast<const Wide*>(c.sums) + int64_t{slice} * 2 * channels + channel;
    sums[0] += of[0];
    sums[1] += of[channels];
  }
  shared[0][thread] = sums[0];
  shared[1][thread] = sums[1];
  __syncthreads();
  if (threadIdx.y != 0 || channel >= channels) return;
  for (uint32_t y = 1; y < blockDim.y; ++y) {
    sums[0] += shared[0][y * blockDim.x + threadIdx.x];
    sums[1] += shared[1][y * blockDim.x + threadIdx.x];
  }
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
}

#endif

}  // namespace tsm_jit
