// CUDA kernels of the end of a residual block.
//
//     out = relu(z * z_scale + identity * identity_scale + bias)
//
//     scale = weight / sqrt(variance + epsilon) of each norm, bias = sum of (norm bias - mean * scale) of both norms
//
// Tensors      z: unshifted. identity, out: unshifted, or shifted with boundary frames; see residual_stream.h
// Block, grid  see stream.cuh
// Aliasing     out may be identity if both have the same layout; out may be z if both are unshifted. A shifted out may
//              be z for norm_add_relu_in_order_kernel alone
// Bytes moved  z, identity and out once each, boundary frames once; with `unshifted` 1 / step^2 of out more
#pragma once

#include "residual/launch_plan.h"
#include "residual/norm_add_relu.h"
#include "residual/stream.cuh"

namespace tsm_jit {

// Blocks per multiprocessor. They limit the registers of a thread, and most registers hold loads in flight.
constexpr int kBlocksAdd = 2, kBlocksNoAdd = 4, kBlocksInOrder = 3;

template <class Element, int kLanes, bool kAdds>
__global__ void norm_add_relu_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ NormAddRelu f);
template <class Element, int kLanes>
__global__ void norm_add_relu_in_order_kernel(const __grid_constant__ StreamArgs a,
                                              const __grid_constant__ NormAddRelu f);

#if !defined(TSM_JIT_NVRTC)

// The arithmetic on one vector. Without norms the scales are 1 and bias is 0, which gives the bits of a plain addition.
template <class Element, int kLanes, bool kAdds>
struct NormAddReluOp {
  using Vec = Packed<Element, kLanes>;
  using acc_t = typename Element::acc_t;
  acc_t z_scale[kLanes], identity_scale[kLanes], bias[kLanes] = {}, lowest;

  __device__ NormAddReluOp(const StreamArgs& a, const NormAddRelu& f, int32_t first_element)
      : lowest(f.relu ? 0 : -bit_cast<float>(0x7f800000u)) {  // -infinity
    const ChannelReader<kLanes> channels(a, first_element);
    read_norm<Element>(a, f.z_norm, channels, z_scale, bias);
    if constexpr (kAdds) read_norm<Element>(a, f.identity_norm, channels, identity_scale, bias);
  }
  __device__ Vec operator()(const Vec& z, const Vec& identity) const {
    acc_t x[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      acc_t rest = bias[lane];
      if constexpr (kAdds) rest += identity[lane] * identity_scale[lane];
      x[lane] = max_or_nan(lowest, z[lane] * z_scale[lane] + rest);
    }
    return Vec::of(x);
  }
};

// Writes x, pixel `row` of frame s, to `unshifted` if it is in one of every step-th rows and columns.
template <class Vec>
__device__ void store_unshifted(const NormAddRelu& f, const ChannelSlice<Vec>& slice, int32_t clip, int32_t s,
                                uint32_t row, const Vec& x) {
  if (f.unshifted == nullptr) return;
  const StreamArgs& a = slice.a;
  const uint32_t width = f.width, step = f.step, h = row / width, w = row - h * width;
  if (h % step != 0 || w % step != 0) return;
  const uint32_t columns = ceil_div(width, step), rows = ceil_div(a.rows / width, step);
  const int64_t pixel = (int64_t{clip} * a.frames + s) * rows * columns + h / step * columns + w / step;
  slice.consecutive_rows(f.unshifted, pixel).store(0, x);
}

// kAdds: is there an identity?
template <class Element, int kLanes, bool kAdds>
__global__ void __launch_bounds__(kResidualThreads, kAdds ? kBlocksAdd : kBlocksNoAdd)
    norm_add_relu_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ NormAddRelu f) {
  using Vec = Packed<Element, kLanes>;
  const ChannelSlice<Vec> slice(a);
  if (!slice.exists()) return;
  const NormAddReluOp<Element, kLanes, kAdds> norm_add_relu(a, f, slice.first_element());
  slice.for_each_task([&](const Task& task) {
    const int32_t s = task.frames.begin, row = task.begin_row + threadIdx.y;
    const ShiftedIndex from = slice.index(s, f.identity_is_shifted), to = slice.index(s, kAdds && f.out_is_shifted);
    const auto z_rows = slice.rows(f.z, task.clip, s, row);
    const auto identity_rows = slice.rows_at(from, f.identity, f.boundary, task.clip, row);
    const auto out_rows = slice.rows_at(to, f.out, f.boundary_out, task.clip, row);
    const ThreadRows rows{row, static_cast<int32_t>(blockDim.y), task.end_row};
    // Load all rows before the first one is used.
    Vec z[kRowsPerThread], identity[kRowsPerThread];
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k) {
      if (!rows.has(k)) continue;
      z[k] = z_rows.load(k);
      if constexpr (kAdds) identity[k] = identity_rows.load(k);
    }
#pragma unroll
    for (int k = 0; k < kRowsPerThread; ++k) {
      if (!rows.has(k)) continue;
      const Vec x = norm_add_relu(z[k], identity[k]);
      out_rows.store(k, x);
      if constexpr (kAdds) store_unshifted(f, slice, task.clip, s, row + k * blockDim.y, x);
    }
    if constexpr (kAdds) {
      if (f.out_is_shifted) write_padding(f, slice, task, row);
    }
  });
}

