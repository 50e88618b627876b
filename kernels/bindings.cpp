// The operators of torch.ops.tsm_jit for CPU and CUDA: tensors in, a `Shift` in bytes out, through torch's stable ABI.
//
// Schemas, fakes, autograd and the plain-torch implementation are in tsm_jit/ops.py; what is registered here takes
// precedence over the latter on its device. The public functions have validated everything; the checks below repeat
// only what memory safety rests on, for callers of torch.ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifdef TSM_JIT_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "residual_shift.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using tsm_jit::Group;
using tsm_jit::Norm;
using tsm_jit::Padding;
using tsm_jit::Residual;
using tsm_jit::Shift;
using tsm_jit::Strides;
using tsm_jit::Sum;
using tsm_jit::Unread;

// Not STD_TORCH_CHECK, which writes its message through a stream: where the C++ library is linked statically into us,
// as some compilers are set up to do, its streams crash.
[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("tsm_jit: " + message); }

// Fails, in PyTorch's own words, if it could not do what it was asked for; before 2.13 it prints these words alone.
void check(AOTITorchError error, const char* asked) {
  if (error == 0) return;
  const char* said = nullptr;
#ifdef TORCH_DYNAMIC_VERSION_CALL_2_13_0
  said = TORCH_DYNAMIC_VERSION_CALL_2_13_0(torch_exception_get_what_without_backtrace,
                                           torch::stable::detail::torch_shim_bc_const_char_ptr);
#endif
  fail(std::string("PyTorch could not ") + asked + (said == nullptr ? "" : std::string(": ") + said));
}

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
int64_t merged_size(const Dimension* tail, const Dimension* end, Dimension unit) {
  int64_t size = 1;
  for (const Dimension* d = end; d != tail;) {
    --d;
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
  const Dimension* const end = rest.data() + rest.size();
  const Dimension* inside = end;
  for (int64_t expected = 1; inside != rest.data(); --inside) {
    const Dimension& d = inside[-1];
    if (d.src != expected || d.dst != expected) break;
    if (channel.size > 1 && expected == channel.src) break;  // the channel comes next
    expected *= d.size;
  }
  const int64_t inner = merged_size(inside, end, {0, 1, 1});
  if (channel.size > 1 && (channel.src != inner || channel.dst != inner)) return false;
  const Dimension row = inside == rest.data() ? Dimension{1, 0, 0} : inside[-1];
  s.outer = merged_size(rest.data(), inside, row);
  if (s.outer < 0) return false;

  const int64_t channel_bytes = inner * element;
  s.run = channel.size * channel_bytes;
  s.src = {clip.src * element, frame.src * element, row.src * element};
  s.dst = {clip.dst * element, frame.dst * element, row.dst * element};
  int64_t begin = 0;
  for (const auto& [width, offset] : plan.groups) {
    const int64_t group_end = begin + width * channel_bytes;
    if (begin < group_end) work.groups.push_back({begin, group_end, static_cast<int32_t>(offset)});
    begin = group_end;
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

#ifdef TSM_JIT_CUDA
// `launch` on the current stream of the device of x.
template <class Launch>
void on_stream(const Tensor& x, Launch launch) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch(stream);
  if (error != nullptr) fail(std::string("the launch of a temporal shift failed: ") + error);
}
#endif

void execute([[maybe_unused]] const Tensor& x, const Shift& shift, const void* src, void* dst) {
#ifdef TSM_JIT_CUDA
  if (x.is_cuda()) return on_stream(x, [&](void* stream) { return tsm_jit::shift_cuda(shift, src, dst, stream); });
#endif
  // A thread is worth waking for some 64 KiB.
  const int64_t tasks = tsm_jit::cpu_tasks(shift);
  const int64_t task_bytes = std::max<int64_t>(1, shift.clips * shift.frames * shift.outer * shift.run / tasks);
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, 65536 / task_bytes),
                              [&](int64_t first, int64_t last) { tsm_jit::shift_cpu(shift, src, dst, first, last); });
}

// What is expanded over anything but frames and channels, as the gradient of a mean over pixels is, once.
Tensor unexpanded(Tensor x, const Plan& plan) {
  for (int64_t d = clips_apart(x, plan) ? 2 : 1; d < x.dim(); ++d) {
    if (d != plan.channel_dim && x.stride(d) == 0 && x.size(d) > 1) x = torch::stable::narrow(x, d, 0, 1);
  }
  return x;
}

// How many channels the frames make, in all, that a shift does not read: tsm_jit.plans.Shift.unread_channels.
int64_t unread_channels(const Plan& plan) {
  int64_t channels = 0;
  for (const auto& [width, offset] : plan.groups) {
    if (plan.padding != Padding::circular) channels += width * std::abs(offset);
  }
  return channels;
}

// And how many elements of x they are.
int64_t unread_elements(const Tensor& x, const Plan& plan) {
  return x.numel() == 0 ? 0 : x.numel() / plan.n_segment / x.size(plan.channel_dim) * unread_channels(plan);
}

// Where, in a run of bytes of these frames, those of each group begin; returns how long it is.
int64_t lay_out_unread(const std::vector<Group>& groups, Padding padding, std::vector<int64_t>& begin) {
  int64_t run = 0;
  for (const Group& group : groups) {
    begin.push_back(run);
    if (padding != Padding::circular) run += std::abs(group.offset) * (group.end - group.begin);
  }
  return run;
}

