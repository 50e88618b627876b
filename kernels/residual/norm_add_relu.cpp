// The end of a residual block on the CPU.
//
//     out = relu(z * z_scale + (identity * identity_scale + bias))
//
//     scale = weight / sqrt(variance + epsilon) of each norm, bias = sum of (norm bias - mean * scale) of both norms
//
// Tensors      z: unshifted. identity, out: unshifted, or shifted with boundary frames; see residual_stream.h
// Task         one frame of one clip
// Aliasing     out may be identity if both have the same layout; out may be z if both are unshifted
// Bytes moved  z, identity and out once each, boundary frames once; with `unshifted` 1 / step^2 of out more
#include "residual/norm_add_relu.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "residual/stream_cpu.h"

namespace tsm_jit {
namespace {

// Writes x, `row` of a group of a frame, to `unshifted`: in NHWC one pixel of all its channels, in NCHW all pixels.
template <class T>
void store_unshifted(const NormAddRelu& f, const GroupFrame<T>& frame, int64_t row, const T* x) {
  if (f.unshifted == nullptr) return;
  const ResidualStream& r = frame.r;
  const int64_t width = f.width, step = f.step, inner = r.channel_numel;
  const int64_t height = (inner == 1 ? r.shift.outer_size : inner) / width;
  const int64_t out_width = ceil_div(width, step), out_numel = ceil_div(height, step) * out_width;
  const int64_t channels = r.shift.inner_bytes / int64_t{sizeof(T)} / inner, group_channels = frame.numel() / inner;
  T* const out = static_cast<T*>(f.unshifted) + (frame.clip * r.shift.frames + frame.s) * out_numel * channels;
  if (inner == 1) {
    const int64_t h = row / width, w = row % width;
    if (h % step != 0 || w % step != 0) return;
    std::copy(x, x + group_channels, out + (h / step * out_width + w / step) * channels + frame.first_channel());
    return;
  }
  T* to = out + frame.first_channel() * out_numel;
  for (int64_t c = 0; c < group_channels; ++c) {
    for (int64_t h = 0; h < height; h += step) {
      for (int64_t w = 0; w < width; w += step) *to++ = x[c * inner + h * width + w];
    }
  }
}

template <class Element>
void norm_add_relu(const ResidualStream& r, const NormAddRelu& f, int64_t first_task, int64_t last_task) {
  using T = typename Element::storage_t;
  using acc_t = typename Element::acc_t;
  const int64_t inner = r.channel_numel;
  std::vector<acc_t> z_scale, identity_scale, bias(r.shift.inner_bytes / int64_t{sizeof(T)} / inner);
  read_norm<Element>(f.z_norm, z_scale, bias);
  read_norm<Element>(f.identity_norm, identity_scale, bias);
  const std::vector<T> zeros(f.identity == nullptr ? r.shift.inner_bytes / sizeof(T) : 0);
  const acc_t lowest = f.relu ? acc_t{0} : -std::numeric_limits<acc_t>::infinity();
  for_each_group<T>(r, first_task, last_task, [&](const GroupFrame<T>& frame) {
    const ShiftedIndex to = frame.index(f.out_is_shifted);
    const auto z_rows = frame.rows(f.z, frame.s);
    const auto identity_rows = frame.rows_at(frame.index(f.identity_is_shifted), f.identity, f.boundary);
    const auto out_rows = frame.rows_at(to, f.out, f.boundary_out);
    const int64_t count = frame.numel(), first_channel = frame.first_channel();
    for (int64_t row = 0; row < r.shift.outer_size; ++row) {
      const T* const z = z_rows[row];
      const T* const identity = f.identity == nullptr ? zeros.data() : identity_rows[row];
      T* const out = out_rows[row];
      const auto compute = [&](int64_t i, int64_t c) {
        const acc_t x =
            Element::to_acc(z[i]) * z_scale[c] + (Element::to_acc(identity[i]) * identity_scale[c] + bias[c]);
        out[i] = Element::from_acc(x <= lowest ? lowest : x);  // NaN stays
      };
      // Two loops that a compiler can vectorise.
      if (inner == 1) {
        for (int64_t i = 0; i < count; ++i) compute(i, first_channel + i);
      } else {
        for (int64_t i = 0, c = first_channel; i < count; i += inner, ++c) {
          for (int64_t k = i; k < i + inner; ++k) compute(k, c);
        }
      }
      store_unshifted(f, frame, row, out);
      write_padding(frame, to, f.out, row, out);
    }
  });
}

}  // namespace

void norm_add_relu_cpu(const ResidualStream& r, const NormAddRelu& f, int64_t first_task, int64_t last_task) {
  dispatch_dtype(r.dtype, [&](auto element) { norm_add_relu<decltype(element)>(r, f, first_task, last_task); });
}

}  // namespace tsm_jit
