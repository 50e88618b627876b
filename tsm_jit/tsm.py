"""The modules and network surgery of TSM (Lin, Gan, Han: Temporal Shift Module, arXiv:1811.08383), under its names.

Names, constructors and state-dict keys are those of https://github.com/mit-han-lab/temporal-shift-module, so that its
users change an import and keep their checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tsm_jit._checks import integer, one_of
from tsm_jit._families import RESNET, VIT, resnet_stages, stages_of
from tsm_jit._networks import ClipModule, ShiftedModule, check_clip_lengths, refuse_converted, shift_before
from tsm_jit.functional import encode_temporal, temporal_shift
from tsm_jit.non_local import MODES, Mode, make_non_local
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

    def shift_of(self, x: Tensor) -> str:
        return encode_temporal(x, self.n_segment, self.fold_div, direction=self.direction)

    def forward(self, x: Tensor) -> Tensor:
        return self.call_shifted(x, self.shift_of(x))

    @staticmethod
    def shift(x: Tensor, n_segment: int, fold_div: int = 3, inplace: bool = False, vect: Any = None) -> Tensor:
        """:func:`tsm_jit.temporal_shift`. ``inplace`` here is PyTorch's: ``x`` itself is shifted and returned."""
        return temporal_shift(x, n_segment, fold_div, inplace=inplace)

    def extra_repr(self) -> str:
        direction = "" if self.direction == "both" else f", direction={self.direction!r}"
        return f"n_segment={self.n_segment}, fold_div={self.fold_div}, inplace={self.inplace}{direction}"


