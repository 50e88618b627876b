// Random choices and the loop over random cases, for the programs that compare kernels.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "core/launch.h"

inline std::mt19937_64 generator;

inline int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator() % (high - low + 1)); }
inline bool one_in(int64_t n) { return between(1, n) == 1; }

// What `main` returns. Arguments: seed, cases. A failing case prints its parameters.
inline int run_cases(char** arguments, bool (*is_right)()) {
  generator.seed(std::strtoull(arguments[1], nullptr, 10));
  const int cases = std::atoi(arguments[2]);
  for (int i = 0; i < cases; ++i) {
    if (!is_right()) return 1;
  }
  std::printf("%d cases\n", cases);
  return 0;
}

// Runs a naive kernel, one thread per element.
template <class... Parameters, class... Arguments>
void run_naive(void (*kernel)(Parameters...), int64_t elements, const Arguments&... arguments) {
  gridDim = dim3(static_cast<uint32_t>(elements));
  blockDim = dim3();
  threadIdx = {0, 0, 0};
  blockIdx = {0, 0, 0};
  for (; blockIdx.x < elements; ++blockIdx.x) kernel(arguments...);
}
