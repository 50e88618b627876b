"""A whole residual block as one function of autograd, for ``residual.py``: its layers, and its end.

What PyTorch records operation by operation costs the host more than a small batch costs the GPU; so does a block that
Python puts together, which is why its parts are operators:

- ``residual_block`` is the forward; it returns what the backward needs as well: of each layer what it convolved, mean
  and variance if the norm is of the batch, and but for the last its ReLU;
- ``residual_end_backward`` (of ``_residual_ops.py``) and ``residual_block_backward`` are the backward of its end and of
  the layers before. Two, so that in between what only the end needs is freed.

And a norm with its ReLU is one pass here, forward and backward, as the end of a block is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tsm_jit import ops
from tsm_jit._residual_ops import (
    NO_SHIFT,
    Norm,
    Operand,
    batch_statistics,
    for_readers,
    gradients_of_end,
    kept,
    parts_of,
    write_new,
)

_library = torch.library.Library("tsm_jit", "FRAGMENT")
# Of each layer `weights` has the weight of the convolution, `convolutions` its stride, padding and dilation, two each,
# its groups, and whether the norm is of the batch; `norms` running mean and variance (which are written), weight and
# bias, `factors` epsilon and momentum, `batches` the number of batches, if the norm is of the batch.
for _schema in (
    "residual_block(Tensor x, str first_shift, Tensor[] weights, int[] convolutions, Tensor(a!)[] norms, "
    "Tensor(b!)[] batches, float[] factors, Tensor? identity, Tensor[] identity_norm, float identity_epsilon, "
    "Tensor? unread, str shift, bool shifted) -> (Tensor, Tensor, Tensor[])",
    # `kept` has of each layer but the last what it convolved, mean, variance and weight of its norm, and its ReLU;
    # `wanted` tells of x, and of each layer's convolution and norm, whether gradients are.
    "residual_block_backward(Tensor grad, Tensor x, str first_shift, Tensor[] weights, int[] convolutions, "
    "Tensor[] kept, float[] epsilons, int[] wanted) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_forward = torch.ops.tsm_jit.residual_block.default._op
_backward = torch.ops.tsm_jit.residual_block_backward.default._op


class Layer(NamedTuple):
    """A convolution without bias, and the batch normalization of what it makes; with the tensors of both."""

    convolution: nn.Conv2d
    weight: Tensor
    norm: nn.BatchNorm2d
    norm_parts: tuple[Tensor, ...]  # running mean and variance, weight and bias


def block_of_layers(
    x: Tensor,
    layers: Sequence[Layer],
    first_shift: str | None,
    identity: Tensor,
    identity_norm: Norm | None,
    unread: Tensor | None,
    shift: str,
    shifted: bool,
    readers: int,
) -> tuple[list[Tensor], Tensor | None]:
    """:func:`tsm_jit._residual_ops.end_of_block` of what ``layers`` make of ``x``, differentiable once.

    Args:
        x: ``[N*T, C, H, W]`` in channels_last, of the type in which the layers compute.
        layers: all but the last are followed by a ReLU.
        first_shift: of ``x``, encoded. Then x itself is what is kept, and it is shifted again for the backward.
        identity, identity_norm, unread, shift, shifted, readers: as there.
    """
    identity, unread = identity.to(x.dtype), None if unread is None else unread.to(x.dtype)
    how = (layers, first_shift or "", identity_norm, shift, shifted, readers)
    of_identity = (None, None) if identity_norm is None else (identity_norm.weight, identity_norm.bias)
    parameters = [part for layer in layers for part in (layer.weight, *layer.norm_parts[2:])]
    unread_out, *out = _Block.apply(x, identity, unread, how, *of_identity, *parameters)
    return out, unread_out if shifted else None


class _Block(Function):
    @staticmethod
    def forward(ctx, x, identity, unread, how, *parameters):
        layers, first_shift, identity_norm, shift, shifted, readers = how
        weights, convolutions, norms, batches, factors = [], [], [], [], []
        for c, weight, norm, parts in layers:
            weights.append(weight.to(x.dtype))
            convolutions += (*c.stride, *c.padding, *c.dilation, c.groups, norm.training)
            norms += parts
            factors += [norm.eps, norm.momentum or 0.0]
            if norm.training:
                batches.append(norm._buffers["num_batches_tracked"])
        out, unread_out, made = _called(
            _forward,
            x,
            first_shift,
            weights,
            convolutions,
            norms,
            batches,
            factors,
            identity,
            *parts_of(identity_norm),
            unread,
            shift,
            shifted,
        )
        of_layers, made = [], iter(made)
        for k, layer in enumerate(layers):
            if k > 0:
                of_layers.append(next(made))
            z = next(made)
            statistics = (next(made), next(made)) if layer.norm.training else layer.norm_parts[:2]
            of_layers += (z, *statistics, layer.norm_parts[2])
        ctx.how = (first_shift, convolutions, factors[::2], shift, shifted)
        ctx.identity_how = identity_norm and identity_norm[4:]
        ctx.identity_is_shifted = unread is not None
        ctx.save_for_backward(
            x, *weights, *of_layers, *kept(identity, identity_norm), out, unread_out if shifted else None
        )
        ctx.set_materialize_grads(False)
        return unread_out, *for_readers(out, readers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_unread, grad_a, grad_b=None):
        first_shift, convolutions, epsilons, shift, shifted = ctx.how
        x, *saved = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        needed = ctx.needs_input_grad
        wanted = [needed[0]]
        for k in range(6, len(needed), 3):
            wanted += [needed[k], needed[k + 1] or needed[k + 2]]
        layers = len(epsilons)
        weights = saved[:layers]

        # The end. What it alone needs is freed after it.
        z_how = epsilons[-1], bool(convolutions[-1])
        z = Operand.of_kept(saved[-10:-6], z_how, any(wanted[:-1]), wanted[-1])
        identity = Operand.of_kept(saved[-6:-2], ctx.identity_how, needed[1], needed[4] or needed[5])
        grads = grad_a, grad_b, grad_unread if shifted else None
        (of_z, *of_norm), of_identity, of_unread = gradients_of_end(
            *grads, *saved[-2:], z, identity, shift, ctx.identity_is_shifted
        )
        del saved[-10:], z, identity, grads, grad_a, grad_b, grad_unread

        found = [None] * (1 + 3 * layers)
        if of_z is not None:
            rest = first_shift, weights, convolutions, saved[layers:], epsilons, wanted
            found = _called(_backward, of_z, x, *rest)
        found[-2:] = of_norm
        of_x, *of_layers = found
        of_identity, *of_identity_norm = of_identity
        return of_x, of_identity, of_unread, None, *of_identity_norm, *of_layers


def _called(operator, *args):
    """What ``operator`` returns; its convolutions may find no memory, for which PyTorch's C interface has no error."""
    try:
        return operator(*args)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