// `unread`, of an in-place shift: where to keep what it does not read, if anything. With `come_back` it is undone.
void run(const Tensor& src, Tensor& dst, Plan plan, bool adjoint, void* unread = nullptr, bool come_back = false) {
  if (src.numel() == 0) return;
  const bool adds = adjoint && (plan.padding == Padding::keep || plan.padding == Padding::replicate);
  if (adjoint && !adds) {  // the adjoint of zeros and circular is the shift the other way
    for (auto& group : plan.groups) group.second = -group.second;
  }
  Work work;
  const bool in_place = src.get() == dst.get();
  if (!describe(src, dst, plan, work)) {  // strides that no run of bytes follows
    if (Tensor few = unexpanded(src, plan); !in_place && few.numel() < src.numel()) {
      few = torch::stable::contiguous(few);
      Tensor moved = torch::stable::empty_like(few);
      run(few, moved, std::move(plan), adds);
      torch::stable::copy_(dst, moved);
      return;
    }
    if (Work of_dst; !in_place && describe(dst, dst, plan, of_dst)) {
      torch::stable::copy_(dst, src);
      return run(dst, dst, std::move(plan), adds);
    }
    Tensor copy = torch::stable::contiguous(src);
    run(copy, copy, std::move(plan), adds, unread, come_back);
    torch::stable::copy_(dst, copy);
    return;
  }
  std::vector<int64_t> unread_begin;
  if (unread != nullptr) {
    const int64_t run = lay_out_unread(work.groups, plan.padding, unread_begin);
    work.shift.unread = {static_cast<char*>(unread), unread_begin.data(), run, come_back};
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
  if (dim > 64) return false;
  for (int64_t found = 0; found < dim; ++found) {  // the dimension that continues what is filled, `dim` times
    int64_t d = 0;
    while (d < dim && ((seen >> d & 1) != 0 || (sizes[d] != 1 && strides[d] != filled))) ++d;
    if (d == dim) return false;
    seen |= uint64_t{1} << d;
    filled *= sizes[d];
  }
  return true;
}

// Memory that the C library maps anew for each tensor: the system hands out its pages at their first write, which takes
// four times as long as a shift if they are small.
void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kMappedAnew = int64_t{32} << 20;  // glibc: DEFAULT_MMAP_THRESHOLD_MAX
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kMappedAnew) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data), begin = (address + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), (address + bytes) / kPage * kPage - begin, MADV_HUGEPAGE);
#endif
}

// Of the device of `like`. torch.empty and its kin are looked up by name at every call, which takes longer than a small
// shift.
Tensor new_tensor(const Tensor& like, int32_t dtype, int64_t dim, const int64_t* sizes, const int64_t* strides) {
  AtenTensorHandle out = nullptr;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  check(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, like.get_device_index(), &out),
        "make a tensor");
  return Tensor(out);
}

int32_t type_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// torch.empty_like.
Tensor new_like(const Tensor& x) {
  if (x.numel() == 0 || !is_dense(x)) return torch::stable::empty_like(x);
  Tensor out = new_tensor(x, type_of(x), x.dim(), x.sizes().data(), x.strides().data());
  if (x.is_cpu()) ask_for_huge_pages(out.mutable_data_ptr(), x.numel() * x.element_size());
  return out;
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

// In place, to be undone: returns the frames that the shift does not read, laid out as its kernels please.
Tensor in_place_keeping(const Tensor& x, const std::string& shift) {
  Plan plan = plan_for(x, shift);
  const int64_t size = unread_elements(x, plan), stride = 1;
  Tensor dst = x, unread = new_tensor(x, type_of(x), 1, &size, &stride);
  run(x, dst, std::move(plan), false, size == 0 ? nullptr : unread.mutable_data_ptr());
  return unread;
}

void in_place_undone(const Tensor& x, const Tensor& unread, const std::string& shift) {
  Plan plan = plan_for(x, shift);
  const bool fits = unread.numel() == unread_elements(x, plan) && unread.is_contiguous() &&
                    unread.scalar_type() == x.scalar_type() && unread.get_device_index() == x.get_device_index();
  if (!fits) fail("unread must be what this shift of such an x returned");
  for (auto& group : plan.groups) group.second = -group.second;
  if (plan.padding != Padding::circular) plan.padding = Padding::keep;
  Tensor dst = x;
  run(x, dst, std::move(plan), false, unread.numel() == 0 ? nullptr : unread.mutable_data_ptr(), true);
}

// --- the end of a residual block ------------------------------------------------------------------------------------

// Everything its kernels need but the pointers.
struct ResidualWork : Work {
  Residual residual{};
  std::vector<int64_t> unread_begin;
};

using Optional = std::optional<Tensor>;

const std::string kNoShift = "n_segment=1 n_segment_shifted=1 channel_dim=1 padding=zeros plan=";

const void* data(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }
void* mutable_data(const Optional& x) { return x ? x->mutable_data_ptr() : nullptr; }

// Of a tensor in memory order or, like activations in channels_last, with its channels innermost; as torch has them, of
// empty tensors too.
std::vector<int64_t> strides_of(const std::vector<int64_t>& sizes, bool channels_last) {
  channels_last = channels_last && sizes.size() > 1;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  const auto next = [&](size_t d) {
    strides[d] = stride;
    stride *= channels_last ? sizes[d] : std::max<int64_t>(sizes[d], 1);
  };
  if (channels_last) next(1);
  for (size_t d = sizes.size(); d-- > 0;) {
    if (d != 1 || !channels_last) next(d);
  }
  return strides;
}

// A new tensor of the type and device of x, of these sizes, in memory order or with its channels innermost.
Tensor new_laid_out(const Tensor& x, const std::vector<int64_t>& sizes, bool channels_last) {
  const std::vector<int64_t> strides = strides_of(sizes, channels_last);
  return new_tensor(x, type_of(x), strides.size(), sizes.data(), strides.data());
}

// And with its channels where those of `like` are.
Tensor new_in_format_of(const Tensor& like, const Tensor& x, const std::vector<int64_t>& sizes) {
  return new_laid_out(x, sizes, !like.is_contiguous());
}

// Has x these sizes, and its elements in memory order or with its channels innermost?
bool is_laid_out(const Tensor& x, const std::vector<int64_t>& sizes, bool channels_last) {
  const std::vector<int64_t> strides = strides_of(sizes, channels_last);
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) {
    fits = x.size(d) == sizes[d] && (sizes[d] == 1 || x.stride(d) == strides[d]);
  }
  return fits;
}

// x, or a copy of it that is.
Tensor laid_out(const Tensor& x, bool channels_last) {
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  if (x.numel() == 0 || is_laid_out(x, sizes, channels_last)) return x;
  Tensor copy = new_laid_out(x, sizes, channels_last);
  torch::stable::copy_(copy, x);
  return copy;
}

// x, or a copy of it in the memory format of `like`.
Optional in_format_of(const Tensor& like, const Optional& x) {
  return x ? Optional(laid_out(*x, !like.is_contiguous())) : x;
}

