// Temporal shift on the CPU: copies rows of bytes between frames, tile by tile.
//
//     out[n, t, o, c] = in[n, t + offset(c), o, c]    see core/shift.h
//
// Tensors      src, dst: [clips, frames, outer_size, inner_bytes] with strides in bytes; see core/shift.h
// Task         one tile of one clip: all frames of up to kTileBytes of [outer_size, inner_bytes]
// Aliasing     src and dst are the same tensor (in place) or do not overlap
// Bytes moved  each byte that moves is read once and written once; in place the other groups are not touched
#include "shift/temporal_shift.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace tsm_jit {
namespace {

// So small that the frames of a tile stay in a core's L2 while its groups move.
constexpr int64_t kTileBytes = 32 * 1024;

// How [outer_size, inner_bytes] is cut: several outer indices per tile, or a part of one if it does not fit.
struct Tiling {
  int64_t rows, bytes;  // of one tile: outer indices, and bytes of each
  int64_t row_tiles, byte_tiles;

  explicit Tiling(const Shift& s)
      : rows(std::min(s.outer_size, std::max<int64_t>(1, kTileBytes / std::min(s.inner_bytes, kTileBytes)))),
        bytes(std::min(s.inner_bytes, kTileBytes)),
        row_tiles(ceil_div(s.outer_size, rows)),
        byte_tiles(ceil_div(s.inner_bytes, bytes)) {}
  int64_t per_clip() const { return row_tiles * byte_tiles; }
};

// Rows of bytes. Each begins `stride` bytes after the one before.
template <class Byte>
struct Rows {
  Byte* data;
  int64_t stride;
};

template <int64_t kWidth>
void copy_fixed(Rows<char> dst, Rows<const char> src, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(dst.data + i * dst.stride, src.data + i * src.stride, kWidth);
}

void copy(Rows<char> dst, Rows<const char> src, int64_t rows, int64_t width) {
  if (dst.data == src.data) return;  // in place, a frame that keeps its value
  switch (width) {                   // common widths of folds: calling memcpy would cost more than the copy
    case 4: return copy_fixed<4>(dst, src, rows);
    case 8: return copy_fixed<8>(dst, src, rows);
    case 16: return copy_fixed<16>(dst, src, rows);
    case 32: return copy_fixed<32>(dst, src, rows);
    case 64: return copy_fixed<64>(dst, src, rows);
    case 128: return copy_fixed<128>(dst, src, rows);
  }
  for (int64_t i = 0; i < rows; ++i) std::memcpy(dst.data + i * dst.stride, src.data + i * src.stride, width);
}

void zero(Rows<char> dst, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) std::memset(dst.data + i * dst.stride, 0, width);
}

// dst = terms[0] + terms[1] + ..., added in this order and rounded once. dst may be one of the terms.
template <class Element>
void add(Rows<char> dst, const std::vector<Rows<const char>>& terms, int64_t rows, int64_t width) {
  using storage_t = typename Element::storage_t;
  const auto load = [](const char* from) {
    storage_t x;
    std::memcpy(&x, from, sizeof x);
    return Element::to_acc(x);
  };
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t at = 0; at < width; at += sizeof(storage_t)) {
      typename Element::acc_t sum = load(terms[0].data + i * terms[0].stride + at);
      for (size_t k = 1; k < terms.size(); ++k) sum += load(terms[k].data + i * terms[k].stride + at);
      const storage_t rounded = Element::from_acc(sum);
      std::memcpy(dst.data + i * dst.stride + at, &rounded, sizeof rounded);
    }
  }
}

// The part of one channel group that lies in one tile, at all frames. In place, frames are visited in the order in
// which each is read before it is overwritten: forward in time if offset > 0, else backward.
class GroupTile {
 public:
  GroupTile(const Shift& s, int32_t offset, const char* src, char* dst, int64_t rows, int64_t width)
      : s_(s), offset_(offset), n_(s.n_segment_shifted), src_(src), dst_(dst), rows_(rows), width_(width) {}

  void gather() {
    if (src_ == dst_ && s_.padding == Padding::circular) save_frames_read_last();
    for (int32_t i = 0; i < n_; ++i) gather_frame(offset_ >= 0 ? i : n_ - 1 - i);
    copy_frames_from_n();
  }

  // One frame of gather(), for out of place, where the order does not matter.
  void gather_frame(int32_t t) {
    const int32_t s = t < n_ ? source_frame(t, offset_, n_, s_.padding) : t;
    if (s == kNoFrame) {
      zero(out(t), rows_, width_);
    } else {
      copy(out(t), is_saved(s) ? saved(s) : in(s), rows_, width_);
    }
  }

