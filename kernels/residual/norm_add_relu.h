// The end of a residual block: out = relu(z_norm(z) + identity_norm(identity)). See residual_stream.h for the layouts.
#pragma once

#include "residual/residual_stream.h"

namespace tsm_jit {

struct NormAddRelu {
  const void* z;  // unshifted
  Norm z_norm;
  const void* identity;  // null: nothing is added, and nothing is shifted
  Norm identity_norm;    // per channel, so it applies in both layouts
  const void* boundary;  // of the identity, if it is shifted
  // May be `identity` if both have the same layout, or `z`: see shifts_z_in_place.
  void* out;
  void* boundary_out;  // if out is shifted
  bool identity_is_shifted, out_is_shifted;
  bool relu;  // else out is the sum itself
  // May be null. A second output next to a shifted `out` that is not z: every step-th row and column of pixels,
  // unshifted.
  void* unshifted;
  int32_t width, step;  // width: of `out` in pixels
};

// Does a shifted `out` overwrite an unshifted `z`? Then a frame is written where another one is read. So one thread
// visits all frames: from the first on if offset > 0, else from the last. Only CUDA can do this, and not a circular
// shift.
inline bool shifts_z_in_place(const NormAddRelu& f) { return f.out_is_shifted && f.out == f.z; }

// CPU. The work is clips * frames independent tasks.
void norm_add_relu_cpu(const ResidualStream& r, const NormAddRelu& f, int64_t first_task, int64_t last_task);

// CUDA, on `stream` of the current device. Returns null or an error message. `unshifted` needs channel_numel == 1.
const char* norm_add_relu_cuda(const ResidualStream& r, const NormAddRelu& f, void* stream);

}  // namespace tsm_jit
