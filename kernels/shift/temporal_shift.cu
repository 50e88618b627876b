// Temporal shift on CUDA, host side: chooses the width of a Vec, the kernel, the block and the grid.
//
// edges.cuh is included here because a separate translation unit would add 2 s to the first import.
#include <algorithm>
#include <cstdlib>

#include "core/launch.h"
#include "shift/edges.cuh"
#include "shift/temporal_shift.cuh"

namespace tsm_jit {
namespace {

constexpr int32_t kMaxGrid = 65535;         // blocks in y and z
constexpr size_t kSharedBytes = 48 * 1024;  // what a block may use without opting in to more
constexpr int32_t kFramesPerThread = 4, kFramesPerBlock = 8;
constexpr unsigned kMaxRows = 8;  // of threads that share the frames of a block
constexpr int32_t kMaxTileFrames = kSharedBytes / (kThreads / kMaxRows * 16);

// One launch covers up to kMaxGroups groups, kMaxBytes of a frame and kMaxGrid clips. Nearly every tensor needs only
// one.
class ShiftLauncher {
 public:
  ShiftLauncher(const Shift& s, const void* src, void* dst, void* stream)
      : s_(s),
        src_(static_cast<const char*>(src)),
        dst_(static_cast<char*>(dst)),
        stream_(stream),
        in_place_(src == dst),
        frames_(static_cast<int32_t>(in_place_ ? s.n_segment_shifted : s.frames)) {
    for (int32_t g = 0; g < s.n_groups; ++g) max_offset_ = std::max(max_offset_, std::abs(s.groups[g].offset));
    const bool whole_clips = in_place_ || s.padding == Padding::circular;
    frames_per_block_ = whole_clips ? frames_ : std::min(frames_, kFramesPerBlock);
    tile_frames_ = std::min(int64_t{frames_}, frames_per_block_ + 2 * int64_t{max_offset_});
    fits_tile_ = tile_frames_ <= kMaxTileFrames && ceil_div(frames_, frames_per_block_) <= kMaxGrid;
    vec_bytes_ = widest_vec(false);
    // With all groups in one launch a Vec may span groups. In place, such a Vec also rewrites bytes that do not move.
    // With outer_size > 1 there are many of these, so it must be narrow.
    int64_t spanning = s.outer_size == 1 || !in_place_ ? 16 : (s.sum_dtype == DType::none ? 4 : 16);
    spanning = std::min(spanning, widest_vec(true));
    const int64_t max_inner_bytes = s.outer_size > 1 ? kMaxBytes / 16 : kMaxBytes;
    const bool one_launch = fits_tile_ && s.n_groups <= kMaxGroups && s.inner_bytes <= max_inner_bytes;
    const bool ends_with_outer = s.outer_size == 1 || !in_place_ || s.inner_bytes % spanning == 0;
    if (one_launch && ends_with_outer) vec_bytes_ = std::max(vec_bytes_, spanning);
  }

  // Returns null or an error message.
  const char* run() const {
    int64_t begin = 0, end = s_.inner_bytes;
    if (in_place_) {  // only the range of groups that move
      int32_t first = 0, last = s_.n_groups;
      while (first < last && s_.groups[first].offset == 0) ++first;
      while (last > first && s_.groups[last - 1].offset == 0) --last;
      if (first == last) return nullptr;
      begin = s_.groups[first].begin / vec_bytes_ * vec_bytes_;
      end = ceil_div(s_.groups[last - 1].end, vec_bytes_) * vec_bytes_;
    }
    for (int32_t first = 0; first < s_.n_groups; first += kMaxGroups) {
      const int32_t n_groups = std::min(s_.n_groups - first, kMaxGroups);
      const int64_t last_end = std::min(end, s_.groups[first + n_groups - 1].end);
      for (int64_t at = std::max(begin, s_.groups[first].begin); at < last_end; at += kMaxBytes) {
        if (const char* error = launch_bytes(first, n_groups, at, std::min(at + kMaxBytes, last_end))) return error;
      }
    }
    return nullptr;
  }

 private:
  // Returns the largest power of two, at most 16, that divides all addresses and distances. Unless a Vec may span
  // groups, it also divides the ends of groups. For sums it is 16 or the size of one element.
  int64_t widest_vec(bool may_span) const {
    uint64_t bits = 16 | reinterpret_cast<uintptr_t>(src_) | reinterpret_cast<uintptr_t>(dst_);
    bits |= s_.inner_bytes * s_.outer_size;
    for (const Strides& strides : {s_.src, s_.dst}) {
      if (s_.clips > 1) bits |= strides.clip;
      if (s_.frames > 1) bits |= strides.frame;
      if (s_.outer_size > 1 && !(may_span && strides.outer == s_.inner_bytes)) bits |= s_.inner_bytes | strides.outer;
    }
    for (int32_t g = 0; g < s_.n_groups && !may_span; ++g) bits |= s_.groups[g].end;
    const int64_t bytes = common_power_of_two(bits);
    return s_.sum_dtype == DType::none || bytes == 16 ? bytes : element_bytes(s_.sum_dtype);
  }

