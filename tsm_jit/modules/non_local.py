"""The non-local block of TSM's networks (Wang, Girshick, Gupta, He: Non-local Neural Networks, arXiv:1711.07971).

Names and state-dict keys are those of TSM's ``ops/non_local.py``: ``layer2.0.block.conv1.weight``,
``layer2.0.nl.theta.weight``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsm_jit._checks import integer, one_of
from tsm_jit.modules.base import ClipModule

Mode = Literal["embedded_gaussian", "dot_product"]
MODES = ("embedded_gaussian", "dot_product")


class NONLocalBlock3D(nn.Module):
    """Every position of a clip gets, added, what all positions say to it: ``[N, C, T, H, W]`` to the same.

    With the defaults for a start, nothing: ``W`` ends in a batch normalisation whose weight is 0.

    Args:
        in_channels: C.
        inter_channels: of the embeddings ``theta``, ``phi`` and ``g``; by default ``C // 2``.
        sub_sample: ``phi`` and ``g`` are halved in height and width.
        bn_layer: a batch normalisation ends ``W``.
        mode: how positions are compared: ``"embedded_gaussian"``, the softmax of ``theta . phi``, or
            ``"dot_product"``, ``theta . phi`` divided by the number of positions.

    Raises:
        TypeError, ValueError: channels that are no integer from 1 up; an unknown ``mode``; on a call, an input that is
            not five-dimensional.
    """

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        sub_sample: bool = True,
        bn_layer: bool = True,
        *,
        mode: Mode = "embedded_gaussian",
    ):
        super().__init__()
        one_of("mode", mode, MODES)
        channels = integer("in_channels", in_channels, 1)
        inner = max(1, channels // 2) if inter_channels is None else integer("inter_channels", inter_channels, 1)
        self.mode = mode
        self.theta = nn.Conv3d(channels, inner, 1)
        self.phi: nn.Module = nn.Conv3d(channels, inner, 1)
        self.g: nn.Module = nn.Conv3d(channels, inner, 1)
        if sub_sample:
            self.phi = nn.Sequential(self.phi, nn.MaxPool3d((1, 2, 2)))
            self.g = nn.Sequential(self.g, nn.MaxPool3d((1, 2, 2)))
        self.W: nn.Module = nn.Conv3d(inner, channels, 1)
        last: Any = self.W
        if bn_layer:
            last = nn.BatchNorm3d(channels)
            self.W = nn.Sequential(self.W, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.dim() != 5:
            raise ValueError(f"x must be clips [N, C, T, H, W], got {list(x.shape)}")
        theta, phi, g = (embed(x).flatten(2).transpose(1, 2) for embed in (self.theta, self.phi, self.g))
        if self.mode == "dot_product":
            y = theta @ (
                phi.transpose(1, 2) @ g / phi.shape[1]
            )  # in this order, of the size of channels, not positions
        else:
            y = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)
        return x + self.W(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class NL3DWrapper(ClipModule):
    """A residual block, then a :class:`NONLocalBlock3D` on its clips: frames ``[N*T, C, H, W]``, ``T = n_segment``.

    Raises:
        TypeError, ValueError: ``block`` ends in no batch normalisation, ``bn3`` or ``bn2``; as
            :class:`NONLocalBlock3D`; on a call, ``n_segment`` does not divide ``N*T``.
    """

    def __init__(self, block: nn.Module, n_segment: int, *, sub_sample: bool = True, mode: Mode = "embedded_gaussian"):
        super().__init__()
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if not isinstance(last, _BatchNorm) or last.weight is None:
            raise TypeError(
                "block must be a residual block that ends in a batch normalisation with weights, bn3 or bn2, "
                f"got {type(block).__name__} with {type(last).__name__}"
            )
        self.block = block
        self.nl = NONLocalBlock3D(last.num_features, sub_sample=sub_sample, mode=mode)
        self.nl.to(last.weight.device, last.weight.dtype).train(block.training)
        self.n_segment = integer("n_segment", n_segment, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        length = self.checked_n_segment()
        if isinstance(x, Tensor) and x.shape[0] % length != 0:  # no check for a proxy of torch.fx
            raise ValueError(f"n_segment must divide the frames of x, got {length} for {list(x.shape)}")
        clips = x.unflatten(0, (-1, length)).transpose(1, 2)
        return self.nl(clips).transpose(1, 2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"n_segment={self.n_segment}"
