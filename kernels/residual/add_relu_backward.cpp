// The backward of the end of a residual block on the CPU, without the sums per channel.
//
//     grad = (grad_a + grad_b) where out > 0, else 0
//
// Tensors      out, grad_a, grad_b: in the layout of `out`. grad: unshifted; see residual_stream.h
// Task         one frame of one clip
// Aliasing     an output may be an input of the same layout
// Bytes moved  out, grad_a, grad_b and grad once each
#include "residual/add_relu_backward.h"

#include <algorithm>
#include <vector>

#include "residual/stream_cpu.h"

namespace tsm_jit {
namespace {

constexpr int64_t kTile = 256;  // elements that are added in acc_t before they are rounded

// Writes one row: grad[i] = sum of terms[k][row][i] where out[i] > 0, else 0.
template <class Element, class T = typename Element::storage_t>
void add_and_mask(T* grad, const T* out, const std::vector<GroupRows<const T>>& terms, int64_t row, int64_t count) {
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t size = std::min(kTile, count - begin);
    typename Element::acc_t sum[kTile] = {};
    for (const auto& term : terms) {  // term by term: loops that a compiler can vectorise
      const T* const x = term[row];
      if (x == nullptr) continue;
      for (int64_t i = 0; i < size; ++i) sum[i] += Element::to_acc(x[begin + i]);
    }
    for (int64_t i = 0; i < size; ++i) {
      grad[begin + i] = Element::to_acc(out[begin + i]) <= 0 ? T{} : Element::from_acc(sum[i]);
    }
  }
}

template <class Element>
void add_relu_backward(const ResidualStream& r, const AddReluBackward& b, int64_t first_task, int64_t last_task) {
  using T = typename Element::storage_t;
  for_each_group<T>(r, first_task, last_task, [&](const GroupFrame<T>& frame) {
    const ShiftedIndex from = frame.index(b.out_is_shifted), to = frame.index(true);
    const auto out_rows = frame.rows_at(from, b.out, b.boundary_out);
    const auto grad_shifted_rows = frame.rows_at(to, b.grad_shifted, b.grad_boundary_in);
    const auto grad_rows = b.grad == nullptr ? grad_shifted_rows : frame.rows(b.grad, frame.s);
    // Consumers of a shifted `out` also read the frames that it pads. The gradient of zeros is dropped.
    const void* const no_boundary = nullptr;
    std::vector<GroupRows<const T>> terms{frame.rows_at(from, b.grad_a, b.grad_boundary),
                                          frame.rows_at(from, b.grad_b, no_boundary)};
    const FrameRange padded = r.shift.padding == Padding::zeros ? FrameRange{0, 0} : from.pads;
    for (int32_t t = padded.begin; t < padded.end; ++t) {
      for (const void* grad : {b.grad_a, b.grad_b}) terms.push_back(frame.rows(grad, t));
    }
    const int64_t count = frame.numel();
    for (int64_t row = 0; row < r.shift.outer_size; ++row) {
      const T* const out = out_rows[row];
      T* const grad = grad_rows[row];
      add_and_mask<Element>(grad, out, terms, row, count);
      T* const grad_shifted = grad_shifted_rows[row];
      if (grad_shifted == nullptr) continue;
      if (grad_shifted != grad) std::copy(grad, grad + count, grad_shifted);
      for (int32_t t = to.pads.begin; t < to.pads.end; ++t) {  // padding passes no gradient to the identity
        T* const padding = frame.rows(b.grad_shifted, t)[row];
        std::fill(padding, padding + count, T{});
      }
    }
  });
}

}  // namespace

void add_relu_backward_cpu(const ResidualStream& r, const AddReluBackward& b, int64_t first_task, int64_t last_task) {
  dispatch_dtype(r.dtype, [&](auto element) { add_relu_backward<decltype(element)>(r, b, first_task, last_task); });
}

}  // namespace tsm_jit
