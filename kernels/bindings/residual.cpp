// The operators of torch.ops.tsm_jit for residual blocks: the end of a block, its backward, the stem, statistics.
#include "bindings/residual.h"

#include <limits>

#include "residual/add_relu_backward.h"
#include "residual/batch_norm_stats.h"
#include "residual/norm_add_relu.h"
#include "residual/norm_grads.h"
#include "residual/norm_relu_backward.h"
#include "residual/norm_relu_max_pool.h"
#ifdef TSM_JIT_CUDA
#include "bindings/block.h"
#endif

namespace tsm_jit {

// --- descriptors -----------------------------------------------------------------------------------------------------

void describe_stream(const Tensor& x, const std::string& shift, std::initializer_list<const Tensor*> like,
                     std::initializer_list<const Tensor*> boundary, StreamDescriptor& out) {
  const ShiftPlan plan = shift_plan(x, shift);
  if (plan.channel_dim != 1) fail("channel_dim must be 1, got " + std::to_string(plan.channel_dim));
  if (!is_dense(x) || !describe_shift(x, x, plan, out.shift)) fail("z must be contiguous, or channels_last");
  ResidualStream& r = out.stream;
  r.shift = out.shift.shift;
  r.dtype = to_dtype(x.scalar_type());
  r.channel_numel = r.shift.inner_bytes / x.size(plan.channel_dim) / x.element_size();
  r.boundary_inner_bytes = layout_boundary(out.shift.groups, plan.padding, out.boundary_begin);
  r.boundary_begin = out.boundary_begin.data();
  const bool outer_has_gaps = r.shift.outer_size > 1 && r.shift.src.outer != r.shift.inner_bytes;
  if (outer_has_gaps || (r.shift.frames > 1 && r.shift.src.frame != r.shift.outer_size * r.shift.inner_bytes)) {
    fail("z must be contiguous, or channels_last");
  }
  for (const Tensor* y : like) {
    if (y == nullptr) continue;
    bool fits = y->dim() == x.dim() && same_type_and_device(*y, x);
    for (int64_t d = 0; fits && d < x.dim(); ++d) {
      fits = y->size(d) == x.size(d) && (x.size(d) == 1 || y->stride(d) == x.stride(d));
    }
    if (!fits) fail("all activations must be of the type, sizes and strides of z");
  }
  const int64_t boundary_bytes = r.shift.clips * r.shift.outer_size * r.boundary_inner_bytes;
  for (const Tensor* y : boundary) {
    if (y == nullptr) continue;
    const bool fits = same_type_and_device(*y, x) && (y->numel() == 0 || is_dense(*y)) &&
                      y->numel() * static_cast<int64_t>(y->element_size()) == boundary_bytes;
    if (!fits) fail("boundary must hold the boundary frames of the shift, without gaps");
  }
}

Norm to_norm(const Tensor& x, const std::vector<Tensor>& parts, double epsilon) {
  if (parts.empty()) return Norm{};
  if (parts.size() != 4) fail("a norm must have a mean, a variance, a weight and a bias");
  const ScalarType type = parts[0].scalar_type();
  for (const Tensor& part : parts) {
    const bool fits = part.numel() == x.size(1) && part.is_contiguous() && part.scalar_type() == type &&
                      (type == ScalarType::Float || type == x.scalar_type()) &&
                      part.get_device_index() == x.get_device_index();
    if (!fits) fail("a norm must have one value per channel in each part, all in float32 or as the activations");
  }
  return Norm{parts[0].const_data_ptr(), parts[1].const_data_ptr(), parts[2].const_data_ptr(),
              parts[3].const_data_ptr(), type == ScalarType::Float, epsilon};
}

void check_sums(const Tensor& x, const ResidualStream& r) {
  if (!x.is_cuda() || r.channel_numel != 1) fail("sums per channel need CUDA and channels_last");
}

namespace {

// A new tensor for the boundary frames of x.
Tensor new_boundary(const Tensor& x, const std::string& shift) {
  const ShiftPlan plan = shift_plan(x, shift);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[0] /= plan.n_segment;
  sizes[1] = boundary_channels(plan);
  return new_with_sizes(x, sizes);
}

// Runs run(stream, args, first_task, last_task) for all frames.
template <class Args, class Run>
void run_frames_on_cpu(const ResidualStream& r, const Args& args, Run run) {
  run_on_cpu(r.shift.clips * r.shift.frames, r.shift.outer_size * r.shift.inner_bytes,
             [&](int64_t first, int64_t last) { run(r, args, first, last); });
}

void execute([[maybe_unused]] const Tensor& z, const ResidualStream& r, const NormAddRelu& f) {
#ifdef TSM_JIT_CUDA
  if (z.is_cuda()) return run_on_cuda(z, [&](void* stream) { return norm_add_relu_cuda(r, f, stream); });
#endif
  run_frames_on_cpu(r, f, norm_add_relu_cpu);
}

}  // namespace

// --- the end of a block, forward -------------------------------------------------------------------------------------

void write_norm_add_relu(const NormAddReluTensors& out, const Normed& z, const Normed& identity, const Tensor* boundary,
                         const std::string& shift, bool relu) {
  const Tensor& x = *z.values;
  if (x.numel() == 0) return;
  StreamDescriptor descriptor;
  describe_stream(x, shift, {&out.out, identity.values}, {out.boundary_out, boundary}, descriptor);
  NormAddRelu f{};
  f.z = x.const_data_ptr();
  f.z_norm = to_norm(x, z.norm, z.epsilon);
  f.identity = identity.values == nullptr ? nullptr : identity.values->const_data_ptr();
  f.identity_norm = to_norm(x, identity.norm, identity.epsilon);
  f.boundary = boundary == nullptr ? nullptr : boundary->const_data_ptr();
  f.out = out.out.mutable_data_ptr();
  f.boundary_out = out.boundary_out == nullptr ? nullptr : out.boundary_out->mutable_data_ptr();
  f.identity_is_shifted = boundary != nullptr;
  f.out_is_shifted = out.boundary_out != nullptr;
  f.relu = relu;
  if (f.identity == nullptr && (f.identity_is_shifted || f.out_is_shifted)) {
    fail("identity must be given where activations are shifted");
  }
  if (out.unshifted != nullptr) {
    const int64_t step = out.step;
    if (x.dim() != 4 || step < 1 || step > std::numeric_limits<int32_t>::max() ||
        !has_layout(*out.unshifted, {x.size(0), x.size(1), ceil_div(x.size(2), step), ceil_div(x.size(3), step)},
                    !x.is_contiguous()) ||
        !same_type_and_device(*out.unshifted, x)) {
      fail("unshifted must be every step-th row and column of pixels of z, of its type and layout");
    }
    if (!f.out_is_shifted || f.out == f.z) fail("unshifted must come beside a shifted out that is not z");
    if (x.is_cuda() && descriptor.stream.channel_numel != 1) fail("unshifted needs channels_last on CUDA");
    f.unshifted = out.unshifted->mutable_data_ptr();
    f.width = static_cast<int32_t>(x.size(3));
    f.step = static_cast<int32_t>(step);
  }
  if (shifts_z_in_place(f) && (!x.is_cuda() || descriptor.stream.shift.padding == Padding::circular)) {
    fail("out must not be z if it is shifted, but on CUDA and by no circular shift");
  }
  execute(x, descriptor.stream, f);
}

std::tuple<Tensor, Tensor> norm_add_relu(const Tensor& z, const std::vector<Tensor>& z_norm, double z_epsilon,
                                         const OptionalTensor& identity, const std::vector<Tensor>& identity_norm,
                                         double identity_epsilon, const OptionalTensor& boundary,
                                         const std::string& shift, bool shifted) {
  const Tensor out = new_like(z), boundary_out = shifted ? new_boundary(z, shift) : new_empty(z);
  const OptionalTensor identity_like_z = with_layout_of(z, identity), boundary_like_z = with_layout_of(z, boundary);
  write_norm_add_relu({out, shifted ? &boundary_out : nullptr}, {&z, z_norm, z_epsilon},
                      {pointer(identity_like_z), identity_norm, identity_epsilon}, pointer(boundary_like_z), shift,
                      true);
  return {out, boundary_out};
}

Tensor norm_relu(const Normed& z) {
  Tensor out = new_like(*z.values);
  write_norm_add_relu({out}, z, {nullptr, kNoNorm, 0}, nullptr, kNoShift, true);
  return out;
}

namespace {

void norm_add_relu_(const Tensor& out, const OptionalTensor& boundary_out, const OptionalTensor& unshifted,
                    int64_t step, const Tensor& z, const std::vector<Tensor>& z_norm, double z_epsilon,
                    const OptionalTensor& identity, const std::vector<Tensor>& identity_norm, double identity_epsilon,
                    const OptionalTensor& boundary, const std::string& shift, bool relu) {
  write_norm_add_relu({out, pointer(boundary_out), pointer(unshifted), step}, {&z, z_norm, z_epsilon},
                      {pointer(identity), identity_norm, identity_epsilon}, pointer(boundary), shift, relu);
}

// --- the stem --------------------------------------------------------------------------------------------------------

// Returns out in the unshifted layout, and in the shifted one with its boundary frames; empty tensors if not asked for.
std::tuple<Tensor, Tensor, Tensor> norm_relu_max_pool(const Tensor& z, const std::vector<Tensor>& z_norm,
                                                      double z_epsilon, const std::string& shift, bool unshifted,
                                                      bool shifted) {
  if (z.dim() != 4 || z.size(1) < 2 || !has_layout(z, sizes_of(z), true)) {
    fail("z must be [N*T, C, H, W] in channels_last, of more than one channel, to be pooled");
  }
  const std::vector<int64_t> sizes{z.size(0), z.size(1), ceil_div(z.size(2), 2), ceil_div(z.size(3), 2)};
  const Tensor unshifted_out = unshifted ? new_with_sizes(z, sizes) : new_empty(z);
  const Tensor out = shifted ? new_with_sizes(z, sizes) : new_empty(z);
  const Tensor boundary_out = shifted ? new_boundary(out, shift) : new_empty(z);
  if (z.numel() == 0 || (!unshifted && !shifted)) return {unshifted_out, out, boundary_out};
  StreamDescriptor descriptor;
  describe_stream(unshifted ? unshifted_out : out, shift, {}, {}, descriptor);
  NormReluMaxPool p{};
  p.z = z.const_data_ptr();
  p.z_norm = to_norm(z, z_norm, z_epsilon);
  p.height = static_cast<int32_t>(z.size(2));
  p.width = static_cast<int32_t>(z.size(3));
  if (unshifted) p.unshifted = unshifted_out.mutable_data_ptr();
  if (shifted) {
    p.out = out.mutable_data_ptr();
    p.boundary_out = boundary_out.mutable_data_ptr();
  }
#ifdef TSM_JIT_CUDA
  if (z.is_cuda()) {
    run_on_cuda(z, [&](void* stream) { return norm_relu_max_pool_cuda(descriptor.stream, p, stream); });
    return {unshifted_out, out, boundary_out};
  }
#endif
  run_frames_on_cpu(descriptor.stream, p, norm_relu_max_pool_cpu);
  return {unshifted_out, out, boundary_out};
}

// --- the end of a block, backward ------------------------------------------------------------------------------------

// The outputs of the forward, and their gradients, which may be null.
struct AddReluTensors {
  const OptionalTensor &grad_a, &grad_b, &grad_boundary;
  const Tensor& out;
  const OptionalTensor& boundary_out;
};

// Null: not needed.
struct AddReluGrads {
  OptionalTensor grad, grad_shifted, grad_boundary_in, norm_grads;
};

// Fails unless a norm has a mean, a variance and a weight, and comes with its values.
void check_norm(const Normed& x, const Tensor& out) {
  bool fits = x.norm.empty() || (x.norm.size() == 3 && x.values != nullptr);
  for (const Tensor& part : x.norm) fits = fits && is_acc_tensor(part, out, out.size(1));
  if (!fits) {
    fail(
        "a norm must come with its values, and have a mean, a variance and a weight, of one value per channel in the "
        "type that activations are added in");
  }
}

#ifdef TSM_JIT_CUDA
// Runs `kernel`, which writes sums per channel, and computes the gradients of norms from them. The scratch memory may
// be freed right away: the allocator reuses it in the order of the stream.
template <class Args>
const char* run_with_sums(const Tensor& x, const ResidualStream& r, Args& b, NormGrads& n, void* stream,
                          const char* (*kernel)(const ResidualStream&, const Args&, void*)) {
  b.slices = n.slices = backward_slices(r);
  const Tensor sums = new_contiguous(x, acc_type(x), {b.slices * (1 + kNorms) * x.size(1)});
  n.sums = b.sums = sums.mutable_data_ptr();
  if (const char* error = kernel(r, b, stream)) return error;
  return norm_grads_cuda(r.dtype, x.size(1), n, stream);
}
#endif

// Writes the gradients that `grads` has tensors for.
void write_add_relu_backward(const AddReluGrads& grads, const AddReluTensors& in, const Normed& z,
                             const Normed& identity, const std::string& shift) {
  const Tensor& out = in.out;
  if (out.numel() == 0) return;
  StreamDescriptor descriptor;
  const ResidualStream& r = descriptor.stream;
  describe_stream(out, shift,
                  {pointer(grads.grad), pointer(grads.grad_shifted), pointer(in.grad_a), pointer(in.grad_b), z.values,
                   identity.values},
                  {pointer(grads.grad_boundary_in), pointer(in.grad_boundary), pointer(in.boundary_out)}, descriptor);
  if (grads.grad_shifted.has_value() != grads.grad_boundary_in.has_value()) {
    fail("grad_shifted must come with grad_boundary_in");
  }
  if (!grads.grad && !grads.grad_shifted) fail("grad must be given, or grad_shifted");
  AddReluBackward b{};
  b.out = out.const_data_ptr();
  b.boundary_out = data(in.boundary_out);
  b.out_is_shifted = in.boundary_out.has_value();
  b.grad_a = data(in.grad_a);
  b.grad_b = data(in.grad_b);
  b.grad_boundary = data(in.grad_boundary);
  b.grad = mutable_data(grads.grad);
  b.grad_shifted = mutable_data(grads.grad_shifted);
  b.grad_boundary_in = mutable_data(grads.grad_boundary_in);
  [[maybe_unused]] NormGrads n{};
  if (grads.norm_grads) {
    const int64_t channels = out.size(1);
    check_sums(out, r);
    if (!is_acc_tensor(*grads.norm_grads, out, (1 + 4 * kNorms) * channels)) {
      fail("norm_grads must be [9, channels], of the type that activations are added in");
    }
    n.grads = grads.norm_grads->mutable_data_ptr();
    n.count = out.numel() / channels;
    const Normed* const operands[kNorms] = {&z, &identity};
    for (int32_t k = 0; k < kNorms; ++k) {
      const Normed& x = *operands[k];
      check_norm(x, out);
      n.epsilon[k] = x.epsilon;
      if (x.norm.empty()) continue;
      b.normed[k] = x.values->const_data_ptr();
      b.mean[k] = x.norm[0].const_data_ptr();
      n.variance[k] = x.norm[1].const_data_ptr();
      n.weight[k] = x.norm[2].const_data_ptr();
    }
  }
#ifdef TSM_JIT_CUDA
  if (out.is_cuda()) {
    return run_on_cuda(out, [&](void* stream) {
      if (!grads.norm_grads) return add_relu_backward_cuda(r, b, stream);
      return run_with_sums(out, r, b, n, stream, add_relu_backward_cuda);
    });
  }
#endif
  run_frames_on_cpu(r, b, add_relu_backward_cpu);
}

// The same, but allocates the outputs.
AddReluGrads new_add_relu_backward(const AddReluTensors& in, const Normed& z, const Normed& identity,
                                   const std::string& shift, bool unshifted, bool shifted) {
  const Tensor& out = in.out;
  const OptionalTensor grad_a = with_layout_of(out, in.grad_a), grad_b = with_layout_of(out, in.grad_b);
  const OptionalTensor grad_boundary = with_layout_of(out, in.grad_boundary);
  const OptionalTensor identity_values =
      identity.values == nullptr ? OptionalTensor() : with_layout(*identity.values, !out.is_contiguous());
  // with_layout_of copies an expanded gradient, such as the gradient of a mean over pixels. The copy may be
  // overwritten.
  const bool is_own_copy = grad_a && grad_a->get() != in.grad_a->get() && !in.boundary_out;
  AddReluGrads grads;
  if (unshifted) grads.grad = is_own_copy ? *grad_a : new_like(out);
  if (shifted) {
    grads.grad_shifted = new_like(out);
    grads.grad_boundary_in = new_boundary(out, shift);
  }
  if (!z.norm.empty() || !identity.norm.empty()) {
    grads.norm_grads = new_contiguous(out, acc_type(out), {1 + 4 * kNorms, out.size(1)});
  }
  write_add_relu_backward(grads, {grad_a, grad_b, grad_boundary, out, in.boundary_out}, z,
                          {pointer(identity_values), identity.norm, identity.epsilon}, shift);
  return grads;
}

void add_relu_backward_(const OptionalTensor& grad, const OptionalTensor& grad_shifted,
                        const OptionalTensor& grad_boundary_in, const OptionalTensor& norm_grads,
                        const OptionalTensor& grad_a, const OptionalTensor& grad_b, const OptionalTensor& grad_boundary,
                        const Tensor& out, const OptionalTensor& boundary_out, const OptionalTensor& z,
                        const std::vector<Tensor>& z_norm, double z_epsilon, const OptionalTensor& identity,
                        const std::vector<Tensor>& identity_norm, double identity_epsilon, const std::string& shift) {
  write_add_relu_backward({grad, grad_shifted, grad_boundary_in, norm_grads},
                          {grad_a, grad_b, grad_boundary, out, boundary_out}, {pointer(z), z_norm, z_epsilon},
                          {pointer(identity), identity_norm, identity_epsilon}, shift);
}

// Returns grad, grad_shifted, grad_boundary_in and norm_grads; empty tensors if not asked for.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_relu_backward(
    const OptionalTensor& grad_a, const OptionalTensor& grad_b, const OptionalTensor& grad_boundary, const Tensor& out,
    const OptionalTensor& boundary_out, const OptionalTensor& z, const std::vector<Tensor>& z_norm, double z_epsilon,
    const OptionalTensor& identity, const std::vector<Tensor>& identity_norm, double identity_epsilon,
    const std::string& shift, bool shifted) {
  const AddReluGrads grads =
      new_add_relu_backward({grad_a, grad_b, grad_boundary, out, boundary_out}, {pointer(z), z_norm, z_epsilon},
                            {pointer(identity), identity_norm, identity_epsilon}, shift, true, shifted);
  const auto or_empty = [&](const OptionalTensor& x) { return x ? *x : new_empty(out); };
  return {*grads.grad, or_empty(grads.grad_shifted), or_empty(grads.grad_boundary_in), or_empty(grads.norm_grads)};
}

}  // namespace