  void gather_adjoint() {
    std::vector<Rows<const char>> terms;
    for (int32_t i = 0; i < n_; ++i) {
      const int32_t t = offset_ > 0 ? n_ - 1 - i : i;
      const int32_t moved = t - offset_;
      terms.clear();
      if (0 <= moved && moved < n_) terms.push_back(in(moved));
      const FrameRange padded = padded_from(t, offset_, n_, s_.padding);
      for (int32_t p = padded.begin; p < padded.end; ++p) terms.push_back(in(p));
      if (terms.empty()) {
        zero(out(t), rows_, width_);
      } else if (terms.size() == 1) {
        copy(out(t), terms[0], rows_, width_);  // keeps bits that an addition might change (-0, NaN)
      } else {
        dispatch_dtype(s_.sum_dtype, [&](auto element) { add<decltype(element)>(out(t), terms, rows_, width_); });
      }
    }
    copy_frames_from_n();
  }

  int32_t offset() const { return offset_; }

 private:
  Rows<const char> in(int64_t t) const { return {src_ + t * s_.src.frame, s_.src.outer}; }
  Rows<char> out(int64_t t) const { return {dst_ + t * s_.dst.frame, s_.dst.outer}; }

  void copy_frames_from_n() {
    for (int64_t t = n_; t < s_.frames; ++t) copy(out(t), in(t), rows_, width_);
  }

  // A circular shift in place overwrites some frames at its start and reads their old values at its end: saves these.
  void save_frames_read_last() {
    first_saved_ = offset_ > 0 ? 0 : n_ + offset_;
    n_saved_ = offset_ > 0 ? offset_ : -offset_;
    saved_.resize(n_saved_ * rows_ * width_);
    for (int64_t k = 0; k < n_saved_; ++k) {
      copy({saved_.data() + k * rows_ * width_, width_}, in(first_saved_ + k), rows_, width_);
    }
  }
  bool is_saved(int64_t t) const { return first_saved_ <= t && t < first_saved_ + n_saved_; }
  Rows<const char> saved(int64_t t) const { return {saved_.data() + (t - first_saved_) * rows_ * width_, width_}; }

  const Shift& s_;
  const int32_t offset_, n_;
  const char* src_;
  char* dst_;
  const int64_t rows_, width_;
  std::vector<char> saved_;
  int64_t first_saved_ = 0, n_saved_ = 0;
};

// Shifts `rows` outer indices from `row` on, bytes [begin, end) of each, of one clip.
void shift_tile(const Shift& s, const char* src, char* dst, int64_t clip, int64_t row, int64_t rows, int64_t begin,
                int64_t end) {
  const bool in_place = src == dst;
  std::vector<GroupTile> tiles;
  for (int32_t g = 0; g < s.n_groups; ++g) {
    const ChannelGroup& group = s.groups[g];
    const int64_t from = std::max(begin, group.begin), to = std::min(end, group.end);
    if (from >= to || (in_place && group.offset == 0)) continue;
    tiles.emplace_back(s, group.offset, src + clip * s.src.clip + row * s.src.outer + from,
                       dst + clip * s.dst.clip + row * s.dst.outer + from, rows, to - from);
  }
  if (!in_place && s.sum_dtype == DType::none) {  // frame by frame, as `dst` lies in memory
    for (int32_t t = 0; t < s.frames; ++t) {
      for (GroupTile& tile : tiles) tile.gather_frame(t);
    }
    return;
  }
  for (GroupTile& tile : tiles) {
    s.sum_dtype == DType::none || tile.offset() == 0 ? tile.gather() : tile.gather_adjoint();
  }
}

}  // namespace

int64_t shift_cpu_tasks(const Shift& shift) { return shift.clips * Tiling(shift).per_clip(); }

void shift_cpu(const Shift& shift, const void* src, void* dst, int64_t first_task, int64_t last_task) {
  const Tiling tiling(shift);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t clip = task / tiling.per_clip(), tile = task % tiling.per_clip();
    const int64_t row = tile / tiling.byte_tiles * tiling.rows, begin = tile % tiling.byte_tiles * tiling.bytes;
    const int64_t rows = std::min(tiling.rows, shift.outer_size - row);
    const int64_t end = std::min(begin + tiling.bytes, shift.inner_bytes);
    shift_tile(shift, static_cast<const char*>(src), static_cast<char*>(dst), clip, row, rows, begin, end);
  }
}

}  // namespace tsm_jit
