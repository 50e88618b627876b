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

from tsm_jit.ops.compat import direct, eager, has_dispatch_modes, is_batched_gradient
from tsm_jit.ops.shift_conv import shift_tokens
from tsm_jit.ops.temporal_shift import (
    SUMMABLE_DTYPES,
    clip_length_marks,
    shift_kernel,
    temporal_shift,
    temporal_shift_backward_,
)

_convolution = direct(torch.ops.aten.convolution.default)
_convolution_backward = direct(torch.ops.aten.convolution_backward.default)
_CAST = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts


class Layer(NamedTuple):
    """A two-dimensional convolution with zero padding, or a linear layer, of shifted frames or tokens."""

    shift: str
    num_prefix_tokens: int = 0  # of each frame; they are not shifted
    convolution: tuple | None = None  # stride, padding, dilation, groups; None: a linear layer

    def apply(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without the shift."""
        if self.convolution is None:
            return F.linear(y, weight, bias)
        stride, padding, dilation, groups = self.convolution
        return _convolution(y, weight, bias, stride, padding, dilation, False, (0, 0), groups)

    def gradients(
        self, dz: Tensor, y: Tensor, weight: Tensor, needs_input: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the shifted input, the weight and the bias."""
        if self.convolution is None:
            rows = dz.flatten(0, -2)
            dy = dz @ weight if needs_input else None
            dw = rows.t() @ y.flatten(0, -2) if needs_weight else None
            return dy, dw, rows.sum(0) if needs_bias else None
        stride, padding, dilation, groups = self.convolution
        sizes = [weight.shape[0]] if needs_bias else None
        needs = [needs_input, needs_weight, needs_bias]
        return _convolution_backward(dz, y, weight, sizes, stride, padding, dilation, False, [0, 0], groups, needs)


def recomputing_layer(x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor | None:
    """Returns ``layer`` of the shifted ``x`` as one autograd function, or None where separate ones are needed."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if any(each.dtype not in _CAST for each in tensors):
            return None
    else:
        dtype = x.dtype
    if dtype not in SUMMABLE_DTYPES or type(x) is not Tensor or x.is_inference() or has_dispatch_modes():
        return None
    if x.untyped_storage().nbytes() > x.nbytes:  # the backward would keep the whole storage
        return None
    if any(each.dtype is not dtype for each in tensors):
        x, weight, *rest = (each.to(dtype) for each in tensors)
        bias = rest[0] if rest else None
    return _RecomputingLayer.apply(x, weight, bias, layer)


class _RecomputingLayer(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.layer = layer
        ctx.save_for_backward(x, weight, *clip_length_marks(x, layer.shift))
        return layer.apply(shift_tokens(x, layer.shift, layer.num_prefix_tokens, shift_kernel), weight, bias)

    @staticmethod
    def backward(ctx, dz):
        layer = ctx.layer
        x, weight = ctx.saved_tensors[:2]
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        is_plain = type(dz) is Tensor and not is_batched_gradient(dz) and eager() and not has_dispatch_modes()
        if torch.is_grad_enabled() or not is_plain:
            return *_composed(layer, dz, x, weight, needs_x, needs_weight, needs_bias), None
        y = x  # the gradient of the input needs its shape alone
        if needs_weight:
            y = shift_tokens(x, layer.shift, layer.num_prefix_tokens, shift_kernel)
        dx, dw, db = layer.gradients(dz, y, weight, needs_x, needs_weight, needs_bias)
        del y
        if needs_x:
            n = layer.num_prefix_tokens
            temporal_shift_backward_(dx[:, n:] if n else dx, layer.shift)
        return dx, dw, db, None


def _composed(layer: Layer, dz: Tensor, x: Tensor, weight: Tensor, *needs: bool) -> list[Tensor | None]:
    """The gradients by differentiable operators: for double backward, or for many gradients at once."""
    with torch.enable_grad():
        bias = weight.new_zeros(weight.shape[0]).requires_grad_()  # any value: no gradient depends on it
        inputs: list[Any] = [x, weight, bias]
        inputs = [each if each.requires_grad else each.detach().requires_grad_() for each in inputs]
        x, weight, bias = inputs
        z = layer.apply(shift_tokens(x, layer.shift, layer.num_prefix_tokens, temporal_shift), weight, bias)
    wanted = [each for each, needed in zip(inputs, needs, strict=True) if needed]
    grads = iter(torch.autograd.grad(z, wanted, dz, create_graph=torch.is_grad_enabled()))
    return [next(grads) if needed else None for needed in needs]