// For the frames of x that a shift does not read.
Tensor new_unread(const Tensor& x, const std::string& shift) {
  const Plan plan = plan_for(x, shift);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[0] /= plan.n_segment;
  sizes[1] = unread_channels(plan);
  return new_in_format_of(x, x, sizes);
}

Tensor nothing(const Tensor& like) { return new_in_format_of(like, like, {0}); }

// Sees activations like x; `like` must be laid out as x is, `unread` as far as memory safety needs it.
void describe_residual(const Tensor& x, const std::string& encoded, const std::vector<const Optional*>& like,
                       const std::vector<const Optional*>& unread, ResidualWork& work) {
  const Plan plan = plan_for(x, encoded);
  if (plan.channel_dim != 1) fail("channel_dim must be 1, got " + std::to_string(plan.channel_dim));
  if (!is_dense(x) || !describe(x, x, plan, work)) fail("z must be contiguous, or channels_last");
  Residual& r = work.residual;
  r.type = sum_type(x.scalar_type());
  r.shift = work.shift;
  r.shift.padding = plan.padding;
  r.shift.n_segment_shifted = static_cast<int32_t>(plan.n_segment_shifted);
  const int64_t element = x.element_size(), channel = r.shift.run / x.size(plan.channel_dim);
  r.inner = channel / element;
  r.unread_run = lay_out_unread(work.groups, plan.padding, work.unread_begin);
  r.unread_begin = work.unread_begin.data();
  const bool gaps = r.shift.outer > 1 && r.shift.src.outer != r.shift.run;
  if (gaps || (r.shift.frames > 1 && r.shift.src.frame != r.shift.outer * r.shift.run)) {
    fail("z must be contiguous, or channels_last");
  }
  const auto laid_out_as_x = [&](const Tensor& y) {
    bool same = y.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) {
      same = y.size(d) == x.size(d) && (x.size(d) == 1 || y.stride(d) == x.stride(d));
    }
    return same;
  };
  for (const Optional* y : like) {
    if (!*y) continue;
    const bool fits = (*y)->scalar_type() == x.scalar_type() && laid_out_as_x(**y) &&
                      (*y)->get_device_index() == x.get_device_index();
    if (!fits) fail("all activations must be of the type, sizes and strides of z");
  }
  for (const Optional* y : unread) {
    if (!*y) continue;
    const bool fits = (*y)->scalar_type() == x.scalar_type() && ((*y)->numel() == 0 || is_dense(**y)) &&
                      (*y)->numel() * element == r.shift.clips * r.shift.outer * r.unread_run &&
                      (*y)->get_device_index() == x.get_device_index();
    if (!fits) fail("unread must hold the frames that the shift does not read, without gaps");
  }
}

Norm norm_of(const Tensor& x, int64_t channels, const std::vector<Tensor>& parts, double epsilon) {
  if (parts.empty()) return Norm{};
  if (parts.size() != 4) fail("a norm must have a mean, a variance, a weight and a bias");
  const ScalarType type = parts[0].scalar_type();
  for (const Tensor& part : parts) {
    const bool fits = part.numel() == channels && part.is_contiguous() && part.scalar_type() == type &&
                      (type == ScalarType::Float || type == x.scalar_type()) &&
                      part.get_device_index() == x.get_device_index();
    if (!fits) fail("a norm must have one value per channel in each part, all in float32 or as the activations");
  }
  return Norm{parts[0].const_data_ptr(), parts[1].const_data_ptr(), parts[2].const_data_ptr(),
              parts[3].const_data_ptr(), type == ScalarType::Float, epsilon};
}

template <class Work, class Run>
void parallel_frames(const Residual& r, const Work& work, Run run) {
  const int64_t frame_bytes = std::max<int64_t>(1, r.shift.outer * r.shift.run);
  torch::stable::parallel_for(0, r.shift.clips * r.shift.frames, std::max<int64_t>(1, 65536 / frame_bytes),
                              [&](int64_t first, int64_t last) { run(r, work, first, last); });
}

void execute([[maybe_unused]] const Tensor& z, const Residual& r, const tsm_jit::ResidualForward& f) {
#ifdef TSM_JIT_CUDA
  if (z.is_cuda()) return on_stream(z, [&](void* stream) { return tsm_jit::residual_forward_cuda(r, f, stream); });
#endif
  parallel_frames(r, f, tsm_jit::residual_forward_cpu);
}

void residual_shift(const Tensor& out, const Optional& unread_out, const Optional& plain, int64_t step, const Tensor& z,
                    const std::vector<Tensor>& z_norm, double z_epsilon, const Optional& identity,
                    const std::vector<Tensor>& identity_norm, double identity_epsilon, const Optional& unread,
                    const std::string& shift, bool relu) {
  if (z.numel() == 0) return;
  ResidualWork work;
  const Optional written = out;
  describe_residual(z, shift, {&written, &identity}, {&unread_out, &unread}, work);
  const int64_t channels = z.size(1);
  tsm_jit::ResidualForward f{};
  f.z = z.const_data_ptr();
  f.z_norm = norm_of(z, channels, z_norm, z_epsilon);
  f.identity = data(identity);
  f.identity_norm = norm_of(z, channels, identity_norm, identity_epsilon);
  f.unread = data(unread);
  f.out = out.mutable_data_ptr();
  f.unread_out = mutable_data(unread_out);
  f.identity_is_shifted = unread.has_value();
  f.out_is_shifted = unread_out.has_value();
  f.relu = relu;
  if (!identity && (unread || unread_out)) fail("identity must be given where activations are shifted");
  if (plain) {
    const bool steps = z.dim() == 4 && step >= 1 && step <= std::numeric_limits<int32_t>::max();
    const auto kept = [&](int64_t d) { return steps ? (z.size(d) + step - 1) / step : 0; };
    if (!steps || !is_laid_out(*plain, {z.size(0), z.size(1), kept(2), kept(3)}, !z.is_contiguous()) ||
        plain->scalar_type() != z.scalar_type() || plain->get_device_index() != z.get_device_index()) {
      fail("plain must be every step-th row and column of pixels of z, of its type and layout");
    }
    if (!unread_out || f.out == f.z) fail("plain must come beside a shifted out that is not z");
    if (z.is_cuda() && work.residual.inner != 1)
      fail("plain comes beside a shifted out on CUDA in channels_last alone");
    f.plain = plain->mutable_data_ptr();
    f.width = static_cast<int32_t>(z.size(3));
    f.step = static_cast<int32_t>(step);
  }
  if (tsm_jit::shifts_z_in_place(f) && (!z.is_cuda() || work.residual.shift.padding == Padding::circular)) {
    fail("out must not be z if it is shifted, but on CUDA and by no circular shift");
  }
  execute(z, work.residual, f);
}

