// Frame arithmetic of a temporal shift, shared by CPU and CUDA.
//
// A clip has n frames. A shift by `offset` computes out[t] = in[t + offset]. The padding decides what out[t] is where
// t + offset is outside the clip:
//
//     zeros      0
//     keep       in[t]
//     replicate  the nearest frame, in[0] or in[n - 1]
//     circular   in[(t + offset) mod n]
//
// n is `n_segment_shifted`: frames from n on do not take part in the shift. |offset| <= n everywhere.
#pragma once

#include "core/common.h"

namespace tsm_jit {

enum class Padding : int32_t { zeros, keep, replicate, circular };

constexpr int32_t kNoFrame = -1;  // the padding is zero

// The frames [begin, end).
struct FrameRange {
  int32_t begin, end;
};

// Returns s for which out[t] = in[s], or kNoFrame if out[t] = 0. Requires t < n.
TSM_HOST_DEVICE inline int32_t source_frame(int32_t t, int32_t offset, int32_t n, Padding padding) {
  const int32_t last = n - 1;
  const int32_t s = t + offset;
  if (0 <= s && s <= last) return s;
  switch (padding) {
    case Padding::keep: return t;
    case Padding::replicate: return s < 0 ? 0 : last;
    case Padding::circular: return s < 0 ? s + n : (s > last ? s - n : s);
    default: return kNoFrame;
  }
}

// Returns the frames t whose padding is in[s], for `keep` and `replicate`. Under the adjoint, the gradient of in[s] is
// the sum of grad[s - offset] and of grad[t] for these t.
TSM_HOST_DEVICE inline FrameRange padded_from(int32_t s, int32_t offset, int32_t n, Padding padding) {
  // With offset > 0 the last `offset` frames are padding, with offset < 0 the first.
  const FrameRange padded = offset > 0 ? FrameRange{n - offset, n} : FrameRange{0, -offset};
  const bool s_is_padded = padded.begin <= s && s < padded.end;
  if (padding == Padding::keep && s_is_padded) return {s, s + 1};
  if (padding == Padding::replicate && offset != 0 && s == (offset > 0 ? n - 1 : 0)) return padded;
  return {0, 0};
}

// Where a shifted tensor with boundary frames holds frame s of the unshifted tensor. The boundary frames are the frames
// of `in` that no frame of `out` holds, apart from padding: the shift moves them out of the clip. With offset > 0 they
// are the first `offset` frames, else the last `-offset` of the n. With `circular` padding there are none.
struct ShiftedIndex {
  int32_t t;         // as frame t of the shifted tensor; kNoFrame: as a boundary frame
  int32_t boundary;  // which of the group's boundary frames, if t is kNoFrame
  FrameRange pads;   // padding frames of the shifted tensor that belong to s: copies of frame s, or zeros
};

TSM_HOST_DEVICE inline ShiftedIndex shifted_index(int32_t s, int32_t offset, int32_t n, Padding padding) {
  const int32_t t = s - offset;
  if (s >= n || offset == 0) return {s, 0, {0, 0}};
  if (padding == Padding::circular) return {source_frame(s, -offset, n, padding), 0, {0, 0}};
  const bool is_padded = offset > 0 ? s >= n - offset : s < -offset;
  const FrameRange pads = padding != Padding::zeros ? padded_from(s, offset, n, padding)
                          : is_padded               ? FrameRange{s, s + 1}
                                                    : FrameRange{0, 0};
  if (0 <= t && t < n) return {t, 0, pads};
  return {kNoFrame, offset > 0 ? s : s - (n + offset), pads};
}

}  // namespace tsm_jit