#ifdef TSM_JIT_CUDA

// --- statistics ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> batch_norm_stats_(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                                             const Tensor& num_batches_tracked, double momentum) {
  const int64_t channels = x.size(1);
  const Tensor mean = new_contiguous(x, acc_type(x), {channels}), variance = new_contiguous(x, acc_type(x), {channels});
  if (x.numel() == 0) return {mean, variance};
  StreamDescriptor descriptor;
  const ResidualStream& r = descriptor.stream;
  describe_stream(x, kNoShift, {}, {}, descriptor);
  check_sums(x, r);
  if (!is_acc_tensor(running_mean, x, channels) || !is_acc_tensor(running_var, x, channels)) {
    fail("running statistics must have one value per channel, of the type that activations are added in");
  }
  if (num_batches_tracked.numel() != 1 || num_batches_tracked.scalar_type() != ScalarType::Long ||
      num_batches_tracked.get_device_index() != x.get_device_index()) {
    fail("num_batches_tracked must be one int64 on the device of x");
  }
  BatchNormStats c{};
  c.x = x.const_data_ptr();
  c.mean = mean.mutable_data_ptr();
  c.variance = variance.mutable_data_ptr();
  c.running_mean = running_mean.mutable_data_ptr();
  c.running_variance = running_var.mutable_data_ptr();
  c.num_batches_tracked = static_cast<int64_t*>(num_batches_tracked.mutable_data_ptr());
  c.momentum = momentum;
  run_on_cuda(x, [&](void* stream) {
    c.slices = stats_slices(r);
    const Tensor sums = new_contiguous(x, acc_type(x), {2 * c.slices * channels});
    c.sums = sums.mutable_data_ptr();
    return batch_norm_stats_cuda(r, c, stream);
  });
  return {mean, variance};
}

