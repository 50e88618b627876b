// Small helpers that every kernel file uses.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TSM_HOST_DEVICE __host__ __device__
#else
#define TSM_HOST_DEVICE
#endif

namespace tsm_jit {

template <class A, class B>
TSM_HOST_DEVICE constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// The largest power of two that divides all numbers whose bits are set in `bits`.
constexpr int64_t common_power_of_two(uint64_t bits) { return static_cast<int64_t>(bits & (~bits + 1)); }

}  // namespace tsm_jit
