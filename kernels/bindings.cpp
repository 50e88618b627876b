// The operators of torch.ops.tsm_jit for CPU and CUDA: tensors in, a `Shift` in bytes out, through torch's stable ABI.
//
// Schemas, fakes, autograd and the plain-torch implementation are in tsm_jit/ops.py; what is registered here takes
// precedence over the latter on its device. The public functions have validated everything; the checks below repeat
// only what memory safety rests on, for callers of torch.ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "temporal_shift.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using tsm_jit::Group;
using tsm_jit::Padding;
using tsm_jit::Shift;
using tsm_jit::Strides;
using tsm_jit::Sum;

// Not STD_TORCH_CHECK, which writes its message through a stream: where the C++ library is linked statically into us,
// as some compilers are set up to do, its streams crash.
[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("tsm_jit: " + message); }

// tsm_jit.plans.Shift, decoded: "n_segment=8 n_segment_shifted=8 channel_dim=1 padding=zeros plan=8:1,8:-1".
struct Plan {
  int64_t n_segment, n_segment_shifted, channel_dim;
  Padding padding;
  std::vector<std::pair<int64_t, int64_t>> groups;  // width, offset
};

class Decoder {
 public:
  explicit Decoder(const std::string& encoded) : encoded_(encoded), at_(encoded.c_str()) {}

  Plan plan() {
    Plan plan;
    plan.n_segment = field("n_segment=");
    plan.n_segment_shifted = field(" n_segment_shifted=");
    plan.channel_dim = field(" channel_dim=");
    expect(" padding=");
    plan.padding = accept("zeros")       ? Padding::zeros
                   : accept("keep")      ? Padding::keep
                   : accept("replicate") ? Padding::replicate
                                         : (expect("circular"), Padding::circular);
    expect(" plan=");
    while (*at_ != 0) {
      const int64_t width = number();
      expect(":");
      plan.groups.emplace_back(width, number());
      if (!accept(",")) break;
    }
    require(*at_ == 0);
    return plan;
  }

 private:
  bool accept(const char* word) {
    const size_t length = std::strlen(word);
    if (std::strncmp(at_, word, length) != 0) return false;
    at_ += length;
    return true;
  }
  void expect(const char* word) { require(accept(word)); }
  int64_t number() {
    char* end = nullptr;
    const int64_t value = std::strtoll(at_, &end, 10);
    require(end != at_);
    at_ = end;
    return value;
  }
  int64_t field(const char* name) {
    expect(name);
    return number();
  }
  void require(bool holds) const {
    if (!holds) fail("shift must be an encoded tsm_jit.plans.Shift, got " + encoded_);
  }

  const std::string& encoded_;
  const char* at_;
};

// [N, T, ...] or [N*T, ...]: the rule of tsm_jit.reference.clips_apart.
bool clips_apart(const Tensor& x, const Plan& plan) { return x.dim() == 5 && plan.channel_dim >= 2; }

// One dimension of a tensor with its stride in src and in dst, in elements.
struct Dimension {
  int64_t size, src, dst;
};

// Does `tail`, ordered from the outermost dimension, cover memory like one dimension of stride `unit`?
// If so returns its size, else -1.
int64_t merged_size(const std::vector<Dimension>& tail, Dimension unit) {
  int64_t size = 1;
  for (auto d = tail.rbegin(); d != tail.rend(); ++d) {
    if (d->src != unit.src * size || d->dst != unit.dst * size) return -1;
    size *= d->size;
  }
  return size;
}

// Everything a kernel needs but the pointers; `groups` backs `shift.groups`.
struct Work {
  Shift shift{};
  std::vector<Group> groups;
};

