"""The non-local block of TSM's networks (Wang, Girshick, Gupta, He: Non-local Neural Networks, arXiv:1711.07971).

It has the names and state-dict keys of TSM's ``ops/non_local.py``: ``layer2.0.block.conv1.weight``,
``layer2.0.nl.theta.weight``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsm_jit import ops
from tsm_jit._checks import integer, one_of
from tsm_jit.modules.base import ClipModule

Mode = Literal["embedded_gaussian", "dot_product"]
MODES = ("embedded_gaussian", "dot_product")


class NONLocalBlock3D(nn.Module):
    """Self-attention over all positions of a clip, with a residual connection (arXiv:1711.07971).

    Input and output are floating-point clips ``[N, C, T, H, W]``. After initialization the block is the identity: the
    last layer of ``W`` has weight 0 and bias 0.

    Args:
        in_channels: the number of input channels ``C``.
        inter_channels: the number of channels of the embeddings ``theta``, ``phi`` and ``g``, by default ``C // 2``.
        sub_sample: whether max pooling halves the height and width of ``phi`` and ``g``.
        bn_layer: whether ``W`` ends in a batch normalization.
        mode: the weight of a pair of positions: ``"embedded_gaussian"``, the softmax of ``theta . phi``, or
            ``"dot_product"``, ``theta . phi`` divided by the number of positions.

    Raises:
        TypeError: a number of channels is not an integer.
        ValueError: a number of channels is below 1, or ``mode`` is unknown. In ``forward``: the input is not
            five-dimensional.

    Example::

        block = tsm_jit.non_local.NONLocalBlock3D(64)
        y = block(torch.randn(2, 64, 8, 14, 14))  # [2, 64, 8, 14, 14]
    """

    mode: Mode = "embedded_gaussian"  # in the class, for modules that were saved without it

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
            # This order needs a [channels, channels] matrix, the other one [positions, positions].
            y = theta @ (phi.transpose(1, 2) @ g / phi.shape[1])
        else:
            y = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)
        return x + self.W(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class NL3DWrapper(ClipModule):
    """A residual block followed by a :class:`NONLocalBlock3D` (arXiv:1711.07971).

    Input and output are frames ``[N*T, C, H, W]``, where ``T = n_segment``.

    Args:
        block: the residual block. Its last layer must be a batch normalization ``bn3`` or ``bn2``.
        n_segment: the clip length in frames.
        sub_sample, mode: as in :class:`NONLocalBlock3D`.

    Raises:
        TypeError: ``block`` does not end in a batch normalization, or ``n_segment`` is not an integer.
        ValueError: ``n_segment`` is below 1, or ``mode`` is unknown. In ``forward``: ``n_segment`` does not divide
            ``N*T``.

    Example::

        net = torchvision.models.resnet50()
        net.layer2[0] = tsm_jit.non_local.NL3DWrapper(net.layer2[0], n_segment=8)
    """

    def __init__(self, block: nn.Module, n_segment: int, *, sub_sample: bool = True, mode: Mode = "embedded_gaussian"):
        super().__init__()
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if not isinstance(last, _BatchNorm) or last.weight is None:
            raise TypeError(
                "block must be a residual block that ends in a batch normalization with weights, bn3 or bn2, "
                f"got {type(block).__name__} with {type(last).__name__}"
            )
        self.block = block
        self.nl = NONLocalBlock3D(last.num_features, sub_sample=sub_sample, mode=mode)
        self.nl.to(last.weight.device, last.weight.dtype).train(block.training)
        self.n_segment = integer("n_segment", n_segment, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        length = self.checked_n_segment(x)
        if isinstance(x, Tensor) and x.shape[0] % length != 0:  # no check for a proxy of torch.fx
            raise ValueError(f"n_segment must divide the frames of x, got {length} for {list(x.shape)}")
        clips = x.unflatten(0, (-1, length)).transpose(1, 2)
        return ops.save_clip_length_mark(self.nl(clips).transpose(1, 2).flatten(0, 1), length)

    def extra_repr(self) -> str:
        return f"n_segment={self.n_segment}"