std::tuple<Tensor, Tensor> new_residual_shift(const Tensor& z, const std::vector<Tensor>& z_norm, double z_epsilon,
                                              const Optional& identity, const std::vector<Tensor>& identity_norm,
                                              double identity_epsilon, const Optional& unread, const std::string& shift,
                                              bool shifted) {
  const Tensor out = new_like(z), unread_out = shifted ? new_unread(z, shift) : nothing(z);
  residual_shift(out, shifted ? Optional(unread_out) : std::nullopt, std::nullopt, 1, z, z_norm, z_epsilon,
                 in_format_of(z, identity), identity_norm, identity_epsilon, in_format_of(z, unread), shift, true);
  return {out, unread_out};
}

std::tuple<Tensor, Tensor, Tensor> residual_pool(const Tensor& z, const std::vector<Tensor>& z_norm, double z_epsilon,
                                                 const std::string& shift, bool plain, bool shifted) {
  if (z.dim() != 4 || z.size(1) < 2 || !is_laid_out(z, {z.sizes().begin(), z.sizes().end()}, true)) {
    fail("z must be [N*T, C, H, W] in channels_last, of more than one channel, to be pooled");
  }
  const auto half = [](int64_t size) { return (size + 1) / 2; };
  const auto pooled = [&](bool wanted) {
    return wanted ? new_in_format_of(z, z, {z.size(0), z.size(1), half(z.size(2)), half(z.size(3))}) : nothing(z);
  };
  const Tensor plain_out = pooled(plain), out = pooled(shifted);
  const Tensor unread_out = shifted ? new_unread(out, shift) : nothing(z);
  if (z.numel() == 0 || (!plain && !shifted)) return {plain_out, out, unread_out};
  ResidualWork work;
  describe_residual(plain ? plain_out : out, shift, {}, {}, work);
  tsm_jit::ResidualPool p{};
  p.z = z.const_data_ptr();
  p.z_norm = norm_of(z, z.size(1), z_norm, z_epsilon);
  p.height = static_cast<int32_t>(z.size(2));
  p.width = static_cast<int32_t>(z.size(3));
  if (plain) p.plain = plain_out.mutable_data_ptr();
  if (shifted) {
    p.out = out.mutable_data_ptr();
    p.unread_out = unread_out.mutable_data_ptr();
  }
#ifdef TSM_JIT_CUDA
  if (z.is_cuda()) {
    on_stream(z, [&](void* stream) { return tsm_jit::residual_pool_cuda(work.residual, p, stream); });
    return {plain_out, out, unread_out};
  }
#endif
  parallel_frames(work.residual, p, tsm_jit::residual_pool_cpu);
  return {plain_out, out, unread_out};
}

// Is x in the type that activations like `like` are added in, as sums by channel and what is made of them are?
bool is_wide(const Tensor& x, const Tensor& like, int64_t count) {
  const ScalarType wide = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return x.is_contiguous() && x.scalar_type() == wide && x.numel() == count &&
         x.get_device_index() == like.get_device_index();
}

// What the backward reads of a norm of activations like `out`.
void check_norm(const std::vector<Tensor>& parts, const Optional& values, const Tensor& out) {
  bool fits = parts.empty() || (parts.size() == 3 && values);
  for (const Tensor& part : parts) fits = fits && is_wide(part, out, out.size(1));
  if (!fits) {
    fail(
        "a norm must come with its values, and have a mean, a variance and a weight, of one value per channel in the "
        "type that activations are added in");
  }
}

// What sums by channel take: CUDA, and channels_last.
void check_sums(const Tensor& x, const Residual& r) {
  if (!x.is_cuda() || r.inner != 1) fail("sums by channel are made on CUDA, in channels_last");
}

// For `count` numbers of the type that activations like x are added in. Its memory is kept until the kernels that are
// launched with it are done.
Tensor new_wide(const Tensor& x, std::initializer_list<int64_t> sizes) {
  const int32_t dtype = x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const std::vector<int64_t> strides = strides_of(sizes, false);
  return new_tensor(x, dtype, strides.size(), sizes.begin(), strides.data());
}

#ifdef TSM_JIT_CUDA
// The sums of a backward of activations like x, which `kernel` makes, and the gradients of norms, made of them.
template <class Backward>
const char* sum_up(const Tensor& x, const Residual& r, Backward& b, tsm_jit::NormGradients& n, void* stream,
                   const char* (*kernel)(const Residual&, const Backward&, void*)) {
  const int64_t channels = x.size(1);
  b.slices = n.slices = tsm_jit::backward_slices(r);
  const Tensor sums = new_wide(x, {b.slices * (1 + tsm_jit::kNorms) * channels});
  n.sums = b.sums = sums.mutable_data_ptr();
  if (const char* error = kernel(r, b, stream)) return error;
  return tsm_jit::norm_gradients_cuda(r.type, channels, n, stream);
}
#endif

