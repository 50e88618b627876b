"""A convolution, an addition and a ReLU in one pass, for inference with norms folded into the convolutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tsm_jit.ops.compat import eager
from tsm_jit.ops.recomputing_layer import Layer
from tsm_jit.ops.shift_conv import shifted_layer
from tsm_jit.ops.temporal_shift import temporal_shift

_library = torch.library.Library("tsm_jit", "FRAGMENT")
_library.define(
    "conv_relu(Tensor x, Tensor weight, Tensor bias, Tensor? add, str? shift, int[] stride, int[] padding, "
    "int[] dilation, int groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def conv_relu(x: Tensor, conv: torch.nn.Conv2d, add: Tensor | None = None, shift: str | None = None) -> Tensor:
    """Computes ``relu(conv(temporal_shift(x)) + add)`` without gradients, for a ``conv`` with a bias.

    Args:
        x: frames ``[N*T, C, H, W]``.
        conv: a convolution with zero padding.
        add: like the result, or None.
        shift: an encoded shift, or None.
    """
    arguments: Any = (x, conv.weight, conv.bias, add, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
    return _compute(*arguments) if eager() else torch.ops.tsm_jit.conv_relu(*arguments)


def _compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    add: Tensor | None,
    shift: str | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if shift is not None:
        if add is None and eager():
            layer = Layer(shift, 0, (tuple(stride), tuple(padding), tuple(dilation), groups))
            z = shifted_layer(x, weight, bias, layer, relu=True)
            if z is not None:
                return z.contiguous(memory_format=_layout(x))
        x = temporal_shift(x, shift)
    if x.is_cuda and groups == 1 and x.dtype in _FUSED_BY_CUDNN and torch.backends.cudnn.is_available():
        if add is None:
            z = torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        else:
            z = torch.cudnn_convolution_add_relu(x, weight, add, 1, bias, stride, padding, dilation, groups)
    else:
        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        z = (z if add is None else z.add_(add)).relu_()
    return z.contiguous(memory_format=_layout(x))


_FUSED_BY_CUDNN = (torch.float16, torch.bfloat16, torch.float32)


def _layout(x: Tensor) -> torch.memory_format:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _fake(x, weight, bias, add, shift, stride, padding, dilation, groups) -> Tensor:
    z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return z.contiguous(memory_format=_layout(x))


_library.impl("conv_relu", _compute, "CompositeExplicitAutograd")
_library.impl("conv_relu", _fake, "Meta")
