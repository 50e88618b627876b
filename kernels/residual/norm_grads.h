// The gradients of up to kNorms batch normalizations, from the sums that a backward kernel computed. CUDA only.
//
// With d = 1 / sqrt(variance + epsilon), g the gradient of norm(x) and sums over the `count` elements of a channel:
//
//     grad_weight  = d * sum(g * (x - mean))
//     grad_bias    = sum(g)
//     batch_weight = -weight * d / count * grad_weight
//     batch_bias   = -weight * d / count * grad_bias
//
// If mean and variance are computed from x, the gradient of x also passes through them. In total it is
//
//     grad_x = g * weight * d  +  (x - mean) * d * batch_weight + batch_bias
//
// The second term is a norm of x with weight batch_weight and bias batch_bias ("batch_norm" in this folder).
#pragma once

#include "residual/residual_stream.h"

namespace tsm_jit {

struct NormGrads {
  const void* sums;  // [slices, 1 + kNorms, channels] of acc_t
  int32_t slices;
  int64_t count;
  // [1 + 4 * kNorms, channels] of acc_t: a row of zeros; for each norm grad_weight, grad_bias, batch_weight,
  // batch_bias.
  void* grads;
  const void *variance[kNorms], *weight[kNorms];  // null: no norm, or its gradients are not needed
  double epsilon[kNorms];
};

const char* norm_grads_cuda(DType dtype, int64_t channels, const NormGrads& n, void* stream);

}  // namespace tsm_jit
