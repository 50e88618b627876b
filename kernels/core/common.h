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

}  // namespace tsm_jit
