"""Operators for a whole residual block: one call in the forward and two in the backward.

The block consists of layers ``norm(conv(x))`` with a ReLU between them. It ends in ``norm_add_relu``
(``ops/residual.py``). With ``downsample`` the last layer computes the identity. These arguments are flat lists with the
same number of entries for each layer:

- ``weights``: the weight of the convolution, which has no bias;
- ``conv_params``: 8 integers: stride, padding and dilation (2 each), groups, whether the norm uses batch statistics;
- ``norms``: 4 tensors: running mean, running variance (both are updated), weight, bias;
- ``counters``: ``num_batches_tracked`` of each norm that uses batch statistics;
- ``norm_params``: 2 numbers: epsilon, momentum.

``residual_block`` also returns tensors for the backward. For each layer these are the output of the convolution, the
batch mean and variance if the norm uses them, and the output of the ReLU if there is one.

``residual_block_backward`` takes the gradient of the last convolution's output:

- ``saved``: 5 tensors for each layer except the last (convolution output, mean, variance, weight, bias), then their
  ReLU outputs. The first ReLU output is optional, as the operator can recompute it.
- ``needs_grad``: a flag for x, then two for each layer: weight and norm.

It returns the gradient of x and, for each layer, the gradients of the weight and of the norm's weight and bias. The
gradients of the last norm come from ``norm_add_relu_backward``.

``cast`` converts many tensors in one kernel launch. The kernels are in ``kernels/bindings``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tsm_jit import reference
from tsm_jit.ops.compat import direct
from tsm_jit.ops.residual import Norm, norm_add_relu
from tsm_jit.plans import decode

_library = torch.library.Library("tsm_jit", "FRAGMENT")
for _schema in (
    "residual_block(Tensor x, str first_shift, Tensor[] weights, int[] conv_params, Tensor(a!)[] norms, "
    "Tensor(b!)[] counters, float[] norm_params, Tensor identity, bool downsample, Tensor? boundary, str shift, "
    "bool shifted) -> (Tensor, Tensor, Tensor[])",
    "residual_block_backward(Tensor grad, Tensor x, str first_shift, Tensor[] weights, int[] conv_params, "
    "Tensor[] saved, float[] epsilons, int[] needs_grad) -> Tensor[]",
    "cast(Tensor[] tensors, ScalarType dtype) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

block_forward = direct(torch.ops.tsm_jit.residual_block.default)
block_backward = direct(torch.ops.tsm_jit.residual_block_backward.default)
cast_all = direct(torch.ops.tsm_jit.cast.default)


class ConvParams(NamedTuple):
    """A two-dimensional convolution without bias."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def flat(self) -> list[int]:
        """Returns the first 7 of a layer's ``conv_params``."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    @classmethod
    def of_flat(cls, flat: Sequence[int]) -> ConvParams:
        """The inverse of :meth:`flat`."""
        return cls((flat[0], flat[1]), (flat[2], flat[3]), (flat[4], flat[5]), flat[6])


def convolve(x: Tensor, weight: Tensor, params: ConvParams) -> Tensor:
    """Returns the convolution of ``x`` with ``weight``."""
    return F.conv2d(x, weight, None, *params)


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, params: ConvParams, needs_grad: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of x and of the weight, None if not needed."""
    stride, padding, dilation, groups = params
    return torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*needs_grad, False]
    )[:2]


def translating_out_of_memory(operator: Callable, *args: Any) -> Any:
    """Calls ``operator`` and raises OutOfMemoryError instead of the RuntimeError of PyTorch's stable C interface."""
    try:
        return operator(*args)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


# --- PyTorch fallback ------------------------------------------------------------------------------------------------


def reference_block(
    x, first_shift, weights, conv_params, norms, counters, norm_params, identity, downsample, boundary, shift, shifted
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``residual_block`` by the convolutions and norms of PyTorch."""
    saved, counters = [], iter(counters)

    def layer(k: int, x: Tensor) -> tuple[Tensor, Norm]:
        mean, variance, weight, bias = norms[4 * k : 4 * k + 4]
        epsilon, momentum = norm_params[2 * k : 2 * k + 2]
        z = convolve(x, weights[k], ConvParams.of_flat(conv_params[8 * k :]))
        z = z.contiguous(memory_format=torch.channels_last)
        saved.append(z)
        if conv_params[8 * k + 7]:
            F.batch_norm(z, mean, variance, training=True, momentum=momentum)  # updates the running statistics
            next(counters).add_(1)
            variance, mean = torch.var_mean(z.to(mean.dtype), (0, 2, 3), unbiased=False)
            saved.extend([mean, variance])
        return z, Norm(mean, variance, weight, bias, epsilon)

    last = len(weights) - 1 - downsample
    x = reference.temporal_shift(x, decode(first_shift)) if first_shift else x
    for k in range(last):
        z, norm = layer(k, x)
        x = F.batch_norm(z, *norm[:4], eps=norm.epsilon).relu()
        saved.append(x)
    z, norm = layer(last, x)
    identity, identity_norm = layer(last + 1, identity) if downsample else (identity, None)
    return *norm_add_relu(z, norm, identity, identity_norm, boundary, shift, shifted), saved


def reference_block_backward(
    grad, x, first_shift, weights, conv_params, saved, epsilons, needs_grad
) -> list[Tensor | None]:
    """``residual_block_backward`` by autograd, which computes the layers again."""
    last = len(weights) - 1
    norms = [saved[5 * k + 1 : 5 * k + 5] for k in range(last)]  # mean, variance, weight, bias
    leaves = [each.detach().requires_grad_() for each in (x, *weights, *(each for norm in norms for each in norm[2:]))]
    x, *rest = leaves
    weights, affine = rest[: last + 1], rest[last + 1 :]
    with torch.enable_grad():
        z = reference.temporal_shift(x, decode(first_shift)) if first_shift else x
        for k, weight in enumerate(weights):
            z = convolve(z, weight, ConvParams.of_flat(conv_params[8 * k :]))
            if k < last:
                from_batch = bool(conv_params[8 * k + 7])
                mean, variance = (None, None) if from_batch else norms[k][:2]
                norm_weight, norm_bias = affine[2 * k : 2 * k + 2]
                z = F.batch_norm(z, mean, variance, norm_weight, norm_bias, from_batch, eps=epsilons[k]).relu()
    needed = [needs_grad[0], *needs_grad[1::2], *(flag for flag in needs_grad[2:-1:2] for _ in range(2))]
    inputs = [leaf for leaf, flag in zip(leaves, needed, strict=True) if flag]
    input_grads = iter(torch.autograd.grad(z, inputs, grad) if inputs else ())
    grad_x, *rest = [next(input_grads) if flag else None for flag in needed]
    grads = [grad_x]
    for k in range(last + 1):
        grads += [rest[k], *(rest[last + 1 + 2 * k : last + 3 + 2 * k] if k < last else (None, None))]
    return [x.new_empty(0) if each is None else each for each in grads]


def reference_cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``cast``, one tensor after the other."""
    return [each.to(dtype, copy=True) for each in tensors]


for _operator, _compute in (
    (torch.ops.tsm_jit.residual_block.default, reference_block),
    (torch.ops.tsm_jit.residual_block_backward.default, reference_block_backward),
    (torch.ops.tsm_jit.cast.default, reference_cast),
):
    _library.impl(_operator, _compute, "CompositeExplicitAutograd")
