// Temporal shift on the CPU: rows of bytes copied between frames, tile by tile. No torch headers.
#include "temporal_shift.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "element.h"

namespace tsm_jit {
namespace {

// A tile of one frame is small enough that the frames of a clip stay in a core's L2 while its groups are moved.
constexpr int64_t kTileBytes = 32 * 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How [outer, run] is cut: whole rows while several fit a tile, pieces of a row when one does not.
struct Tiling {
  int64_t rows, bytes;           // of one tile
  int64_t row_tiles, run_tiles;  // of one clip
  int64_t per_clip() const { return row_tiles * run_tiles; }
};

Tiling tile(const Shift& s) {
  Tiling t;
  t.bytes = std::min(s.run, kTileBytes);
  t.rows = std::min(s.outer, std::max<int64_t>(1, kTileBytes / t.bytes));
  t.row_tiles = ceil_div(s.outer, t.rows);
  t.run_tiles = ceil_div(s.run, t.bytes);
  return t;
}

// `count` pieces of `width` bytes, each `stride` bytes after the last.
template <class Byte>
struct Rows {
  Byte* data;
  int64_t stride;
};

template <int64_t Width>
void copy_fixed(Rows<char> dst, Rows<const char> src, int64_t count) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(dst.data + i * dst.stride, src.data + i * src.stride, Width);
}

void copy(Rows<char> dst, Rows<const char> src, int64_t count, int64_t width) {
  if (dst.data == src.data) return;  // in place, a frame that keeps its value
  switch (width) {                   // the folds of usual networks: a call to memcpy would cost more than the bytes
    case 4: return copy_fixed<4>(dst, src, count);
    case 8: return copy_fixed<8>(dst, src, count);
    case 16: return copy_fixed<16>(dst, src, count);
    case 32: return copy_fixed<32>(dst, src, count);
    case 64: return copy_fixed<64>(dst, src, count);
    case 128: return copy_fixed<128>(dst, src, count);
  }
  for (int64_t i = 0; i < count; ++i) std::memcpy(dst.data + i * dst.stride, src.data + i * src.stride, width);
}

void zero(Rows<char> dst, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) std::memset(dst.data + i * dst.stride, 0, width);
}

// dst = terms[0] + terms[1] + ..., added in this order and rounded once. dst may be one of the terms.
template <class Element>
void add(Rows<char> dst, const std::vector<Rows<const char>>& terms, int64_t count, int64_t width) {
  using Stored = typename Element::Stored;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < width; at += sizeof(Stored)) {
      const auto load = [&](const Rows<const char>& term) {
        Stored x;
        std::memcpy(&x, term.data + i * term.stride + at, sizeof x);
        return Element::widen(x);
      };
      typename Element::Wide sum = load(terms[0]);
      for (size_t k = 1; k < terms.size(); ++k) sum += load(terms[k]);
      const Stored rounded = Element::narrow(sum);
      std::memcpy(dst.data + i * dst.stride + at, &rounded, sizeof rounded);
    }
  }
}

void add(Sum type, Rows<char> dst, const std::vector<Rows<const char>>& terms, int64_t count, int64_t width) {
  switch (type) {
    case Sum::float16: return add<Float16>(dst, terms, count, width);
    case Sum::bfloat16: return add<BFloat16>(dst, terms, count, width);
    case Sum::float32: return add<Native<float>>(dst, terms, count, width);
    case Sum::float64: return add<Native<double>>(dst, terms, count, width);
    case Sum::none: return;
  }
}

// One group's piece of a tile, through every frame. In place, frames are visited in the order in which each is read
// before it is overwritten: forward in time when the source lies ahead, backward when it lies behind.
class Piece {
 public:
  Piece(const Shift& s, const Group& g, const char* src, char* dst, int64_t rows, int64_t width)
      : s_(s), offset_(g.offset), src_(src), dst_(dst), rows_(rows), width_(width) {}

  void forward() {
    const int32_t shifted = s_.n_segment_shifted;
    if (src_ == dst_ && s_.padding == Padding::circular) save_overwritten_frames();
    for (int32_t i = 0; i < shifted; ++i) forward(offset_ >= 0 ? i : shifted - 1 - i);
    keep_frames_beyond_shift();
  }

  // One frame of it, for which the order must not matter: out of place.
  void forward(int32_t t) {
    const int32_t from = t < s_.n_segment_shifted ? source_frame(t, offset_, s_.n_segment_shifted, s_.padding) : t;
    if (from == kNoFrame) {
      zero(out(t), rows_, width_);
    } else {
      copy(out(t), is_saved(from) ? saved(from) : in(from), rows_, width_);
    }
  }

