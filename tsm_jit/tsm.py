"""The modules and network surgery of TSM (Lin, Gan, Han: Temporal Shift Module, arXiv:1811.08383), under its names.

Names, constructors and state-dict keys are those of https://github.com/mit-han-lab/temporal-shift-module, so that its
users change an import and keep their checkpoints.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tsm_jit._checks import integer, one_of
from tsm_jit._networks import ClipModule, ShiftedModule, refuse_converted, residual_stages
from tsm_jit.functional import encode_temporal, temporal_shift
from tsm_jit.plans import DIRECTIONS, Direction


class TemporalShift(ShiftedModule):
    """Shift, then ``net``: the drop-in for TSM's class of this name (arXiv:1811.08383).

    The input is frames ``[N*T, C, *]``, ``T = n_segment``, of any dtype; the output is that of ``net``. The shift is
    :func:`tsm_jit.temporal_shift` with ``fold_div=n_div`` and zero padding.

    Args:
        net: the module that receives the shifted frames, typically a block's first convolution.
        n_segment: the clip length in frames.
        n_div: a fold is ``C // n_div`` channels.
        inplace: keep no second activation. Unlike TSM's flag of this name it never changes what any other reader of
            the input sees, such as the skip branch of a residual block: the input holds the same bits afterwards, and
            outputs and gradients are exact. While autograd records, ``net`` sees a shifted copy that dies with the
            call; the backward shifts the input again. Otherwise the input is shifted in place, ``net`` runs, and the
            shift is undone; until then no other thread or CUDA stream may use the input. A ``net`` that might write
            into its input or return it (all but ``nn.Conv1d/2d/3d`` and ``nn.Linear`` without hooks) gets a copy.
        vect: accepted for compatibility and ignored: the vector width follows from the alignment of the tensor.
        direction: ``"both"``; or ``"past"``, TSM's uni-directional form, where one fold reads the previous frame and
            none the next one, for streams (:mod:`tsm_jit.online`); or ``"future"``.

    Raises:
        TypeError, ValueError: on a call, as :func:`tsm_jit.temporal_shift`.

    Example::

        block.conv1 = TemporalShift(block.conv1, n_segment=8, n_div=8, inplace=True)
    """

    def __init__(
        self,
        net: nn.Module,
        n_segment: int = 3,
        n_div: int = 8,
        inplace: bool = False,
        vect: Any = None,
        *,
        direction: Direction = "both",
    ):
        super().__init__()
        self.net = net
        self.n_segment = n_segment
        self.fold_div = n_div
        self.inplace = inplace
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        shift = encode_temporal(x, self.n_segment, self.fold_div, direction=self.direction)
        return self.call_shifted(self.net, x, shift)

    @staticmethod
    def shift(x: Tensor, n_segment: int, fold_div: int = 3, inplace: bool = False, vect: Any = None) -> Tensor:
        """:func:`tsm_jit.temporal_shift`. ``inplace`` here is PyTorch's: ``x`` itself is shifted and returned."""
        return temporal_shift(x, n_segment, fold_div, inplace=inplace)

    def extra_repr(self) -> str:
        direction = "" if self.direction == "both" else f", direction={self.direction!r}"
        return f"n_segment={self.n_segment}, fold_div={self.fold_div}, inplace={self.inplace}{direction}"


