// Temporal shift on CUDA, host side: the widest unit, the kernel for the clip length, the launches. No torch headers.
#include <cuda_runtime.h>

#include <algorithm>

#include "temporal_shift.cuh"

namespace tsm_jit {
namespace {

constexpr int64_t kMaxColumns = int64_t{1} << 31;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a block may keep in shared memory without asking, and what leaves room for several blocks on a multiprocessor.
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int64_t kGoodSharedBytes = 32 * 1024;

// The largest power of two, at most 16, that divides every address, distance and group boundary.
int64_t widest_unit(const Shift& s, const void* src, const void* dst) {
  uint64_t bits = 16 | reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst) | s.run;
  for (const Strides& strides : {s.src, s.dst}) {
    if (s.clips > 1) bits |= strides.clip;
    if (s.frames > 1) bits |= strides.frame;
    if (s.outer > 1) bits |= strides.outer;
  }
  for (int32_t g = 0; g < s.n_groups; ++g) bits |= s.groups[g].end;
  const int64_t unit = bits & (~bits + 1);
  switch (s.sum) {  // whole elements: 16 bytes of them, or one
    case Sum::none: return unit;
    case Sum::float16:
    case Sum::bfloat16: return unit == 16 ? 16 : 2;
    case Sum::float32: return unit == 16 ? 16 : 4;
    default: return unit == 16 ? 16 : 8;
  }
}

// A piece of the shift that one launch can cover: up to kMaxGroups groups of [begin, end) bytes of the run, some rows,
// some clips. All but absurd sizes need one piece.
class Launcher {
 public:
  Launcher(const Shift& s, const void* src, void* dst, cudaStream_t stream)
      : s_(s),
        src_(static_cast<const char*>(src)),
        dst_(static_cast<char*>(dst)),
        stream_(stream),
        in_place_(src == dst),
        unit_(widest_unit(s, src, dst)) {}

  cudaError_t run() {
    int32_t first = 0, last = s_.n_groups;
    if (in_place_) {  // only what moves is read and written
      while (first < last && s_.groups[first].offset == 0) ++first;
      while (last > first && s_.groups[last - 1].offset == 0) --last;
    }
    for (; first < last; first += kMaxGroups) {
      const int32_t n_groups = std::min(last - first, kMaxGroups);
      const int64_t end = s_.groups[first + n_groups - 1].end, step = kMaxColumns * unit_;
      for (int64_t begin = s_.groups[first].begin; begin < end; begin += step) {
        if (cudaError_t error = rows(first, n_groups, begin, std::min(begin + step, end))) return error;
      }
    }
    return cudaSuccess;
  }

 private:
  cudaError_t rows(int32_t first_group, int32_t n_groups, int64_t begin, int64_t end) const {
    Args a{};
    a.src_strides = s_.src;
    a.dst_strides = s_.dst;
    a.frames = static_cast<int32_t>(s_.frames);
    a.n_segment_shifted = s_.n_segment_shifted;
    a.padding = s_.padding;
    a.run = static_cast<uint32_t>((end - begin) / unit_);
    for (int32_t g = 0; g < n_groups; ++g) {
      const Group& group = s_.groups[first_group + g];
      a.group_end[g] = static_cast<uint32_t>((std::clamp(group.end, begin, end) - begin) / unit_);
      a.group_offset[g] = group.offset;
    }
    const int64_t rows = std::max<int64_t>(1, kMaxColumns / a.run);
    for (int64_t row = 0; row < s_.outer; row += rows) {
      a.src = src_ + row * s_.src.outer + begin;
      a.dst = dst_ + row * s_.dst.outer + begin;
      a.columns = static_cast<uint32_t>(std::min(rows, s_.outer - row) * a.run);
      if (cudaError_t error = launch(a)) return error;
    }
    return cudaSuccess;
  }

  cudaError_t launch(const Args& a) const {
    switch (s_.sum) {
      case Sum::none: break;
      case Sum::float16: return launch_sum<Float16>(a);
      case Sum::bfloat16: return launch_sum<BFloat16>(a);
      case Sum::float32: return launch_sum<Native<float>>(a);
      case Sum::float64: return launch_sum<Native<double>>(a);
    }
    switch (unit_) {
      case 16: return launch_move<uint4>(a);
      case 8: return launch_move<uint2>(a);
      case 4: return launch_move<uint32_t>(a);
      case 2: return launch_move<uint16_t>(a);
      default: return launch_move<uint8_t>(a);
    }
  }

  template <class Element>
  cudaError_t launch_sum(const Args& a) const {
    if (unit_ == 16) return walk_columns<uint4, Add<Element>>(a);
    return walk_columns<typename Element::Stored, Add<Element>>(a);
  }

  template <class Unit>
  cudaError_t launch_move(const Args& a) const {
    if (in_place_) return walk_columns<Unit, Move>(a);
    return start(shift_out_of_place<Unit>, a, kThreads, ceil_div(s_.frames, kFramesInFlight), 0);
  }

  // In shared memory while a warp's columns fit into it, with as many threads as leave a multiprocessor busy.
  template <class Unit, class Value>
  cudaError_t walk_columns(const Args& a) const {
    const int64_t column = s_.n_segment_shifted * sizeof(Unit);
    if (32 * column > kSharedBytes) return start(shift_stream<Unit, Value>, a, kThreads, 1, 0);
    int threads = kThreads;
    while (threads > 32 && threads * column > kGoodSharedBytes) threads /= 2;
    return start(shift_column<Unit, Value>, a, threads, 1, threads * column);
  }

  // One launch, or several when there are more clips than a grid has blocks.
  cudaError_t start(void (*kernel)(Args), Args a, int threads, int64_t slices_per_clip, size_t shared) const {
    a.tiles = static_cast<uint32_t>(ceil_div(a.columns, threads));
    const int64_t blocks_per_clip = a.tiles * slices_per_clip;
    const int64_t clips = std::max<int64_t>(1, kMaxBlocks / blocks_per_clip);
    for (int64_t clip = 0; clip < s_.clips; clip += clips) {
      const auto blocks = static_cast<unsigned>(std::min(clips, s_.clips - clip) * blocks_per_clip);
      kernel<<<blocks, threads, shared, stream_>>>(a);
      if (cudaError_t error = cudaGetLastError()) return error;
      a.src += clips * s_.src.clip;
      a.dst += clips * s_.dst.clip;
    }
    return cudaSuccess;
  }

  const Shift& s_;
  const char* src_;
  char* dst_;
  const cudaStream_t stream_;
  const bool in_place_;
  const int64_t unit_;
};

}  // namespace

const char* shift_cuda(const Shift& shift, const void* src, void* dst, void* stream) {
  const cudaError_t error = Launcher(shift, src, dst, static_cast<cudaStream_t>(stream)).run();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tsm_jit