class TokenShift(TemporalShift):
    """Shift of the tokens of a vision transformer, then ``net``: TSM (arXiv:1811.08383) along another dimension.

    The input is ``[N*T, L, C]``, ``T = n_segment``, of any dtype; the output is that of ``net``. The first
    ``num_prefix_tokens`` of the L tokens, such as the class token, stay.

    Args:
        net: the module that receives the tokens, typically the ``nn.Linear`` before an attention.
        num_prefix_tokens: 0 or more.
        n_segment, n_div, inplace, direction: as in :class:`TemporalShift`.

    Raises:
        TypeError, ValueError: ``num_prefix_tokens`` is no integer from 0 up; on a call, an input that is not
            three-dimensional; and as :func:`tsm_jit.temporal_shift`.
    """

    def __init__(
        self,
        net: nn.Module,
        n_segment: int,
        n_div: int = 8,
        inplace: bool = False,
        *,
        direction: Direction = "both",
        num_prefix_tokens: int = 1,
    ):
        super().__init__(net, n_segment, n_div, inplace, direction=direction)
        self.num_prefix_tokens = integer("num_prefix_tokens", num_prefix_tokens, 0)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"x must be tokens [N*T, L, C], got {list(x.shape)}")
        shift = encode_temporal(
            x[:, self.num_prefix_tokens :], self.n_segment, self.fold_div, direction=self.direction, channel_dim=-1
        )
        return self.call_shifted(x, shift, still=self.num_prefix_tokens)


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
    stages: Collection[int] | None = None,
    blocks: Collection[int] | None = None,
    non_local: Mode | None = None,
) -> None:
    """Puts a :class:`TemporalShift` into the residual blocks of a network, in place on the network, as TSM does.

    Keys of the state dict become those of TSM: ``layer1.0.conv1.net.weight`` for ``blockres``.

    Args:
        net: one of these, of torchvision or timm: ResNet, ResNeXt, Wide-ResNet, ResNet-D, RegNet, ConvNeXt, MobileNetV2
            and V3, EfficientNet (of inverted residuals only those are shifted that skip and expand), or timm's ViT,
            which gets a :class:`TokenShift`. For others there is :func:`tsm_jit.shift_before`.
        n_segment: the clip length in frames at the network's input.
        n_div: a fold is ``C // n_div`` channels.
        place: ``"blockres"``, before the first convolution of a block (ViT: before ``attn.qkv``), on the residual
            branch, where the skip branch still sees the unshifted frames; or ``"block"``, before the whole block. As in
            TSM, ``blockres`` shifts only every second block of a ResNet whose ``layer3`` has 23 blocks or more.
        temporal_pool: of a ResNet. The later stages shift clips of ``n_segment // 2``; :func:`make_temporal_pool`,
            called as well, halves them before ``layer2``.
        inplace: as in :class:`TemporalShift`: same values, less memory and time.
        direction: as in :class:`TemporalShift`: ``"past"`` for networks that are to run on a stream.
        stages: the stages to shift, from 1 as in ``layer1``; all without. A ViT is one stage.
        blocks: the blocks to shift in each of them, from 0 as in ``layer1.0``; all without.
        non_local: of a ResNet. ``"embedded_gaussian"`` or ``"dot_product"``: non-local blocks as well, see
            :func:`tsm_jit.non_local.make_non_local`.

    Raises:
        TypeError, ValueError: ``net`` is of no such family, or was converted already; an unknown ``place``,
            ``direction`` or ``non_local``; an ``n_segment`` or ``n_div`` that is no integer from 1 up, or odd and to be
            halved; ``stages`` or ``blocks`` that the network does not have; ``temporal_pool`` that is not as the
            network pools.

    Example::

        make_temporal_shift(net, 8, stages=[3], blocks=[0])  # a single shift, before the third stage
    """
    family, all_stages = stages_of(net)
    one_of("place", place, ("block", "blockres"))
    one_of("direction", direction, DIRECTIONS)
    if non_local is not None:
        one_of("non_local", non_local, MODES)
    refuse_converted(net)
    n_segment, n_div = integer("n_segment", n_segment, 1), integer("n_div", n_div, 1)
    if family is not RESNET and (temporal_pool or non_local is not None):
        kind = type(net).__name__
        raise ValueError(f"temporal_pool and non_local must be left alone for what is no ResNet, got them for {kind}")
    if not temporal_pool and any(isinstance(module, TemporalPool) for module in net.modules()):
        raise ValueError(f"temporal_pool must be True for a network that pools, got {temporal_pool!r}")
    later = _halved(n_segment) if temporal_pool else n_segment
    stages = _chosen("stages", stages, range(1, len(all_stages) + 1))
    every = 2 if family is RESNET and place == "blockres" and blocks is None and len(all_stages[2]) >= 23 else 1
    blocks = _chosen("blocks", blocks, range(max(map(len, all_stages))))
    shift = functools.partial(TemporalShift, n_div=n_div, inplace=inplace, direction=direction)
    if family is VIT:
        shift = functools.partial(TokenShift, **shift.keywords, num_prefix_tokens=net.num_prefix_tokens)
    chosen = [
        (number, i)
        for number, stage in enumerate(all_stages, 1)
        for i, block in enumerate(stage)
        if number in stages and i in blocks and i % every == 0 and block.first is not None
    ]
    if not chosen:
        raise ValueError(
            f"stages and blocks must choose a block that can be shifted, got {list(stages)} and {list(blocks)}"
        )
    if family is RESNET:
        check_clip_lengths(net, n_segment, later)
    if non_local is not None:
        make_non_local(net, later, mode=non_local)  # may refuse the network, so it comes first, and renames its blocks
        _, all_stages = stages_of(net)
    places = {}
    for number, i in chosen:
        block = all_stages[number - 1][i]
        around = functools.partial(shift, n_segment=n_segment if number == 1 else later)
        places[block.name if place == "block" else block.first] = around
    shift_before(net, places)


def _chosen(name: str, chosen: Collection[int] | None, there: range) -> Collection[int]:
    if chosen is None:
        return there
    if not isinstance(chosen, Collection) or isinstance(chosen, (str, bytes)):
        raise TypeError(f"{name} must be a collection of integers, got {chosen!r}")
    numbers = [integer(name, each) for each in chosen]
    if not set(numbers) <= set(there):
        raise ValueError(f"{name} must be from {there[0]} to {there[-1]} for this network, got {numbers}")
    return numbers


def make_temporal_pool(net: nn.Module, n_segment: int) -> None:
    """Halves the clip before ``layer2`` of a ResNet, in place on the network, as TSM does (key ``layer2.net``).

    Raises:
        TypeError, ValueError: ``net`` is no ResNet or is pooled already; ``n_segment`` is no even integer, or what
            the network already holds is not for such clips.
    """
    resnet_stages(net)
    half = _halved(n_segment)
    if isinstance(net.layer2, TemporalPool):
        raise ValueError("net must not be pooled already, but its layer2 is a TemporalPool")
    check_clip_lengths(net, n_segment, half)
    shift_before(net, {"layer2": functools.partial(TemporalPool, n_segment=n_segment)})
