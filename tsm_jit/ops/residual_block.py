"""Operators for a whole residual block: one call in the forward and two in the backward.

The block consists of layers ``norm(conv(x))`` with a ReLU between them. It ends in ``norm_add_relu``
(``ops/residual.py``). With ``downsample`` the last layer computes the identity. These arguments are flat lists with
entries for each layer:

- ``weights``: the weight of the convolution, which has no bias;
- ``conv_params``: 8 integers: stride, padding and dilation (2 each), groups, whether the norm uses batch statistics;
- ``affine``: 2 tensors: weight and bias of the norm;
- ``running``: running mean and running variance. If the norm uses batch statistics, ``num_batches_tracked`` follows,
  and the operator updates all three;
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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from tsm_jit import reference
from tsm_jit.ops.residual import NO_SHIFT, Norm, batch_norm_stats_, caller, norm_add_relu
from tsm_jit.plans import decode

_library = torch.library.Library("tsm_jit", "FRAGMENT")
for _schema in (
    "residual_block(Tensor x, str first_shift, Tensor[] weights, int[] conv_params, Tensor[] affine, "
    "Tensor(a!)[] running, float[] norm_params, Tensor identity, bool downsample, Tensor? boundary, str shift, "
    "bool shifted) -> (Tensor, Tensor, Tensor[])",
    "residual_block_backward(Tensor grad, Tensor x, str first_shift, Tensor[] weights, int[] conv_params, "
    "Tensor[] saved, float[] epsilons, int[] needs_grad) -> Tensor[]",
    "cast(Tensor[] tensors, ScalarType dtype) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_ops = torch.ops.tsm_jit


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


def to_channels_last(x: Tensor) -> Tensor:
    """Returns frames or weights in channels_last, and other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, params: ConvParams, needs_grad: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of x and of the weight, None if not needed."""
    stride, padding, dilation, groups = params
    return torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*needs_grad, False]
    )[:2]


def block_forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Calls ``residual_block``."""
    return _block_in_parts(*args) if is_compiling() else _forward(*args)


_forward, block_backward, cast_all = caller("residual_block"), caller("residual_block_backward"), caller("cast")


def _block_in_parts(
    x, first_shift, weights, conv_params, affine, running, norm_params, identity, downsample, boundary, shift, shifted
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``residual_block`` for compilers, which do not support that an operator updates tensors and returns a list."""
    outputs, each = [], iter(running)

    def layer(k: int, x: Tensor) -> tuple[Tensor, Norm]:
        z = to_channels_last(convolve(x, weights[k], ConvParams.of_flat(conv_params[8 * k :])))
        outputs.append(z)
        mean, variance = next(each), next(each)
        if conv_params[8 * k + 7]:
            mean, variance = batch_norm_stats_(z, mean, variance, next(each), norm_params[2 * k + 1])
            outputs.extend((mean, variance))
        return z, Norm(mean, variance, affine[2 * k], affine[2 * k + 1], norm_params[2 * k])

    last = len(weights) - 1 - downsample
    x = torch.ops.tsm_jit.temporal_shift.kernel(x, first_shift) if first_shift else x
    for k in range(last):
        x, _ = norm_add_relu(*layer(k, x), None, None, None, NO_SHIFT, False)
        outputs.append(x)
    z, norm = layer(last, x)
    identity, identity_norm = layer(last + 1, identity) if downsample else (identity, None)
    return *norm_add_relu(z, norm, identity, identity_norm, boundary, shift, shifted), outputs


# --- PyTorch fallback ------------------------------------------------------------------------------------------------


def reference_block(
    x, first_shift, weights, conv_params, affine, running, norm_params, identity, downsample, boundary, shift, shifted
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``residual_block`` by the convolutions and norms of PyTorch."""
    outputs, each = [], iter(running)

    def layer(k: int, x: Tensor) -> tuple[Tensor, Norm]:
        mean, variance = next(each), next(each)
        epsilon, momentum = norm_params[2 * k : 2 * k + 2]
        z = to_channels_last(convolve(x, weights[k], ConvParams.of_flat(conv_params[8 * k :])))
        outputs.append(z)
        if conv_params[8 * k + 7]:
            F.batch_norm(z, mean, variance, training=True, momentum=momentum)  # updates the running statistics
            next(each).add_(1)
            variance, mean = torch.var_mean(z.to(mean.dtype), (0, 2, 3), unbiased=False)
            outputs.extend([mean, variance])
        return z, Norm(mean, variance, affine[2 * k], affine[2 * k + 1], epsilon)

    last = len(weights) - 1 - downsample
    x = reference.temporal_shift(x, decode(first_shift)) if first_shift else x
    for k in range(last):
        z, norm = layer(k, x)
        x = F.batch_norm(z, *norm[:4], eps=norm.epsilon).relu()
        outputs.append(x)
    z, norm = layer(last, x)
    identity, identity_norm = layer(last + 1, identity) if downsample else (identity, None)
    return *norm_add_relu(z, norm, identity, identity_norm, boundary, shift, shifted), outputs


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
    return [x.new_empty(0) if each is None else to_channels_last(each) for each in grads]


def _fake_block_backward(grad, x, first_shift, weights, conv_params, saved, epsilons, needs_grad) -> list[Tensor]:
    """Allocates the outputs of ``residual_block_backward``."""

    def new(like: Tensor, needed: int) -> Tensor:
        if not needed:
            return x.new_empty(0)
        return torch.empty_like(like, memory_format=torch.channels_last if like.dim() == 4 else torch.preserve_format)

    grads, last = [new(x, needs_grad[0])], len(weights) - 1
    for k, weight in enumerate(weights):
        norm_needs_grad = k < last and needs_grad[2 + 2 * k]
        grads.append(new(weight, needs_grad[1 + 2 * k]))
        grads += [new(saved[5 * k + 3] if norm_needs_grad else x, norm_needs_grad) for _ in range(2)]
    return grads


def reference_cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``cast``, one tensor after the other."""
    return [each.to(dtype, copy=True) for each in tensors]


for _operator, _compute in (
    (_ops.residual_block.default, reference_block),
    (_ops.residual_block_backward.default, reference_block_backward),
    (_ops.cast.default, reference_cast),
):
    _library.impl(_operator, _compute, "CompositeExplicitAutograd")
_library.impl(_ops.residual_block_backward.default, _fake_block_backward, "Meta")
