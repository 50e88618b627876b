// Naive statistics of a batch normalization, in float64: read this first. Tests compare batch_norm_stats.cuh with it.
//
//     mean = sum(x) / rows, variance = sum((x - mean)^2) / rows
//
// Tensors   x: [rows, channels]; mean, variance: [channels]
// Grid      one thread per channel
#pragma once

#include "core/naive.cuh"

namespace tsm_jit {

template <class Element>
__global__ void batch_norm_stats_naive(double* mean, double* variance, const typename Element::storage_t* x,
                                       int64_t rows, int64_t channels) {
  const int64_t c = naive_index();
  if (c >= channels) return;
  double sum = 0, squares = 0;
  for (int64_t i = c; i < rows * channels; i += channels) sum += Element::to_acc(x[i]);
  mean[c] = sum / rows;
  for (int64_t i = c; i < rows * channels; i += channels) {
    const double distance = Element::to_acc(x[i]) - mean[c];
    squares += distance * distance;
  }
  variance[c] = squares / rows;
}

}  // namespace tsm_jit
