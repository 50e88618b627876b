// The end of a residual block on the CPU: frame by frame, group by group, row by row. No torch headers.
#include "residual_shift.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "element.h"

namespace tsm_jit {
namespace {

// The rows of a group in one frame; null where a tensor is not there.
template <class Byte>
struct FrameRows {
  Byte* first;
  int64_t stride;
  Byte* operator[](int64_t row) const { return first == nullptr ? nullptr : first + row * stride; }
};

// One group of one frame, wherever a tensor holds it.
struct Piece {
  const Residual& r;
  int64_t clip;
  int32_t group;

  int64_t begin() const { return r.shift.groups[group].begin; }
  int64_t width() const { return r.shift.groups[group].end - begin(); }
  template <class Byte>
  FrameRows<Byte> plain(Byte* data, int64_t s) const {
    const Shift& shift = r.shift;
    if (data == nullptr) return {nullptr, 0};
    return {data + (clip * shift.frames + s) * shift.outer * shift.run + begin(), shift.run};
  }
  template <class Byte>
  FrameRows<Byte> at(const Place& place, Byte* shifted, Byte* unread) const {
    if (place.t != kNoFrame) return plain(shifted, place.t);
    if (unread == nullptr) return {nullptr, 0};
    const int64_t within = r.unread_begin[group] + place.unread * width();
    return {unread + clip * r.shift.outer * r.unread_run + within, r.unread_run};
  }
};

// x where it is wanted as itself: `row` of a piece of frame s, one pixel of all its channels or all pixels of each.
template <class Stored>
void store_plain(const Residual& r, const ResidualForward& f, const Piece& piece, int64_t s, int64_t row,
                 const Stored* x) {
  if (f.plain == nullptr) return;
  const int64_t width = f.width, step = f.step, pixels = r.inner == 1 ? r.shift.outer : r.inner;
  const int64_t columns = (width + step - 1) / step, kept = (pixels / width + step - 1) / step * columns;
  const auto size = static_cast<int64_t>(sizeof(Stored)), channels = r.shift.run / size / r.inner;
  const int64_t first = piece.begin() / size / r.inner, count = piece.width() / size / r.inner;
  Stored* const frame = static_cast<Stored*>(f.plain) + (piece.clip * r.shift.frames + s) * kept * channels;
  if (r.inner == 1) {
    const int64_t h = row / width, w = row % width;
    if (h % step != 0 || w % step != 0) return;
    std::copy(x, x + count, frame + (h / step * columns + w / step) * channels + first);
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    Stored* to = frame + (first + c) * kept;
    for (int64_t h = 0; h < pixels / width; h += step) {
      for (int64_t w = 0; w < width; w += step) *to++ = x[c * pixels + h * width + w];
    }
  }
}

template <class Visit>
void for_each_piece(const Residual& r, int64_t first_task, int64_t last_task, Visit visit) {
  for (int64_t task = first_task; task < last_task; ++task) {
    const auto s = static_cast<int32_t>(task % r.shift.frames);
    for (int32_t g = 0; g < r.shift.n_groups; ++g) {
      const Place place = place_of(s, r.shift.groups[g].offset, r.shift.n_segment_shifted, r.shift.padding);
      visit(Piece{r, task / r.shift.frames, g}, s, place);
    }
  }
}

// z * z_scale + (identity * identity_scale + bias): both norms, by channel. Without one, scale is 1 and bias 0: then it
// is the addition it looks like, to the bit.
template <class Element>
struct Affine {
  using Wide = typename Element::Wide;
  std::vector<Wide> z_scale, identity_scale, bias;

  Affine(const ResidualForward& f, int64_t channels) : bias(channels) {
    add(f.z_norm, channels, z_scale);
    add(f.identity_norm, channels, identity_scale);
  }

