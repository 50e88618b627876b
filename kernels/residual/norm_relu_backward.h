// The backward of relu(norm(z)) in two passes over grad and z. CUDA only, channels_last (channel_numel == 1).
//
//     masked = grad where norm(z) > 0, else 0         the ReLU mask is recomputed from z, so relu(norm(z)) is not read
//     sums   = partial sums of masked and of masked * (z - mean)             norm_relu_grad_sums_cuda
//     out    = masked * weight / sqrt(variance + epsilon) + batch_norm(z)    norm_relu_backward_cuda
//
// batch_norm is the gradient through mean and variance of the batch. norm_grads computes it from the sums.
#pragma once

#include "residual/residual_stream.h"

namespace tsm_jit {

struct NormReluBackward {
  const void *grad, *z;
  Norm norm;
  void* sums;  // [slices, 1 + kNorms, channels], the first two rows are written
  int32_t slices;
  Norm batch_norm;  // see NormGrads; a null mean: mean and variance are constants
  void* out;        // the gradient of z; may be `grad`
};

const char* norm_relu_grad_sums_cuda(const ResidualStream& r, const NormReluBackward& b, void* stream);
const char* norm_relu_backward_cuda(const ResidualStream& r, const NormReluBackward& b, void* stream);

}  // namespace tsm_jit
