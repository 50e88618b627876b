// Random shifts by the CUDA kernels, run on the CPU, against the CPU kernels and the naive kernels: the same bytes
// everywhere, margins included. Arguments: seed, cases.

#include "shift/temporal_shift.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "compare.h"
#include "shift/temporal_shift_naive.cuh"

using namespace tsm_jit;

namespace {

Strides random_strides(const Shift& s, int64_t element) {
  Strides strides{};
  strides.outer = s.inner_bytes + (one_in(3) ? between(0, 3) * element : 0);
  strides.frame = strides.outer * s.outer_size + (one_in(3) ? between(0, 5) * element : 0);
  strides.clip = strides.frame * s.frames + (one_in(4) ? between(0, 3) * element : 0);
  return strides;
}

// A random shift of [clips, frames, outer_size, channels, inner]; no strides yet.
struct RandomShift {
  Shift shift{};
  std::vector<ChannelGroup> groups;
  int64_t element, channels, inner;

  RandomShift() : element(1 << between(0, 4)), channels(between(1, one_in(10) ? 70 : 24)) {
    Shift& s = shift;
    const bool channels_last = one_in(2);
    inner = channels_last ? 1 : between(1, 30);
    s.clips = between(1, 3);
    s.frames = between(1, one_in(6) ? (one_in(6) ? 260 : 40) : 9);
    s.n_segment_shifted = static_cast<int32_t>(between(1, s.frames));
    s.outer_size = channels_last ? between(1, 50) : 1;
    s.inner_bytes = channels * inner * element;
    s.padding = static_cast<Padding>(between(0, 3));
    if ((s.padding == Padding::keep || s.padding == Padding::replicate) && one_in(2)) {
      if (element == 2) s.sum_dtype = one_in(2) ? DType::float16 : DType::bfloat16;
      if (element == 4) s.sum_dtype = DType::float32;
      if (element == 8) s.sum_dtype = one_in(2) ? DType::float32 : DType::float64;  // complex64 or float64
      if (element == 16) s.sum_dtype = DType::float64;
    }
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
  }
  RandomShift(const RandomShift&) = delete;

