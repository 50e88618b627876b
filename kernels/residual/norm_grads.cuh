// CUDA kernel of the gradients of norms; norm_grads.h has the formulas.
//
// Tensors      sums: [slices, 1 + kNorms, channels]; grads: [1 + 4 * kNorms, channels]
// Block, grid  8 channels x 32 threads that share the slices; x covers the channels
// Aliasing     none
// Bytes moved  sums and grads once; the launch takes most of the time
#pragma once

#include "residual/launch_plan.h"
#include "residual/norm_grads.h"
#include "residual/stream.cuh"

namespace tsm_jit {

template <class acc_t>
__global__ void norm_grads_kernel(const __grid_constant__ NormGrads n, int32_t channels);

#if !defined(TSM_JIT_NVRTC)

template <class acc_t>
__global__ void __launch_bounds__(kResidualThreads)
    norm_grads_kernel(const __grid_constant__ NormGrads n, int32_t channels) {
  const int32_t channel = blockIdx.x * blockDim.x + threadIdx.x;
  acc_t sums[1 + kNorms];
  if (!add_slices(n.sums, n.slices, channels, channel, sums)) return;
  acc_t* grads = static_cast<acc_t*>(n.grads) + channel;
  *grads = 0;
#pragma unroll
  for (int norm = 0; norm < kNorms; ++norm) {
    if (n.variance[norm] == nullptr) continue;
    const acc_t variance = static_cast<const acc_t*>(n.variance[norm])[channel];
    const acc_t d = rsqrt(variance + static_cast<acc_t>(n.epsilon[norm]));
    const acc_t grad_weight = sums[1 + norm] * d, grad_bias = sums[0];
    const acc_t factor = static_cast<const acc_t*>(n.weight[norm])[channel] * d / -static_cast<acc_t>(n.count);
    const acc_t rows[] = {grad_weight, grad_bias, factor * grad_weight, factor * grad_bias};
#pragma unroll
    for (int row = 0; row < 4; ++row) grads[(1 + 4 * norm + row) * channels] = rows[row];
  }
}

#endif

const char* norm_grads_cuda(DType dtype, int64_t channels, const NormGrads& n, void* stream) {
  const LaunchPlan plan = plan_per_channel(channels);
  const auto start = [&](auto kernel) {
    return launch(kernel, plan.grid, plan.block, 0, stream, n, static_cast<int32_t>(channels));
  };
  return dtype == DType::float64 ? start(norm_grads_kernel<double>) : start(norm_grads_kernel<float>);
}

}  // namespace tsm_jit
