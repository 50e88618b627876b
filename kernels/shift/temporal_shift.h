// The temporal shift of one tensor, out[n, t] = in[n, t + offset] for each channel group; see core/shift.h.
//
// In place: src == dst. Then only groups with an offset are read and written. Otherwise src and dst must not overlap.
#pragma once

#include "core/shift.h"

namespace tsm_jit {

// CPU. The work is `shift_cpu_tasks(shift)` independent tasks. Any thread may run any range of them.
int64_t shift_cpu_tasks(const Shift& shift);
void shift_cpu(const Shift& shift, const void* src, void* dst, int64_t first_task, int64_t last_task);

// CUDA, on `stream` (a cudaStream_t) of the current device. Returns null or an error message.
const char* shift_cuda(const Shift& shift, const void* src, void* dst, void* stream);

}  // namespace tsm_jit