 private:
  void add(const Norm& norm, int64_t channels, std::vector<Wide>& scale) {
    scale.assign(channels, 1);
    if (norm.mean == nullptr) return;
    const auto load = [&](const void* data, int64_t channel) -> Wide {
      if (norm.in_float) return static_cast<const float*>(data)[channel];
      return Element::widen(static_cast<const typename Element::Stored*>(data)[channel]);
    };
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = load(norm.weight, c) * (1 / std::sqrt(load(norm.variance, c) + static_cast<Wide>(norm.epsilon)));
      bias[c] += load(norm.bias, c) - load(norm.mean, c) * scale[c];
    }
  }
};

template <class Element>
void forward(const Residual& r, const ResidualForward& f, int64_t first_task, int64_t last_task) {
  using Stored = typename Element::Stored;
  const int64_t channels = r.shift.run / static_cast<int64_t>(sizeof(Stored)) / r.inner;
  const Affine<Element> affine(f, channels);
  const std::vector<Stored> zeros(f.identity == nullptr ? r.shift.run / sizeof(Stored) : 0);
  const auto lowest = f.relu ? typename Element::Wide{0} : -std::numeric_limits<typename Element::Wide>::infinity();
  for_each_piece(r, first_task, last_task, [&](const Piece& piece, int32_t s, const Place& there) {
    const Place same{s, 0, {0, 0}}, place = f.out_is_shifted ? there : same;
    const auto z = piece.plain(static_cast<const char*>(f.z), s);
    const auto identity = piece.at(f.identity_is_shifted ? there : same, static_cast<const char*>(f.identity),
                                   static_cast<const char*>(f.unread));
    const auto out = piece.at(place, static_cast<char*>(f.out), static_cast<char*>(f.unread_out));
    const int64_t count = piece.width() / static_cast<int64_t>(sizeof(Stored));
    const int64_t first_channel = piece.begin() / static_cast<int64_t>(sizeof(Stored)) / r.inner;
    for (int64_t row = 0; row < r.shift.outer; ++row) {
      const auto* from = reinterpret_cast<const Stored*>(z[row]);
      const auto* added = f.identity == nullptr ? zeros.data() : reinterpret_cast<const Stored*>(identity[row]);
      auto* to = reinterpret_cast<Stored*>(out[row]);
      // `inner` of each channel, or 1 of each: two loops that a compiler makes vectors of.
      const auto values = [&](int64_t begin, int64_t end, auto channel_of) {
        for (int64_t at = begin; at < end; ++at) {
          const int64_t c = channel_of(at);
          const auto sum = Element::widen(from[at]) * affine.z_scale[c] +
                           (Element::widen(added[at]) * affine.identity_scale[c] + affine.bias[c]);
          to[at] = Element::narrow(sum <= lowest ? lowest : sum);  // NaN stays
        }
      };
      if (r.inner == 1) {
        values(0, count, [&](int64_t at) { return first_channel + at; });
      } else {
        for (int64_t at = 0, c = first_channel; at < count; at += r.inner, ++c) {
          values(at, at + r.inner, [&](int64_t) { return c; });
        }
      }
      store_plain(r, f, piece, s, row, to);
      for (int32_t t = place.pads.begin; t < place.pads.end; ++t) {
        auto* padding = reinterpret_cast<Stored*>(piece.plain(static_cast<char*>(f.out), t)[row]);
        for (int64_t at = 0; at < count; ++at) padding[at] = r.shift.padding == Padding::zeros ? Stored{} : to[at];
      }
    }
  });
}

template <class Element>
void pool(const Residual& r, const ResidualPool& p, int64_t first_task, int64_t last_task) {
  using Stored = typename Element::Stored;
  using Wide = typename Element::Wide;
  const auto channels = r.shift.run / static_cast<int64_t>(sizeof(Stored));
  ResidualForward norm_alone{};
  norm_alone.z_norm = p.z_norm;
  const Affine<Element> affine(norm_alone, channels);
  const int64_t columns = (p.width + 1) / 2;
  std::vector<Wide> largest(channels);
  std::vector<Stored> x(channels);
  for_each_piece(r, first_task, last_task, [&](const Piece& piece, int32_t s, const Place& place) {
    const int64_t first = piece.begin() / static_cast<int64_t>(sizeof(Stored));
    const int64_t count = piece.width() / static_cast<int64_t>(sizeof(Stored));
    const auto* const frame =
        static_cast<const Stored*>(p.z) + (piece.clip * r.shift.frames + s) * p.height * p.width * channels + first;
    const auto plain = piece.plain(static_cast<char*>(p.plain), s);
    const auto out = piece.at(place, static_cast<char*>(p.out), static_cast<char*>(p.unread_out));
    for (int64_t row = 0; row < r.shift.outer; ++row) {
      std::fill(largest.begin(), largest.end(), Wide{0});  // the least that a ReLU leaves
      const int64_t top = row / columns * 2 - 1, left = row % columns * 2 - 1;
      for (int64_t h = std::max<int64_t>(top, 0); h < std::min<int64_t>(top + 3, p.height); ++h) {
        for (int64_t w = std::max<int64_t>(left, 0); w < std::min<int64_t>(left + 3, p.width); ++w) {
          const Stored* const z = frame + (h * p.width + w) * channels;
          for (int64_t c = 0; c < count; ++c) {
            const Wide value = Element::widen(z[c]) * affine.z_scale[first + c] + affine.bias[first + c];
            largest[c] = value <= largest[c] || largest[c] != largest[c] ? largest[c] : value;  // NaN stays
          }
        }
      }
      for (int64_t c = 0; c < count; ++c) x[c] = Element::narrow(largest[c]);
      const auto store = [&](char* to) {
        if (to != nullptr) std::memcpy(to, x.data(), count * sizeof(Stored));
      };
      store(plain[row]);
      store(out[row]);
      if (p.out == nullptr) continue;
      if (r.shift.padding == Padding::zeros) std::fill(x.begin(), x.end(), Stored{});
      for (int32_t t = place.pads.begin; t < place.pads.end; ++t) store(piece.plain(static_cast<char*>(p.out), t)[row]);
    }
  });
}

template <class Element>
void backward(const Residual& r, const ResidualBackward& b, int64_t first_task, int64_t last_task) {
  using Stored = typename Element::Stored;
  constexpr int64_t kTile = 256;
  for_each_piece(r, first_task, last_task, [&](const Piece& piece, int32_t s, const Place& there) {
    const Place same{s, 0, {0, 0}}, place = b.out_is_shifted ? there : same;
    const auto bytes = [](const void* data) { return static_cast<const char*>(data); };
    const auto out = piece.at(place, bytes(b.out), bytes(b.unread_out));
    const auto shifted = piece.at(there, static_cast<char*>(b.grad_shifted), static_cast<char*>(b.grad_unread_in));
    const auto grad = b.grad == nullptr ? shifted : piece.plain(static_cast<char*>(b.grad), s);
    std::vector<FrameRows<const char>> terms{piece.at(place, bytes(b.grad_a), bytes(b.grad_unread)),
                                             piece.at(place, bytes(b.grad_b), bytes(nullptr))};
    const FrameRange readers = r.shift.padding == Padding::zeros ? same.pads : place.pads;
    for (int32_t t = readers.begin; t < readers.end; ++t) {
      for (const void* of : {b.grad_a, b.grad_b}) terms.push_back(piece.plain(bytes(of), t));
    }
    const int64_t count = piece.width() / static_cast<int64_t>(sizeof(Stored));
    for (int64_t row = 0; row < r.shift.outer; ++row) {
      const auto* mask = reinterpret_cast<const Stored*>(out[row]);
      auto* to = reinterpret_cast<Stored*>(grad[row]);
      auto* to_shifted = reinterpret_cast<Stored*>(shifted[row]);
      for (int64_t begin = 0; begin < count; begin += kTile) {
        const int64_t end = std::min(begin + kTile, count);
        typename Element::Wide sum[kTile] = {};
        for (const auto& term : terms) {  // one by one: loops that a compiler makes vectors of
          const auto* from = reinterpret_cast<const Stored*>(term[row]);
          for (int64_t at = begin; from != nullptr && at < end; ++at) sum[at - begin] += Element::widen(from[at]);
        }
        for (int64_t at = begin; at < end; ++at) {
          const auto of = sum[at - begin];
          to[at] = Element::widen(mask[at]) <= 0 ? Stored{} : Element::narrow(of);
        }
      }
      if (to_shifted == nullptr) continue;
      if (to_shifted != to) std::memcpy(to_shifted, to, count * sizeof(Stored));
      for (int32_t t = there.pads.begin; t < there.pads.end; ++t) {
        auto* padding = reinterpret_cast<Stored*>(piece.plain(static_cast<char*>(b.grad_shifted), t)[row]);
        for (int64_t at = 0; at < count; ++at) padding[at] = Stored{};
      }
    }
  });
}

}  // namespace

