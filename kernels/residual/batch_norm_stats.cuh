// CUDA kernels of the statistics of a batch normalization, two launches.
//
//     sums                = x - x[0] and (x - x[0])^2 per channel and slice             batch_norm_sums_kernel
//     mean, variance      of these; the running statistics follow by `momentum`         batch_norm_stats_kernel
//
// x[0] is the first row. It is near the mean, so the variance is not a small difference of large numbers.
//
// Tensors      x: unshifted, channels_last. sums: [slices, 2, channels]. The others: [channels]
// Block, grid  sums: see stream.cuh, each block in y writes one slice. stats: 8 channels x 32 threads that share slices
// Aliasing     none
// Bytes moved  x once
#pragma once

#include "residual/batch_norm_stats.h"
#include "residual/launch_plan.h"
#include "residual/stream.cuh"

namespace tsm_jit {

constexpr int kBlocksStats = 3;

template <class Element, int kLanes>
__global__ void batch_norm_sums_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ BatchNormStats c);
template <class Element>
__global__ void batch_norm_stats_kernel(const __grid_constant__ BatchNormStats c, int32_t channels, int64_t count);

#if !defined(TSM_JIT_NVRTC)

template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksStats)
    batch_norm_sums_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ BatchNormStats c) {
  using Vec = Packed<Element, kLanes>;
  using acc_t = typename Element::acc_t;
  const ChannelSlice<Vec> slice(a);
  ChannelSums<Element, kLanes, 2> sums;
  if (slice.exists()) {
    const Vec origin = slice.rows(c.x, 0, 0, 0).load(0);
    slice.for_each_task([&](const Task& task) {
      const int32_t s = task.frames.begin, row = task.begin_row + threadIdx.y;
      const auto x_rows = slice.rows(c.x, task.clip, s, row);
      const ThreadRows rows{row, static_cast<int32_t>(blockDim.y), task.end_row};
      Vec x[kRowsPerThread];
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        if (rows.has(k)) x[k] = x_rows.load(k);
      }
#pragma unroll
      for (int k = 0; k < kRowsPerThread; ++k) {
        if (!rows.has(k)) continue;
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          const acc_t distance = x[k][lane] - origin[lane];
          sums.of[0][lane] += distance;
          sums.of[1][lane] += distance * distance;
        }
      }
    });
  }
  sums.store(a, c.sums, 2);
}

template <class Element>
__global__ void __launch_bounds__(kResidualThreads)
    batch_norm_stats_kernel(const __grid_constant__ BatchNormStats c, int32_t channels, int64_t count) {
  using acc_t = typename Element::acc_t;
  const int32_t channel = blockIdx.x * blockDim.x + threadIdx.x;
  acc_t sums[2];
  if (!add_slices(c.sums, c.slices, channels, channel, sums)) return;
  const acc_t distance = sums[0] / count, raw = sums[1] / count - distance * distance;
  const acc_t variance = raw < 0 ? 0 : raw;  // rounding may make it negative; NaN stays
  const acc_t mean = Element::to_acc(static_cast<const typename Element::storage_t*>(c.x)[channel]) + distance;
  static_cast<acc_t*>(c.mean)[channel] = mean;
  static_cast<acc_t*>(c.variance)[channel] = variance;
  const acc_t unbiased = count > 1 ? variance * count / (count - 1) : variance, momentum = c.momentum;
  acc_t* const running_mean = static_cast<acc_t*>(c.running_mean) + channel;
  acc_t* const running_variance = static_cast<acc_t*>(c.running_variance) + channel;
  *running_mean += momentum * (mean - *running_mean);
  *running_variance += momentum * (unbiased - *running_variance);
  if (channel == 0) ++*c.num_batches_tracked;
}

#endif

int32_t stats_slices(const ResidualStream& r) { return slices_to_fill_gpu(r, kBlocksStats); }

const char* batch_norm_stats_cuda(const ResidualStream& r, const BatchNormStats& c, void* stream) {
  const bool vectors = uses_vectors(r, {c.x});
  LaunchPlan plan;
  if (const char* error = make_plan(r, vectors, {c.slices, 0, false, false}, plan)) return error;
  const int64_t channels = r.shift.inner_bytes / element_bytes(r.dtype);
  const int64_t count = r.shift.clips * r.shift.frames * r.shift.outer_size;
  const LaunchPlan per_channel = plan_per_channel(channels);
  return dispatch_vec(r.dtype, vectors, [&](auto vec) -> const char* {
    using Element = typename decltype(vec)::Element;
    const auto sums_kernel = batch_norm_sums_kernel<Element, decltype(vec)::kLanes>;
    if (const char* error = launch(sums_kernel, plan.grid, plan.block, 0, stream, plan.args, c)) return error;
    return launch(batch_norm_stats_kernel<Element>, per_channel.grid, per_channel.block, 0, stream, c,
                  static_cast<int32_t>(channels), count);
  });
}

}  // namespace tsm_jit
