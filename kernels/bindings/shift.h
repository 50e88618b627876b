// From a tensor and an encoded tsm_jit.plans.Shift to the descriptor of core/shift.h.
#pragma once

#include "bindings/common.h"
#include "core/shift.h"

namespace tsm_jit {

// tsm_jit.plans.Shift, such as "n_segment=8 n_segment_shifted=8 channel_dim=1 padding=zeros plan=8:1,8:-1".
struct ShiftPlan {
  int64_t n_segment, n_segment_shifted, channel_dim;
  Padding padding;
  std::vector<std::pair<int64_t, int64_t>> groups;  // width, offset
};

// Decodes `encoded`, checks it against x, and reduces offsets to |offset| <= n_segment_shifted.
ShiftPlan shift_plan(const Tensor& x, const std::string& encoded);

// The number of channels that the boundary frames of all groups have in total: plans.Shift.boundary_channels.
int64_t boundary_channels(const ShiftPlan& plan);

// A Shift without pointers to data. `groups` is the memory of shift.groups.
struct ShiftDescriptor {
  Shift shift{};
  std::vector<ChannelGroup> groups;
};

// Views src and dst, of the same sizes, as [clips, frames, outer_size, inner_bytes]. Returns false if their strides do
// not allow it.
bool describe_shift(const Tensor& src, const Tensor& dst, const ShiftPlan& plan, ShiftDescriptor& out);

// Fills `begin` with the first byte of each group in a row of boundary frames. Returns the bytes of a row.
int64_t layout_boundary(const std::vector<ChannelGroup>& groups, Padding padding, std::vector<int64_t>& begin);

// The operators of the same names.
Tensor temporal_shift(const Tensor& x, const std::string& shift);
void temporal_shift_backward_(const Tensor& grad, const std::string& shift);

}  // namespace tsm_jit
