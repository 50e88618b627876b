// Mean and biased variance of x per channel; updates the running statistics as torch.nn.BatchNorm2d does.
// CUDA only, channels_last (channel_numel == 1).
#pragma once

#include "residual/residual_stream.h"

namespace tsm_jit {

struct BatchNormStats {
  const void* x;
  void* sums;  // [slices, 2, channels] of acc_t, scratch memory
  int32_t slices;
  void *mean, *variance, *running_mean, *running_variance;  // [channels] of acc_t
  int64_t* num_batches_tracked;
  double momentum;
};

// Returns the number of slices of `sums`.
int32_t stats_slices(const ResidualStream& r);
const char* batch_norm_stats_cuda(const ResidualStream& r, const BatchNormStats& c, void* stream);

}  // namespace tsm_jit
