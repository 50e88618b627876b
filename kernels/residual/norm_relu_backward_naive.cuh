// Naive backward of relu(norm(z)): read this first. Tests compare norm_relu_backward.cuh with it.
//
//     masked = grad where norm(z) > 0, else 0
//     out    = masked * scale + batch_norm(z)
//
// Tensors   grad, z, masked, out: [rows, channels]
// Grid      one thread per element
#pragma once

#include "core/naive.cuh"

namespace tsm_jit {

template <class Element>
__global__ void norm_relu_backward_naive(typename Element::storage_t* out, typename Element::storage_t* masked,
                                         const typename Element::storage_t* grad, const typename Element::storage_t* z,
                                         NaiveNorm<typename Element::acc_t> norm,
                                         NaiveNorm<typename Element::acc_t> batch_norm, int64_t rows,
                                         int64_t channels) {
  const int64_t i = naive_index(), c = i % channels;
  if (i >= rows * channels) return;
  const auto x = Element::to_acc(z[i]);
  const auto normed =
      Element::to_acc(Element::from_acc(x * norm.scale(c) + norm.bias_term(c)));  // as the forward rounds
  masked[i] = normed <= 0 ? typename Element::storage_t{} : grad[i];
  auto grad_z = Element::to_acc(masked[i]) * norm.scale(c) + batch_norm.bias_term(c);
  if (batch_norm.mean != nullptr) grad_z += x * batch_norm.scale(c);
  out[i] = Element::from_acc(grad_z);
}

}  // namespace tsm_jit
