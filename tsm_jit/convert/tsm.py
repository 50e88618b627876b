"""The network surgery of TSM (arXiv:1811.08383), under its names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal

from torch import nn

from tsm_jit._checks import integer, one_of
from tsm_jit.convert.architectures import RESNET, resnet_stages, stages_of
from tsm_jit.convert.non_local import make_non_local
from tsm_jit.convert.surgery import NeedsPool, check_clip_lengths, refuse_converted, shift_before
from tsm_jit.modules.non_local import MODES, Mode
from tsm_jit.modules.tsm import TemporalPool, TemporalShift, TokenShift, halved
from tsm_jit.plans import DIRECTIONS, Direction


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
    architecture, all_stages = stages_of(net)
    one_of("place", place, ("block", "blockres"))
    one_of("direction", direction, DIRECTIONS)
    if non_local is not None:
        one_of("non_local", non_local, MODES)
    refuse_converted(net)
    n_segment, n_div = integer("n_segment", n_segment, 1), integer("n_div", n_div, 1)
    if architecture is not RESNET and (temporal_pool or non_local is not None):
        kind = type(net).__name__
        raise ValueError(f"temporal_pool and non_local must be left alone for what is no ResNet, got them for {kind}")
    if not temporal_pool and any(isinstance(module, TemporalPool) for module in net.modules()):
        raise ValueError(f"temporal_pool must be True for a network that pools, got {temporal_pool!r}")
    later = halved(n_segment) if temporal_pool else n_segment
    stages = _chosen("stages", stages, range(1, len(all_stages) + 1))
    every = architecture.every(list(map(len, all_stages))) if place == "blockres" and blocks is None else 1
    blocks = _chosen("blocks", blocks, range(max(map(len, all_stages))))
    shift: Callable[..., TemporalShift] = TemporalShift
    options: dict[str, Any] = {"n_div": n_div, "inplace": inplace, "direction": direction}
    if architecture.tokens:
        shift, options["num_prefix_tokens"] = TokenShift, net.num_prefix_tokens
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
    if architecture is RESNET:
        check_clip_lengths(net, n_segment, later)
    if non_local is not None:
        make_non_local(net, later, mode=non_local)  # may refuse the network, so it comes first, and renames its blocks
        _, all_stages = stages_of(net)
    places: dict[str, Callable[[nn.Module], nn.Module]] = {}
    for number, i in chosen:
        block = all_stages[number - 1][i]
        target = block.name if place == "block" else block.first
        assert target is not None  # `chosen` has only blocks that can be shifted
        places[target] = functools.partial(shift, n_segment=n_segment if number == 1 else later, **options)
    shift_before(net, places)
    if temporal_pool:
        net.register_forward_pre_hook(NeedsPool())


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
    half = halved(n_segment)
    if isinstance(net.layer2, TemporalPool):
        raise ValueError("net must not be pooled already, but its layer2 is a TemporalPool")
    check_clip_lengths(net, n_segment, half)
    shift_before(net, {"layer2": functools.partial(TemporalPool, n_segment=n_segment)})