# --- the operators, for devices without kernels ----------------------------------------------------------------------


def _plain_forward(
    x,
    first_shift,
    weights,
    convolutions,
    norms,
    batches,
    factors,
    identity,
    identity_norm,
    identity_epsilon,
    unread,
    shift,
    shifted,
):
    made, batches = [], iter(batches)
    if first_shift:
        x = ops.temporal_shift(x, first_shift)
    for k, weight in enumerate(weights):
        *how, of_batch = convolutions[8 * k : 8 * k + 8]
        mean, variance, *affine = norms[4 * k : 4 * k + 4]
        epsilon, momentum = factors[2 * k : 2 * k + 2]
        z = torch.conv2d(x, weight, None, how[:2], how[2:4], how[4:6], how[6])
        z = z.contiguous(memory_format=torch.channels_last)
        made.append(z)
        if of_batch:
            mean, variance = batch_statistics(z, mean, variance, next(batches), momentum)
            made += [mean, variance]
        norm = Norm(mean, variance, *affine, epsilon)
        if k + 1 < len(weights):
            x = write_new(z, norm, None, None, None, NO_SHIFT, False)[0]
            made.append(x)
    identity_norm = Norm(*identity_norm, identity_epsilon) if identity_norm else None
    return *write_new(z, norm, identity, identity_norm, unread, shift, shifted), made


def _plain_backward(grad, x, first_shift, weights, convolutions, kept, epsilons, wanted):
    found = [x.new_empty(0)] * (1 + 3 * len(weights))  # not wanted
    for k in reversed(range(len(weights))):
        *how, _ = convolutions[8 * k : 8 * k + 8]
        before = any(wanted[: 1 + 2 * k])
        given = kept[5 * k - 1] if k > 0 else ops.temporal_shift(x, first_shift) if first_shift else x
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            given,
            weights[k],
            None,
            how[:2],
            how[2:4],
            how[4:6],
            False,
            [0, 0],
            how[6],
            [before, wanted[1 + 2 * k], False],
        )
        if wanted[1 + 2 * k]:
            found[1 + 3 * k] = of_weight
        if not before:
            break
        if k == 0:
            if first_shift:
                ops.temporal_shift_backward_(of_x, first_shift)
            found[0] = of_x
            break
        z_how = epsilons[k - 1], bool(convolutions[8 * k - 1])
        z = Operand.of_kept(kept[5 * k - 5 : 5 * k - 1], z_how, any(wanted[: 2 * k]), bool(wanted[2 * k]))
        grad, *of_norm = gradients_of_end(of_x, None, None, given, None, z, Operand(), NO_SHIFT, False)[0]
        if z.summed()[1]:
            found[3 * k - 1 : 3 * k + 1] = of_norm
        if grad is None:
            break
    return found


_library.impl(torch.ops.tsm_jit.residual_block.default, _plain_forward, "CompositeExplicitAutograd")
_library.impl(torch.ops.tsm_jit.residual_block_backward.default, _plain_backward, "CompositeExplicitAutograd")
