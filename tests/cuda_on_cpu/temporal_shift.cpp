// Random shifts by the CUDA kernels, run on the CPU, and by the CPU kernels: the same bytes everywhere, margins
// included. Arguments: seed, cases.
#include "temporal_shift.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "compare.h"

using namespace tsm_jit;

namespace {

// Random bytes that begin at a multiple of 64.
class Memory {
 public:
  explicit Memory(size_t size) : size_(size), lines_(size / sizeof(Line) + 1) {
    for (size_t i = 0; i < size; ++i) *at(i) = static_cast<uint8_t>(generator());
  }
  uint8_t* at(int64_t offset) { return lines_[0].bytes + offset; }
  bool operator==(Memory& other) { return std::memcmp(at(0), other.at(0), size_) == 0; }
  // A sum of NaN or of opposite infinities has no defined payload: numbers for each element.
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

Strides random_strides(const Shift& s, int64_t element) {
  Strides strides{};
  strides.outer = s.run + (one_in(3) ? between(0, 3) * element : 0);
  strides.frame = strides.outer * s.outer + (one_in(3) ? between(0, 5) * element : 0);
  strides.clip = strides.frame * s.frames + (one_in(4) ? between(0, 3) * element : 0);
  return strides;
}

bool same_bytes() {
  Shift s{};
  const int64_t element = 1 << between(0, 4), channels = between(1, one_in(10) ? 70 : 24);
  const bool channels_last = one_in(2), in_place = one_in(2);
  const int64_t inner = channels_last ? 1 : between(1, 30);
  s.clips = between(1, 3);
  s.frames = between(1, one_in(6) ? (one_in(6) ? 260 : 40) : 9);
  s.n_segment_shifted = static_cast<int32_t>(between(1, s.frames));
  s.outer = channels_last ? between(1, 50) : 1;
  s.run = channels * inner * element;
  s.padding = static_cast<Padding>(between(0, 3));
  if ((s.padding == Padding::keep || s.padding == Padding::replicate) && one_in(2)) {
    if (element == 2) s.sum = one_in(2) ? Sum::float16 : Sum::bfloat16;
    if (element == 4) s.sum = Sum::float32;
    if (element == 8) s.sum = one_in(2) ? Sum::float32 : Sum::float64;  // complex64 or float64
    if (element == 16) s.sum = Sum::float64;
  }

  std::vector<Group> groups;
  const int64_t parts = one_in(10) ? 60 : between(1, 5);
  for (int64_t channel = 0; channel < channels;) {
    const int64_t width = std::min(between(1, std::max<int64_t>(1, 2 * channels / parts)), channels - channel);
    const int64_t furthest = one_in(10) ? s.n_segment_shifted : std::min(s.n_segment_shifted, 4);
    int64_t offset = one_in(4) ? 0 : between(-furthest, furthest);
    if (s.padding == Padding::circular) offset %= s.n_segment_shifted;
    const int64_t begin = channel * inner * element, end = (channel += width) * inner * element;
    groups.push_back({begin, end, static_cast<int32_t>(offset)});
  }
  s.groups = groups.data();
  s.n_groups = static_cast<int32_t>(groups.size());
  s.src = random_strides(s, element);
  s.dst = in_place ? s.src : random_strides(s, element);

  const int64_t src_offset = one_in(2) ? 0 : between(0, 7) * element;
  const int64_t dst_offset = in_place ? src_offset : (one_in(2) ? 0 : between(0, 7) * element);
  Memory src(s.src.clip * s.clips + src_offset + 32), expected(s.dst.clip * s.clips + dst_offset + 32);
  switch (s.sum) {
    case Sum::none: break;
    case Sum::float16:
    case Sum::bfloat16: src.fill(src_offset % 2, 2, [](uint8_t* at) { at[1] &= 0xbf; }); break;
    case Sum::float32:
      src.fill(src_offset % 4, 4, [](uint8_t* at) {
        const float number = static_cast<float>(between(-1000, 1000)) / 7;
        std::memcpy(at, &number, 4);
      });
      break;
    case Sum::float64:
      src.fill(src_offset % 8, 8, [](uint8_t* at) {
        const double number = static_cast<double>(between(-1000, 1000)) / 7;
        std::memcpy(at, &number, 8);
      });
  }
  if (in_place) expected = src;
  Memory actual = expected, untouched = src;
  const bool keeps = in_place && s.sum == Sum::none && s.padding != Padding::circular && one_in(2);
  std::vector<int64_t> unread_begin;
  for (const Group& group : groups) {
    unread_begin.push_back(s.unread.run);
    s.unread.run += std::abs(group.offset) * (group.end - group.begin);
  }
  s.unread.begin = unread_begin.data();
  Memory expected_unread(s.clips * s.outer * s.unread.run + 32), actual_unread(s.clips * s.outer * s.unread.run + 32);
  if (keeps) actual_unread = expected_unread;
  const int64_t unread_offset = one_in(2) ? 0 : between(0, 7) * element % 32;
  const auto run = [&](auto kernel, Memory& to, Memory& unread) {
    s.unread.data = keeps ? reinterpret_cast<char*>(unread.at(unread_offset)) : nullptr;
    kernel(in_place ? to.at(src_offset) : src.at(src_offset), to.at(dst_offset));
  };
  const auto by_cpu = [&](const void* from, void* to) { shift_cpu(s, from, to, 0, cpu_tasks(s)); };
  const auto by_cuda = [&](const void* from, void* to) { shift_cuda(s, from, to, nullptr); };
  run(by_cpu, expected, expected_unread);
  run(by_cuda, actual, actual_unread);
  bool right = actual == expected && src == untouched && (!keeps || actual_unread == expected_unread);
  if (keeps) {
    for (Group& group : groups) group.offset = -group.offset;
    s.padding = Padding::keep;
    s.unread.come_back = true;
    run(by_cpu, expected, actual_unread);
    run(by_cuda, actual, expected_unread);
    right = right && expected == src && actual == src;
  }
  if (right) return true;
  std::printf(
      "%lld-byte elements, %lld clips of %lld frames (%d shifted), outer %lld, run %lld, padding %d, sum %d, %s:",
      (long long)element, (long long)s.clips, (long long)s.frames, s.n_segment_shifted, (long long)s.outer,
      (long long)s.run, (int)s.padding, (int)s.sum, in_place ? "in place" : "out of place");
  for (const Group& group : groups) std::printf(" %lld: %d", (long long)(group.end - group.begin), group.offset);
  std::printf("\n");
  return false;
}

}  // namespace

int main(int, char** arguments) { return run_cases(arguments, same_bytes); }