void residual_forward_cpu(const Residual& r, const ResidualForward& f, int64_t first_task, int64_t last_task) {
  switch (r.type) {
    case Sum::float16: return forward<Float16>(r, f, first_task, last_task);
    case Sum::bfloat16: return forward<BFloat16>(r, f, first_task, last_task);
    case Sum::float32: return forward<Native<float>>(r, f, first_task, last_task);
    default: return forward<Native<double>>(r, f, first_task, last_task);
  }
}

void residual_pool_cpu(const Residual& r, const ResidualPool& p, int64_t first_task, int64_t last_task) {
  switch (r.type) {
    case Sum::float16: return pool<Float16>(r, p, first_task, last_task);
    case Sum::bfloat16: return pool<BFloat16>(r, p, first_task, last_task);
    case Sum::float32: return pool<Native<float>>(r, p, first_task, last_task);
    default: return pool<Native<double>>(r, p, first_task, last_task);
  }
}

void residual_backward_cpu(const Residual& r, const ResidualBackward& b, int64_t first_task, int64_t last_task) {
  switch (r.type) {
    case Sum::float16: return backward<Float16>(r, b, first_task, last_task);
    case Sum::bfloat16: return backward<BFloat16>(r, b, first_task, last_task);
    case Sum::float32: return backward<Native<float>>(r, b, first_task, last_task);
    default: return backward<Native<double>>(r, b, first_task, last_task);
  }
}

}  // namespace tsm_jit