void residual_shift_backward(const Optional& grad, const Optional& grad_shifted, const Optional& grad_unread_in,
                             const Optional& norm_gradients, const Optional& grad_a, const Optional& grad_b,
                             const Optional& grad_unread, const Tensor& out, const Optional& unread_out,
                             const Optional& z, const std::vector<Tensor>& z_norm, double z_epsilon,
                             const Optional& identity, const std::vector<Tensor>& identity_norm,
                             double identity_epsilon, const std::string& shift) {
  if (out.numel() == 0) return;
  ResidualWork work;
  const Residual& r = work.residual;
  describe_residual(out, shift, {&grad, &grad_shifted, &grad_a, &grad_b, &z, &identity},
                    {&grad_unread_in, &grad_unread, &unread_out}, work);
  tsm_jit::ResidualBackward b{};
  b.out = out.const_data_ptr();
  b.unread_out = data(unread_out);
  b.out_is_shifted = unread_out.has_value();
  b.grad_a = data(grad_a);
  b.grad_b = data(grad_b);
  b.grad_unread = data(grad_unread);
  b.grad = mutable_data(grad);
  b.grad_shifted = mutable_data(grad_shifted);
  b.grad_unread_in = mutable_data(grad_unread_in);
  if (grad_shifted.has_value() != grad_unread_in.has_value()) fail("grad_shifted must come with grad_unread_in");
  if (!grad && !grad_shifted) fail("grad must be given, or grad_shifted");
  const int64_t channels = out.size(1);
  [[maybe_unused]] tsm_jit::NormGradients n{};
  if (norm_gradients) {
    check_sums(out, r);
    if (!is_wide(*norm_gradients, out, (1 + 4 * tsm_jit::kNorms) * channels)) {
      fail("norm_gradients must be [9, channels], of the type that activations are added in");
    }
    n.made = norm_gradients->mutable_data_ptr();
    n.count = out.numel() / channels;
    n.epsilon[0] = z_epsilon;
    n.epsilon[1] = identity_epsilon;
    const std::pair<const Optional*, const std::vector<Tensor>*> norms[] = {{&z, &z_norm}, {&identity, &identity_norm}};
    for (int32_t k = 0; k < tsm_jit::kNorms; ++k) {
      const auto& [values, parts] = norms[k];
      check_norm(*parts, *values, out);
      if (parts->empty()) continue;
      b.normed[k] = data(*values);
      b.mean[k] = (*parts)[0].const_data_ptr();
      n.variance[k] = (*parts)[1].const_data_ptr();
      n.weight[k] = (*parts)[2].const_data_ptr();
    }
  }
#ifdef TSM_JIT_CUDA
  if (out.is_cuda()) {
    return on_stream(out, [&](void* stream) {
      if (!norm_gradients) return tsm_jit::residual_backward_cuda(r, b, stream);
      return sum_up(out, r, b, n, stream, tsm_jit::residual_backward_cuda);
    });
  }
#endif
  parallel_frames(r, b, tsm_jit::residual_backward_cpu);
}

// What residual_shift_backward writes, as new tensors; absent if not wanted.
struct Made {
  Optional grad, grad_shifted, grad_unread_in, norm_gradients;
};

Made make_gradients(const Optional& grad_a, const Optional& grad_b, const Optional& grad_unread, const Tensor& out,
                    const Optional& unread_out, const Optional& z, const std::vector<Tensor>& z_norm, double z_epsilon,
                    const Optional& identity, const std::vector<Tensor>& identity_norm, double identity_epsilon,
                    const std::string& shift, bool plain, bool shifted) {
  const Optional a = in_format_of(out, grad_a);
  // A plain gradient that had to be copied (that of a mean over pixels is one value) is ours to overwrite.
  const bool is_ours = a && a->get() != grad_a->get() && !unread_out;
  Made made;
  if (plain) made.grad = is_ours ? *a : new_like(out);
  if (shifted) {
    made.grad_shifted = new_like(out);
    made.grad_unread_in = new_unread(out, shift);
  }
  if (!z_norm.empty() || !identity_norm.empty()) {
    made.norm_gradients = new_wide(out, {1 + 4 * tsm_jit::kNorms, out.size(1)});
  }
  residual_shift_backward(made.grad, made.grad_shifted, made.grad_unread_in, made.norm_gradients, a,
                          in_format_of(out, grad_b), in_format_of(out, grad_unread), out, unread_out, z, z_norm,
                          z_epsilon, in_format_of(out, identity), identity_norm, identity_epsilon, shift);
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> new_residual_shift_backward(
    const Optional& grad_a, const Optional& grad_b, const Optional& grad_unread, const Tensor& out,
    const Optional& unread_out, const Optional& z, const std::vector<Tensor>& z_norm, double z_epsilon,
    const Optional& identity, const std::vector<Tensor>& identity_norm, double identity_epsilon,
    const std::string& shift, bool shifted) {
  const Made made = make_gradients(grad_a, grad_b, grad_unread, out, unread_out, z, z_norm, z_epsilon, identity,
                                   identity_norm, identity_epsilon, shift, true, shifted);
  const auto or_nothing = [&](const Optional& x) { return x ? *x : nothing(out); };
  return {*made.grad, or_nothing(made.grad_shifted), or_nothing(made.grad_unread_in), or_nothing(made.norm_gradients)};
}

#ifdef TSM_JIT_CUDA
std::tuple<Tensor, Tensor> channel_statistics(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                                              const Tensor& batches, double momentum) {
  const Tensor mean = new_wide(x, {x.size(1)}), variance = new_wide(x, {x.size(1)});
  if (x.numel() == 0) return {mean, variance};
  ResidualWork work;
  const Residual& r = work.residual;
  describe_residual(x, kNoShift, {}, {}, work);
  check_sums(x, r);
  for (const Tensor* each : {&running_mean, &running_var}) {
    if (!is_wide(*each, x, x.size(1))) {
      fail("running statistics must have one value per channel, of the type that activations are added in");
    }
  }
  if (batches.numel() != 1 || batches.scalar_type() != ScalarType::Long ||
      batches.get_device_index() != x.get_device_index()) {
    fail("the number of batches must be one of 64 bits, beside x");
  }
  tsm_jit::ChannelStatistics c{};
  c.x = x.const_data_ptr();
  c.mean = mean.mutable_data_ptr();
  c.variance = variance.mutable_data_ptr();
  c.running_mean = running_mean.mutable_data_ptr();
  c.running_variance = running_var.mutable_data_ptr();
  c.batches = static_cast<int64_t*>(batches.mutable_data_ptr());
  c.momentum = momentum;
  on_stream(x, [&](void* stream) {
    c.slices = tsm_jit::statistics_slices(r);
    const Tensor sums = new_wide(x, {2 * c.slices * x.size(1)});
    c.sums = sums.mutable_data_ptr();
    return tsm_jit::channel_statistics_cuda(r, c, stream);
  });
  return {mean, variance};
}

// --- a residual block, recorded --------------------------------------------------------------------------------------
//
// What tsm_jit/_residual_block.py says in Python, for devices without kernels. Said there, a block takes the host twice
// as long.

// One of the two that the end of a block adds, backward.
struct Operand {
  Optional values;
  std::vector<Tensor> norm;  // mean, variance and weight, under a ReLU its bias; empty: none
  double epsilon;
  bool of_batch;             // are mean and variance those of the values, so that gradients go through them as well?
  bool wanted, norm_wanted;  // which gradients

  bool summed() const { return !norm.empty() && (of_batch || norm_wanted); }
};

struct Gradients {
  Tensor values, weight, bias;  // undefined: not wanted
};

// Row k of [rows, channels].
Tensor row(const Tensor& rows, int64_t k) {
  const int64_t channels = rows.size(1), stride = 1;
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(rows.get(), 1, &channels, &stride, k * channels, &out));
  return Tensor(out);
}