// --- gradients of operands -------------------------------------------------------------------------------------------

OperandGrads norm_relu_grads(const Tensor& grad, const Operand& z, bool overwrite) {
  const Tensor& values = *z.values;
  if (values.numel() == 0) fail("z must have values, to be differentiated");
  const int64_t channels = values.size(1);
  const Tensor grad_like_z = with_layout(grad, !values.is_contiguous());
  StreamDescriptor descriptor;
  const ResidualStream& r = descriptor.stream;
  describe_stream(values, kNoShift, {&grad_like_z}, {}, descriptor);
  check_sums(values, r);
  for (const Tensor& part : z.norm) {
    if (!is_acc_tensor(part, values, channels)) fail("a norm must be of the type that activations are added in");
  }
  NormReluBackward b{};
  b.grad = grad_like_z.const_data_ptr();
  b.z = values.const_data_ptr();
  b.norm = to_norm(values, z.norm, z.epsilon);
  if (b.norm.mean == nullptr) fail("norm must be given");
  NormGrads n{};
  OperandGrads grads;
  OptionalTensor norm_grads;  // see NormGrads
  if (z.needs_sums()) {
    norm_grads = new_contiguous(values, acc_type(values), {1 + 4, channels});
    n.grads = norm_grads->mutable_data_ptr();
    n.count = values.numel() / channels;
    n.variance[0] = b.norm.variance;
    n.weight[0] = b.norm.weight;
    n.epsilon[0] = z.epsilon;
    if (z.uses_batch_stats) {
      b.batch_norm = b.norm;
      b.batch_norm.weight = row_data(*norm_grads, 3);
      b.batch_norm.bias = row_data(*norm_grads, 4);
    }
  }
  if (z.needs_grad) {
    grads.values = overwrite || grad_like_z.get() != grad.get() ? grad_like_z : new_like(values);
    b.out = grads.values.mutable_data_ptr();
  }
  run_on_cuda(values, [&](void* stream) -> const char* {
    if (z.needs_sums()) {
      if (const char* error = run_with_sums(values, r, b, n, stream, norm_relu_grad_sums_cuda)) return error;
    }
    return z.needs_grad ? norm_relu_backward_cuda(r, b, stream) : nullptr;
  });
  if (norm_grads) {
    grads.weight = row_of(*norm_grads, 1);
    grads.bias = row_of(*norm_grads, 2);
  }
  return grads;
}

