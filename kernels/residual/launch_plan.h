// Host side of the CUDA kernels of this folder: the width of a vector, the block, the grid and the tasks.
#pragma once

#include <algorithm>

#include "core/launch.h"
#include "residual/stream.cuh"

namespace tsm_jit {

constexpr int32_t kMaxGridY = 65535;

// How the work is split.
struct WorkSplit {
  int32_t slices;         // blocks that share the tasks; 0: enough to fill the GPU
  int32_t blocks_per_sm;  // blocks that fit on a multiprocessor; used if slices is 0
  bool frames_in_order;   // one thread visits all frames of a clip
  bool rows_are_pixels;   // the kernel needs to know the pixel of a row
};

struct LaunchPlan {
  StreamArgs args{};
  dim3 grid, block;
};

// May vectors be 16 bytes wide? `activations` and groups must be aligned to 16 bytes. A vector must hold one element
// per channel, or elements of at most two channels. A kernel reads as many numbers of each part of `norms`, and of
// each of `means` (float32), as one vector.
inline bool uses_vectors(const ResidualStream& r, std::initializer_list<const void*> activations,
                         std::initializer_list<Norm> norms = {}, std::initializer_list<const void*> means = {}) {
  if (r.dtype == DType::float64) return false;  // only used to check exactness
  if (r.channel_numel != 1 && r.channel_numel * element_bytes(r.dtype) < 16) return false;
  uint64_t bits = r.shift.inner_bytes | r.boundary_inner_bytes;
  for (int32_t g = 0; g < r.shift.n_groups; ++g) bits |= r.shift.groups[g].end | r.boundary_begin[g];
  const auto are_aligned = [](std::initializer_list<const void*> pointers, int64_t bytes) {
    bool result = true;
    for (const void* pointer : pointers) result = result && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    return result;
  };
  const int64_t lanes = 16 / element_bytes(r.dtype), float_bytes = sizeof(float);
  bool result = bits % 16 == 0 && are_aligned(activations, 16) && are_aligned(means, lanes * float_bytes);
  for (const Norm& norm : norms) {
    const int64_t vector_bytes = lanes * (norm.is_float32 ? float_bytes : element_bytes(r.dtype));
    result = result && are_aligned({norm.mean, norm.variance, norm.weight, norm.bias}, vector_bytes);
  }
  return result;
}

// Fills `plan`. Returns null or an error message.
inline const char* make_plan(const ResidualStream& r, bool vectors, const WorkSplit& split, LaunchPlan& plan) {
  const Shift& s = r.shift;
  const int64_t vec_bytes = vectors ? 16 : element_bytes(r.dtype);
  const int64_t vecs = s.inner_bytes / vec_bytes, largest = (int64_t{1} << 31) - kMaxGridY;
  unsigned x = s.outer_size == 1 ? kResidualThreads : 32;
  while (x > 1 && x / 2 >= vecs) x /= 2;
  plan.block = dim3(x, kResidualThreads / x);
  StreamArgs& a = plan.args;
  // A thread should have several rows. So if nothing shifts, all frames are treated as one frame with many rows. If a
  // frame has a single row, the same frame of all clips is treated as one frame.
  const bool is_unshifted = !split.rows_are_pixels && s.n_groups == 1 && s.groups[0].offset == 0;
  const bool frames_in_order = split.frames_in_order && !is_unshifted;
  const bool one_row = !split.rows_are_pixels && s.outer_size == 1;
  const int64_t clips = is_unshifted || one_row ? 1 : s.clips, frames = is_unshifted ? 1 : s.frames;
  const int64_t rows = s.outer_size * (s.clips / clips) * (s.frames / frames);
  // 8 times as many blocks as run at once: while one waits for memory, another one begins. Each block reads its norms.
  const int64_t x_blocks = ceil_div(vecs, x);
  const int64_t resident = int64_t{split.blocks_per_sm} * std::max(multiprocessors(), 1);
  const int64_t fill = std::min(ceil_div(8 * resident, x_blocks), int64_t{kMaxGridY});
  const int64_t rows_of_block = int64_t{plan.block.y} * (frames_in_order ? 1 : kRowsPerThread);
  a.rows_per_task = static_cast<int32_t>(std::min(rows, rows_of_block));
  a.frames_per_task = static_cast<int32_t>(frames_in_order ? frames : 1);
  a.tasks_per_frame = static_cast<int32_t>(ceil_div(rows, a.rows_per_task));
  const int64_t tasks = clips * (frames / a.frames_per_task) * a.tasks_per_frame;
  if (s.n_groups > kResidualGroups) return "a plan of a residual stream must have at most 31 groups";
  if (s.inner_bytes + 16 * kResidualThreads >= largest || r.boundary_inner_bytes >= largest) {
    return "a frame of a residual stream must have less than 2^31 bytes";
  }
  if (frames >= largest || rows >= largest || tasks >= largest) {
    return "a residual stream must have less than 2^31 rows";
  }
  a.frames = static_cast<int32_t>(frames);
  a.n_segment_shifted = is_unshifted ? 1 : s.n_segment_shifted;
  a.padding = s.padding;
  a.rows = static_cast<int32_t>(rows);
  a.inner_bytes = static_cast<int32_t>(s.inner_bytes);
  a.frame = s.outer_size * s.inner_bytes;
  a.clip = s.frames * a.frame;
  a.row = one_row && !is_unshifted ? a.clip : s.inner_bytes;
  a.boundary_row = r.boundary_inner_bytes;
  a.boundary_clip = s.outer_size * r.boundary_inner_bytes;
  a.channel_numel = static_cast<int32_t>(r.channel_numel);
  a.tasks = static_cast<int32_t>(tasks);
  a.n_groups = s.n_groups;
  for (int32_t g = 0; g < s.n_groups; ++g) {
    a.group_end[g] = static_cast<int32_t>(s.groups[g].end);
    a.group_offset[g] = s.groups[g].offset;
    a.boundary_begin[g] = static_cast<int32_t>(r.boundary_begin[g]);
  }
  const int64_t y_blocks = split.slices != 0 ? split.slices : std::min(tasks, fill);
  plan.grid = dim3(static_cast<unsigned>(x_blocks), static_cast<unsigned>(y_blocks));
  return nullptr;
}

// The template arguments of a kernel, as a value.
template <class E, int kLanesOfVec>
struct VecType {
  using Element = E;
  static constexpr int kLanes = kLanesOfVec;
};

// Returns f(VecType) for vectors of 16 bytes, or of one element.
template <class F>
const char* dispatch_vec(DType dtype, bool vectors, F f) {
  return dispatch_dtype(dtype, [&](auto element) -> const char* {
    using Element = decltype(element);
    constexpr int kLanes = sizeof(typename Element::storage_t) == 8 ? 1 : 16 / sizeof(typename Element::storage_t);
    return vectors ? f(VecType<Element, kLanes>{}) : f(VecType<Element, 1>{});
  });
}

// The number of slices with which the blocks of a kernel just fill the GPU.
inline int32_t slices_to_fill_gpu(const ResidualStream& r, int64_t blocks_per_sm) {
  const int64_t x_blocks = ceil_div(r.shift.inner_bytes, 32 * 16);
  const int64_t resident = blocks_per_sm * std::max(multiprocessors(), 1);
  return static_cast<int32_t>(std::clamp(resident / x_blocks, int64_t{1}, int64_t{kMaxGridY}));
}

// For a kernel that adds up slices: block 8 channels x 32 slices, as each thread waits for one slice after the other.
inline LaunchPlan plan_per_channel(int64_t channels) {
  LaunchPlan plan;
  plan.block = dim3(8, kResidualThreads / 8);
  plan.grid = dim3(static_cast<unsigned>(ceil_div(channels, plan.block.x)));
  return plan;
}

}  // namespace tsm_jit