// The same for a shifted `out` that overwrites z. A thread visits the frames of a clip in the order in which each is
// read before it is overwritten.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kResidualThreads, kBlocksInOrder)
    norm_add_relu_in_order_kernel(const __grid_constant__ StreamArgs a, const __grid_constant__ NormAddRelu f) {
  using Vec = Packed<Element, kLanes>;
  constexpr int kBatch = kLanes == 1 ? 1 : 2;  // frames in flight
  const ChannelSlice<Vec> slice(a);
  if (!slice.exists()) return;
  const NormAddReluOp<Element, kLanes, true> norm_add_relu(a, f, slice.first_element());
  slice.for_each_task([&](const Task& task) {
    const int32_t clip = task.clip;
    const bool forward_in_time = slice.offset > 0;
    const auto frame = [&](int32_t j) { return forward_in_time ? j : task.frames.begin + task.frames.end - 1 - j; };
    for (int32_t row = task.begin_row + threadIdx.y; row < task.end_row; row += blockDim.y) {
      const auto z_frames = slice.frames(f.z, clip, row), identity_frames = slice.frames(f.identity, clip, row);
      const auto out_frames = slice.frames(f.out, clip, row);
      const auto boundary_frames = slice.boundary_frames(f.boundary, clip, row);
      const auto boundary_out_frames = slice.boundary_frames(f.boundary_out, clip, row);
      for (int32_t start = task.frames.begin; start < task.frames.end; start += kBatch) {
        const ThreadRows frames{start, 1, task.frames.end};
        Vec z[kBatch], identity[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (!frames.has(k)) continue;
          const ShiftedIndex from = slice.index(frame(start + k), f.identity_is_shifted);
          z[k] = z_frames.load(frame(start + k));
          identity[k] = from.t != kNoFrame ? identity_frames.load(from.t) : boundary_frames.load(from.boundary);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (!frames.has(k)) continue;
          const ShiftedIndex to = slice.index(frame(start + k), f.out_is_shifted);
          const Vec x = norm_add_relu(z[k], identity[k]);
          to.t != kNoFrame ? out_frames.store(to.t, x) : boundary_out_frames.store(to.boundary, x);
          if constexpr (kLanes == 1) store_unshifted(f, slice, clip, frame(start + k), row, x);
        }
      }
    }
    if (f.out_is_shifted) write_padding(f, slice, task, task.begin_row + threadIdx.y);
  });
}

#endif

const char* norm_add_relu_cuda(const ResidualStream& r, const NormAddRelu& f, void* stream) {
  const bool in_order = shifts_z_in_place(f), adds = f.identity != nullptr;
  const bool vectors =
      uses_vectors(r, {f.z, f.identity, f.boundary, f.out, f.boundary_out, f.unshifted}, {f.z_norm, f.identity_norm});
  const int32_t blocks_per_sm = in_order ? kBlocksInOrder : adds ? kBlocksAdd : kBlocksNoAdd;
  LaunchPlan plan;
  if (const char* error = make_plan(r, vectors, {0, blocks_per_sm, in_order, f.unshifted != nullptr}, plan))
    return error;
  return dispatch_vec(r.dtype, vectors, [&](auto vec) -> const char* {
    using Element = typename decltype(vec)::Element;
    constexpr int kLanes = decltype(vec)::kLanes;
    const auto start = [&](auto kernel) { return launch(kernel, plan.grid, plan.block, 0, stream, plan.args, f); };
    // For vectors of one element, only the kernel that supports every case is compiled.
    if constexpr (kLanes > 1) {
      if (!in_order && adds) return start(norm_add_relu_kernel<Element, kLanes, true>);
      if (!in_order) return start(norm_add_relu_kernel<Element, kLanes, false>);
    }
    return start(norm_add_relu_in_order_kernel<Element, kLanes>);
  });
}

}  // namespace tsm_jit