namespace {

// Returns the gradient of the values of an operand with a norm, from the gradient of the norm's result in `grads`:
//
//     grad * weight / sqrt(variance + epsilon) + batch_norm(values)      see norm_grads.h
//
// That is norm_add_relu without ReLU. `zero`: [channels] zeros, the mean and bias of the first term. `batch_norm`:
// batch_weight and batch_bias, [2, channels]. `overwrite`: may write into grads.grad.
Tensor grad_through_norm(const AddReluGrads& grads, const Operand& x, const void* zero, const void* batch_norm,
                         bool overwrite, const std::string& shift) {
  const Tensor& grad = grads.grad ? *grads.grad : *grads.grad_shifted;
  const OptionalTensor values = x.uses_batch_stats ? with_layout_of(grad, x.values) : std::nullopt;
  const Tensor* const boundary = grads.grad ? nullptr : pointer(grads.grad_boundary_in);
  Tensor out = overwrite && grads.grad ? grad : new_like(grad);
  StreamDescriptor descriptor;
  describe_stream(grad, grads.grad ? kNoShift : shift, {pointer(values)}, {boundary}, descriptor);
  const bool is_float32 = descriptor.stream.dtype != DType::float64;
  const void *mean = x.norm[0].const_data_ptr(), *variance = x.norm[1].const_data_ptr();
  const Norm grad_norm{zero, variance, x.norm[2].const_data_ptr(), zero, is_float32, x.epsilon};
  NormAddRelu f{};
  if (values) {
    const void* bias = static_cast<const char*>(batch_norm) + x.norm[0].numel() * x.norm[0].element_size();
    f.z = values->const_data_ptr();
    f.z_norm = {mean, variance, batch_norm, bias, is_float32, x.epsilon};
    f.identity = grad.const_data_ptr();
    f.identity_norm = grad_norm;
    f.identity_is_shifted = boundary != nullptr;
    f.boundary = boundary == nullptr ? nullptr : boundary->const_data_ptr();
  } else {
    f.z = grad.const_data_ptr();
    f.z_norm = grad_norm;
  }
  f.out = out.mutable_data_ptr();
  execute(grad, descriptor.stream, f);
  return out;
}

// From Python's [uses_batch_stats, needs_grad, norm_needs_grad].
Operand to_operand(const OptionalTensor& values, const std::vector<Tensor>& norm, double epsilon,
                   const std::vector<int64_t>& flags) {
  if (flags.size() != 3) fail("flags must be three flags, got " + std::to_string(flags.size()));
  return {values, norm, epsilon, flags[0] != 0, flags[1] != 0, flags[2] != 0};
}

// Returns seven gradients: of values, weight and bias of z; of values, weight and bias of the identity; of boundary.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_add_relu_backward(
    const OptionalTensor& grad_a, const OptionalTensor& grad_b, const OptionalTensor& grad_boundary, const Tensor& out,
    const OptionalTensor& boundary_out, const OptionalTensor& z_values, const std::vector<Tensor>& z_norm,
    double z_epsilon, const std::vector<int64_t>& z_meta, const OptionalTensor& identity_values,
    const std::vector<Tensor>& identity_norm, double identity_epsilon, const std::vector<int64_t>& identity_meta,
    const std::string& shift, bool identity_is_shifted) {
  if (out.numel() == 0) fail("out must have values, to be differentiated");
  const Operand z = to_operand(z_values, z_norm, z_epsilon, z_meta);
  const Operand identity = to_operand(identity_values, identity_norm, identity_epsilon, identity_meta);
  const Operand* const operands[kNorms] = {&z, &identity};
  for (const Operand* x : operands) check_norm({pointer(x->values), x->norm, x->epsilon}, out);
  const auto summed = [](const Operand& x) {  // x if its gradients need sums, otherwise nothing
    return x.needs_sums() ? Normed{pointer(x.values), x.norm, x.epsilon} : Normed{nullptr, kNoNorm, x.epsilon};
  };
  // If the identity was shifted, grad_through_norm of z reads the shifted gradient, so an unshifted one is not needed.
  // It can do so only if it also reads the values of z, as statistics of the batch require.
  const bool unshifted = !identity_is_shifted || (z.needs_grad && (z.norm.empty() || !z.uses_batch_stats));
  const AddReluGrads grads = new_add_relu_backward({grad_a, grad_b, grad_boundary, out, boundary_out}, summed(z),
                                                   summed(identity), shift, unshifted, identity_is_shifted);
  OptionalTensor rows = grads.norm_grads;  // see NormGrads; row 0 is zeros
  OperandGrads of[kNorms];
  for (int64_t k = 0; k < kNorms; ++k) {
    const Operand& x = *operands[k];
    if (x.needs_sums()) {
      of[k].weight = row_of(*grads.norm_grads, 1 + 4 * k);
      of[k].bias = row_of(*grads.norm_grads, 2 + 4 * k);
    }
    if (!x.needs_grad) continue;
    if (x.norm.empty()) {
      of[k].values = k == 1 && identity_is_shifted ? *grads.grad_shifted : *grads.grad;
      continue;
    }
    if (!rows) {
      rows = new_contiguous(out, acc_type(out), {1, out.size(1)});
      torch::stable::zero_(*rows);
    }
    // The last operand that reads grads.grad may overwrite it, unless it is itself a result.
    const bool is_last = k == 1 ? !z.norm.empty() : identity_is_shifted || !identity.needs_grad;
    of[k].values = grad_through_norm(grads, x, row_data(*rows, 0), row_data(*rows, 3 + 4 * k), is_last, shift);
  }
  return {of[0].values,
          of[0].weight,
          of[0].bias,
          of[1].values,
          of[1].weight,
          of[1].bias,
          grads.grad_boundary_in.value_or(Tensor())};
}

