// Random choices and the loop over random cases, for the programs that compare kernels.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "core/launch.h"

inline std::mt19937_64 generator;

inline int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator() % (high - low + 1)); }
inline bool one_in(int64_t n) { return between(1, n) == 1; }

// Random bytes that begin at a multiple of 64.
class Memory {
 public:
  explicit Memory(size_t size) : size_(size), lines_(size / sizeof(Line) + 1) {
    for (size_t i = 0; i < size; ++i) *at(i) = static_cast<uint8_t>(generator());
  }
  uint8_t* at(int64_t offset) { return lines_[0].bytes + offset; }
  bool operator==(Memory& other) { return std::memcmp(at(0), other.at(0), size_) == 0; }
  template <class Fill>
  void fill(int64_t begin, size_t element, Fill number) {
    for (size_t i = begin; i + element <= size_; i += element) number(at(i));
  }

 private:
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  size_t size_;
  std::vector<Line> lines_;
};

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