// The gradient of an operand's values, of which `made` has that of their norm. `zero` is a row of zeros, `beside`
// weight and bias of the norm that the gradient has beside; see NormGradients. `overwrite` allows to write it into
// `made.grad`.
Tensor through_norm(const Made& made, const Operand& x, const void* zero, const void* beside, bool overwrite,
                    const std::string& shift) {
  const Tensor& grad = made.grad ? *made.grad : *made.grad_shifted;
  const Optional values = x.of_batch ? in_format_of(grad, x.values) : std::nullopt;
  const Optional unread = made.grad ? std::nullopt : made.grad_unread_in;
  Tensor out = overwrite && made.grad ? grad : new_like(grad);
  ResidualWork work;
  describe_residual(grad, made.grad ? kNoShift : shift, {&values}, {&unread}, work);
  const bool in_float = work.residual.type != Sum::float64;
  const void *mean = x.norm[0].const_data_ptr(), *variance = x.norm[1].const_data_ptr();
  const tsm_jit::Norm grad_norm{zero, variance, x.norm[2].const_data_ptr(), zero, in_float, x.epsilon};
  tsm_jit::ResidualForward f{};
  if (values) {
    const void* bias = static_cast<const char*>(beside) + x.norm[0].numel() * x.norm[0].element_size();
    f.z = values->const_data_ptr();
    f.z_norm = {mean, variance, beside, bias, in_float, x.epsilon};
    f.identity = grad.const_data_ptr();
    f.identity_norm = grad_norm;
    f.identity_is_shifted = unread.has_value();
    f.unread = data(unread);
  } else {
    f.z = grad.const_data_ptr();
    f.z_norm = grad_norm;
  }
  f.out = out.mutable_data_ptr();
  execute(grad, work.residual, f);
  return out;
}

// Those of z and of the identity, and that of `unread`.
std::tuple<Gradients, Gradients, Tensor> gradients_of_end(const Optional& grad_a, const Optional& grad_b,
                                                          const Optional& grad_unread, const Tensor& out,
                                                          const Optional& unread_out, const Operand& z,
                                                          const Operand& identity, const std::string& shift,
                                                          bool identity_is_shifted) {
  if (out.numel() == 0) fail("out must have values, to be differentiated");
  static const Optional kNone;
  static const std::vector<Tensor> kNoNorm;
  const Operand* const operands[tsm_jit::kNorms] = {&z, &identity};
  for (const Operand* x : operands) check_norm(x->norm, x->values, out);
  // Where the identity was shifted, the norm of z may read its gradient in that form, beside the values.
  const bool plain = !identity_is_shifted || (z.wanted && (z.norm.empty() || !z.of_batch));
  const Made made =
      make_gradients(grad_a, grad_b, grad_unread, out, unread_out, z.summed() ? z.values : kNone,
                     z.summed() ? z.norm : kNoNorm, z.epsilon, identity.summed() ? identity.values : kNone,
                     identity.summed() ? identity.norm : kNoNorm, identity.epsilon, shift, plain, identity_is_shifted);
  Optional zeros = made.norm_gradients;  // its first row is
  const auto row_of = [&](int64_t k) {
    return static_cast<const char*>(zeros->const_data_ptr()) + k * out.size(1) * zeros->element_size();
  };
  Gradients found[tsm_jit::kNorms];
  for (int64_t k = 0; k < tsm_jit::kNorms; ++k) {
    const Operand& x = *operands[k];
    if (x.summed()) {
      found[k].weight = row(*made.norm_gradients, 1 + 4 * k);
      found[k].bias = row(*made.norm_gradients, 2 + 4 * k);
    }
    if (!x.wanted) continue;
    if (x.norm.empty()) {
      found[k].values = k == 1 && identity_is_shifted ? *made.grad_shifted : *made.grad;
      continue;
    }
    if (!zeros) {
      zeros = new_wide(out, {1, out.size(1)});
      torch::stable::zero_(*zeros);
    }
    // The last one that reads `grad`, where that is nobody's gradient itself.
    const bool last = k == 1 ? !z.norm.empty() : identity_is_shifted || !identity.wanted;
    found[k].values = through_norm(made, x, row_of(0), row_of(3 + 4 * k), last, shift);
  }
  return {found[0], found[1], made.grad_unread_in.value_or(Tensor())};
}

// Those of z, given that of relu(norm(z)), a norm with its bias. `overwrite` allows to write into what is given.
Gradients gradients_of_relu(const Tensor& given, const Operand& z, bool overwrite) {
  const Tensor& values = *z.values;
  if (values.numel() == 0) fail("z must have values, to be differentiated");
  const int64_t channels = values.size(1);
  const Optional grad = in_format_of(values, given);
  ResidualWork work;
  const Residual& r = work.residual;
  describe_residual(values, kNoShift, {&grad}, {}, work);
  check_sums(values, r);
  for (const Tensor& part : z.norm) {
    if (!is_wide(part, values, channels)) fail("a norm must be of the type that activations are added in");
  }
  tsm_jit::ReluOfNormBackward b{};
  b.grad = data(grad);
  b.z = values.const_data_ptr();
  b.norm = norm_of(values, channels, z.norm, z.epsilon);
  if (b.norm.mean == nullptr) fail("norm must be given");
  tsm_jit::NormGradients n{};
  Gradients found;
  if (z.summed()) {
    const Tensor made = new_wide(values, {1 + 4, channels});
    n.made = made.mutable_data_ptr();
    n.count = values.numel() / channels;
    n.variance[0] = b.norm.variance;
    n.weight[0] = b.norm.weight;
    n.epsilon[0] = z.epsilon;
    found.weight = row(made, 1);
    found.bias = row(made, 2);
    if (z.of_batch) {
      b.beside = b.norm;
      b.beside.weight = row(made, 3).const_data_ptr();
      b.beside.bias = row(made, 4).const_data_ptr();
    }
  }
  if (z.wanted) {
    found.values = overwrite || grad->get() != given.get() ? *grad : new_like(values);
    b.out = found.values.mutable_data_ptr();
  }
  on_stream(values, [&](void* stream) -> const char* {
    if (z.summed()) {
      if (const char* error = sum_up(values, r, b, n, stream, tsm_jit::relu_of_norm_sums_cuda)) return error;
    }
    return z.wanted ? tsm_jit::relu_of_norm_backward_cuda(r, b, stream) : nullptr;
  });
  return found;
}