// Sees src and dst, of the same sizes, as [clips, frames, outer, run]. False if their strides do not allow it.
bool describe(const Tensor& src, const Tensor& dst, const Plan& plan, Work& work) {
  const auto sizes = src.sizes(), src_strides = src.strides(), dst_strides = dst.strides();
  const int64_t dim = src.dim(), element = src.element_size();
  const bool apart = clips_apart(src, plan);
  const auto dimension = [&](int64_t d) { return Dimension{sizes[d], src_strides[d], dst_strides[d]}; };

  Shift& s = work.shift;
  Dimension clip = dimension(0), frame = dimension(apart ? 1 : 0);
  if (!apart) clip = {clip.size / plan.n_segment, clip.src * plan.n_segment, clip.dst * plan.n_segment};
  s.clips = clip.size;
  s.frames = plan.n_segment;

  // The other dimensions in the order of memory. Those inside the channel join it in `run`, the rest is `outer`.
  const Dimension channel = dimension(plan.channel_dim);
  std::vector<Dimension> rest;
  for (int64_t d = apart ? 2 : 1; d < dim; ++d) {
    if (d != plan.channel_dim && sizes[d] != 1) rest.push_back(dimension(d));
  }
  std::stable_sort(rest.begin(), rest.end(), [](const Dimension& a, const Dimension& b) { return a.src > b.src; });
  auto inside = rest.end();
  for (int64_t expected = 1; inside != rest.begin(); --inside) {
    const Dimension& d = inside[-1];
    if (d.src != expected || d.dst != expected) break;
    if (channel.size > 1 && expected == channel.src) break;  // the channel comes next
    expected *= d.size;
  }
  const int64_t inner = merged_size({inside, rest.end()}, {0, 1, 1});
  rest.erase(inside, rest.end());
  if (channel.size > 1 && (channel.src != inner || channel.dst != inner)) return false;
  const Dimension row = rest.empty() ? Dimension{1, 0, 0} : rest.back();
  s.outer = merged_size(rest, row);
  if (s.outer < 0) return false;

  const int64_t channel_bytes = inner * element;
  s.run = channel.size * channel_bytes;
  s.src = {clip.src * element, frame.src * element, row.src * element};
  s.dst = {clip.dst * element, frame.dst * element, row.dst * element};
  int64_t begin = 0;
  for (const auto& [width, offset] : plan.groups) {
    const int64_t end = begin + width * channel_bytes;
    if (begin < end) work.groups.push_back({begin, end, static_cast<int32_t>(offset)});
    begin = end;
  }
  if (begin < s.run) work.groups.push_back({begin, s.run, 0});
  s.groups = work.groups.data();
  s.n_groups = static_cast<int32_t>(work.groups.size());
  return true;
}

// Decodes the shift, checks what memory safety needs, and brings the offsets into the range the kernels expect.
Plan plan_for(const Tensor& x, const std::string& encoded) {
  // A network calls with few shifts, often the same one in a row, and to decode one takes as long as a small shift.
  thread_local std::string last;
  thread_local Plan decoded;
  if (last.empty() || encoded != last) {
    last.clear();
    decoded = Decoder(encoded).plan();
    last = encoded;
  }
  Plan plan = decoded;
  if (plan.channel_dim < 1 || plan.channel_dim >= x.dim()) {
    fail("channel_dim must be a dimension of x after the frames, got " + std::to_string(plan.channel_dim));
  }
  const bool divides = plan.n_segment >= 1 && plan.n_segment <= std::numeric_limits<int32_t>::max() / 2 &&
                       (clips_apart(x, plan) ? x.size(1) == plan.n_segment : x.size(0) % plan.n_segment == 0);
  if (!divides) fail("n_segment must be the clip length of x, got " + std::to_string(plan.n_segment));
  if (plan.n_segment_shifted < 1 || plan.n_segment_shifted > plan.n_segment) {
    fail("n_segment_shifted must be in 1..n_segment, got " + std::to_string(plan.n_segment_shifted));
  }
  int64_t free = x.size(plan.channel_dim);
  for (auto& [width, offset] : plan.groups) {
    if (width < 0 || width > free) fail("plan must fit into the channels of x, got " + encoded);
    free -= width;
    // Past the clip every offset means the same: all padding.
    const int64_t n = plan.n_segment_shifted;
    offset = plan.padding == Padding::circular ? offset % n : std::clamp(offset, -n, n);
  }
  return plan;
}

Sum sum_type(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return Sum::float16;
    case ScalarType::BFloat16: return Sum::bfloat16;
    case ScalarType::Float:
    case ScalarType::ComplexFloat: return Sum::float32;
    case ScalarType::Double:
    case ScalarType::ComplexDouble: return Sum::float64;
    default:
      fail("grad must be of 16-bit, 32-bit or 64-bit floating point or complex: the adjoint of this padding adds");
  }
}

