// CUDA kernel of the backward of the end of a residual block.
//
//     grad = (grad_a + grad_b) where out > 0, else 0
//     sums = grad and grad * (normed - mean) per channel, before grad is rounded
//
// Tensors      out, grad_a, grad_b: in the layout of `out`. grad: unshifted. grad_shifted: the same values, shifted
// Block, grid  see stream.cuh; with `sums` the grid has `slices` blocks in y, and each writes one slice
// Aliasing     an output may be an input of the same layout
// Bytes moved  out, grad_a and grad_b, each `normed`, grad and grad_shifted once each
#pragma once

#include "residual/add_relu_backward.h"
#include "residual/launch_plan.h"
#include "residual/stream.cuh"

namespace tsm_jit {

constexpr int kBlocksBackward = 2;

template <class Element, int kLanes, int kReadNorms>
__global__ void add_relu_backward_kernel(const __grid_constant__ StreamArgs a,
                                         const __grid_constant__ AddReluBackward b);

#if !defined(TSM_JIT_NVRTC)

// kReadNorms: how many norms have sums.
template <class Element, int kLanes, int kReadNorms>
__global__ void __launch_bounds__(kResidualThreads, kBlocksBackward)
    add_relu_backward_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ AddReluBackward b) {
  using Vec = Packed<Element, kLanes>;
  using acc_t = typename Element::acc_t;
  constexpr int kBatch = kLanes == 1 ? 1 : 2;  // rows in flight
  const ChannelSlice<Vec> slice(a);
  ChannelSums<Element, kLanes, 1 + kReadNorms> sums;
  if (slice.exists()) {
    acc_t mean[kReadNorms][kLanes] = {};
    const ChannelReader<kLanes> channels(a, slice.first_element());
#pragma unroll
    for (int n = 0; n < kReadNorms; ++n) {
      if (b.normed[n] != nullptr) channels.template read<Native<acc_t>>(a, {b.mean[n]}, {mean[n]});
    }
    slice.for_each_task([&](const Task& task) {
      const int32_t clip = task.clip, s = task.frames.begin, first_row = task.begin_row + threadIdx.y,
                    step = blockDim.y;
      const ShiftedIndex to = slice.index(s), from = slice.index(s, b.out_is_shifted);
      const bool padding_has_grad = b.out_is_shifted && a.padding != Padding::zeros;
      for (int32_t row = first_row; row < task.end_row; row += kBatch * step) {
        const ThreadRows rows{row, step, task.end_row};
        const auto out_rows = slice.rows_at(from, b.out, b.boundary_out, clip, row);
        const auto grad_a_rows = slice.rows_at(from, b.grad_a, b.grad_boundary, clip, row);
        const auto grad_b_rows = slice.rows_at(from, b.grad_b, nullptr, clip, row);
        // Load all rows before the first one is used.
        Vec out[kBatch], grad_a[kBatch], grad_b[kBatch], normed[kReadNorms][kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (!rows.has(k)) continue;
          out[k] = out_rows.load(k);
          grad_a[k] = grad_a_rows.load(k);
          grad_b[k] = grad_b_rows.load(k);
#pragma unroll
          for (int n = 0; n < kReadNorms; ++n) normed[n][k] = slice.rows(b.normed[n], clip, s, row).load(k);
        }
        const auto grad_rows = slice.rows(b.grad, clip, s, row);
        const auto grad_shifted_rows = slice.rows_at(to, b.grad_shifted, b.grad_boundary_in, clip, row);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (!rows.has(k)) continue;
          // The gradient of this frame, and of the copies of it that padding made.
          acc_t grad[kLanes];
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) grad[lane] = grad_a[k][lane] + grad_b[k][lane];
#pragma unroll 1
          for (int32_t t = to.pads.begin; padding_has_grad && t < to.pads.end; ++t) {
            const Vec more_a = slice.rows(b.grad_a, clip, t, row).load(k);
            const Vec more_b = slice.rows(b.grad_b, clip, t, row).load(k);
#pragma unroll
            for (int lane = 0; lane < kLanes; ++lane) grad[lane] += more_a[lane] + more_b[lane];
          }
          // The ReLU mask, and the sums per channel.
#pragma unroll
          for (int lane = 0; lane < kLanes; ++lane) {
            if (out[k][lane] <= 0) grad[lane] = 0;
            sums.of[0][lane] += grad[lane];
#pragma unroll
            for (int n = 0; n < kReadNorms; ++n) {
              sums.of[1 + n][lane] += grad[lane] * (normed[n][k][lane] - mean[n][lane]);
            }
          }
          // Store in one or both layouts. Padding passes no gradient to the identity.
          const Vec rounded = Vec::of(grad);
          grad_rows.store(k, rounded);
          if (b.grad_shifted != nullptr) {
            grad_shifted_rows.store(k, rounded);
#pragma unroll 1
            for (int32_t t = to.pads.begin; t < to.pads.end; ++t) {
              slice.rows(b.grad_shifted, clip, t, row).store(k, Vec{});
            }
          }
        }
      }
    });
  }
  if (b.sums != nullptr) sums.store(a, b.sums, 1 + kNorms);
}

#endif

int32_t backward_slices(const ResidualStream& r) { return slices_to_fill_gpu(r, kBlocksBackward); }

const char* add_relu_backward_cuda(const ResidualStream& r, const AddReluBackward& b, void* stream) {
  const bool vectors = uses_vectors(r,
                                    {b.out, b.boundary_out, b.grad_a, b.grad_b, b.grad_boundary, b.grad, b.grad_shifted,
                                     b.grad_boundary_in, b.normed[0], b.normed[1]},
                                    {}, {b.mean[0], b.mean[1]});
  LaunchPlan plan;
  const int32_t slices = b.sums == nullptr ? 0 : b.slices;
  if (const char* error = make_plan(r, vectors, {slices, kBlocksBackward, false, false}, plan)) return error;
  return dispatch_vec(r.dtype, vectors, [&](auto vec) -> const char* {
    using Element = typename decltype(vec)::Element;
    constexpr int kLanes = decltype(vec)::kLanes;
    const auto start = [&](auto kernel) { return launch(kernel, plan.grid, plan.block, 0, stream, plan.args, b); };
    if constexpr (kLanes > 1) {
      if (b.normed[1] == nullptr) return start(add_relu_backward_kernel<Element, kLanes, 1>);
    }
    return start(add_relu_backward_kernel<Element, kLanes, 2>);
  });
}

}  // namespace tsm_jit