  // In place: the frames that nothing reads to where they are kept, or back.
  void move_unread(Rows<char> aside, int64_t frame_bytes) {
    const bool come_back = s_.unread.come_back;
    const FrameRange kept = unread_frames(come_back ? -offset_ : offset_, s_.n_segment_shifted);
    for (int32_t t = kept.begin; t < kept.end; ++t, aside.data += frame_bytes) {
      come_back ? copy(out(t), {aside.data, aside.stride}, rows_, width_) : copy(aside, in(t), rows_, width_);
    }
  }

  void adjoint_sum() {
    const int32_t shifted = s_.n_segment_shifted;
    std::vector<Rows<const char>> terms;
    for (int32_t i = 0; i < shifted; ++i) {
      const int32_t t = offset_ > 0 ? shifted - 1 - i : i;
      const int32_t moved = t - offset_;
      terms.clear();
      if (0 <= moved && moved < shifted) terms.push_back(in(moved));
      const FrameRange readers = padding_readers(t, offset_, shifted, s_.padding);
      for (int32_t r = readers.begin; r < readers.end; ++r) terms.push_back(in(r));
      if (terms.empty()) {
        zero(out(t), rows_, width_);
      } else if (terms.size() == 1) {
        copy(out(t), terms[0], rows_, width_);  // a move keeps every bit, as an addition might not
      } else {
        add(s_.sum, out(t), terms, rows_, width_);
      }
    }
    keep_frames_beyond_shift();
  }

  bool is_still() const { return offset_ == 0; }

 private:
  Rows<const char> in(int64_t t) const { return {src_ + t * s_.src.frame, s_.src.outer}; }
  Rows<char> out(int64_t t) const { return {dst_ + t * s_.dst.frame, s_.dst.outer}; }

  void keep_frames_beyond_shift() {
    for (int64_t t = s_.n_segment_shifted; t < s_.frames; ++t) copy(out(t), in(t), rows_, width_);
  }

  // A circular shift in place reads the frames it starts with once more at its end.
  void save_overwritten_frames() {
    first_saved_ = offset_ > 0 ? 0 : s_.n_segment_shifted + offset_;
    n_saved_ = offset_ > 0 ? offset_ : -offset_;
    saved_.resize(n_saved_ * rows_ * width_);
    for (int64_t k = 0; k < n_saved_; ++k) {
      copy({saved_.data() + k * rows_ * width_, width_}, in(first_saved_ + k), rows_, width_);
    }
  }
  bool is_saved(int64_t t) const { return first_saved_ <= t && t < first_saved_ + n_saved_; }
  Rows<const char> saved(int64_t t) const { return {saved_.data() + (t - first_saved_) * rows_ * width_, width_}; }

  const Shift& s_;
  const int32_t offset_;
  const char* src_;
  char* dst_;
  const int64_t rows_, width_;
  std::vector<char> saved_;
  int64_t first_saved_ = 0, n_saved_ = 0;
};

}  // namespace

int64_t cpu_tasks(const Shift& shift) { return shift.clips * tile(shift).per_clip(); }

void shift_cpu(const Shift& shift, const void* src, void* dst, int64_t first_task, int64_t last_task) {
  const Tiling tiling = tile(shift);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t clip = task / tiling.per_clip(), within = task % tiling.per_clip();
    const int64_t row = within / tiling.run_tiles * tiling.rows, begin = within % tiling.run_tiles * tiling.bytes;
    const int64_t rows = std::min(tiling.rows, shift.outer - row), end = std::min(begin + tiling.bytes, shift.run);
    std::vector<Piece> pieces;
    const Unread& unread = shift.unread;
    for (int32_t g = 0; g < shift.n_groups; ++g) {
      const Group& group = shift.groups[g];
      const int64_t from = std::max(begin, group.begin), to = std::min(end, group.end);
      if (from >= to || (src == dst && group.offset == 0)) continue;
      pieces.emplace_back(
          shift, group, static_cast<const char*>(src) + clip * shift.src.clip + row * shift.src.outer + from,
          static_cast<char*>(dst) + clip * shift.dst.clip + row * shift.dst.outer + from, rows, to - from);
      if (unread.data == nullptr) continue;
      char* const aside = unread.data + (clip * shift.outer + row) * unread.run + unread.begin[g] + from - group.begin;
      if (unread.come_back) pieces.back().forward();
      pieces.back().move_unread({aside, unread.run}, group.end - group.begin);
      if (unread.come_back) pieces.pop_back();
    }
    if (src != dst && shift.sum == Sum::none) {
      for (int32_t t = 0; t < shift.frames; ++t) {
        for (Piece& piece : pieces) piece.forward(t);
      }
      continue;
    }
    for (Piece& piece : pieces) {
      if (shift.sum == Sum::none || piece.is_still()) {
        piece.forward();
      } else {
        piece.adjoint_sum();
      }
    }
  }
}

}  // namespace tsm_jit
