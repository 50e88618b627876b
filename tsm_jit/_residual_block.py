"""A whole residual block as one function of autograd, for ``residual.py``: its layers, and its end.

What PyTorch records operation by operation costs the host more than a small batch costs the GPU. And a norm with its
ReLU is one pass here, forward and backward, as the end of a block is.
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
    applied_norm,
    for_readers,
    gradients_of_end,
    kept,
    write_new,
)

_convolution_backward = torch.ops.aten.convolution_backward.default._op


class Layer(NamedTuple):
    """A convolution and the batch normalization of what it makes."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d

    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.convolution.weight, self.convolution.bias, self.norm.weight, self.norm.bias


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
    how = (tuple(layers), first_shift, identity_norm, shift, shifted, readers)
    of_identity = (None, None) if identity_norm is None else (identity_norm.weight, identity_norm.bias)
    parameters = [part for layer in layers for part in layer.parameters()]
    unread_out, *out = _Block.apply(x, identity, unread, how, *of_identity, *parameters)
    return out, unread_out if shifted else None


class _Block(Function):
    @staticmethod
    def forward(ctx, x, identity, unread, how, *parameters):
        layers, first_shift, identity_norm, shift, shifted, readers = how
        ctx.how, ctx.norms = (layers, first_shift, shift, shifted), [identity_norm and identity_norm[4:]]
        ctx.identity_is_shifted = unread is not None
        of_layers, given = [], x
        if first_shift is not None:
            x = ops.temporal_shift(x, first_shift)
        for k, layer in enumerate(layers):
            c = layer.convolution
            weight, bias = c.weight.to(x.dtype), None if c.bias is None else c.bias.to(x.dtype)
            z = torch.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)
            z = z.contiguous(memory_format=torch.channels_last)
            norm = applied_norm(layer.norm, z, True)
            ctx.norms.append(norm[4:])
            of_layers += [given, weight, *kept(z, norm)]
            if k + 1 < len(layers):
                given = x = write_new(z, norm, None, None, None, NO_SHIFT, False)[0]
        out, unread_out = write_new(z, norm, identity, identity_norm, unread, shift, shifted)
        ctx.save_for_backward(*of_layers, *kept(identity, identity_norm), out, unread_out if shifted else None)
        ctx.set_materialize_grads(False)
        return unread_out, *for_readers(out, readers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_unread, grad_a, grad_b=None):
        layers, first_shift, shift, shifted = ctx.how
        identity_how, *hows = ctx.norms
        *saved, mean, variance, weight, out, unread_out = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # each is freed once it is not needed any more, as if recorded one by one
        x_needed, identity_needed, _, _, *needed = ctx.needs_input_grad
        of_identity = (saved.pop(), mean, variance, weight)
        identity = Operand.of_kept(of_identity, identity_how, identity_needed, any(needed[:2]))
        found = [None] * len(needed)
        # The last layer ends in the sum of the block, the others in a sum of one operand.
        grads = grad_a, grad_b, grad_unread if shifted else None
        end = identity, shift, ctx.identity_is_shifted
        of_x = of_block = None
        del of_identity, identity
        for k in reversed(range(len(layers))):
            at = 2 + 4 * k
            before = x_needed or any(needed[2:at])
            wanted = [before, *needed[at : at + 2]]
            x, weight, *of_z = saved[-6:]
            del saved[-6:]
            z = Operand.of_kept(of_z, hows[k], any(wanted), any(needed[at + 2 : at + 4]))
            (of_z, *found[at + 2 : at + 4]), *of_end = gradients_of_end(*grads, out, unread_out, z, *end)
            of_block = of_block or of_end
            if not any(wanted):
                break
            out, unread_out, end = x, None, (Operand(), NO_SHIFT, False)
            z = grads = None
            if k == 0 and first_shift is not None:
                x = ops.temporal_shift(x, first_shift)
            c = layers[k].convolution
            biases, nothing = None if c.bias is None else [c.out_channels], [0] * len(c.stride)
            of_x, *found[at : at + 2] = _convolution_backward(
                of_z, x, weight, biases, c.stride, c.padding, c.dilation, False, nothing, c.groups, wanted
            )
            if not before:
                break
            grads = of_x, None, None
            of_z = None
        else:
            if first_shift is not None:
                ops.temporal_shift_backward_(of_x, first_shift)
        (of_identity, *found[:2]), grad_unread_in = of_block
        return of_x if x_needed else None, of_identity, grad_unread_in, None, *found
