// The residual stream of a network with temporal shifts, kept shifted between blocks.
//
// A residual block computes x = relu(z + identity), and the next block begins with shift(x). A shift only moves values,
// so it commutes with every elementwise operation:
//
//     shift(relu(z + identity)) = relu(shift(z) + shift(identity))
//
// So the add+ReLU kernel writes shift(x) directly. Activations exist in two layouts:
//
//     unshifted    x: [N*T, C, H, W] = [clips, frames, outer_size, inner_bytes] (core/shift.h), without gaps
//     shifted      shift(x), of the same sizes, and boundary: [N, K, H, W], the boundary frames of x (core/frames.h).
//                  Together they hold all of x. For each channel group, boundary holds its |offset| boundary frames
//                  one after the other as channels; K is the sum of width * |offset| over the groups.
#pragma once

#include "core/shift.h"

namespace tsm_jit {

// Batch normalization: (value - mean) / sqrt(variance + epsilon) * weight + bias. Each part is [channels].
struct Norm {
  const void *mean, *variance, *weight, *bias;  // a null mean: no norm, the value itself
  bool is_float32;                              // the parts are float32, else they have the dtype of the activations
  double epsilon;
};

// Activations and their shift.
struct ResidualStream {
  Shift shift;  // src, dst and sum_dtype are not used
  DType dtype;
  int64_t channel_numel;          // contiguous elements of one channel: H*W in NCHW, 1 in NHWC
  const int64_t* boundary_begin;  // [n_groups] where the group begins in boundary, in bytes of boundary_inner_bytes
  int64_t boundary_inner_bytes;
};

// A backward sums two kinds of values over all elements of a channel: the gradient; and gradient * (value - mean) for
// each norm. There are up to kNorms norms: one of z and one of the identity. Blocks write partial sums [slices, 1 +
// kNorms, channels] of the type acc_t; norm_grads adds the slices up.
constexpr int32_t kNorms = 2;

// Returns the number of slices for norm_relu_grad_sums and add_relu_backward.
int32_t backward_slices(const ResidualStream& r);

}  // namespace tsm_jit
