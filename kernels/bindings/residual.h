// Shared by residual.cpp and block.h: from tensors to the descriptors of kernels/residual, and the operators that a
// whole block consists of.
#pragma once

#include "bindings/common.h"
#include "bindings/shift.h"
#include "residual/residual_stream.h"

// Hidden, as torch::stable::Tensor is: structs with a Tensor may not be more visible.
namespace [[gnu::visibility("hidden")]] tsm_jit {

inline const std::string kNoShift = "n_segment=1 n_segment_shifted=1 channel_dim=1 padding=zeros plan=";
inline const std::vector<Tensor> kNoNorm;

// Values with the batch normalization that is applied to them: mean, variance, weight, bias; empty: none.
struct Normed {
  const Tensor* values;  // may be null
  const std::vector<Tensor>& norm;
  double epsilon;
};

// A ResidualStream; the vectors are the memory of its groups and of boundary_begin.
struct StreamDescriptor {
  ResidualStream stream{};
  ShiftDescriptor shift;
  std::vector<int64_t> boundary_begin;
};

// Describes activations like x. Fails unless all of `like` have the layout of x, and all of `boundary` the size of its
// boundary frames. Null entries are skipped.
void describe_stream(const Tensor& x, const std::string& shift, std::initializer_list<const Tensor*> like,
                     std::initializer_list<const Tensor*> boundary, StreamDescriptor& out);

// Fails unless all parts of a norm have one value per channel, all in float32 or all in the dtype of x.
Norm to_norm(const Tensor& x, const std::vector<Tensor>& parts, double epsilon);

// Fails unless x is on CUDA in channels_last, as sums per channel need it.
void check_sums(const Tensor& x, const ResidualStream& r);

inline const Tensor* pointer(const OptionalTensor& x) { return x ? &*x : nullptr; }

// --- forward ---------------------------------------------------------------------------------------------------------

// out = relu(norm(z) + norm(identity)); see norm_add_relu.h. A null boundary or boundary_out: unshifted.
struct NormAddReluTensors {
  const Tensor& out;
  const Tensor* boundary_out = nullptr;
  const Tensor* unshifted = nullptr;
  int64_t step = 1;
};
void write_norm_add_relu(const NormAddReluTensors& out, const Normed& z, const Normed& identity, const Tensor* boundary,
                         const std::string& shift, bool relu);

// The operator norm_add_relu. norm_relu calls it without identity and returns relu(norm(z)).
std::tuple<Tensor, Tensor> norm_add_relu(const Tensor& z, const std::vector<Tensor>& z_norm, double z_epsilon,
                                         const OptionalTensor& identity, const std::vector<Tensor>& identity_norm,
                                         double identity_epsilon, const OptionalTensor& boundary,
                                         const std::string& shift, bool shifted);
Tensor norm_relu(const Normed& z);

#ifdef TSM_JIT_CUDA
// The operator batch_norm_stats_: mean and variance.
std::tuple<Tensor, Tensor> batch_norm_stats_(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                                             const Tensor& num_batches_tracked, double momentum);

// --- backward --------------------------------------------------------------------------------------------------------

// One of the two operands that the end of a block adds, and which of its gradients are needed.
struct Operand {
  OptionalTensor values;
  std::vector<Tensor> norm;  // mean, variance and weight, before a ReLU also the bias; empty: none
  double epsilon;
  bool uses_batch_stats;  // mean and variance are computed from `values`, so gradients also pass through them
  bool needs_grad, norm_needs_grad;

  bool needs_sums() const { return !norm.empty() && (uses_batch_stats || norm_needs_grad); }
};

// Undefined tensors are not needed.
struct OperandGrads {
  Tensor values, weight, bias;
};

// The gradients of z, given the gradient of relu(norm(z)). `overwrite`: may write into `grad`.
OperandGrads norm_relu_grads(const Tensor& grad, const Operand& z, bool overwrite);
#endif

}  // namespace tsm_jit
