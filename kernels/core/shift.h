// The descriptor of a temporal shift in bytes, shared by the CPU kernels, the CUDA kernels and the bindings.
//
// A tensor is viewed as [clips, frames, outer_size, inner_bytes]. The last dimension is contiguous and holds every
// channel once, so a channel group is a byte range of it:
//
//     NCHW   outer_size = 1     inner_bytes = bytes of C*H*W elements    a group is one long piece per frame
//     NHWC   outer_size = H*W   inner_bytes = bytes of C elements        a group is one short piece per pixel
//
//          clip n              inner_bytes ->
//          frame 0   [ group 0: +1 | group 1: -1 | group 2: 0 ]
//          frame 1   [    ^        |    |        |            ]     out[t] = in[t + offset]
//          frame 2   [    |        |    v        |            ]
//
// A shift only moves bytes. The exception is the adjoint of `keep` and `replicate`: a frame that was read twice
// receives a sum of two gradients. Then `Shift::sum_dtype` names the element type.
#pragma once

#include "core/dtype.h"
#include "core/frames.h"

namespace tsm_jit {

// The bytes [begin, end) of inner_bytes, whose out[t] is in[t + offset].
struct ChannelGroup {
  int64_t begin, end;
  int32_t offset;
};

// Distances in bytes from one clip, frame or outer index to the next.
struct Strides {
  int64_t clip, frame, outer;
};

struct Shift {
  int64_t clips, frames, outer_size, inner_bytes;
  int32_t n_segment_shifted;  // frames from here on do not take part
  Padding padding;
  DType sum_dtype;  // not `none`: this is the adjoint of `keep` or `replicate`. `groups` holds the forward offsets.
  const ChannelGroup* groups;
  int32_t n_groups;  // the groups cover [0, inner_bytes) in order
  Strides src, dst;
};

}  // namespace tsm_jit
