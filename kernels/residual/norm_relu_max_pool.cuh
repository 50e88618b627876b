// CUDA kernel of the stem of a ResNet.
//
//     out = max over a 3x3 window, stride 2, padding 1, of relu(z * scale + bias)
//
// Tensors      z: [clips, frames, height * width, inner_bytes]; unshifted, out: half as many rows and columns
// Block, grid  see stream.cuh; a row is a pixel of the output, and a thread has the nine pixels of its window in flight
// Aliasing     none
// Bytes moved  z once (windows overlap in L1 and L2), each output once, and its boundary frames
#pragma once

#include "residual/launch_plan.h"
#include "residual/norm_relu_max_pool.h"
#include "residual/stream.cuh"

namespace tsm_jit {

constexpr int kBlocksPool = 2;

template <class Element, int kLanes>
__global__ void norm_relu_max_pool_kernel(const __grid_constant__ StreamArgs a,
                                          const __grid_constant__ NormReluMaxPool p);

#if !defined(TSM_JIT_NVRTC)

template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksPool)
    norm_relu_max_pool_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ NormReluMaxPool p) {
  using Vec = Packed<Element, kLanes>;
  using acc_t = typename Element::acc_t;
  constexpr int kWindow = 3, kStride = 2;
  const ChannelSlice<Vec> slice(a);
  if (!slice.exists()) return;
  acc_t scale[kLanes], bias[kLanes] = {};
  read_norm<Element>(a, p.z_norm, ChannelReader<kLanes>(a, slice.first_element()), scale, bias);
  const int32_t columns = ceil_div(p.width, kStride);
  slice.for_each_task([&](const Task& task) {
    const int32_t s = task.frames.begin;
    const ShiftedIndex to = slice.index(s);
    const auto pixels = slice.consecutive_rows(p.z, (int64_t{task.clip} * a.frames + s) * p.height * p.width);
    for (int32_t row = task.begin_row + threadIdx.y; row < task.end_row; row += blockDim.y) {
      const int32_t top = row / columns * kStride - 1, left = row % columns * kStride - 1;
      const auto is_inside = [&](int32_t h, int32_t w) { return 0 <= h && h < p.height && 0 <= w && w < p.width; };
      // Load the whole window before its first pixel is used.
      Vec z[kWindow][kWindow];
#pragma unroll
      for (int h = 0; h < kWindow; ++h) {
#pragma unroll
        for (int w = 0; w < kWindow; ++w) {
          if (is_inside(top + h, left + w)) z[h][w] = pixels.load((top + h) * p.width + left + w);
        }
      }
      acc_t x[kLanes] = {};  // the smallest value of a ReLU
#pragma unroll
      for (int h = 0; h < kWindow; ++h) {
#pragma unroll
        for (int w = 0; w < kWindow; ++w) {
          if (!is_inside(top + h, left + w)) continue;
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) {
            x[lane] = max_or_nan(x[lane], z[h][w][lane] * scale[lane] + bias[lane]);
          }
        }
      }
      const Vec pooled = Vec::of(x);
      slice.rows(p.unshifted, task.clip, s, row).store(0, pooled);
      slice.rows_at(to, p.out, p.boundary_out, task.clip, row).store(0, pooled);
    }
    if (p.out != nullptr) write_padding(p, slice, task, task.begin_row + threadIdx.y);
  });
}

#endif

const char* norm_relu_max_pool_cuda(const ResidualStream& r, const NormReluMaxPool& p, void* stream) {
  const bool vectors = uses_vectors(r, {p.z, p.unshifted, p.out, p.boundary_out}, {p.z_norm});
  LaunchPlan plan;
  if (const char* error = make_plan(r, vectors, {0, kBlocksPool, false, true}, plan)) return error;
  return dispatch_vec(r.dtype, vectors, [&](auto vec) -> const char* {
    const auto kernel = norm_relu_max_pool_kernel<typename decltype(vec)::Element, decltype(vec)::kLanes>;
    return launch(kernel, plan.grid, plan.block, 0, stream, plan.args, p);
  });
}

}  // namespace tsm_jit
