// torch.ops.tsm_jit.temporal_shift*, for CPU and CUDA.
#include "bindings/shift.h"

#include <cstdlib>
#include <cstring>
#include <limits>

#ifdef TSM_JIT_CUDA
#include "shift/edges.h"
#endif
#include "shift/temporal_shift.h"

namespace tsm_jit {
namespace {

// --- decoding --------------------------------------------------------------------------------------------------------

class Decoder {
 public:
  explicit Decoder(const std::string& encoded) : encoded_(encoded), at_(encoded.c_str()) {}

  ShiftPlan decode() {
    ShiftPlan plan;
    plan.n_segment = field("n_segment=");
    plan.n_segment_shifted = field(" n_segment_shifted=");
    plan.channel_dim = field(" channel_dim=");
    expect(" padding=");
    plan.padding = padding();
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
  Padding padding() {
    if (accept("zeros")) return Padding::zeros;
    if (accept("keep")) return Padding::keep;
    if (accept("replicate")) return Padding::replicate;
    expect("circular");
    return Padding::circular;
  }
  void require(bool condition) const {
    if (!condition) fail("shift must be an encoded tsm_jit.plans.Shift, got " + encoded_);
  }

  const std::string& encoded_;
  const char* at_;
};

// Does x have dimensions [N, T, ...], rather than [N*T, ...]? As tsm_jit.reference.has_clip_dim.
bool has_clip_dim(const Tensor& x, const ShiftPlan& plan) { return x.dim() == 5 && plan.channel_dim >= 2; }

}  // namespace

ShiftPlan shift_plan(const Tensor& x, const std::string& encoded) {
  // A network calls with few shifts, often with the same one in a row. Decoding takes as long as a small shift.
  thread_local std::string last;
  thread_local ShiftPlan decoded;
  if (last.empty() || encoded != last) {
    last.clear();
    decoded = Decoder(encoded).decode();
    last = encoded;
  }
  ShiftPlan plan = decoded;
  if (plan.channel_dim < 1 || plan.channel_dim >= x.dim()) {
    fail("channel_dim must be a dimension of x after the frames, got " + std::to_string(plan.channel_dim));
  }
  const bool divides = plan.n_segment >= 1 && plan.n_segment <= std::numeric_limits<int32_t>::max() / 2 &&
                       (has_clip_dim(x, plan) ? x.size(1) == plan.n_segment : x.size(0) % plan.n_segment == 0);
  if (!divides) fail("n_segment must be the clip length of x, got " + std::to_string(plan.n_segment));
  if (plan.n_segment_shifted < 1 || plan.n_segment_shifted > plan.n_segment) {
    fail("n_segment_shifted must be in 1..n_segment, got " + std::to_string(plan.n_segment_shifted));
  }
  int64_t free_channels = x.size(plan.channel_dim);
  for (auto& [width, offset] : plan.groups) {
    if (width < 0 || width > free_channels) fail("plan must fit into the channels of x, got " + encoded);
    free_channels -= width;
    // Beyond the clip every offset means the same: padding only.
    const int64_t n = plan.n_segment_shifted;
    offset = plan.padding == Padding::circular ? offset % n : std::clamp(offset, -n, n);
  }
  return plan;
}

int64_t boundary_channels(const ShiftPlan& plan) {
  int64_t channels = 0;
  for (const auto& [width, offset] : plan.groups) {
    if (plan.padding != Padding::circular) channels += width * std::abs(offset);
  }
  return channels;
}

int64_t layout_boundary(const std::vector<ChannelGroup>& groups, Padding padding, std::vector<int64_t>& begin) {
  int64_t bytes = 0;
  for (const ChannelGroup& group : groups) {
    begin.push_back(bytes);
    if (padding != Padding::circular) bytes += std::abs(group.offset) * (group.end - group.begin);
  }
  return bytes;
}

// --- strides ---------------------------------------------------------------------------------------------------------

namespace {

// One dimension, with its strides in src and dst in elements.
struct Dimension {
  int64_t size, src, dst;
};

// Can the dimensions [begin, end), the outermost first, be viewed as one whose elements are `unit` apart? Returns its
// size, or -1.
int64_t merged_size(const Dimension* begin, const Dimension* end, Dimension unit) {
  int64_t size = 1;
  for (const Dimension* d = end; d != begin;) {
    --d;
    if (d->src != unit.src * size || d->dst != unit.dst * size) return -1;
    size *= d->size;
  }
  return size;
}

}  // namespace

bool describe_shift(const Tensor& src, const Tensor& dst, const ShiftPlan& plan, ShiftDescriptor& out) {
  const auto sizes = src.sizes(), src_strides = src.strides(), dst_strides = dst.strides();
  const int64_t element = src.element_size();
  const bool apart = has_clip_dim(src, plan);
  const auto dimension = [&](int64_t d) { return Dimension{sizes[d], src_strides[d], dst_strides[d]}; };

  Dimension clip = dimension(0), frame = dimension(apart ? 1 : 0);
  if (!apart) clip = {clip.size / plan.n_segment, clip.src * plan.n_segment, clip.dst * plan.n_segment};

  // The other dimensions in the order of memory. Those inside of the channels belong to inner_bytes, like the channels;
  // those outside of them are outer_size.
  const Dimension channel = dimension(plan.channel_dim);
  std::vector<Dimension> rest;
  for (int64_t d = apart ? 2 : 1; d < src.dim(); ++d) {
    if (d != plan.channel_dim && sizes[d] != 1) rest.push_back(dimension(d));
  }
  std::stable_sort(rest.begin(), rest.end(), [](const Dimension& a, const Dimension& b) { return a.src > b.src; });
  const Dimension* const end = rest.data() + rest.size();
  const Dimension* inside = end;  // first dimension inside of the channels
  for (int64_t expected = 1; inside != rest.data(); --inside) {
    const Dimension& d = inside[-1];
    if (d.src != expected || d.dst != expected) break;
    if (channel.size > 1 && expected == channel.src) break;
    expected *= d.size;
  }
  const int64_t channel_numel = merged_size(inside, end, {0, 1, 1});
  if (channel.size > 1 && (channel.src != channel_numel || channel.dst != channel_numel)) return false;
  const Dimension outer = inside == rest.data() ? Dimension{1, 0, 0} : inside[-1];
  const int64_t outer_size = merged_size(rest.data(), inside, outer);
  if (outer_size < 0) return false;

  const int64_t channel_bytes = channel_numel * element;
  Shift& s = out.shift;
  s.clips = clip.size;
  s.frames = plan.n_segment;
  s.outer_size = outer_size;
  s.inner_bytes = channel.size * channel_bytes;
  s.n_segment_shifted = static_cast<int32_t>(plan.n_segment_shifted);
  s.padding = plan.padding;
  s.src = {clip.src * element, frame.src * element, outer.src * element};
  s.dst = {clip.dst * element, frame.dst * element, outer.dst * element};
  int64_t begin = 0;
  for (const auto& [width, offset] : plan.groups) {
    const int64_t group_end = begin + width * channel_bytes;
    if (begin < group_end) out.groups.push_back({begin, group_end, static_cast<int32_t>(offset)});
    begin = group_end;
  }
  if (begin < s.inner_bytes) out.groups.push_back({begin, s.inner_bytes, 0});  // channels past the last group
  s.groups = out.groups.data();
  s.n_groups = static_cast<int32_t>(out.groups.size());
  return true;
}

// --- execution -------------------------------------------------------------------------------------------------------

namespace {

void execute([[maybe_unused]] const Tensor& x, const Shift& s, const void* src, void* dst) {
#ifdef TSM_JIT_CUDA
  if (x.is_cuda()) return run_on_cuda(x, [&](void* stream) { return shift_cuda(s, src, dst, stream); });
#endif
  const int64_t tasks = shift_cpu_tasks(s);
  run_on_cpu(tasks, s.clips * s.frames * s.outer_size * s.inner_bytes / tasks,
             [&](int64_t first, int64_t last) { shift_cpu(s, src, dst, first, last); });
}

// x with every expanded dimension (stride 0) other than frames and channels narrowed to size 1. The gradient of a mean
// over pixels is such an x.
Tensor unexpanded(Tensor x, const ShiftPlan& plan) {
  for (int64_t d = has_clip_dim(x, plan) ? 2 : 1; d < x.dim(); ++d) {
    if (d != plan.channel_dim && x.stride(d) == 0 && x.size(d) > 1) x = torch::stable::narrow(x, d, 0, 1);
  }
  return x;
}

// Shifts src into dst; in place if they are the same tensor. `adds`: computes the adjoint of `keep` or `replicate`.
void run_shift(const Tensor& src, Tensor& dst, const ShiftPlan& plan, bool adds) {
  ShiftDescriptor descriptor;
  const bool in_place = src.get() == dst.get();
  if (!describe_shift(src, dst, plan, descriptor)) {  // no layout has these strides
    if (Tensor narrow = unexpanded(src, plan); !in_place && narrow.numel() < src.numel()) {
      narrow = torch::stable::contiguous(narrow);
      Tensor shifted = torch::stable::empty_like(narrow);
      run_shift(narrow, shifted, plan, adds);
      torch::stable::copy_(dst, shifted);
      return;
    }
    if (ShiftDescriptor of_dst; !in_place && describe_shift(dst, dst, plan, of_dst)) {
      torch::stable::copy_(dst, src);
      return run_shift(dst, dst, plan, adds);
    }
    Tensor copy = torch::stable::contiguous(src);
    run_shift(copy, copy, plan, adds);
    torch::stable::copy_(dst, copy);
    return;
  }
  Shift& s = descriptor.shift;
  s.sum_dtype = adds ? to_dtype(src.scalar_type()) : DType::none;
  void* data = dst.mutable_data_ptr();
  execute(src, s, in_place ? data : src.const_data_ptr(), data);
}

void forward(const Tensor& x, Tensor& out, const std::string& shift) {
  const ShiftPlan plan = shift_plan(x, shift);
  if (x.numel() != 0) run_shift(x, out, plan, false);
}

void backward(const Tensor& grad, Tensor& out, const std::string& shift) {
  ShiftPlan plan = shift_plan(grad, shift);
  const bool adds = plan.padding == Padding::keep || plan.padding == Padding::replicate;
  if (!adds) {  // the adjoint of zeros and circular is the shift by -offset
    for (auto& group : plan.groups) group.second = -group.second;
  }
  if (grad.numel() != 0) run_shift(grad, out, plan, adds);
}

Tensor temporal_shift_backward(const Tensor& grad, const std::string& shift) {
  Tensor out = new_like(grad);
  backward(grad, out, shift);
  return out;
}

void temporal_shift_(const Tensor& x, const std::string& shift) {
  Tensor out = x;
  forward(x, out, shift);
}

// Casts all tensors to `dtype`, in one launch.
std::vector<Tensor> cast(const std::vector<Tensor>& tensors, ScalarType dtype) {
  std::vector<Tensor> out;
  for (const Tensor& x : tensors) {
    const std::vector<int64_t> sizes = sizes_of(x), strides = strides_for(sizes, false);
    out.push_back(new_strided(x, dtype_code(dtype), sizes.size(), sizes.data(),
                              is_dense(x) ? x.strides().data() : strides.data()));
  }
  if (out.empty()) return out;
  StableIValue stack[] = {torch::stable::detail::from(out), torch::stable::detail::from(tensors),
                          torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_foreach_copy_", "", stack, TORCH_ABI_VERSION));
  return out;
}

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("temporal_shift", TORCH_BOX(&temporal_shift));
  m.impl("temporal_shift.kernel", TORCH_BOX(&temporal_shift));
  m.impl("temporal_shift_backward", TORCH_BOX(&temporal_shift_backward));
  m.impl("temporal_shift_backward.kernel", TORCH_BOX(&temporal_shift_backward));
  m.impl("temporal_shift_", TORCH_BOX(&temporal_shift_));
  m.impl("temporal_shift_backward_", TORCH_BOX(&temporal_shift_backward_));
  m.impl("cast", TORCH_BOX(&cast));
}

}  // namespace

Tensor temporal_shift(const Tensor& x, const std::string& shift) {
  Tensor out = new_like(x);
  forward(x, out, shift);
  return out;
}

void temporal_shift_backward_(const Tensor& grad, const std::string& shift) {
  Tensor out = grad;
  backward(grad, out, shift);
}

}  // namespace tsm_jit

// --- edges of split clips --------------------------------------------------------------------------------------------

#ifdef TSM_JIT_CUDA
namespace tsm_jit {
namespace {

void move_edges(const Tensor& x, void* data, bool sends, const Tensor& parts, int64_t slot_bytes,
                int64_t milliseconds) {
  constexpr auto kFields = static_cast<int64_t>(sizeof(EdgePart) / sizeof(int64_t));
  if (!parts.is_cpu() || !parts.is_contiguous() || parts.scalar_type() != ScalarType::Long || parts.dim() != 2 ||
      parts.size(1) != kFields) {
    fail("parts must be contiguous int64 [n, " + std::to_string(kFields) + "] on the CPU");
  }
  const auto* rows = static_cast<const EdgePart*>(parts.const_data_ptr());
  run_on_cuda(x, [&](void* stream) {
    return move_edges_cuda(rows, parts.size(0), data, sends, slot_bytes, milliseconds, stream);
  });
}

void send_edges(const Tensor& x, const Tensor& parts, int64_t slot_bytes, int64_t milliseconds) {
  move_edges(x, const_cast<void*>(x.const_data_ptr()), true, parts, slot_bytes, milliseconds);
}

void receive_edges(const Tensor& out, const Tensor& parts, int64_t slot_bytes, int64_t milliseconds) {
  move_edges(out, out.mutable_data_ptr(), false, parts, slot_bytes, milliseconds);
}

}  // namespace
}  // namespace tsm_jit
#endif

STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CPU, m) { tsm_jit::register_operators(m); }
#ifdef TSM_JIT_CUDA
STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CUDA, m) {
  tsm_jit::register_operators(m);
  m.impl("send_edges", TORCH_BOX(&tsm_jit::send_edges));
  m.impl("receive_edges", TORCH_BOX(&tsm_jit::receive_edges));
}
#endif
