"""A convolution or a linear layer of shifted frames as one autograd function.

It saves the input instead of the shifted copy, which the backward computes again. So training keeps no second
activation. Forward and backward call the same operators as separate layers do, so they give the same bits. But under
autocast each use of a weight has its own cast, so gradients of several uses are added in the dtype of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tsm_jit.ops.compat import count_dispatch_modes, direct, direct_apply, eager, is_batched_gradient, unwrap_if_dead
from tsm_jit.ops.temporal_shift import (
    SUMMABLE_DTYPES,
    check_marks,
    clip_length_marks,
    shift_kernel,
    shift_tokens,
    temporal_shift,
    temporal_shift_backward,
    temporal_shift_backward_,
    without_prefix,
)
from tsm_jit.plans import decode

if TYPE_CHECKING:
    from tsm_jit.ops.time_shard import TimeShard

_convolution_backward = torch.ops.aten.convolution_backward.default
_direct_convolution_backward = direct(_convolution_backward)
_unsafe_view = direct(torch.ops.aten._unsafe_view.default)

# The dtypes that autocast casts.
AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The types of tensors with memory of their own. Other parameters may compute products in their own way.
DENSE = (Tensor, torch.nn.Parameter)


class Layer(NamedTuple):
    """A two-dimensional convolution with zero padding, or a linear layer, of shifted frames or tokens."""

    shift: str
    num_prefix_tokens: int = 0  # of each frame; they are not shifted
    convolution: tuple | None = None  # stride, padding, dilation, groups; None: a linear layer
    shard: TimeShard | None = None  # if ranks share the frames; ``shift`` is the shift of the whole clips

    @classmethod
    def conv1x1(cls, shift: str, stride: int) -> Layer:
        """A 1x1 convolution."""
        return cls(shift, 0, ((stride, stride), (0, 0), (1, 1), 1))

    def apply(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer without the shift."""
        return F.linear(y, weight, bias) if self.convolution is None else F.conv2d(y, weight, bias, *self.convolution)

    def backward(self, ctx: Any, dz: Tensor, needs_bias: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the input before the shift, the weight and the bias, after :func:`save_inputs`."""
        x, weight, halo = saved_inputs(ctx, self)
        if x is None:
            x = self._without_values(dz, *ctx.layouts[0])
        if weight is None:
            weight = self._without_values(dz, *ctx.layouts[1])
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        plain = not torch.is_grad_enabled() and is_plain_gradient(dz)
        y = self._shifted(ctx, x, halo, plain) if needs_weight else x
        if self.convolution is None:
            rows = _rows(dz)
            dx = (rows @ weight).reshape(x.shape) if needs_x else None
            dw = rows.t() @ _rows(y) if needs_weight else None
            db = rows.sum(0) if needs_bias else None
        else:
            stride, padding, dilation, groups = self.convolution
            bias_sizes, needs = [weight.shape[0]] if needs_bias else None, [needs_x, needs_weight, needs_bias]
            convolution_backward = _direct_convolution_backward if plain else _convolution_backward
            dx, dw, db = convolution_backward(
                dz, y, weight, bias_sizes, stride, padding, dilation, False, [0, 0], groups, needs
            )
        del y
        if dx is not None and plain:
            self.shift_backward_(dx)
        elif dx is not None:
            adjoint: Callable[[Tensor, str], Tensor] = temporal_shift_backward
            if self.shard is not None:
                adjoint = functools.partial(split_clips().sharded_shift_backward, shard=self.shard)
            dx = shift_tokens(dx, self.shift, self.num_prefix_tokens, adjoint)
        return dx, dw, db

    def _shifted(self, ctx: Any, x: Tensor, halo: Tensor | None, plain: bool) -> Tensor:
        """The shifted ``x``, without communication."""
        function: Callable[[Tensor, str], Tensor]
        if self.shard is None:
            function = shift_kernel if plain else temporal_shift
        else:
            split = split_clips()
            edges = split.Halo(halo, ctx.call).edges(self.num_prefix_tokens)
            function = functools.partial(split.sharded_shift, shard=self.shard, edges=edges)
        return shift_tokens(x, self.shift, self.num_prefix_tokens, function)

    def shift_backward_(self, dx: Tensor) -> None:
        """The adjoint of the shift, in place and without autograd."""
        moving = without_prefix(dx, self.num_prefix_tokens)
        if self.shard is None:
            temporal_shift_backward_(moving, self.shift)
            return
        split_clips().sharded_shift_backward_(moving, self.shift, self.shard)

    def _without_values(self, dz: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
        """In place of an input that was not saved. The strides decide which kernels of a convolution run."""
        if self.convolution is None:
            return torch.zeros((), dtype=dz.dtype, device=dz.device).expand(shape)  # takes no memory
        return torch.empty_strided(shape, strides, dtype=dz.dtype, device=dz.device)


def split_clips() -> Any:
    """Returns the module ``sharded_shift``, which a process without split clips need not import."""
    from tsm_jit.ops import sharded_shift

    return sharded_shift


def _rows(z: Tensor) -> Tensor:
    """``z.flatten(0, -2)``, also for many gradients at once."""
    return z.reshape(z.shape[:-1].numel(), z.shape[-1])


def is_plain_gradient(dz: Tensor) -> bool:
    """Whether ``dz`` is one gradient in memory, and no compiler, transform or dispatch mode must see all operators."""
    return type(dz) is Tensor and not is_batched_gradient(dz) and eager() and count_dispatch_modes() == 0


def compute_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """Returns the dtype in which PyTorch computes a layer, or None if the layer must run as PyTorch's own operators.

    It must under a dispatch mode, for subclasses of ``Tensor``, and if autocast does not cast dtypes that differ.
    """
    if type(x) is not Tensor or type(weight) not in DENSE or count_dispatch_modes():
        return None
    if bias is not None and type(bias) not in DENSE:
        return None
    device = "cuda" if x.is_cuda else x.device.type  # the latter takes 3 us
    if not x.is_cuda and not torch.amp.is_autocast_available(device):  # "meta", for example
        return None
    if torch.is_autocast_enabled(device):
        dtype, dtypes = torch.get_autocast_dtype(device), AUTOCAST_DTYPES
        plain = x.dtype in dtypes and weight.dtype in dtypes and (bias is None or bias.dtype in dtypes)
    else:
        dtype = x.dtype
        plain = weight.dtype is dtype and (bias is None or bias.dtype is dtype)
    return dtype if plain else None


def recomputing_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, dtype: torch.dtype
) -> Tensor | None:
    """Returns ``layer`` of the shifted ``x`` as one autograd function, or None where separate ones are needed.

    ``dtype`` is the :func:`compute_dtype`.
    """
    if not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    if dtype not in SUMMABLE_DTYPES or dtype.is_complex:  # PyTorch computes several convolutions of real numbers
        return None
    if layer.convolution is None and not x.is_contiguous():  # PyTorch may compute batches of products instead of one
        return None
    # Autograd cannot save a tensor of inference_mode. Of a slice the backward would keep the whole storage.
    if x.is_inference() or x.untyped_storage().nbytes() > x.nbytes:
        return None
    if x.dtype is not dtype:
        if decode(layer.shift).needs_sum:  # separate layers add gradients in the dtype of x
            return None
        x = x.to(dtype)
    weight = weight if weight.dtype is dtype else weight.to(dtype)
    if bias is not None:
        bias = unwrap_if_dead(bias if bias.dtype is dtype else bias.to(dtype))
    return _apply(x, unwrap_if_dead(weight), bias, layer)


class _RecomputingLayer(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.layer = layer
        save_inputs(ctx, x, weight, layer)
        z = layer.apply(shift_tokens(x, layer.shift, layer.num_prefix_tokens, shift_kernel), weight, bias)
        return _unsafe_view(z, z.shape) if z._is_view() else z  # autograd forbids to write into views made here

    @staticmethod
    def backward(ctx, dz):
        if dz is None:
            return None, None, None, None
        return *ctx.layer.backward(ctx, dz, ctx.needs_input_grad[2]), None


_apply = direct_apply(_RecomputingLayer)


def save_inputs(ctx: Any, x: Tensor, weight: Tensor, layer: Layer, halo: Tensor | None = None) -> None:
    """Saves inputs of an autograd function. The gradient of each of ``x`` and ``weight`` reads only the other."""
    # A result without a gradient gives none to the parameters, as in PyTorch. But ranks that share the frames wait for
    # the messages of each backward, so that one must run.
    ctx.set_materialize_grads(layer.shard is not None)
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    if not (needs_x and needs_weight):
        ctx.layouts = (x.shape, x.stride()), (weight.shape, weight.stride())
        if not needs_weight:
            halo = None
    marks = clip_length_marks(x, layer.shift)
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, halo, *marks)


def saved_inputs(ctx: Any, layer: Layer) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns what :func:`save_inputs` saved, if the clip length is still that of the forward."""
    x, weight, halo, *marks = ctx.saved_tensors
    check_marks(marks, layer.shift)
    return x, weight, halo
