// Naive stem of a ResNet: read this first. Tests compare norm_relu_max_pool.cuh with it.
//
//     out = max_pool2d(relu(z * scale + bias), kernel_size=3, stride=2, padding=1)
//
// Tensors   z: [clips * frames, height, width, channels]. out: half as many rows and columns, in either layout
// Grid      one thread per element of out, of shape s
#pragma once

#include "core/naive.cuh"

namespace tsm_jit {

template <class Element>
__global__ void norm_relu_max_pool_naive(NaiveStream<Element> out, const typename Element::storage_t* z,
                                         NaiveNorm<typename Element::acc_t> norm, NaiveShape s, int32_t height,
                                         int32_t width) {
  const int64_t i = naive_index();
  if (i >= s.numel()) return;
  const NaiveIndex at(s, i);
  const int64_t c = at.channel, out_width = (width + 1) / 2, h0 = at.outer / out_width * 2,
                w0 = at.outer % out_width * 2;
  const typename Element::storage_t* const frame = z + (at.clip * s.frames + at.t) * height * width * s.channels;
  typename Element::acc_t largest = 0;  // of a ReLU
  for (int64_t h = h0 - 1; h <= h0 + 1; ++h) {
    for (int64_t w = w0 - 1; w <= w0 + 1; ++w) {
      if (h < 0 || h >= height || w < 0 || w >= width) continue;
      const auto x = Element::to_acc(frame[(h * width + w) * s.channels + c]) * norm.scale(c) + norm.bias_term(c);
      if (!(x <= largest) && largest == largest) largest = x;  // NaN stays
    }
  }
  const auto rounded = Element::from_acc(largest);
  out.store(s, at, rounded, s.padding == Padding::zeros ? typename Element::storage_t{} : rounded);
}

}  // namespace tsm_jit
