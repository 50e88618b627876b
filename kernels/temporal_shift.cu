// Temporal shift on CUDA, host side: the widest unit, what a launch and a block cover. No torch headers.
#include <algorithm>
#include <cstdlib>

#include "launch.h"
#include "temporal_shift.cuh"

namespace tsm_jit {
namespace {

constexpr int32_t kMaxGrid = 65535;         // blocks in y and z
constexpr size_t kSharedBytes = 48 * 1024;  // what a block may have without asking
constexpr int32_t kFramesOfThread = 4, kFramesOfBlock = 8;
constexpr unsigned kMaxRows = 8;  // of threads that share the frames of a block
constexpr int32_t kMaxTileFrames = kSharedBytes / (kThreads / kMaxRows * 16);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One launch covers some groups, up to kMaxBytes of the run, some rows, some clips. All but absurd sizes need one.
class Launcher {
 public:
  Launcher(const Shift& s, const void* src, void* dst, void* stream)
      : s_(s),
        src_(static_cast<const char*>(src)),
        dst_(static_cast<char*>(dst)),
        stream_(stream),
        in_place_(src == dst),
        frames_(static_cast<int32_t>(in_place_ ? s.n_segment_shifted : s.frames)) {
    for (int32_t g = 0; g < s.n_groups; ++g) reach_ = std::max(reach_, std::abs(s.groups[g].offset));
    const bool whole_clips = in_place_ || s.padding == Padding::circular;
    frames_of_block_ = whole_clips ? frames_ : std::min(frames_, kFramesOfBlock);
    tile_frames_ = std::min(int64_t{frames_}, frames_of_block_ + 2 * int64_t{reach_});
    tiled_ = tile_frames_ <= kMaxTileFrames && ceil_div(frames_, frames_of_block_) <= kMaxGrid;
    unit_ = widest_unit(false);
    // With all groups in one launch a unit may hold the end of one. In place that moves what stays, too: of rows,
    // little.
    int64_t mixed = s.outer == 1 || !in_place_ ? 16 : (s.sum == Sum::none ? 4 : 16);
    mixed = std::min(mixed, widest_unit(true));
    const bool whole_runs = tiled_ && s.n_groups <= kMaxGroups && s.run <= (s.outer > 1 ? kMaxBytes / 16 : kMaxBytes);
    const bool whole_rows = s.outer == 1 || !in_place_ || s.run % mixed == 0;
    if (whole_runs && whole_rows && s.unread.data == nullptr) unit_ = std::max(unit_, mixed);
  }

  // Null, or what was wrong.
  const char* run() const {
    int64_t begin = 0, end = s_.run;
    if (in_place_) {  // only what moves is read and written
      int32_t first = 0, last = s_.n_groups;
      while (first < last && s_.groups[first].offset == 0) ++first;
      while (last > first && s_.groups[last - 1].offset == 0) --last;
      if (first == last) return nullptr;
      begin = s_.groups[first].begin / unit_ * unit_;
      end = ceil_div(s_.groups[last - 1].end, unit_) * unit_;
    }
    for (int32_t first = 0; first < s_.n_groups; first += kMaxGroups) {
      const int32_t n_groups = std::min(s_.n_groups - first, kMaxGroups);
      const int64_t last_end = std::min(end, s_.groups[first + n_groups - 1].end);
      for (int64_t at = std::max(begin, s_.groups[first].begin); at < last_end; at += kMaxBytes) {
        if (const char* error = rows(first, n_groups, at, std::min(at + kMaxBytes, last_end))) return error;
      }
    }
    return nullptr;
  }

 private:
  // The largest power of two, at most 16, that divides every address and distance and, unless units are mixed, the ends
  // of groups and of rows without a gap. With sums: whole elements, 16 bytes of them or one.
  int64_t widest_unit(bool mixed) const {
    uint64_t bits = 16 | reinterpret_cast<uintptr_t>(src_) | reinterpret_cast<uintptr_t>(dst_) | s_.run * s_.outer;
    bits |= reinterpret_cast<uintptr_t>(s_.unread.data);
    for (const Strides& strides : {s_.src, s_.dst}) {
      if (s_.clips > 1) bits |= strides.clip;
      if (s_.frames > 1) bits |= strides.frame;
      if (s_.outer > 1 && !(mixed && strides.outer == s_.run)) bits |= s_.run | strides.outer;
    }
    for (int32_t g = 0; g < s_.n_groups && !mixed; ++g) bits |= s_.groups[g].end;
    const int64_t unit = bits & (~bits + 1);
    switch (s_.sum) {
      case Sum::none: return unit;
      case Sum::float16:
      case Sum::bfloat16: return unit == 16 ? 16 : 2;
      case Sum::float32: return unit == 16 ? 16 : 4;
      default: return unit == 16 ? 16 : 8;
    }
  }

