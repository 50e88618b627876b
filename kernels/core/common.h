// Small helpers that every kernel file uses.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TSM_HOST_DEVICE __host__ __device__
#else
#define TSM_HOST_DEVICE
#endif

namespace tsm_jit {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace tsm_jit
