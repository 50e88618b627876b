// The stem of a ResNet on the CPU.
//
//     out = max over a 3x3 window, stride 2, padding 1, of relu(z * scale + bias)
//
// Tensors      z: [clips, frames, height * width, channels]; unshifted, out: half as many rows and columns
// Task         one frame of one clip
// Aliasing     none
// Bytes moved  z once from memory, each value up to four times from a cache; out once for each layout
#include "residual/norm_relu_max_pool.h"

#include <algorithm>
#include <vector>

#include "residual/stream_cpu.h"

namespace tsm_jit {
namespace {

template <class Element>
void norm_relu_max_pool(const ResidualStream& r, const NormReluMaxPool& p, int64_t first_task, int64_t last_task) {
  using T = typename Element::storage_t;
  using acc_t = typename Element::acc_t;
  const int64_t channels = r.shift.inner_bytes / int64_t{sizeof(T)}, out_width = ceil_div(p.width, 2);
  std::vector<acc_t> scale, bias(channels), largest(channels);
  std::vector<T> x(channels);
  read_norm<Element>(p.z_norm, scale, bias);
  for_each_group<T>(r, first_task, last_task, [&](const GroupFrame<T>& frame) {
    const int64_t first = frame.first_channel(), count = frame.numel();
    const int64_t pixel = (frame.clip * r.shift.frames + frame.s) * p.height * p.width;
    const T* const z = static_cast<const T*>(p.z) + pixel * channels + first;
    const ShiftedIndex to = frame.index(true);
    const auto unshifted_rows = frame.rows(p.unshifted, frame.s);
    const auto out_rows = frame.rows_at(to, p.out, p.boundary_out);
    for (int64_t row = 0; row < r.shift.outer_size; ++row) {
      std::fill(largest.begin(), largest.end(), acc_t{0});  // the smallest value of a ReLU
      const int64_t top = row / out_width * 2 - 1, left = row % out_width * 2 - 1;
      for (int64_t h = std::max<int64_t>(top, 0); h < std::min<int64_t>(top + 3, p.height); ++h) {
        for (int64_t w = std::max<int64_t>(left, 0); w < std::min<int64_t>(left + 3, p.width); ++w) {
          for (int64_t c = 0; c < count; ++c) {
            const acc_t value =
                Element::to_acc(z[(h * p.width + w) * channels + c]) * scale[first + c] + bias[first + c];
            largest[c] = value <= largest[c] || largest[c] != largest[c] ? largest[c] : value;  // NaN stays
          }
        }
      }
      for (int64_t c = 0; c < count; ++c) x[c] = Element::from_acc(largest[c]);
      for (T* const out : {unshifted_rows[row], out_rows[row]}) {
        if (out != nullptr) std::copy(x.begin(), x.begin() + count, out);
      }
      if (p.out != nullptr) write_padding(frame, to, p.out, row, x.data());
    }
  });
}

}  // namespace

void norm_relu_max_pool_cpu(const ResidualStream& r, const NormReluMaxPool& p, int64_t first_task, int64_t last_task) {
  dispatch_dtype(r.dtype, [&](auto element) { norm_relu_max_pool<decltype(element)>(r, p, first_task, last_task); });
}

}  // namespace tsm_jit
