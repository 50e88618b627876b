// CUDA kernels of the backward of relu(norm(z)).
//
//     masked = grad where norm(z), rounded as in the forward, is > 0; else 0
//     sums   = masked and masked * (z - mean) per channel                                norm_relu_grad_sums_kernel
//     out    = masked * weight / sqrt(variance + epsilon) + batch_norm(z), rounded once   norm_relu_backward_kernel
//
// Tensors      grad, z, out: unshifted
// Block, grid  see stream.cuh; norm_relu_grad_sums_kernel has `slices` blocks in y, and each writes one slice
// Aliasing     out may be grad
// Bytes moved  sums: grad and z once each. backward: grad, z and out once each
#pragma once

#include "residual/launch_plan.h"
#include "residual/norm_relu_backward.h"
#include "residual/stream.cuh"

namespace tsm_jit {

constexpr int kBlocksNormReluBackward = 2;

template <class Element, int kLanes>
__global__ void norm_relu_grad_sums_kernel(const __grid_constant__ StreamArgs a,
                                           const __grid_constant__ NormReluBackward b);
template <class Element, int kLanes>
__global__ void norm_relu_backward_kernel(const __grid_constant__ StreamArgs a,
                                          const __grid_constant__ NormReluBackward b);

#if !defined(TSM_JIT_NVRTC)

// masked = grad where norm(z) > 0, else 0. norm(z) is rounded as in the forward. A NaN counts as positive.
template <class Element, int kLanes>
struct MaskGradient {
  using Vec = Packed<Element, kLanes>;
  using acc_t = typename Element::acc_t;
  acc_t scale[kLanes], bias[kLanes] = {};

  __device__ MaskGradient(const StreamArgs& a, const Norm& norm, const ChannelReader<kLanes>& channels) {
    read_norm<Element>(a, norm, channels, scale, bias);
  }
  __device__ void operator()(const Vec& grad, const Vec& z, acc_t (&masked)[kLanes]) const {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) masked[lane] = z[lane] * scale[lane] + bias[lane];
    const Vec normed = Vec::of(masked);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) masked[lane] = normed[lane] <= 0 ? 0 : grad[lane];
  }
};

// Calls visit(k, z, masked) for row k of each thread in a task. All rows are loaded before the first one is used.
template <class Element, int kLanes, class Visit>
__device__ void for_each_masked_row(const ChannelSlice<Packed<Element, kLanes>>& slice, const Task& task,
                                    const NormReluBackward& b, const MaskGradient<Element, kLanes>& mask_gradient,
                                    Visit visit) {
  using Vec = Packed<Element, kLanes>;
  const int32_t s = task.frames.begin, row = task.begin_row + threadIdx.y;
  const auto grad_rows = slice.rows(b.grad, task.clip, s, row), z_rows = slice.rows(b.z, task.clip, s, row);
  const ThreadRows rows{row, static_cast<int32_t>(blockDim.y), task.end_row};
  Vec grad[kRowsPerThread], z[kRowsPerThread];
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    if (!rows.has(k)) continue;
    grad[k] = grad_rows.load(k);
    z[k] = z_rows.load(k);
  }
#pragma unroll
  for (int k = 0; k < kRowsPerThread; ++k) {
    if (!rows.has(k)) continue;
    typename Element::acc_t masked[kLanes];
    mask_gradient(grad[k], z[k], masked);
    visit(k, z[k], masked);
  }
}

template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksNormReluBackward)
    norm_relu_grad_sums_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ NormReluBackward b) {
  using Vec = Packed<Element, kLanes>;
  using acc_t = typename Element::acc_t;
  const ChannelSlice<Vec> slice(a);
  ChannelSums<Element, kLanes, 2> sums;
  if (slice.exists()) {
    const ChannelReader<kLanes> channels(a, slice.first_element());
    const MaskGradient<Element, kLanes> mask_gradient(a, b.norm, channels);
    acc_t mean[kLanes];
    channels.template read<Native<acc_t>>(a, {b.norm.mean}, {mean});
    slice.for_each_task([&](const Task& task) {
      for_each_masked_row(slice, task, b, mask_gradient, [&](int, const Vec& z, const acc_t(&masked)[kLanes]) {
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          sums.of[0][lane] += masked[lane];
          sums.of[1][lane] += masked[lane] * (z[lane] - mean[lane]);
        }
      });
    });
  }
  sums.store(a, b.sums, 1 + kNorms);
}

// Tasks are visited from the first one on, as norm_relu_grad_sums_kernel ended there.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksNormReluBackward)
    norm_relu_backward_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ NormReluBackward b) {
  using Vec = Packed<Element, kLanes>;
  using acc_t = typename Element::acc_t;
  const ChannelSlice<Vec> slice(a);
  if (!slice.exists()) return;
  const ChannelReader<kLanes> channels(a, slice.first_element());
  const MaskGradient<Element, kLanes> mask_gradient(a, b.norm, channels);
  acc_t batch_scale[kLanes] = {}, batch_bias[kLanes] = {};
  const bool has_batch_norm = b.batch_norm.mean != nullptr;
  if (has_batch_norm) read_norm<Element>(a, b.batch_norm, channels, batch_scale, batch_bias);
  slice.template for_each_task<false>([&](const Task& task) {
    const auto out_rows = slice.rows(b.out, task.clip, task.frames.begin, task.begin_row + threadIdx.y);
    for_each_masked_row(slice, task, b, mask_gradient, [&](int k, const Vec& z, const acc_t(&masked)[kLanes]) {
      acc_t x[kLanes];
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        x[lane] = masked[lane] * mask_gradient.scale[lane] + batch_bias[lane];
        if (has_batch_norm) x[lane] += z[lane] * batch_scale[lane];
      }
      out_rows.store(k, Vec::of(x));
    });
  });
}

#endif

const char* norm_relu_grad_sums_cuda(const ResidualStream& r, const NormReluBackward& b, void* stream) {
  const bool vectors = uses_vectors(r, {b.grad, b.z}, {b.norm});
  LaunchPlan plan;
  if (const char* error = make_plan(r, vectors, {b.slices, 0, false, false}, plan)) return error;
  return dispatch_vec(r.dtype, vectors, [&](auto vec) -> const char* {
    const auto kernel = norm_relu_grad_sums_kernel<typename decltype(vec)::Element, decltype(vec)::kLanes>;
    return launch(kernel, plan.grid, plan.block, 0, stream, plan.args, b);
  });
}

const char* norm_relu_backward_cuda(const ResidualStream& r, const NormReluBackward& b, void* stream) {
  const bool vectors = uses_vectors(r, {b.grad, b.z, b.out}, {b.norm, b.batch_norm});
  LaunchPlan plan;
  if (const char* error = make_plan(r, vectors, {0, kBlocksNormReluBackward, false, false}, plan)) return error;
  return dispatch_vec(r.dtype, vectors, [&](auto vec) -> const char* {
    const auto kernel = norm_relu_backward_kernel<typename decltype(vec)::Element, decltype(vec)::kLanes>;
    return launch(kernel, plan.grid, plan.block, 0, stream, plan.args, b);
  });
}

}  // namespace tsm_jit