// Returns the gradients of z, weight and bias.
std::tuple<Tensor, Tensor, Tensor> norm_relu_backward(const Tensor& grad, const Tensor& z,
                                                      const std::vector<Tensor>& norm, double epsilon,
                                                      const std::vector<int64_t>& flags) {
  const auto [values, weight, bias] = norm_relu_grads(grad, to_operand(z, norm, epsilon, flags), false);
  return {values, weight, bias};
}

}  // namespace
#endif

namespace {

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("norm_add_relu_", TORCH_BOX(&norm_add_relu_));
  m.impl("norm_add_relu", TORCH_BOX(&norm_add_relu));
  m.impl("norm_relu_max_pool", TORCH_BOX(&norm_relu_max_pool));
  m.impl("add_relu_backward_", TORCH_BOX(&add_relu_backward_));
  m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
}

}  // namespace
}  // namespace tsm_jit

STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CPU, m) { tsm_jit::register_operators(m); }
#ifdef TSM_JIT_CUDA
STABLE_TORCH_LIBRARY_IMPL(tsm_jit, CUDA, m) {
  using namespace tsm_jit;
  register_operators(m);
  m.impl("batch_norm_stats_", TORCH_BOX(&batch_norm_stats_));
  m.impl("norm_add_relu_backward", TORCH_BOX(&norm_add_relu_backward));
  m.impl("norm_relu_backward", TORCH_BOX(&norm_relu_backward));
  m.impl("residual_block", TORCH_BOX(&residual_block));
  m.impl("residual_block_backward", TORCH_BOX(&residual_block_backward));
}
#endif
