// Naive backward of the end of a residual block: read this first. Tests compare add_relu_backward.cuh with it.
//
//     grad = (grad_a + grad_b) where out > 0, else 0
//
// Tensors   out, grad_a, grad_b: in the layout of `out`. grad: unshifted. grad_shifted: the same, shifted
// Grid      one thread per element of grad
#pragma once

#include "core/naive.cuh"

namespace tsm_jit {

template <class Element>
__global__ void add_relu_backward_naive(NaiveStream<Element> grad, NaiveStream<Element> grad_shifted,
                                        NaiveStream<Element> out, NaiveStream<Element> grad_a,
                                        NaiveStream<Element> grad_b, NaiveShape s) {
  const int64_t i = naive_index();
  if (i >= s.numel()) return;
  NaiveIndex at(s, i);
  const bool is_masked = out.load(s, at) <= 0;
  auto sum = grad_a.load(s, at) + grad_b.load(s, at);
  if (out.is_shifted && s.padding != Padding::zeros) {  // consumers also read the copies of this frame
    const FrameRange pads = shifted_index(at.t, s.offset[at.channel], s.n_segment_shifted, s.padding).pads;
    for (int32_t t = pads.begin; t < pads.end; ++t) {
      const int64_t copy = i + (t - at.t) * s.frame_numel();
      if (grad_a.data != nullptr) sum += Element::to_acc(grad_a.data[copy]);
      if (grad_b.data != nullptr) sum += Element::to_acc(grad_b.data[copy]);
    }
  }
  const auto rounded = Element::from_acc(is_masked ? 0 : sum);
  grad.store(s, at, rounded, {});
  grad_shifted.store(s, at, rounded, {});
}

// Sums per channel, channels_last: sum(grad) and sum(grad * (normed - mean)). Grid: one thread per channel.
template <class Element>
__global__ void channel_sums_naive(double* sums, const typename Element::storage_t* grad,
                                   const typename Element::storage_t* normed, const typename Element::acc_t* mean,
                                   int64_t rows, int64_t channels) {
  const int64_t c = naive_index();
  if (c >= channels) return;
  double sum = 0, product = 0;
  for (int64_t i = c; i < rows * channels; i += channels) {
    sum += Element::to_acc(grad[i]);
    product += Element::to_acc(grad[i]) * (static_cast<double>(Element::to_acc(normed[i])) - mean[c]);
  }
  sums[c] = sum;
  sums[channels + c] = product;
}

}  // namespace tsm_jit