// [of_batch, wanted, norm_wanted], from Python.
Operand operand_of(const Optional& values, const std::vector<Tensor>& norm, double epsilon,
                   const std::vector<int64_t>& how) {
  if (how.size() != 3) fail("an operand must come with three flags, got " + std::to_string(how.size()));
  return {values, norm, epsilon, how[0] != 0, how[1] != 0, how[2] != 0};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_end_backward(
    const Optional& grad_a, const Optional& grad_b, const Optional& grad_unread, const Tensor& out,
    const Optional& unread_out, const Optional& z, const std::vector<Tensor>& z_norm, double z_epsilon,
    const std::vector<int64_t>& z_how, const Optional& identity, const std::vector<Tensor>& identity_norm,
    double identity_epsilon, const std::vector<int64_t>& identity_how, const std::string& shift, bool shifted) {
  const auto [of_z, of_identity, of_unread] =
      gradients_of_end(grad_a, grad_b, grad_unread, out, unread_out, operand_of(z, z_norm, z_epsilon, z_how),
                       operand_of(identity, identity_norm, identity_epsilon, identity_how), shift, shifted);
  return {of_z.values, of_z.weight, of_z.bias, of_identity.values, of_identity.weight, of_identity.bias, of_unread};
}

std::tuple<Tensor, Tensor, Tensor> relu_of_norm_backward(const Tensor& grad, const Tensor& z,
                                                         const std::vector<Tensor>& norm, double epsilon,
                                                         const std::vector<int64_t>& how) {
  const auto [values, weight, bias] = gradients_of_relu(grad, operand_of(z, norm, epsilon, how), false);
  return {values, weight, bias};
}

// A convolution of two dimensions: its stride, padding and dilation, two each, and its groups; whether the norm after
// it is of the batch.
constexpr size_t kConvolution = 8;
constexpr int64_t kNothing[] = {0, 0};

Tensor convolved(const Tensor& x, const Tensor& weight, const int64_t* how) {
  AtenTensorHandle out = nullptr;
  check(aoti_torch_cuda_convolution(x.get(), weight.get(), nullptr, how, 2, how + 2, 2, how + 4, 2, false, kNothing, 2,
                                    how[6], &out),
        "convolve");
  return laid_out(Tensor(out), true);
}

// The gradients of x and of the weight, undefined if not wanted.
std::pair<Tensor, Tensor> convolved_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const int64_t* how, bool wanted, bool weight_wanted) {
  AtenTensorHandle out[3] = {};
  const int32_t mask[] = {wanted, weight_wanted, false};
  check(aoti_torch_cuda_convolution_backward(grad.get(), x.get(), weight.get(), nullptr, 0, how, 2, how + 2, 2, how + 4,
                                             2, false, kNothing, 2, how[6], mask, 3, &out[0], &out[1], &out[2]),
        "differentiate a convolution");
  const Tensor of_x(out[0]), of_weight(out[1]), of_bias(out[2]);
  return {of_x, of_weight};
}

// Layers of a convolution and a norm, a ReLU between two of them, and the end of the block. With `downsample` the last
// layer is that of the identity, and convolves what is given for it. `norms` has the running mean and variance, the
// weight and the bias of each norm, `factors` its epsilon and its momentum, `batches` one number for each that is of
// the batch. Returned for the backward: of each layer what it convolved, mean and variance if the norm is of the batch,
// and its ReLU if there is one.
std::tuple<Tensor, Tensor, std::vector<Tensor>> residual_block(
    const Tensor& given, const std::string& first_shift, const std::vector<Tensor>& weights,
    const std::vector<int64_t>& convolutions, const std::vector<Tensor>& norms, const std::vector<Tensor>& batches,
    const std::vector<double>& factors, const Tensor& given_identity, bool downsample, const Optional& unread,
    const std::string& shift, bool shifted) {
  const size_t layers = weights.size();
  if (layers < (downsample ? 2 : 1) || convolutions.size() != kConvolution * layers || norms.size() != 4 * layers ||
      factors.size() != 2 * layers) {
    fail("each layer must have a convolution and a norm");
  }
  std::vector<Tensor> kept;
  auto counter = batches.begin();
  const auto convolve = [&](size_t k, const Tensor& x) {
    const int64_t* const how = &convolutions[kConvolution * k];
    const Tensor z = convolved(x, weights[k], how);
    kept.push_back(z);
    std::vector<Tensor> norm(&norms[4 * k], &norms[4 * k] + 4);
    if (how[7] != 0) {
      if (counter == batches.end()) fail("each norm of the batch must have a number of batches");
      std::tie(norm[0], norm[1]) = channel_statistics(z, norm[0], norm[1], *counter++, factors[2 * k + 1]);
      kept.insert(kept.end(), {norm[0], norm[1]});
    }
    return std::pair(z, norm);
  };
  const size_t last = layers - 1 - (downsample ? 1 : 0);
  Tensor x = first_shift.empty() ? given : out_of_place<false>(given, first_shift);
  for (size_t k = 0; k < last; ++k) {
    const auto [z, norm] = convolve(k, x);
    x = new_like(z);
    residual_shift(x, std::nullopt, std::nullopt, 1, z, norm, factors[2 * k], std::nullopt, {}, 0, std::nullopt,
                   kNoShift, true);
    kept.push_back(x);
  }
  const auto [z, norm] = convolve(last, x);
  Tensor identity = given_identity;
  std::vector<Tensor> identity_norm;
  if (downsample) std::tie(identity, identity_norm) = convolve(last + 1, identity);
  auto [out, unread_out] = new_residual_shift(z, norm, factors[2 * last], identity, identity_norm,
                                              downsample ? factors[2 * last + 2] : 0, unread, shift, shifted);
  return {out, unread_out, kept};
}

