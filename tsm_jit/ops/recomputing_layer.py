"""A convolution or a linear layer of shifted frames as one autograd function.

It saves the input instead of the shifted copy, which the backward computes again. So training keeps no second
activation. Forward and backward call the same operators as separate layers do, so they give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tsm_jit.ops.compat import direct, direct_apply, eager, has_dispatch_modes, is_batched_gradient, unwrap_if_dead
from tsm_jit.ops.temporal_shift import (
    SUMMABLE_DTYPES,
    check_marks,
    clip_length_marks,
    shift_kernel,
    shift_tokens,
    temporal_shift,
    temporal_shift_backward_,
)

_convolution_backward = direct(torch.ops.aten.convolution_backward.default)

# The dtypes that autocast casts.
AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Layer(NamedTuple):
    """A two-dimensional convolution with zero padding, or a linear layer, of shifted frames or tokens."""

    shift: str
    num_prefix_tokens: int = 0  # of each frame; they are not shifted
    convolution: tuple | None = None  # stride, padding, dilation, groups; None: a linear layer

    def apply(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without the shift."""
        return F.linear(y, weight, bias) if self.convolution is None else F.conv2d(y, weight, bias, *self.convolution)

    def backward(
        self, dz: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the input ``x`` before the shift, the weight and the bias, where needed.

        If the weight needs no gradient, only the shape of ``x`` matters.
        """
        if torch.is_grad_enabled() or not is_plain_gradient(dz):
            return self._differentiable_backward(dz, x, weight, needs_x, needs_weight, needs_bias)
        y = shift_tokens(x, self.shift, self.num_prefix_tokens, shift_kernel) if needs_weight else x
        if self.convolution is None:
            rows = dz.flatten(0, -2)
            dx = dz @ weight if needs_x else None
            dw = rows.t() @ y.flatten(0, -2) if needs_weight else None
            db = rows.sum(0) if needs_bias else None
        else:
            stride, padding, dilation, groups = self.convolution
            bias_sizes, needs = [weight.shape[0]] if needs_bias else None, [needs_x, needs_weight, needs_bias]
            dx, dw, db = _convolution_backward(
                dz, y, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups, needs
            )
        del y
        if dx is not None:
            n = self.num_prefix_tokens
            temporal_shift_backward_(dx[:, n:] if n else dx, self.shift)
        return dx, dw, db

    def _differentiable_backward(self, dz: Tensor, x: Tensor, weight: Tensor, *needs: bool) -> Any:
        """The same by differentiable operators: for double backward, or for many gradients at once."""
        with torch.enable_grad():
            bias = weight.new_zeros(weight.shape[0])  # any value: no gradient depends on it
            inputs = [each if each.requires_grad else each.detach().requires_grad_() for each in (x, weight, bias)]
            z = self.apply(shift_tokens(inputs[0], self.shift, self.num_prefix_tokens, temporal_shift), *inputs[1:])
        needed = [each for each, is_needed in zip(inputs, needs, strict=True) if is_needed]
        grads = iter(torch.autograd.grad(z, needed, dz, create_graph=torch.is_grad_enabled()) if needed else ())
        return tuple(next(grads) if is_needed else None for is_needed in needs)


def is_plain_gradient(dz: Tensor) -> bool:
    """Whether ``dz`` is one gradient in memory, and no compiler, transform or dispatch mode must see all operators."""
    return type(dz) is Tensor and not is_batched_gradient(dz) and eager() and not has_dispatch_modes()


def recomputing_layer(x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor | None:
    """Returns ``layer`` of the shifted ``x`` as one autograd function, or None where separate ones are needed."""
    x = unwrap_if_dead(x)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    dtypes = {each.dtype for each in tensors}
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # "meta", for example
        return None
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if not dtypes.issubset(AUTOCAST_DTYPES):
            return None
    else:
        dtype = x.dtype
    if dtype not in SUMMABLE_DTYPES or type(x) is not Tensor or x.is_inference() or has_dispatch_modes():
        return None
    if x.untyped_storage().nbytes() > x.nbytes:  # the backward would keep the whole storage
        return None
    if dtypes != {dtype}:
        x, weight, *rest = (each.to(dtype) for each in tensors)
        bias = rest[0] if rest else None
    bias = None if bias is None else unwrap_if_dead(bias)
    return _apply(x, unwrap_if_dead(weight), bias, layer)


class _RecomputingLayer(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.layer = layer
        ctx.shape = x.shape
        save_input(ctx, x, weight, layer.shift)
        return layer.apply(shift_tokens(x, layer.shift, layer.num_prefix_tokens, shift_kernel), weight, bias)

    @staticmethod
    def backward(ctx, dz):
        x, weight = saved_input(ctx, ctx.shape, ctx.layer.shift)
        return *ctx.layer.backward(dz, x, weight, *ctx.needs_input_grad[:3]), None


_apply = direct_apply(_RecomputingLayer)


def save_input(ctx: Any, x: Tensor, weight: Tensor, shift: str) -> None:
    """Saves the first two inputs of an autograd function. Only the gradient of the weight reads ``x``."""
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, *clip_length_marks(x, shift))


def saved_input(ctx: Any, shape: torch.Size, shift: str) -> tuple[Tensor, Tensor]:
    """Returns what :func:`save_input` saved. An ``x`` that was not saved has its shape, and no memory."""
    x, weight, *marks = ctx.saved_tensors
    check_marks(marks, shift)
    return weight.new_zeros(()).expand(shape) if x is None else x, weight
