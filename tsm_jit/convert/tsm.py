"""Inserts the shifts and pools of TSM into networks (arXiv:1811.08383)."""

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
    """Inserts a :class:`TemporalShift` into the residual blocks of a network, in place, as TSM does.

    The state dict gets TSM's keys (arXiv:1811.08383), with ``blockres`` for example ``layer1.0.conv1.net.weight``.

    Args:
        net: a ResNet, ResNeXt, Wide-ResNet, ResNet-D, RegNet, ConvNeXt, MobileNetV2, MobileNetV3 or EfficientNet of
            torchvision or timm, torchvision's MNASNet, mmaction2's ResNet, or timm's ViT, which gets a
            :class:`TokenShift`. Inverted residuals are shifted if they have a skip branch and an expansion layer. For
            other networks use :func:`tsm_jit.shift_before`.
        n_segment: the clip length in frames at the input of the network.
        n_div: a fold has ``C // n_div`` channels.
        place: ``"blockres"`` shifts before the first convolution of the residual branch (ViT: before ``attn.qkv``), so
            the skip branch reads unshifted frames. ``"block"`` shifts before the whole block. As in TSM, ``blockres``
            shifts only every second block of a ResNet if ``layer3`` has 23 blocks or more.
        temporal_pool: only for a ResNet: whether :func:`make_temporal_pool` halves the clips before ``layer2``. It must
            be called separately, before or after this function.
        inplace: as in :class:`TemporalShift`. The values are the same, with less memory and time.
        direction: as in :class:`TemporalShift`. Use ``"past"`` for streams without latency.
        stages: the stages to shift, numbered from 1 as in ``layer1``, by default all. A ViT has one stage.
        blocks: the blocks to shift in each stage, numbered from 0 as in ``layer1.0``, by default all.
        non_local: only for a ResNet: ``"embedded_gaussian"`` or ``"dot_product"`` also inserts non-local blocks, see
            :func:`tsm_jit.non_local.make_non_local`.

    Raises:
        TypeError: ``net`` has an unsupported architecture, or an argument has the wrong type.
        ValueError: ``net`` already has temporal shifts; an argument is outside its range; ``n_segment`` is odd and
            ``temporal_pool=True``; or ``temporal_pool`` does not match the pools of ``net``.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, 8, stages=[3], blocks=[0])  # one shift, in the first block of layer3
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
        raise ValueError(f"temporal_pool and non_local must not be set unless net is a ResNet, got them for {kind}")
    if not temporal_pool and any(isinstance(module, TemporalPool) for module in net.modules()):
        raise ValueError(f"temporal_pool must be True for a network with a temporal pool, got {temporal_pool!r}")
    later = halved(n_segment) if temporal_pool else n_segment
    stages = _selected("stages", stages, range(1, len(all_stages) + 1))
    every = architecture.every(list(map(len, all_stages))) if place == "blockres" and blocks is None else 1
    blocks = _selected("blocks", blocks, range(max(map(len, all_stages))))
    shift: Callable[..., TemporalShift] = TemporalShift
    options: dict[str, Any] = {"n_div": n_div, "inplace": inplace, "direction": direction}
    if architecture.tokens:
        shift, options["num_prefix_tokens"] = TokenShift, net.num_prefix_tokens
    selected = [
        (number, i)
        for number, stage in enumerate(all_stages, 1)
        for i, block in enumerate(stage)
        if number in stages and i in blocks and i % every == 0 and block.first is not None
    ]
    if not selected:
        raise ValueError(
            f"stages and blocks must select a block that can be shifted, got {list(stages)} and {list(blocks)}"
        )
    if architecture is RESNET:
        check_clip_lengths(net, n_segment, later)
    if non_local is not None:
        make_non_local(net, later, mode=non_local)  # comes first, since it may raise and renames blocks
        _, all_stages = stages_of(net)
    places: dict[str, Callable[[nn.Module], nn.Module]] = {}
    for number, i in selected:
        block = all_stages[number - 1][i]
        target = block.name if place == "block" else block.first
        assert target is not None  # `selected` has only blocks that can be shifted
        places[target] = functools.partial(shift, n_segment=n_segment if number == 1 else later, **options)
    shift_before(net, places)
    if temporal_pool:
        net.register_forward_pre_hook(NeedsPool())


def _selected(name: str, selected: Collection[int] | None, valid: range) -> Collection[int]:
    if selected is None:
        return valid
    if not isinstance(selected, Collection) or isinstance(selected, (str, bytes)):
        raise TypeError(f"{name} must be a collection of integers, got {selected!r}")
    numbers = [integer(name, each) for each in selected]
    if not set(numbers) <= set(valid):
        raise ValueError(f"{name} must be from {valid[0]} to {valid[-1]} for this network, got {numbers}")
    return numbers


def make_temporal_pool(net: nn.Module, n_segment: int) -> None:
    """Inserts a :class:`TemporalPool` before ``layer2`` of a ResNet, in place, as TSM does (arXiv:1811.08383).

    The state dict gets TSM's keys for ``layer2``, for example ``layer2.net.0.conv1.weight``.

    Args:
        net: a ResNet, with or without temporal shifts.
        n_segment: the clip length in frames at the input of the network, an even number.

    Raises:
        TypeError: ``net`` is not a ResNet, or ``n_segment`` is not an integer.
        ValueError: ``n_segment`` is odd or does not match the temporal modules of ``net``, or ``net`` already has a
            temporal pool.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8, temporal_pool=True)
        tsm_jit.make_temporal_pool(net, n_segment=8)
    """
    resnet_stages(net)
    half = halved(n_segment)
    if isinstance(net.layer2, TemporalPool):
        raise ValueError("net must not have a temporal pool yet, got a TemporalPool as layer2")
    check_clip_lengths(net, n_segment, half)
    shift_before(net, {"layer2": functools.partial(TemporalPool, n_segment=n_segment)})