void execute([[maybe_unused]] const Tensor& x, const Shift& shift, const void* src, void* dst) {
#ifdef TSM_JIT_CUDA
  if (x.is_cuda()) {
    const int32_t device = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const char* error = tsm_jit::shift_cuda(shift, src, dst, stream);
    if (error != nullptr) fail(std::string("the launch of a temporal shift failed: ") + error);
    return;
  }
#endif
  // A thread is worth waking for some 64 KiB.
  const int64_t tasks = tsm_jit::cpu_tasks(shift);
  const int64_t task_bytes = std::max<int64_t>(1, shift.clips * shift.frames * shift.outer * shift.run / tasks);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, 65536 / task_bytes),
                              [&](int64_t first, int64_t last) { tsm_jit::shift_cpu(shift, src, dst, first, last); });
}

void run(const Tensor& src, Tensor& dst, Plan plan, bool adjoint) {
  if (src.numel() == 0) return;
  const bool adds = adjoint && (plan.padding == Padding::keep || plan.padding == Padding::replicate);
  if (adjoint && !adds) {  // the adjoint of zeros and circular is the shift the other way
    for (auto& group : plan.groups) group.second = -group.second;
  }
  Work work;
  const bool in_place = src.get() == dst.get();
  if (!describe(src, dst, plan, work)) {  // strides that no run of bytes follows: through a contiguous copy
    Tensor copy = torch::stable::contiguous(src);
    run(copy, copy, std::move(plan), adds);
    torch::stable::copy_(dst, copy);
    return;
  }
  work.shift.padding = plan.padding;
  work.shift.n_segment_shifted = static_cast<int32_t>(plan.n_segment_shifted);
  work.shift.sum = adds ? sum_type(src.scalar_type()) : Sum::none;
  void* data = dst.mutable_data_ptr();
  execute(src, work.shift, in_place ? data : src.const_data_ptr(), data);
}

// Do the strides of x leave no gap and share no element, so that a new tensor has the same?
bool is_dense(const Tensor& x) {
  int64_t filled = 1;
  uint64_t seen = 0;
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dim = x.dim();
  for (int64_t found = 0; found < dim; ++found) {  // the dimension that continues what is filled, `dim` times
    int64_t d = 0;
    while (d < dim && ((seen >> d & 1) != 0 || (sizes[d] != 1 && strides[d] != filled))) ++d;
    if (d == dim) return false;
    seen |= uint64_t{1} << d;
    filled *= sizes[d];
  }
  return true;
}

// torch.empty_like. Its operator is looked up by name at every call, which takes longer than a small shift.
Tensor new_like(const Tensor& x) {
  if (x.dim() > 64 || x.numel() == 0 || !is_dense(x)) return torch::stable::empty_like(x);
  AtenTensorHandle out = nullptr;
  int32_t dtype = 0, device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype, device_type,
                                                  x.get_device_index(), &out));
  return Tensor(out);
}

template <bool kAdjoint>
Tensor out_of_place(const Tensor& x, const std::string& shift) {
  Plan plan = plan_for(x, shift);
  Tensor out = new_like(x);
  run(x, out, std::move(plan), kAdjoint);
  return out;
}

template <bool kAdjoint>
void in_place(const Tensor& x, const std::string& shift) {
  Tensor dst = x;
  run(x, dst, plan_for(x, shift), kAdjoint);
}

void register_operators(torch::stable::detail::StableLibrary& m) {
  for (const char* name : {"temporal_shift", "temporal_shift.kernel"}) m.impl(name, TORCH_BOX(&out_of_place<false>));
  for (const char* name : {"temporal_shift_backward", "temporal_shift_backward.kernel"}) {
    m.impl(name, TORCH_BOX(&out_of_place<true>));
  }
  m.impl("temporal_shift_", TORCH_BOX(&in_place<false>));
  m.impl("temporal_shift_backward_", TORCH_BOX(&in_place<true>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CPU, m) { register_operators(m); }
#ifdef TSM_JIT_CUDA
STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CUDA, m) { register_operators(m); }
#endif
