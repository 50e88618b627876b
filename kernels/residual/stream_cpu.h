// What the CPU kernels of this folder share: how a task finds the rows of its channel groups, and reads norms.
//
// Task   one frame of one clip, group by group, row by row
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "residual/residual_stream.h"

namespace tsm_jit {

// The rows of a channel group in one frame. A missing tensor has null rows.
template <class T>
struct GroupRows {
  T* first;
  int64_t stride;  // in bytes
  T* operator[](int64_t row) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return first == nullptr ? nullptr : reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + row * stride);
  }
};

// One channel group of one frame of a stream whose elements are of type T.
template <class T>
struct GroupFrame {
  const ResidualStream& r;
  int64_t clip;
  int32_t s;  // frame
  int32_t group;

  int64_t numel() const { return (r.shift.groups[group].end - r.shift.groups[group].begin) / int64_t{sizeof(T)}; }
  int64_t first_element() const { return r.shift.groups[group].begin / int64_t{sizeof(T)}; }
  int64_t first_channel() const { return first_element() / r.channel_numel; }

  // Where a stream, shifted or not, holds this frame.
  ShiftedIndex index(bool is_shifted) const {
    const int32_t offset = is_shifted ? r.shift.groups[group].offset : 0;
    return shifted_index(s, offset, r.shift.n_segment_shifted, r.shift.padding);
  }
  // The rows of frame t of a tensor.
  GroupRows<const T> rows(const void* tensor, int64_t t) const { return at<const T>(tensor, frame_offset(t)); }
  GroupRows<T> rows(void* tensor, int64_t t) const { return at<T>(tensor, frame_offset(t)); }
  // The rows at `index` of a tensor with boundary frames.
  GroupRows<const T> rows_at(const ShiftedIndex& index, const void* tensor, const void* boundary) const {
    return index.t != kNoFrame ? rows(tensor, index.t) : boundary_rows<const T>(boundary, index.boundary);
  }
  GroupRows<T> rows_at(const ShiftedIndex& index, void* tensor, void* boundary) const {
    return index.t != kNoFrame ? rows(tensor, index.t) : boundary_rows<T>(boundary, index.boundary);
  }

 private:
  int64_t frame_offset(int64_t t) const {
    const Shift& shift = r.shift;
    return (clip * shift.frames + t) * shift.outer_size * shift.inner_bytes + shift.groups[group].begin;
  }
  template <class U, class Void>
  GroupRows<U> at(Void* tensor, int64_t offset) const {
    if (tensor == nullptr) return {nullptr, 0};
    return {static_cast<U*>(tensor) + offset / int64_t{sizeof(U)}, r.shift.inner_bytes};
  }
  template <class U, class Void>
  GroupRows<U> boundary_rows(Void* boundary, int64_t index) const {
    if (boundary == nullptr) return {nullptr, 0};
    const int64_t offset = clip * r.shift.outer_size * r.boundary_inner_bytes + r.boundary_begin[group];
    return {static_cast<U*>(boundary) + offset / int64_t{sizeof(U)} + index * numel(), r.boundary_inner_bytes};
  }
};

// Calls visit(GroupFrame) for all groups of the frames of these tasks.
template <class T, class Visit>
void for_each_group(const ResidualStream& r, int64_t first_task, int64_t last_task, Visit visit) {
  for (int64_t task = first_task; task < last_task; ++task) {
    for (int32_t g = 0; g < r.shift.n_groups; ++g) {
      visit(GroupFrame<T>{r, task / r.shift.frames, static_cast<int32_t>(task % r.shift.frames), g});
    }
  }
}

// Reads a norm as value * scale + bias. Sets `scale`; adds to `bias`, so that the biases of two norms add up.
template <class Element>
void read_norm(const Norm& norm, std::vector<typename Element::acc_t>& scale,
               std::vector<typename Element::acc_t>& bias) {
  using acc_t = typename Element::acc_t;
  scale.assign(bias.size(), 1);
  if (norm.mean == nullptr) return;
  const auto load = [&](const void* data, size_t channel) -> acc_t {
    if (norm.is_float32) return static_cast<const float*>(data)[channel];
    return Element::to_acc(static_cast<const typename Element::storage_t*>(data)[channel]);
  };
  for (size_t c = 0; c < bias.size(); ++c) {
    scale[c] = load(norm.weight, c) * (1 / std::sqrt(load(norm.variance, c) + static_cast<acc_t>(norm.epsilon)));
    bias[c] += load(norm.bias, c) - load(norm.mean, c) * scale[c];
  }
}

// Writes `row` of the padding that this frame fills in a shifted `out`: copies of x, or zeros.
template <class T>
void write_padding(const GroupFrame<T>& frame, const ShiftedIndex& index, void* out, int64_t row, const T* x) {
  for (int32_t t = index.pads.begin; t < index.pads.end; ++t) {
    T* const to = frame.rows(out, t)[row];
    if (frame.r.shift.padding == Padding::zeros) {
      std::fill(to, to + frame.numel(), T{});
    } else {
      std::copy(x, x + frame.numel(), to);
    }
  }
}

}  // namespace tsm_jit