  const char* rows(int32_t first_group, int32_t n_groups, int64_t begin, int64_t end) const {
    Args a{};
    a.src_strides = s_.src;
    a.dst_strides = s_.dst;
    a.frames = frames_;
    a.frames_of_block = frames_of_block_;
    a.reach = reach_;
    a.n_segment_shifted = s_.n_segment_shifted;
    a.padding = s_.padding;
    a.run = static_cast<int32_t>(end - begin);
    a.n_groups = n_groups;
    for (int32_t g = 0; g < n_groups; ++g) {
      const Group& group = s_.groups[first_group + g];
      a.group_end[g] = static_cast<int32_t>(std::clamp(group.end, begin, end) - begin);
      a.group_offset[g] = group.offset;
      if (s_.unread.data == nullptr) continue;
      a.unread_frame[g] = group.end - group.begin;
      a.unread_begin[g] = s_.unread.begin[first_group + g] + begin - group.begin;
    }
    a.come_back = s_.unread.come_back;
    a.unread_row = s_.unread.run;
    a.unread_clip = s_.outer * s_.unread.run;
    // A multiple of 16, so that units begin where they would in one launch.
    const int64_t fit = kMaxBytes / a.run, rows = fit < 16 ? std::max<int64_t>(1, fit) : fit / 16 * 16;
    for (int64_t row = 0; row < s_.outer; row += rows) {
      a.src = src_ + row * s_.src.outer + begin;
      a.dst = dst_ + row * s_.dst.outer + begin;
      if (s_.unread.data != nullptr) a.unread = s_.unread.data + row * a.unread_row;
      a.bytes = static_cast<int32_t>(std::min(rows, s_.outer - row) * a.run);
      if (const char* error = start(a)) return error;
    }
    return nullptr;
  }

  const char* start(const Args& a) const {
    switch (s_.sum) {
      case Sum::none: break;
      case Sum::float16: return start_sum<Float16>(a);
      case Sum::bfloat16: return start_sum<BFloat16>(a);
      case Sum::float32: return start_sum<Native<float>>(a);
      case Sum::float64: return start_sum<Native<double>>(a);
    }
    switch (unit_) {
      case 16: return start_units<uint4, Move>(a);
      case 8: return start_units<uint2, Move>(a);
      case 4: return start_units<uint32_t, Move>(a);
      case 2: return start_units<uint16_t, Move>(a);
      default: return start_units<uint8_t, Move>(a);
    }
  }

  template <class Element>
  const char* start_sum(const Args& a) const {
    if (unit_ == 16) return start_units<uint4, Add<Element>>(a);
    return start_units<typename Element::Stored, Add<Element>>(a);
  }

  template <class Unit, class Value>
  const char* start_units(const Args& a) const {
    dim3 block(kThreads), grid;
    if (!tiled_) {
      grid.y = static_cast<unsigned>(in_place_ ? 1 : std::min(frames_, kMaxGrid));
      return start_clips<Unit>(shift_stream<Unit, Value>, a, block, grid, 0);
    }
    const size_t column = tile_frames_ * sizeof(Unit);
    const auto rows = static_cast<unsigned>(ceil_div(frames_of_block_, kFramesOfThread));
    while (block.y < kMaxRows && (block.y < rows || block.x * column > kSharedBytes)) {
      block.y *= 2;
      block.x /= 2;
    }
    grid.y = static_cast<unsigned>(ceil_div(frames_, frames_of_block_));
    return start_clips<Unit>(shift_tile<Unit, Value>, a, block, grid, block.x * column);
  }

  // One launch, or several when there are more clips than a grid has blocks.
  template <class Unit>
  const char* start_clips(void (*kernel)(Args), Args a, dim3 block, dim3 grid, size_t shared) const {
    grid.x = static_cast<unsigned>(ceil_div(a.bytes, block.x * sizeof(Unit)));
    for (int64_t clip = 0; clip < s_.clips; clip += kMaxGrid) {
      grid.z = static_cast<unsigned>(std::min<int64_t>(kMaxGrid, s_.clips - clip));
      if (const char* error = launch(kernel, grid, block, shared, stream_, a)) return error;
      a.src += kMaxGrid * s_.src.clip;
      a.dst += kMaxGrid * s_.dst.clip;
      if (a.unread != nullptr) a.unread += kMaxGrid * a.unread_clip;
    }
    return nullptr;
  }

  const Shift& s_;
  const char* const src_;
  char* const dst_;
  void* const stream_;
  const bool in_place_;
  const int32_t frames_;     // to write: in place those that take part, else all
  int32_t frames_of_block_;  // all of them, or a few
  int32_t reach_ = 0;        // the largest offset
  int64_t tile_frames_;      // that a block has in shared memory
  bool tiled_;               // has it room for them?
  int64_t unit_;
};

}  // namespace

const char* shift_cuda(const Shift& shift, const void* src, void* dst, void* stream) {
  return Launcher(shift, src, dst, stream).run();
}

}  // namespace tsm_jit
