// What the naive kernels (*_naive.cuh) share: index arithmetic, spelled out, for one thread per element.
//
// Tests compare the optimised kernels with the naive ones. These are not compiled when tsm_jit is imported.
#pragma once

#include "core/dtype.h"
#include "core/frames.h"
#include "core/launch.h"

namespace tsm_jit {

// Activations [clips, frames, outer_size, channels, channel_numel], contiguous: NCHW has outer_size 1 and
// channel_numel H*W, NHWC has outer_size H*W and channel_numel 1.
struct NaiveShape {
  int64_t clips, frames, outer_size, channels, channel_numel;
  const int32_t* offset;  // [channels], of the channel's group
  int32_t n_segment_shifted;
  Padding padding;
  // Boundary frames are [clips, outer_size, boundary_numel]. The first one of a channel begins at its boundary_begin,
  // the next ones boundary_frame apart, in elements.
  const int64_t *boundary_begin, *boundary_frame;  // [channels]
  int64_t boundary_numel;

  TSM_HOST_DEVICE int64_t frame_numel() const { return outer_size * channels * channel_numel; }
  TSM_HOST_DEVICE int64_t numel() const { return clips * frames * frame_numel(); }
};

// Element i of the activations.
struct NaiveIndex {
  int64_t i, clip, outer, channel, pixel;
  int32_t t;

  __device__ NaiveIndex(const NaiveShape& s, int64_t element) : i(element) {
    pixel = i % s.channel_numel;
    channel = i / s.channel_numel % s.channels;
    outer = i / (s.channel_numel * s.channels) % s.outer_size;
    t = static_cast<int32_t>(i / s.frame_numel() % s.frames);
    clip = i / s.frame_numel() / s.frames;
  }
};

// The element, or channel, that this thread computes.
__device__ inline int64_t naive_index() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

// Activations in the unshifted layout, or with boundary frames in the shifted one. Null data: zeros.
template <class Element>
struct NaiveStream {
  using storage_t = typename Element::storage_t;
  storage_t *data, *boundary;
  bool is_shifted;

  // Returns the address of the value of frame `at.t` of the unshifted layout, or null if there is no such tensor.
  __device__ storage_t* find(const NaiveShape& s, const NaiveIndex& at) const {
    const ShiftedIndex index =
        shifted_index(at.t, is_shifted ? s.offset[at.channel] : 0, s.n_segment_shifted, s.padding);
    if (index.t != kNoFrame) return data == nullptr ? nullptr : data + at.i + (index.t - at.t) * s.frame_numel();
    if (boundary == nullptr) return nullptr;
    const int64_t row = (at.clip * s.outer_size + at.outer) * s.boundary_numel;
    return boundary + row + s.boundary_begin[at.channel] + index.boundary * s.boundary_frame[at.channel] + at.pixel;
  }
  __device__ typename Element::acc_t load(const NaiveShape& s, const NaiveIndex& at) const {
    const storage_t* const from = find(s, at);
    return from == nullptr ? 0 : Element::to_acc(*from);
  }
  // Writes x, and `padding` to the frames of the shifted layout that frame at.t pads.
  __device__ void store(const NaiveShape& s, const NaiveIndex& at, storage_t x, storage_t padding) const {
    if (storage_t* const to = find(s, at)) *to = x;
    if (!is_shifted || data == nullptr) return;
    const FrameRange pads = shifted_index(at.t, s.offset[at.channel], s.n_segment_shifted, s.padding).pads;
    for (int32_t t = pads.begin; t < pads.end; ++t) data[at.i + (t - at.t) * s.frame_numel()] = padding;
  }
};

// Batch normalization as x * scale + shift. Null mean: scale is 1 and shift is 0.
template <class acc_t>
struct NaiveNorm {
  const acc_t *mean, *variance, *weight, *bias;  // [channels]
  double epsilon;

  __device__ acc_t scale(int64_t c) const {
    return mean == nullptr ? 1 : weight[c] * rsqrt(variance[c] + static_cast<acc_t>(epsilon));
  }
  __device__ acc_t bias_term(int64_t c) const { return mean == nullptr ? 0 : bias[c] - mean[c] * scale(c); }
};

}  // namespace tsm_jit