// Of these layers, given the gradient of what the last one convolved. `kept` has, of each but the last, what it
// convolved, mean, variance, weight and bias of its norm; then the ReLUs of these. That of the first may be missing: it
// is made again. `wanted`: x; of each layer, weight and norm.
// Returned: of x; of each layer, of its weight, and of weight and bias of its norm (not of the last one).
std::vector<Tensor> residual_block_backward(const Tensor& of_last, const Tensor& given, const std::string& first_shift,
                                            const std::vector<Tensor>& weights,
                                            const std::vector<int64_t>& convolutions, const std::vector<Tensor>& kept,
                                            const std::vector<double>& epsilons, const std::vector<int64_t>& wanted) {
  const size_t layers = weights.size(), norms = 5 * (layers - 1), relus = kept.size() - norms;
  if (layers == 0 || convolutions.size() != kConvolution * layers || kept.size() < norms ||
      (relus != layers - 1 && relus + 1 != layers - 1) || epsilons.size() != layers ||
      wanted.size() != 1 + 2 * layers) {
    fail("each layer must have a convolution, a norm and what they were given");
  }
  const auto any_before = [&](size_t end) {
    return std::any_of(wanted.begin(), wanted.begin() + end, [](int64_t each) { return each != 0; });
  };
  const auto given_to = [&](size_t k, bool weight_wanted) -> Tensor {
    const bool shifts = !first_shift.empty() && weight_wanted;  // or else nobody reads its values
    if (k == 0) return shifts ? out_of_place<false>(given, first_shift) : given;
    const Tensor* const layer = &kept[5 * (k - 1)];
    if (!weight_wanted) return *layer;
    if (layers - k <= relus) return kept[kept.size() - (layers - k)];
    const std::vector<Tensor> norm{layer + 1, layer + 5};
    return std::get<0>(
        new_residual_shift(*layer, norm, epsilons[k - 1], std::nullopt, {}, 0, std::nullopt, kNoShift, false));
  };
  std::vector<Tensor> found(1 + 3 * layers);
  Tensor of_z = of_last;
  for (size_t k = layers; k-- > 0;) {
    const int64_t* const how = &convolutions[kConvolution * k];
    const bool before = any_before(1 + 2 * k), weight_wanted = wanted[1 + 2 * k] != 0;
    Tensor of_x;
    std::tie(of_x, found[1 + 3 * k]) =
        convolved_backward(of_z, given_to(k, weight_wanted), weights[k], how, before, weight_wanted);
    if (!before) break;
    if (k == 0) {
      if (!first_shift.empty()) in_place<true>(of_x, first_shift);
      found[0] = of_x;
      break;
    }
    const Tensor* const layer = &kept[5 * (k - 1)];
    const Operand z{layer[0],          {layer + 1, layer + 5},
                    epsilons[k - 1],   how[7 - static_cast<int64_t>(kConvolution)] != 0,
                    any_before(2 * k), wanted[2 * k] != 0};
    const Gradients of = gradients_of_relu(of_x, z, true);
    found[3 * k - 1] = of.weight;
    found[3 * k] = of.bias;
    if (!z.wanted) break;
    of_z = of.values;
  }
  return found;
}
#endif

// All in another type, by one launch.
std::vector<Tensor> cast(const std::vector<Tensor>& tensors, ScalarType dtype) {
  std::vector<Tensor> made;
  for (const Tensor& x : tensors) {
    const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides = strides_of(sizes, false);
    made.push_back(new_tensor(x, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), sizes.size(),
                              sizes.data(), is_dense(x) ? x.strides().data() : strides.data()));
  }
  if (made.empty()) return made;
  StableIValue stack[] = {torch::stable::detail::from(made), torch::stable::detail::from(tensors),
                          torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_foreach_copy_", "", stack, TORCH_ABI_VERSION));
  return made;
}

void register_operators(torch::stable::detail::StableLibrary& m) {
  for (const char* name : {"temporal_shift", "temporal_shift.kernel", "temporal_shift.again"}) {
    m.impl(name, TORCH_BOX(&out_of_place<false>));
  }
  for (const char* name : {"temporal_shift_backward", "temporal_shift_backward.kernel"}) {
    m.impl(name, TORCH_BOX(&out_of_place<true>));
  }
  m.impl("temporal_shift_", TORCH_BOX(&in_place<false>));
  m.impl("temporal_shift_backward_", TORCH_BOX(&in_place<true>));
  m.impl("temporal_shift_keeping_", TORCH_BOX(&in_place_keeping));
  m.impl("temporal_shift_undone_", TORCH_BOX(&in_place_undone));
  m.impl("cast", TORCH_BOX(&cast));
  m.impl("residual_shift_", TORCH_BOX(&residual_shift));
  m.impl("residual_shift_backward_", TORCH_BOX(&residual_shift_backward));
  for (const char* name : {"residual_shift", "residual_shift.again"}) m.impl(name, TORCH_BOX(&new_residual_shift));
  m.impl("residual_pool", TORCH_BOX(&residual_pool));
  m.impl("residual_shift_backward", TORCH_BOX(&new_residual_shift_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CPU, m) { register_operators(m); }
#ifdef TSM_JIT_CUDA
STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CUDA, m) {
  register_operators(m);
  m.impl("channel_statistics_", TORCH_BOX(&channel_statistics));
  m.impl("residual_end_backward", TORCH_BOX(&residual_end_backward));
  m.impl("relu_of_norm_backward", TORCH_BOX(&relu_of_norm_backward));
  m.impl("residual_block", TORCH_BOX(&residual_block));
  m.impl("residual_block_backward", TORCH_BOX(&residual_block_backward));
}
#endif
