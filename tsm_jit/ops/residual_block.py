"""The operators for a whole residual block that autograd records as one function; see ``fused/block.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tsm_jit import ops
from tsm_jit.ops.compat import direct
from tsm_jit.ops.residual import (
    NO_SHIFT,
    Norm,
    Operand,
    batch_statistics,
    gradients_of_relu_of_norm,
    sums_are_in_kernel,
    write_new,
)

_library = torch.library.Library("tsm_jit", "FRAGMENT")


# Of each layer `weights` has the weight of the convolution, `convolutions` its stride, padding and dilation, two each,
# its groups, and whether the norm is of the batch; `norms` running mean and variance (which are written), weight and
# bias, `factors` epsilon and momentum, `batches` the number of batches, if the norm is of the batch. With `downsample`
# the last layer makes the identity of what is given for it.
#
# Returned, beside x and its unread frames: of each layer what it convolved, mean and variance if the norm is of the
# batch, and its ReLU if there is one.
for _schema in (
    "residual_block(Tensor x, str first_shift, Tensor[] weights, int[] convolutions, Tensor(a!)[] norms, "
    "Tensor(b!)[] batches, float[] factors, Tensor identity, bool downsample, Tensor? unread, str shift, bool shifted) "
    "-> (Tensor, Tensor, Tensor[])",
    # `kept` has of each layer but the last what it convolved, mean, variance, weight and bias of its norm; then their
    # ReLUs, of which that of the first layer may be missing: it is made again. `wanted` tells of x, and of each layer's
    # convolution and norm, whether gradients are.
    "residual_block_backward(Tensor grad, Tensor x, str first_shift, Tensor[] weights, int[] convolutions, "
    "Tensor[] kept, float[] epsilons, int[] wanted) -> Tensor[]",
    "cast(Tensor[] tensors, ScalarType dtype) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


block_forward = direct(torch.ops.tsm_jit.residual_block.default)
block_backward = direct(torch.ops.tsm_jit.residual_block_backward.default)
cast_all = direct(torch.ops.tsm_jit.cast.default)


def convolve(x: Tensor, weight: Tensor, how: Sequence[int]) -> Tensor:
    """``how`` is stride, padding, dilation and groups."""
    return F.conv2d(x, weight, None, how[:2], how[2:4], how[4:6], how[6])


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, how: Sequence[int], x_wanted: bool, weight_wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of what is convolved and of the weight."""
    masks = [x_wanted, weight_wanted, False]
    return torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, how[:2], how[2:4], how[4:6], False, [0, 0], how[6], masks
    )[:2]


def raising_out_of_memory(operator, *args):
    """What ``operator`` returns; its convolutions may find no memory, for which PyTorch's C interface has no error."""
    try:
        return operator(*args)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def _plain_forward(
    x,
    first_shift,
    weights,
    convolutions,
    norms,
    batches,
    factors,
    identity,
    downsample,
    unread,
    shift,
    shifted,
):
    made, batches = [], iter(batches)

    def convolve(k: int, x: Tensor) -> tuple[Tensor, Norm]:
        *how, of_batch = convolutions[8 * k : 8 * k + 8]
        mean, variance, *affine = norms[4 * k : 4 * k + 4]
        epsilon, momentum = factors[2 * k : 2 * k + 2]
        z = convolve(x, weights[k], how).contiguous(memory_format=torch.channels_last)
        made.append(z)
        if of_batch:
            mean, variance = batch_statistics(z, mean, variance, next(batches), momentum)
            made.extend([mean, variance])
        return z, Norm(mean, variance, *affine, epsilon)

    last = len(weights) - 1 - downsample
    if first_shift:
        x = ops.temporal_shift(x, first_shift)
    for k in range(last):
        x = write_new(*convolve(k, x), None, None, None, NO_SHIFT, False)[0]
        made.append(x)
    z, norm = convolve(last, x)
    identity, identity_norm = convolve(last + 1, identity) if downsample else (identity, None)
    return *write_new(z, norm, identity, identity_norm, unread, shift, shifted), made


def _plain_backward(grad, x, first_shift, weights, convolutions, kept, epsilons, wanted):
    layers = len(weights)
    found = [x.new_empty(0)] * (1 + 3 * layers)  # not wanted
    relus = [None] * (6 * (layers - 1) - len(kept)) + kept[5 * (layers - 1) :]
    for k in reversed(range(layers)):
        *how, _ = convolutions[8 * k : 8 * k + 8]
        before = any(wanted[: 1 + 2 * k])
        weight_wanted = bool(wanted[1 + 2 * k])  # or else nobody reads the values of what is given
        if k == 0:
            given = ops.temporal_shift(x, first_shift) if first_shift and weight_wanted else x
        else:
            z_how = epsilons[k - 1], bool(convolutions[8 * k - 1])
            given, *parts = kept[5 * k - 5 : 5 * k]
            z = Operand(given, Norm(*parts, *z_how), any(wanted[: 2 * k]), bool(wanted[2 * k]))
            if weight_wanted:
                given = relus[k - 1]
                if given is None:
                    given = write_new(z.values, z.norm, None, None, None, NO_SHIFT, False)[0]
        of_x, of_weight = convolve_backward(grad, given, weights[k], how, before, weight_wanted)
        if weight_wanted:
            found[1 + 3 * k] = of_weight
        if not before:
            break
        if k == 0:
            if first_shift:
                ops.temporal_shift_backward_(of_x, first_shift)
            found[0] = of_x
            break
        grad, *of_norm = gradients_of_relu_of_norm(of_x, z, sums_are_in_kernel(z.values))
        if z.summed()[1]:
            found[3 * k - 1 : 3 * k + 1] = of_norm
        if grad is None:
            break
    return found


def _plain_cast(tensors, dtype):
    return [each.to(dtype, copy=True) for each in tensors]


_library.impl(torch.ops.tsm_jit.residual_block.default, _plain_forward, "CompositeExplicitAutograd")


_library.impl(torch.ops.tsm_jit.residual_block_backward.default, _plain_backward, "CompositeExplicitAutograd")


_library.impl(torch.ops.tsm_jit.cast.default, _plain_cast, "CompositeExplicitAutograd")
