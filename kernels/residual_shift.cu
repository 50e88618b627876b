// The end of a residual block on CUDA, host side: units, what a block covers, launches. No torch headers.
#include <algorithm>

#include "launch.h"
#include "residual_shift.cuh"

namespace tsm_jit {
namespace {

constexpr int32_t kMaxGridY = 65535;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t element_bytes(Sum type) { return type == Sum::float64 ? 8 : type == Sum::float32 ? 4 : 2; }

// Do units of 16 bytes begin with every row, group and frame, and hold two channels at most, or one number of each?
// Then those of `by_channel`, numbers of so many bytes, have to be vectors.
bool is_aligned(const Residual& r, std::initializer_list<const void*> pointers, int64_t number_bytes,
                std::initializer_list<const void*> by_channel) {
  if (r.inner != 1 && r.inner * element_bytes(r.type) < 16) return false;
  uint64_t bits = r.shift.run | r.unread_run;
  for (int32_t g = 0; g < r.shift.n_groups; ++g) bits |= r.shift.groups[g].end | r.unread_begin[g];
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  uint64_t vectors = 0;
  for (const void* pointer : by_channel) vectors |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0 && vectors % (16 / element_bytes(r.type) * number_bytes) == 0;
}

struct Launch {
  ResidualArgs args{};
  dim3 grid, block;
};

// How the work is shared.
struct Shares {
  int32_t slices;    // blocks that share the tasks; 0: as many as fill the GPU, of which
  int32_t resident;  // a multiprocessor holds so many
  bool in_order;     // does one thread visit all frames?
  bool by_pixel;     // are the rows of a frame its pixels, whatever else could be?
};

const char* plan(const Residual& r, int64_t unit, const Shares& shares, Launch& launch) {
  const Shift& s = r.shift;
  const int64_t units = s.run / unit, largest = (int64_t{1} << 31) - kMaxGridY;
  unsigned x = s.outer == 1 ? kResidualThreads : 32;
  while (x > 1 && x / 2 >= units) x /= 2;
  launch.block = dim3(x, kResidualThreads / x);
  ResidualArgs& a = launch.args;
  const bool is_still = !shares.by_pixel && s.n_groups == 1 && s.groups[0].offset == 0;
  const bool in_order = shares.in_order && !is_still;
  // All that lies at the same frame may be rows of it, so that a thread has several: what is still has one frame, and
  // where a frame is one row, its rows are those of all clips.
  const bool one_row = !shares.by_pixel && s.outer == 1;
  const int64_t clips = is_still || one_row ? 1 : s.clips, frames = is_still ? 1 : s.frames;
  const int64_t rows = s.outer * (s.clips / clips) * (s.frames / frames);
  const int64_t x_blocks = ceil_div(units, x);
  // Several times as many blocks as run at once: where one waits for memory, another begins. Each reads its norms.
  const int64_t resident = int64_t{shares.resident} * std::max(multiprocessors(), 1);
  const int64_t fill = ceil_div(8 * resident, x_blocks);
  const int64_t columns = shares.slices != 0 ? shares.slices : std::min(fill, int64_t{kMaxGridY});
  const int64_t rows_of_block = int64_t{launch.block.y} * (in_order ? 1 : kRowsOfThread);
  a.rows_of_task = static_cast<int32_t>(std::min(rows, rows_of_block));
  a.frames_of_task = static_cast<int32_t>(in_order ? frames : 1);
  a.chunks = static_cast<int32_t>(ceil_div(rows, a.rows_of_task));
  const int64_t tasks = clips * (frames / a.frames_of_task) * a.chunks;
  if (s.n_groups > kResidualGroups) return "a plan of a residual stream must have at most 31 groups";
  if (s.run + 16 * kResidualThreads >= largest || r.unread_run >= largest) {
    return "a frame of a residual stream must have less than 2^31 bytes";
  }
  if (frames >= largest || rows >= largest || tasks >= largest) {
    return "a residual stream must have less than 2^31 rows";
  }
  a.frames = static_cast<int32_t>(frames);
  a.n_segment_shifted = is_still ? 1 : s.n_segment_shifted;
  a.padding = s.padding;
  a.rows = static_cast<int32_t>(rows);
  a.run = static_cast<int32_t>(s.run);
  a.frame = s.outer * s.run;
  a.clip = s.frames * a.frame;
  a.row = one_row && !is_still ? a.clip : s.run;
  a.unread_row = r.unread_run;
  a.unread_clip = s.outer * r.unread_run;
  a.inner = static_cast<int32_t>(r.inner);
  a.tasks = static_cast<int32_t>(tasks);
  a.n_groups = s.n_groups;
  for (int32_t g = 0; g < s.n_groups; ++g) {
    a.group_end[g] = static_cast<int32_t>(s.groups[g].end);
    a.group_offset[g] = s.groups[g].offset;
    a.unread_begin[g] = static_cast<int32_t>(r.unread_begin[g]);
  }
  const int64_t used = shares.slices != 0 ? columns : std::min(tasks, columns);
  launch.grid = dim3(static_cast<unsigned>(x_blocks), static_cast<unsigned>(used));
  return nullptr;
}

// Of 64 bits one by one, as it is for exactness that they are used.
template <class Element>
constexpr int kVector = sizeof(typename Element::Stored) == 8 ? 1 : 16 / sizeof(typename Element::Stored);

// `start(plan, kernels of one type and unit)` with those of the activations; what it returns.
template <template <class, int> class Kernels, class Start>
const char* with_kernels(const Residual& r, const Shares& shares, std::initializer_list<const void*> pointers,
                         int64_t number_bytes, std::initializer_list<const void*> by_channel, Start start) {
  const bool aligned = r.type != Sum::float64 && is_aligned(r, pointers, number_bytes, by_channel);
  Launch launch;
  if (const char* error = plan(r, aligned ? 16 : element_bytes(r.type), shares, launch)) return error;
  const auto of_type = [&](auto element) -> const char* {
    using Element = decltype(element);
    return aligned ? start(launch, Kernels<Element, kVector<Element>>{}) : start(launch, Kernels<Element, 1>{});
  };
  switch (r.type) {
    case Sum::float16: return of_type(Float16{});
    case Sum::bfloat16: return of_type(BFloat16{});
    case Sum::float32: return of_type(Native<float>{});
    default: return of_type(Native<double>{});
  }
}

// Functions, not constants: out of a constant NVRTC makes other code, with more registers. One number at a time, all is
// done by the kernel that can.
template <class Element, int kLanes>
struct Forward {
  static auto in_order() { return residual_forward_in_order<Element, kLanes>; }
  static auto sum() {
    if constexpr (kLanes == 1) return residual_forward_in_order<Element, kLanes>;
    if constexpr (kLanes > 1) return residual_forward<Element, kLanes, true>;
  }
  static auto alone() {
    if constexpr (kLanes == 1) return residual_forward_in_order<Element, kLanes>;
    if constexpr (kLanes > 1) return residual_forward<Element, kLanes, false>;
  }
};

template <class Element, int kLanes>
struct Pool {
  static auto kernel() { return residual_pool<Element, kLanes>; }
};

template <class Element, int kLanes>
struct Backward {
  static auto one_norm() { return residual_backward<Element, kLanes, (kLanes == 1 ? 2 : 1)>; }
  static auto two_norms() { return residual_backward<Element, kLanes, 2>; }
};

template <class Element, int kLanes>
struct OfRelu {
  static auto sums() { return relu_of_norm_sums<Element, kLanes>; }
  static auto backward() { return relu_of_norm_backward<Element, kLanes>; }
};

template <class Element, int kLanes>
struct Statistics {
  static auto sum() { return sum_channels<Element, kLanes>; }
  static auto finish() { return finish_statistics<Element>; }
};

}  // namespace

const char* residual_forward_cuda(const Residual& r, const ResidualForward& f, void* stream) {
  const bool in_order = shifts_z_in_place(f), alone = f.identity == nullptr;
  const Shares shares{0, in_order ? kBlocksInOrder : alone ? kBlocksAlone : kBlocksOfSum, in_order, f.plain != nullptr};
  const bool floats = f.z_norm.in_float || f.identity_norm.in_float;
  return with_kernels<Forward>(
      r, shares, {f.z, f.identity, f.unread, f.out, f.unread_out, f.plain}, floats ? 4 : element_bytes(r.type),
      {f.z_norm.mean, f.z_norm.variance, f.z_norm.weight, f.z_norm.bias, f.identity_norm.mean, f.identity_norm.variance,
       f.identity_norm.weight, f.identity_norm.bias},
      [&](const Launch& on, auto kernels) {
        const auto kernel = in_order ? kernels.in_order() : alone ? kernels.alone() : kernels.sum();
        return launch(kernel, on.grid, on.block, 0, stream, on.args, f);
      });
}

const char* residual_pool_cuda(const Residual& r, const ResidualPool& p, void* stream) {
  const Norm& norm = p.z_norm;
  return with_kernels<Pool>(r, {0, kBlocksOfPool, false, true}, {p.z, p.plain, p.out, p.unread_out},
                            norm.in_float ? 4 : element_bytes(r.type),
                            {norm.mean, norm.variance, norm.weight, norm.bias}, [&](const Launch& on, auto kernels) {
                              return launch(kernels.kernel(), on.grid, on.block, 0, stream, on.args, p);
                            });
}

const char* residual_backward_cuda(const Residual& r, const ResidualBackward& b, void* stream) {
  const Shares shares{b.sums == nullptr ? 0 : b.slices, kBlocksOfBackward, false, false};
  return with_kernels<Backward>(r, shares,
                                {b.out, b.unread_out, b.grad_a, b.grad_b, b.grad_unread, b.grad, b.grad_shifted,
                                 b.grad_unread_in, b.normed[0], b.normed[1]},
                                sizeof(float), {b.mean[0], b.mean[1]}, [&](const Launch& on, auto kernels) {
                                  const auto kernel = b.normed[1] == nullptr ? kernels.one_norm() : kernels.two_norms();
                                  return launch(kernel, on.grid, on.block, 0, stream, on.args, b);
                                });
}

namespace {

// With the blocks that cover the channels as many as a GPU holds.
int32_t slices(const Residual& r, int64_t blocks) {
  const int64_t columns = ceil_div(r.shift.run, 32 * 16), resident = blocks * std::max(multiprocessors(), 1);
  return static_cast<int32_t>(std::clamp(resident / columns, int64_t{1}, int64_t{kMaxGridY}));
}

// Of a kernel that adds up slices.
Launch by_channel(int64_t channels) {
  Launch launch;
  launch.block = dim3(8, kResidualThreads / 8);  // many slices at once: each waits for the one before
  launch.grid = dim3(static_cast<unsigned>(ceil_div(channels, launch.block.x)));
  return launch;
}

}  // namespace

int32_t backward_slices(const Residual& r) { return slices(r, kBlocksOfBackward); }
int32_t statistics_slices(const Residual& r) { return slices(r, kBlocksOfStatistics); }

const char* relu_of_norm_sums_cuda(const Residual& r, const ReluOfNormBackward& b, void* stream) {
  const Norm& norm = b.norm;
  return with_kernels<OfRelu>(
      r, {b.slices, 0, false, false}, {b.grad, b.z}, sizeof(float), {norm.mean, norm.variance, norm.weight, norm.bias},
      [&](const Launch& on, auto kernels) { return launch(kernels.sums(), on.grid, on.block, 0, stream, on.args, b); });
}

const char* relu_of_norm_backward_cuda(const Residual& r, const ReluOfNormBackward& b, void* stream) {
  const Norm& norm = b.norm;
  return with_kernels<OfRelu>(r, {0, kBlocksOfBackward, false, false}, {b.grad, b.z, b.out}, sizeof(float),
                              {norm.mean, norm.variance, norm.weight, norm.bias, b.beside.weight, b.beside.bias},
                              [&](const Launch& on, auto kernels) {
                                return launch(kernels.backward(), on.grid, on.block, 0, stream, on.args, b);
                              });
}

const char* channel_statistics_cuda(const Residual& r, const ChannelStatistics& c, void* stream) {
  return with_kernels<Statistics>(r, {c.slices, 0, false, false}, {c.x}, 1, {}, [&](const Launch& on, auto kernels) {
    const int64_t channels = r.shift.run / element_bytes(r.type),
                  count = r.shift.clips * r.shift.frames * r.shift.outer;
    const Launch last = by_channel(channels);
    if (const char* error = launch(kernels.sum(), on.grid, on.block, 0, stream, on.args, c)) return error;
    return launch(kernels.finish(), last.grid, last.block, 0, stream, c, static_cast<int32_t>(channels), count);
  });
}

const char* norm_gradients_cuda(Sum type, int64_t channels, const NormGradients& n, void* stream) {
  const Launch on = by_channel(channels);
  const auto start = [&](auto kernel) {
    return launch(kernel, on.grid, on.block, 0, stream, n, static_cast<int32_t>(channels));
  };
  return type == Sum::float64 ? start(norm_gradients<double>) : start(norm_gradients<float>);
}

}  // namespace tsm_jit