class TemporalPool(ClipModule):
    """Halves the clip length, then ``net``: TSM's temporal pooling (arXiv:1811.08383).

    Max pooling over time with kernel 3, stride 2 and padding 1: ``[N*T, C, H, W]`` to ``[N*(T/2), C, H, W]``, with
    ``T = n_segment`` even.
    """

    halves = True

    def __init__(self, net: nn.Module, n_segment: int):
        super().__init__()
        self.net = net
        self.n_segment = n_segment

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.temporal_pool(x, self.n_segment))

    @staticmethod
    def temporal_pool(x: Tensor, n_segment: int) -> Tensor:
        """The pooling alone. Raises ``ValueError`` if ``n_segment`` is odd or does not divide ``N*T``."""
        _halved(n_segment)
        if x.dim() != 4 or x.shape[0] % n_segment != 0:
            raise ValueError(
                f"n_segment must divide the frames of x [N*T, C, H, W], got {n_segment} for {list(x.shape)}"
            )
        clips = x.unflatten(0, (-1, n_segment)).transpose(1, 2)
        pooled = F.max_pool3d(clips, kernel_size=(3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))
        return pooled.transpose(1, 2).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"n_segment={self.n_segment}"


def _halved(n_segment: Any) -> int:
    n_segment = integer("n_segment", n_segment)
    if n_segment < 2 or n_segment % 2 != 0:
        raise ValueError(f"n_segment must be even to be halved, got {n_segment}")
    return n_segment // 2


def make_temporal_shift(
    net: nn.Module,
    n_segment: int,
    n_div: int = 8,
    place: Literal["block", "blockres"] = "blockres",
    temporal_pool: bool = False,
    *,
    inplace: bool = False,
    direction: Direction = "both",
) -> None:
    """Puts a :class:`TemporalShift` into every residual block of a ResNet, in place on the network, as TSM does.

    Keys of the state dict become those of TSM: ``layer1.0.conv1.net.weight`` for ``blockres``.

    Args:
        net: a ResNet with stages ``layer1`` to ``layer4`` of blocks with a ``conv1``: those of torchvision (ResNet,
            ResNeXt, Wide-ResNet), and timm's.
        n_segment: the clip length in frames at the network's input.
        n_div: a fold is ``C // n_div`` channels.
        place: ``"blockres"``, before the first convolution of a block, on the residual branch, where the skip branch
            still sees the unshifted frames; or ``"block"``, before the whole block. As in TSM, ``blockres`` shifts only
            every second block of a network whose ``layer3`` has 23 blocks or more (ResNet-101).
        temporal_pool: the clip is halved before ``layer2`` (see :func:`make_temporal_pool`), so that the later stages
            shift clips of ``n_segment // 2``.
        inplace: as in :class:`TemporalShift`: same values, less memory and time.
        direction: as in :class:`TemporalShift`: ``"past"`` for networks that are to run on a stream.

    Raises:
        TypeError, ValueError: ``net`` has no such stages or was converted already; an unknown ``place`` or
            ``direction``; an ``n_segment`` or ``n_div`` that is no integer from 1 up, or odd and to be halved.
    """
    stages = residual_stages(net)
    one_of("place", place, ("block", "blockres"))
    one_of("direction", direction, DIRECTIONS)
    refuse_converted(net)
    n_segment, n_div = integer("n_segment", n_segment, 1), integer("n_div", n_div, 1)
    later = _halved(n_segment) if temporal_pool else n_segment
    every = 2 if place == "blockres" and len(stages[2]) >= 23 else 1
    for index, stage in enumerate(stages):
        segments = n_segment if index == 0 else later
        for i, block in enumerate(stage):
            if place == "block":
                stage[i] = TemporalShift(block, segments, n_div, inplace, direction=direction)
            elif i % every == 0:
                block.conv1 = TemporalShift(block.conv1, segments, n_div, inplace, direction=direction)


def make_temporal_pool(net: nn.Module, n_segment: int) -> None:
    """Halves the clip before ``layer2`` of a ResNet, in place on the network, as TSM does (key ``layer2.net``).

    Raises:
        TypeError, ValueError: ``net`` is no ResNet or is pooled already; ``n_segment`` is no even integer.
    """
    residual_stages(net)
    _halved(n_segment)
    if isinstance(net.layer2, TemporalPool):
        raise ValueError("net must not be pooled already, but its layer2 is a TemporalPool")
    net.layer2 = TemporalPool(net.layer2, n_segment)
