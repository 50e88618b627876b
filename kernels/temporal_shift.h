// The vocabulary that the CPU kernels, the CUDA kernels and the bindings share: what a shift is, in bytes.
//
// A tensor is seen as [clips, frames, outer, run]. The `run` bytes of one (clip, frame, outer) are contiguous and hold
// every channel once, so a channel group is a byte range of the run:
//
//     NCHW        outer = 1,    run = C*H*W elements     a group is one long piece per frame
//     NHWC        outer = H*W,  run = C elements         a group is one short piece per pixel
//
//          clip n              run  ->
//          frame 0   [ group 0: +1 | group 1: -1 | group 2: does not move ]
//          frame 1   [    ^        |    |        |                        ]     out[t] = in[t + offset]
//          frame 2   [    |        |    v        |                        ]
//
// Nothing is computed: bytes move. The one exception is the adjoint of `keep` and `replicate`, where a frame that was
// read twice receives a sum; there the element type matters, and `Shift::sum` names it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TSM_HOST_DEVICE __host__ __device__
#else
#define TSM_HOST_DEVICE
#endif

namespace tsm_jit {

enum class Padding : int32_t { zeros, keep, replicate, circular };

// The type in which an adjoint adds. `none`: bytes only move.
enum class Sum : int32_t { none, float16, bfloat16, float32, float64 };

constexpr int32_t kNoFrame = -1;  // the padding is zero

// The frame whose value out[t] takes, for a frame t < n_segment_shifted and |offset| <= n_segment_shifted.
TSM_HOST_DEVICE inline int32_t source_frame(int32_t t, int32_t offset, int32_t n_segment_shifted, Padding padding) {
  const int32_t last = n_segment_shifted - 1;
  const int32_t s = t + offset;
  if (0 <= s && s <= last) return s;
  switch (padding) {
    case Padding::keep: return t;
    case Padding::replicate: return s < 0 ? 0 : last;
    case Padding::circular: return s < 0 ? s + n_segment_shifted : (s > last ? s - n_segment_shifted : s);
    default: return kNoFrame;
  }
}

// The frames [begin, end) whose gradients frame s receives besides that of frame s - offset, which moved: the padding
// that read s. Empty for every padding but `keep` and `replicate`.
struct FrameRange {
  int32_t begin, end;
};

TSM_HOST_DEVICE inline FrameRange padding_readers(int32_t s, int32_t offset, int32_t n_segment_shifted,
                                                  Padding padding) {
  // With offset > 0 the last `offset` frames are padding, with offset < 0 the first.
  const FrameRange padded =
      offset > 0 ? FrameRange{n_segment_shifted - offset, n_segment_shifted} : FrameRange{0, -offset};
  const bool s_is_padded = padded.begin <= s && s < padded.end;
  if (padding == Padding::keep && s_is_padded) return {s, s + 1};
  if (padding == Padding::replicate && offset != 0 && s == (offset > 0 ? n_segment_shifted - 1 : 0)) return padded;
  return {0, 0};
}

// Channels [begin, end) of the run, in bytes, read the frame `offset` later.
struct Group {
  int64_t begin, end;
  int32_t offset;
};

// The frames of a group that no frame reads, under any padding but `circular`, which leaves none.
TSM_HOST_DEVICE inline FrameRange unread_frames(int32_t offset, int32_t n_segment_shifted) {
  return offset > 0 ? FrameRange{0, offset} : FrameRange{n_segment_shifted + offset, n_segment_shifted};
}

// In place alone: where these frames are kept, so that the shift can be undone.
//
//     data    [clips, outer, run]: for each group these frames, one after the other
struct Unread {
  char* data;            // null: they are lost
  const int64_t* begin;  // of each group, in bytes of the run
  int64_t run;           // in bytes
  bool come_back;        // this shift is the inverse of the one that kept them, and pads with them
};

// Distances in bytes from one clip, frame or outer index to the next.
struct Strides {
  int64_t clip, frame, outer;
};

struct Shift {
  int64_t clips, frames, outer, run;  // run in bytes
  int32_t n_segment_shifted;          // frames from here on do not take part
  Padding padding;
  Sum sum;  // not `none`: the adjoint that adds; `groups` then still holds the forward offsets
  const Group* groups;
  int32_t n_groups;  // the groups cover [0, run) in order
  Strides src, dst;
  Unread unread;
};

// CPU. The work is `cpu_tasks(shift)` independent tasks; any thread may run any range of them. In place: src == dst.
int64_t cpu_tasks(const Shift& shift);
void shift_cpu(const Shift& shift, const void* src, void* dst, int64_t first_task, int64_t last_task);

// CUDA, on `stream` (a cudaStream_t) of the current device. In place: src == dst.
// Returns null, or what CUDA said was wrong.
const char* shift_cuda(const Shift& shift, const void* src, void* dst, void* stream);

}  // namespace tsm_jit
