// A whole residual block as one operator, forward and backward. CUDA only.
//
// tsm_jit/ops/residual_block.py has the same in Python, for devices without kernels. It takes twice the CPU time, as
// Python runs between the operators.
//
//     x -> [first_shift] -> conv -> norm+ReLU -> ... -> conv -> norm_add_relu -> out
//     identity -> [conv, if `downsample`] ------------------------^
//
// A layer is a convolution and the norm after it. Its conv_params are kConvParams numbers: stride, padding and dilation
// (two each), groups, and whether the norm uses the statistics of the batch.
//
// This is a header because a separate translation unit would add 1 s of compile time to the first import.
#pragma once

#include "bindings/residual.h"

namespace tsm_jit {
namespace {

constexpr size_t kConvParams = 8;
constexpr size_t kSavedPerLayer = 5;  // z, and mean, variance, weight and bias of its norm
constexpr int64_t kNoOutputPadding[] = {0, 0};

bool uses_batch_stats(const int64_t* conv_params) { return conv_params[7] != 0; }

Tensor convolution(const Tensor& x, const Tensor& weight, const int64_t* params) {
  AtenTensorHandle out = nullptr;
  check(aoti_torch_cuda_convolution(x.get(), weight.get(), nullptr, params, 2, params + 2, 2, params + 4, 2, false,
                                    kNoOutputPadding, 2, params[6], &out),
        "convolve");
  return with_layout(Tensor(out), true);
}

// Returns the gradients of x and of the weight; undefined if not needed.
std::pair<Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                               const int64_t* params, bool needs_grad, bool weight_needs_grad) {
  AtenTensorHandle out[3] = {};
  const int32_t mask[] = {needs_grad, weight_needs_grad, false};
  check(aoti_torch_cuda_convolution_backward(grad.get(), x.get(), weight.get(), nullptr, 0, params, 2, params + 2, 2,
                                             params + 4, 2, false, kNoOutputPadding, 2, params[6], mask, 3, &out[0],
                                             &out[1], &out[2]),
        "differentiate a convolution");
  Tensor grad_x(out[0]), grad_weight(out[1]);
  const Tensor grad_bias(out[2]);
  if (needs_grad) grad_x = with_layout(grad_x, true);  // compilers expect these strides
  if (weight_needs_grad) grad_weight = with_layout(grad_weight, true);
  return {grad_x, grad_weight};
}

// Runs the layers. With `downsample` the last layer is the convolution and norm of the identity.
//
// affine       of each layer: weight and bias of the norm
// running      of each layer: running mean and running variance; then, of a norm that uses the statistics of the batch,
//              the number of batches. Such a norm updates all three.
// norm_params  of each layer: epsilon and momentum
//
// Returns out, boundary_out and, for the backward, tensors of each layer: z; mean and variance, if the norm uses the
// statistics of the batch; the output of the ReLU, if one follows.
std::tuple<Tensor, Tensor, std::vector<Tensor>> residual_block(
    const Tensor& input, const std::string& first_shift, const std::vector<Tensor>& weights,
    const std::vector<int64_t>& conv_params, const std::vector<Tensor>& affine, const std::vector<Tensor>& running,
    const std::vector<double>& norm_params, const Tensor& input_identity, bool downsample,
    const OptionalTensor& boundary, const std::string& shift, bool shifted) {
  const size_t layers = weights.size();
  if (layers < (downsample ? 2 : 1) || conv_params.size() != kConvParams * layers || affine.size() != 2 * layers ||
      norm_params.size() != 2 * layers) {
    fail("conv_params, affine and norm_params must have " + std::to_string(kConvParams) +
         ", 2 and 2 entries for each of " + std::to_string(layers) + " weights, got " +
         std::to_string(conv_params.size()) + ", " + std::to_string(affine.size()) + " and " +
         std::to_string(norm_params.size()));
  }
  std::vector<Tensor> saved;
  auto next_running = running.begin();
  // Returns z of layer k, and the parts of its norm.
  const auto run_layer = [&](size_t k, const Tensor& x) {
    const int64_t* const params = &conv_params[kConvParams * k];
    const Tensor z = convolution(x, weights[k], params);
    saved.push_back(z);
    const auto next = [&] {
      if (next_running == running.end()) {
        fail("running must have 2 tensors for each norm, and 3 if it uses the statistics of the batch, got " +
             std::to_string(running.size()) + " for " + std::to_string(layers) + " norms");
      }
      return *next_running++;
    };
    std::vector<Tensor> norm{next(), next(), affine[2 * k], affine[2 * k + 1]};
    if (uses_batch_stats(params)) {
      std::tie(norm[0], norm[1]) = batch_norm_stats_(z, norm[0], norm[1], next(), norm_params[2 * k + 1]);
      saved.insert(saved.end(), {norm[0], norm[1]});
    }
    return std::pair(z, norm);
  };
  const size_t last = layers - 1 - (downsample ? 1 : 0);
  Tensor x = first_shift.empty() ? input : temporal_shift(input, first_shift);
  for (size_t k = 0; k < last; ++k) {
    const auto [z, norm] = run_layer(k, x);
    x = norm_relu({&z, norm, norm_params[2 * k]});
    saved.push_back(x);
  }
  const auto [z, norm] = run_layer(last, x);
  Tensor identity = input_identity;
  std::vector<Tensor> identity_norm;
  if (downsample) std::tie(identity, identity_norm) = run_layer(last + 1, identity);
  auto [out, boundary_out] = norm_add_relu(z, norm, norm_params[2 * last], identity, identity_norm,
                                           downsample ? norm_params[2 * last + 2] : 0, boundary, shift, shifted);
  return {out, boundary_out, saved};
}

// The backward of the residual branch. `grad` is the gradient of z of the last layer.
//
// saved        of each layer except the last: z, mean, variance, weight and bias; then the outputs of their ReLUs. The
//              output of layer 0 may be missing: then it is recomputed.
// needs_grad   of x; of each layer: of its weight, and of its norm
//
// Returns the gradient of x and three gradients for each layer: of the weight of the convolution, and of weight and
// bias of the norm. The last layer has no gradients of its norm.
std::vector<Tensor> residual_block_backward(const Tensor& grad, const Tensor& input, const std::string& first_shift,
                                            const std::vector<Tensor>& weights, const std::vector<int64_t>& conv_params,
                                            const std::vector<Tensor>& saved, const std::vector<double>& epsilons,
                                            const std::vector<int64_t>& needs_grad) {
  const size_t layers = weights.size(), n_saved = kSavedPerLayer * (layers - 1), relus = saved.size() - n_saved;
  if (layers == 0 || conv_params.size() != kConvParams * layers || saved.size() < n_saved ||
      (relus != layers - 1 && relus + 1 != layers - 1) || epsilons.size() != layers ||
      needs_grad.size() != 1 + 2 * layers) {
    fail("conv_params, epsilons, needs_grad and saved must fit " + std::to_string(layers) + " weights, got " +
         std::to_string(conv_params.size()) + ", " + std::to_string(epsilons.size()) + ", " +
         std::to_string(needs_grad.size()) + " and " + std::to_string(saved.size()) + " entries");
  }
  const auto any_needs_grad = [&](size_t count) {  // of the first `count` flags
    return std::any_of(needs_grad.begin(), needs_grad.begin() + count, [](int64_t flag) { return flag != 0; });
  };
  // The norm of layer k: mean, variance, weight, bias.
  const auto norm_of = [&](size_t k) {
    const Tensor* const z = &saved[kSavedPerLayer * k];
    return std::vector<Tensor>{z + 1, z + kSavedPerLayer};
  };
  // The input of the convolution of layer k. Only the gradient of the weight reads its values.
  const auto input_of = [&](size_t k, bool reads_values) -> Tensor {
    if (k == 0) return !first_shift.empty() && reads_values ? temporal_shift(input, first_shift) : input;
    const Tensor& z = saved[kSavedPerLayer * (k - 1)];
    if (!reads_values) return z;
    if (layers - k <= relus) return saved[saved.size() - (layers - k)];
    return norm_relu({&z, norm_of(k - 1), epsilons[k - 1]});
  };
  std::vector<Tensor> grads(1 + 3 * layers);
  Tensor grad_z = grad;
  for (size_t k = layers; k-- > 0;) {
    const int64_t* const params = &conv_params[kConvParams * k];
    const bool before_needs_grad = any_needs_grad(1 + 2 * k), weight_needs_grad = needs_grad[1 + 2 * k] != 0;
    Tensor grad_x;
    std::tie(grad_x, grads[1 + 3 * k]) = convolution_backward(grad_z, input_of(k, weight_needs_grad), weights[k],
                                                              params, before_needs_grad, weight_needs_grad);
    if (!before_needs_grad) break;
    if (k == 0) {
      if (!first_shift.empty()) temporal_shift_backward_(grad_x, first_shift);
      grads[0] = grad_x;
      break;
    }
    const Operand z{saved[kSavedPerLayer * (k - 1)],        norm_of(k - 1),        epsilons[k - 1],
                    uses_batch_stats(params - kConvParams), any_needs_grad(2 * k), needs_grad[2 * k] != 0};
    const OperandGrads z_grads = norm_relu_grads(grad_x, z, true);
    if (z.norm_needs_grad) {  // kernels compute them for statistics of the batch, too
      grads[3 * k - 1] = z_grads.weight;
      grads[3 * k] = z_grads.bias;
    }
    if (!z.needs_grad) break;
    grad_z = z_grads.values;
  }
  return grads;
}

}  // namespace
}  // namespace tsm_jit
