// The backward of the end of a residual block: grad = (grad_a + grad_b) where out > 0, else 0.
//
// `grad` is the gradient of z_norm(z) + identity_norm(identity). A NaN in `out` keeps the gradient.
#pragma once

#include "residual/residual_stream.h"

namespace tsm_jit {

struct AddReluBackward {
  const void *out, *boundary_out;               // results of the forward
  const void *grad_a, *grad_b, *grad_boundary;  // gradients of `out` (two consumers) and of boundary_out; may be null
  void* grad;                                   // unshifted; may be null if grad_shifted is not
  void *grad_shifted, *grad_boundary_in;        // the same in the shifted layout; null: the identity was unshifted
  bool out_is_shifted;
  void* sums;                  // [slices, 1 + kNorms, channels], see residual_stream.h; may be null. CUDA only.
  int32_t slices;              // blocks that share the work if `sums` is not null
  const void* normed[kNorms];  // the values before z_norm and before identity_norm; null: no norm
  const void* mean[kNorms];    // [channels] of acc_t
};

// CPU. The work is clips * frames independent tasks.
void add_relu_backward_cpu(const ResidualStream& r, const AddReluBackward& b, int64_t first_task, int64_t last_task);

// CUDA, on `stream` of the current device. Returns null or an error message. `sums` needs channel_numel == 1.
const char* add_relu_backward_cuda(const ResidualStream& r, const AddReluBackward& b, void* stream);

}  // namespace tsm_jit
