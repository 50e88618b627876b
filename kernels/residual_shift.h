// The end of a residual block with the stream between blocks kept shifted: the vocabulary of its CPU and CUDA kernels.
//
// A residual block ends in x = relu(z + identity), and the next one begins with shift(x). A shift moves whole values,
// so it commutes with what works value by value:
//
//     shift(relu(z + identity)) = relu(shift(z) + shift(identity))
//
// So the sum that is made anyway writes S = shift(x) in place of x. What S does not hold are the frames that the shift
// does not read; these go to a second tensor, `unread`. Together they are x, and become the next block's identity.
//
//     unread      [clips, unread channels, ...] in the layout of the activations: for each group, its first |offset|
//                 frames (offset > 0) or its last ones, one after the other as channels
//     z, S, x     as in temporal_shift.h: [clips, frames, outer, run], here without gaps
#pragma once

#include "temporal_shift.h"

namespace tsm_jit {

// (value - mean) / sqrt(variance + epsilon) * weight + bias, with one of each per channel: a batch normalization.
struct Norm {
  const void *mean, *variance, *weight, *bias;  // a null mean: the value itself
  bool in_float;                                // or else of the type of the activations
  double epsilon;
};

struct Residual {
  Shift shift;                  // of the stream; src, dst and sum are not used
  Sum type;                     // of the activations
  int64_t inner;                // elements of a channel that follow each other in the run: 1 in channels_last
  const int64_t* unread_begin;  // of each group, in bytes of the run of `unread`
  int64_t unread_run;           // in bytes
};

// out = relu(norm(z) + norm(identity)). Each activation is in shifted form (with its unread frames), or plain.
struct ResidualForward {
  const void* z;
  Norm z_norm;
  const void* identity;  // may be null: nothing is added, and nothing shifted
  Norm identity_norm;    // by channel, so in either form
  const void* unread;
  void* out;  // may be `identity` in the same form, or `z`: see shifts_z_in_place
  void* unread_out;
  bool identity_is_shifted, out_is_shifted;
  bool relu;  // or else the sum as it is
  // The same as itself, of every step-th row and column of pixels, beside an `out` that is shifted (but not in place of
  // z). May be null.
  void* plain;
  int32_t width, step;  // of the pixels of `out`
};

// Is a plain `z` overwritten by a shifted stream? Then a frame is written where a later one is read: all frames of a
// unit have to be visited by one thread, from the first on if they read later ones, else from the last. A rotation
// knows no such order. By CUDA alone.
inline bool shifts_z_in_place(const ResidualForward& f) { return f.out_is_shifted && f.out == f.z; }

// What a ResNet begins with, in the forms that its first block reads: relu(norm(z)), and of that the largest value in
// windows of 3x3 pixels, every second one, the first around the first pixel. Channels are innermost.
struct ResidualPool {
  const void* z;  // [clips, frames, height * width, run]
  Norm z_norm;
  int32_t height, width;
  void *plain, *out, *unread_out;  // of half as many rows and columns, rounded up; null if not wanted
};

constexpr int32_t kNorms = 2;  // of z, and of the identity

// The gradient of z + identity, masked where relu was 0; and the sums that the gradients of both norms are made of.
struct ResidualBackward {
  const void *out, *unread_out;               // as the forward wrote them
  const void *grad_a, *grad_b, *grad_unread;  // of `out`, from its two readers, and of `unread_out`; may be null
  void* grad;                                 // plain; may be null beside
  void *grad_shifted, *grad_unread_in;        // the same in shifted form; null if the identity was plain
  bool out_is_shifted;
  void* sums;                  // [slices, 1 + kNorms, channels] of grad, and of grad * (normed - mean); may be null
  int32_t slices;              // blocks that share the work where sums are made
  const void* normed[kNorms];  // what had a norm, and its mean by channel; may be null
  const void* mean[kNorms];
};

// The gradient of z, given that of relu(norm(z)). What the ReLU made is not read: norm(z), computed again, tells where
// it was 0. First come the sums, and out of them `beside`.
struct ReluOfNormBackward {
  const void *grad, *z;
  Norm norm;
  void* sums;  // [slices, 1 + kNorms, channels]: those of a ResidualBackward with one norm
  int32_t slices;
  Norm beside;  // of z, added to what comes through the norm: see NormGradients. A null mean: nothing is
  void* out;    // may be `grad`
};

// Mean and variance of x by channel; the running ones follow as in a batch normalization, which counts its batches.
struct ChannelStatistics {
  const void* x;
  void* sums;  // [slices, 2, channels], for its own use
  int32_t slices;
  void *mean, *variance, *running_mean, *running_variance;
  int64_t* batches;
  double momentum;
};

// The gradients of norms, from the sums of a backward: `made` holds a row of zeros and, for each norm, those of its
// weight and its bias, then the weight and the bias of a norm of the same values. That norm, of a batch of `count` for
// each channel, is what the gradient of the values has beside grad * weight / sqrt(variance + epsilon).
struct NormGradients {
  const void* sums;  // [slices, 1 + kNorms, channels]
  int32_t slices;
  int64_t count;
  void* made;                                     // [1 + 4 * kNorms, channels]
  const void *variance[kNorms], *weight[kNorms];  // null: no norm, or one whose gradients nobody wants
  double epsilon[kNorms];
};

// Where the shifted stream holds frame s of a group: as its frame t or, where t is kNoFrame, among the unread frames;
// and the frames that s pads: with itself or, for zero padding, with zero.
struct Place {
  int32_t t, unread;
  FrameRange pads;
};

TSM_HOST_DEVICE inline Place place_of(int32_t s, int32_t offset, int32_t n_segment_shifted, Padding padding) {
  const int32_t n = n_segment_shifted, t = s - offset;
  if (s >= n || offset == 0) return {s, 0, {0, 0}};
  if (padding == Padding::circular) return {source_frame(s, -offset, n, padding), 0, {0, 0}};
  const bool is_padded = offset > 0 ? s >= n - offset : s < -offset;
  const FrameRange pads = padding != Padding::zeros ? padding_readers(s, offset, n, padding)
                          : is_padded               ? FrameRange{s, s + 1}
                                                    : FrameRange{0, 0};
  if (0 <= t && t < n) return {t, 0, pads};
  return {kNoFrame, offset > 0 ? s : s - (n + offset), pads};
}

// CPU. The work is clips * frames independent tasks. Makes no sums.
void residual_forward_cpu(const Residual& r, const ResidualForward& f, int64_t first_task, int64_t last_task);
void residual_pool_cpu(const Residual& r, const ResidualPool& p, int64_t first_task, int64_t last_task);
void residual_backward_cpu(const Residual& r, const ResidualBackward& b, int64_t first_task, int64_t last_task);

// CUDA, on `stream` of the current device. Return null, or what was wrong. What sums by channel, or knows pixels, needs
// inner == 1.
const char* residual_forward_cuda(const Residual& r, const ResidualForward& f, void* stream);
const char* residual_pool_cuda(const Residual& r, const ResidualPool& p, void* stream);
const char* residual_backward_cuda(const Residual& r, const ResidualBackward& b, void* stream);
const char* relu_of_norm_sums_cuda(const Residual& r, const ReluOfNormBackward& b, void* stream);
const char* relu_of_norm_backward_cuda(const Residual& r, const ReluOfNormBackward& b, void* stream);
const char* channel_statistics_cuda(const Residual& r, const ChannelStatistics& c, void* stream);
// For how many slices the sums of these need memory.
int32_t backward_slices(const Residual& r);
int32_t statistics_slices(const Residual& r);
const char* norm_gradients_cuda(Sum type, int64_t channels, const NormGradients& n, void* stream);

}  // namespace tsm_jit
