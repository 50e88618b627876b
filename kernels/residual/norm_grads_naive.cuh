// Naive gradients of one norm, in float64: read this first. Tests compare norm_grads.cuh with it; norm_grads.h has the
// formulas.
//
// Tensors   sums: [slices, 1 + kNorms, channels], rows 0 and 1 + norm are read; grads: [4, channels]
// Grid      one thread per channel
#pragma once

#include "core/naive.cuh"
#include "residual/residual_stream.h"

namespace tsm_jit {

template <class acc_t>
__global__ void norm_grads_naive(double* grads, const acc_t* sums, const acc_t* variance, const acc_t* weight,
                                 double epsilon, int32_t norm, int32_t slices, int64_t count, int64_t channels) {
  const int64_t c = naive_index();
  if (c >= channels) return;
  double sum = 0, product = 0;
  for (int32_t slice = 0; slice < slices; ++slice) {
    sum += sums[slice * (1 + kNorms) * channels + c];
    product += sums[(slice * (1 + kNorms) + 1 + norm) * channels + c];
  }
  const double d = rsqrt(static_cast<double>(variance[c]) + epsilon);
  grads[c] = d * product;
  grads[channels + c] = sum;
  grads[2 * channels + c] = -weight[c] * d / count * grads[c];
  grads[3 * channels + c] = -weight[c] * d / count * grads[channels + c];
}

}  // namespace tsm_jit