  bool report(bool is_right, const char* what) const {
    if (is_right) return true;
    const Shift& s = shift;
    std::printf("%s: %lld-byte elements, %lld clips of %lld frames (%d shifted), outer_size %lld, inner_bytes %lld, ",
                what, (long long)element, (long long)s.clips, (long long)s.frames, s.n_segment_shifted,
                (long long)s.outer_size, (long long)s.inner_bytes);
    std::printf("padding %d, sum_dtype %d:", (int)s.padding, (int)s.sum_dtype);
    for (const ChannelGroup& group : groups)
      std::printf(" %lld: %d", (long long)(group.end - group.begin), group.offset);
    std::printf("\n");
    return false;
  }
};

// Replaces random bytes by numbers, where they are added: a sum of NaN or of opposite infinities has no defined
// payload.
void make_numbers(const Shift& s, Memory& memory, int64_t offset) {
  switch (s.sum_dtype) {
    case DType::none: break;
    case DType::float16:
    case DType::bfloat16: memory.fill(offset % 2, 2, [](uint8_t* at) { at[1] &= 0xbf; }); break;
    case DType::float32:
      memory.fill(offset % 4, 4, [](uint8_t* at) {
        const float number = static_cast<float>(between(-1000, 1000)) / 7;
        std::memcpy(at, &number, 4);
      });
      break;
    case DType::float64:
      memory.fill(offset % 8, 8, [](uint8_t* at) {
        const double number = static_cast<double>(between(-1000, 1000)) / 7;
        std::memcpy(at, &number, 8);
      });
  }
}

// Contiguous and out of place: CUDA against the naive kernels.
bool agrees_with_naive() {
  RandomShift random;
  Shift& s = random.shift;
  const int64_t frame = s.inner_bytes * s.outer_size, numel = s.clips * s.frames * frame / random.element;
  s.src = s.dst = {frame * s.frames, frame, s.inner_bytes};
  std::vector<int32_t> offsets;
  for (const ChannelGroup& group : random.groups) {
    offsets.resize(group.end / random.element / random.inner, group.offset);
  }
  const NaiveShape shape{s.clips,
                         s.frames,
                         s.outer_size,
                         random.channels,
                         random.inner,
                         offsets.data(),
                         s.n_segment_shifted,
                         s.padding,
                         nullptr,
                         nullptr,
                         0};
  const size_t bytes = numel * random.element;
  Memory src(bytes), expected(bytes), actual(bytes);
  if (s.sum_dtype != DType::none) {  // integers: the naive kernel adds them in another order
    dispatch_dtype(s.sum_dtype, [&](auto element) {
      src.fill(0, sizeof(typename decltype(element)::storage_t), [](uint8_t* at) {
        const auto number = decltype(element)::from_acc(static_cast<float>(between(-50, 50)));
        std::memcpy(at, &number, sizeof number);
      });
    });
  }
  shift_cuda(s, src.at(0), actual.at(0), nullptr);
  const auto move = [&](auto value) {
    using T = decltype(value);
    run_naive(temporal_shift_naive<T>, numel, (T*)expected.at(0), (const T*)src.at(0), shape);
  };
  if (s.sum_dtype != DType::none) {
    dispatch_dtype(s.sum_dtype, [&](auto element) {
      using Element = decltype(element);
      using T = typename Element::storage_t;
      NaiveShape parts = shape;  // of a complex number
      parts.channel_numel *= random.element / sizeof(T);
      run_naive(temporal_shift_backward_naive<Element>, parts.numel(), (T*)expected.at(0), (const T*)src.at(0), parts);
      // A sum of one term keeps its bits, while the naive kernel adds it to 0: -0 becomes 0.
      for (int64_t i = 0; i < parts.numel(); ++i) {
        T *a = (T*)actual.at(i * sizeof(T)), *e = (T*)expected.at(i * sizeof(T));
        if (Element::to_acc(*a) == 0 && Element::to_acc(*e) == 0) *a = *e;
      }
    });
  } else {
    switch (random.element) {
      case 1: move(uint8_t{}); break;
      case 2: move(uint16_t{}); break;
      case 4: move(uint32_t{}); break;
      case 8: move(uint64_t{}); break;
      default: move(uint4{});
    }
  }
  return random.report(actual == expected, "naive");
}

// Any strides, in place or out of place: CUDA against the CPU.
bool agrees_with_cpu() {
  RandomShift random;
  Shift& s = random.shift;
  const int64_t element = random.element;
  const bool in_place = one_in(2);
  s.src = random_strides(s, element);
  s.dst = in_place ? s.src : random_strides(s, element);

  const int64_t src_offset = one_in(2) ? 0 : between(0, 7) * element;
  const int64_t dst_offset = in_place ? src_offset : (one_in(2) ? 0 : between(0, 7) * element);
  Memory src(s.src.clip * s.clips + src_offset + 32), expected(s.dst.clip * s.clips + dst_offset + 32);
  make_numbers(s, src, src_offset);
  if (in_place) expected = src;
  Memory actual = expected, untouched = src;
  const auto from = [&](Memory& to) { return in_place ? to.at(src_offset) : src.at(src_offset); };
  shift_cpu(s, from(expected), expected.at(dst_offset), 0, shift_cpu_tasks(s));
  shift_cuda(s, from(actual), actual.at(dst_offset), nullptr);
  return random.report(actual == expected && src == untouched, in_place ? "in place" : "out of place");
}

bool is_right() { return one_in(3) ? agrees_with_naive() : agrees_with_cpu(); }

}  // namespace

int main(int, char** arguments) { return run_cases(arguments, is_right); }