  // Launches for the bytes [begin, end) of inner_bytes, which belong to these groups.
  const char* launch_bytes(int32_t first_group, int32_t n_groups, int64_t begin, int64_t end) const {
    ShiftArgs a{};
    a.src_strides = s_.src;
    a.dst_strides = s_.dst;
    a.frames = frames_;
    a.frames_per_block = frames_per_block_;
    a.max_offset = max_offset_;
    a.n_segment_shifted = s_.n_segment_shifted;
    a.padding = s_.padding;
    a.inner_bytes = static_cast<int32_t>(end - begin);
    a.n_groups = n_groups;
    for (int32_t g = 0; g < n_groups; ++g) {
      const ChannelGroup& group = s_.groups[first_group + g];
      a.group_end[g] = static_cast<int32_t>(std::clamp(group.end, begin, end) - begin);
      a.group_offset[g] = group.offset;
    }
    // A multiple of 16 outer indices, so that each launch begins at a multiple of a Vec.
    const int64_t fit = kMaxBytes / a.inner_bytes, step = fit < 16 ? std::max<int64_t>(1, fit) : fit / 16 * 16;
    for (int64_t outer = 0; outer < s_.outer_size; outer += step) {
      a.src = src_ + outer * s_.src.outer + begin;
      a.dst = dst_ + outer * s_.dst.outer + begin;
      a.frame_bytes = static_cast<int32_t>(std::min(step, s_.outer_size - outer) * a.inner_bytes);
      if (const char* error = launch_op(a)) return error;
    }
    return nullptr;
  }

  const char* launch_op(const ShiftArgs& a) const {
    if (s_.sum_dtype != DType::none) {
      return dispatch_dtype(s_.sum_dtype, [&](auto element) -> const char* {
        using Element = decltype(element);
        if (vec_bytes_ == 16) return launch_frames<uint4, GatherAdjoint<Element>>(a);
        return launch_frames<typename Element::storage_t, GatherAdjoint<Element>>(a);
      });
    }
    return dispatch_vec(vec_bytes_, [&](auto vec) { return launch_frames<decltype(vec), Gather>(a); });
  }

  template <class Vec, class ShiftOp>
  const char* launch_frames(const ShiftArgs& a) const {
    dim3 block(kThreads), grid;
    if (!fits_tile_) {
      grid.y = static_cast<unsigned>(in_place_ ? 1 : std::min(frames_, kMaxGrid));
      return launch_clips<Vec>(shift_stream<Vec, ShiftOp>, a, block, grid, 0);
    }
    const size_t column_bytes = tile_frames_ * sizeof(Vec);
    const auto rows = static_cast<unsigned>(ceil_div(frames_per_block_, kFramesPerThread));
    while (block.y < kMaxRows && (block.y < rows || block.x * column_bytes > kSharedBytes)) {
      block.y *= 2;
      block.x /= 2;
    }
    grid.y = static_cast<unsigned>(ceil_div(frames_, frames_per_block_));
    return launch_clips<Vec>(shift_tile<Vec, ShiftOp>, a, block, grid, block.x * column_bytes);
  }

  // One launch, or several if there are more clips than a grid has blocks.
  template <class Vec>
  const char* launch_clips(void (*kernel)(ShiftArgs), ShiftArgs a, dim3 block, dim3 grid, size_t shared_bytes) const {
    grid.x = static_cast<unsigned>(ceil_div(a.frame_bytes, block.x * sizeof(Vec)));
    for (int64_t clip = 0; clip < s_.clips; clip += kMaxGrid) {
      grid.z = static_cast<unsigned>(std::min<int64_t>(kMaxGrid, s_.clips - clip));
      if (const char* error = launch(kernel, grid, block, shared_bytes, stream_, a)) return error;
      a.src += kMaxGrid * s_.src.clip;
      a.dst += kMaxGrid * s_.dst.clip;
    }
    return nullptr;
  }

  const Shift& s_;
  const char* const src_;
  char* const dst_;
  void* const stream_;
  const bool in_place_;
  const int32_t frames_;      // to write: n_segment_shifted in place, else all
  int32_t frames_per_block_;  // all of them, or a few
  int32_t max_offset_ = 0;
  int64_t tile_frames_;  // frames of a block in shared memory
  bool fits_tile_;       // shift_tile, else shift_stream
  int64_t vec_bytes_;
};

}  // namespace

const char* shift_cuda(const Shift& shift, const void* src, void* dst, void* stream) {
  return ShiftLauncher(shift, src, dst, stream).run();
}

}  // namespace tsm_jit
