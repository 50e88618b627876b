// Naive end of a residual block: read this first. Tests compare norm_add_relu.cuh with it.
//
//     out = relu(z * z_scale + identity * identity_scale + bias)
//
// Tensors   z: unshifted. identity, out: in either layout; see residual_stream.h
// Grid      one thread per element of z
#pragma once

#include "core/naive.cuh"

namespace tsm_jit {

template <class Element>
__global__ void norm_add_relu_naive(NaiveStream<Element> out, NaiveStream<Element> z,
                                    NaiveNorm<typename Element::acc_t> z_norm, NaiveStream<Element> identity,
                                    NaiveNorm<typename Element::acc_t> identity_norm, NaiveShape s, bool relu) {
  const int64_t i = naive_index();
  if (i >= s.numel()) return;
  const NaiveIndex at(s, i);
  const int64_t c = at.channel;
  const auto bias = z_norm.bias_term(c) + identity_norm.bias_term(c);
  auto x = z.load(s, at) * z_norm.scale(c) + (identity.load(s, at) * identity_norm.scale(c) + bias);
  if (relu && x <= 0) x = 0;  // NaN stays
  const auto rounded = Element::from_acc(x);
  out.store(s, at, rounded, s.padding == Padding::zeros ? typename Element::storage_t{} : rounded);
}

}  // namespace tsm_jit
