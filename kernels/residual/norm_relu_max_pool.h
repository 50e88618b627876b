// The stem of a ResNet: out = max_pool2d(relu(z_norm(z)), kernel_size=3, stride=2, padding=1), in both layouts.
#pragma once

#include "residual/residual_stream.h"

namespace tsm_jit {

// The ResidualStream describes the outputs, which have ceil(height / 2) * ceil(width / 2) pixels.
struct NormReluMaxPool {
  const void* z;  // [clips, frames, height * width, inner_bytes], channels_last
  Norm z_norm;
  int32_t height, width;
  void* unshifted;           // may be null
  void *out, *boundary_out;  // shifted; may be null
};

// CPU. The work is clips * frames independent tasks.
void norm_relu_max_pool_cpu(const ResidualStream& r, const NormReluMaxPool& p, int64_t first_task, int64_t last_task);

// CUDA, on `stream` of the current device. Returns null or an error message.
const char* norm_relu_max_pool_cuda(const ResidualStream& r, const NormReluMaxPool& p, void* stream);

}  // namespace tsm_jit
