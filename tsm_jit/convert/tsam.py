"""Inserts the shifts of TSAM into networks (https://github.com/aav-antonov/TSAM)."""

from __future__ import annotations

from torch import nn

from tsm_jit._checks import integer
from tsm_jit.convert.architectures import resnet_stages
from tsm_jit.convert.surgery import refuse_converted, shift_before
from tsm_jit.modules.tsam import TemporalShift


def make_Shift(
    net: nn.Module,
    n_segments: int,
    n_segment_shifted: int,
    f_div: int,
    shift_depth: int,
    n_insert: int,
    m_insert: int,
    *,
    inplace: bool = False,
) -> None:
    """Inserts a :class:`TemporalShift` before ``conv1`` of residual blocks of a ResNet, in place, as TSAM does.

    In each stage the blocks ``i`` with ``i % n_insert == m_insert`` are shifted. The state dict gets TSAM's keys
    (https://github.com/aav-antonov/TSAM): ``layer1.0.conv1.layer.weight``.

    Args:
        net: a ResNet of torchvision, timm or mmaction2.
        n_segments, n_segment_shifted, f_div, shift_depth, inplace: as in :class:`TemporalShift`.
        n_insert: the distance between shifted blocks, 1 to shift all blocks.
        m_insert: the first shifted block of each stage, ``0..n_insert - 1``.

    Raises:
        TypeError: ``net`` is not a ResNet, or a number is not an integer.
        ValueError: an argument is outside its range, or ``net`` already has temporal shifts.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.tsam.make_Shift(net, 9, 8, f_div=8, shift_depth=2, n_insert=1, m_insert=0)
    """
    stages = resnet_stages(net)
    n_segments = integer("n_segments", n_segments, 1)
    n_segment_shifted = integer("n_segment_shifted", n_segment_shifted, 1)
    if n_segment_shifted > n_segments:
        raise ValueError(f"n_segment_shifted must be at most n_segments={n_segments}, got {n_segment_shifted}")
    f_div, shift_depth = integer("f_div", f_div, 2), integer("shift_depth", shift_depth, 1)
    n_insert, m_insert = integer("n_insert", n_insert, 1), integer("m_insert", m_insert, 0)
    if m_insert >= n_insert:
        raise ValueError(f"m_insert must be less than n_insert={n_insert}, got {m_insert}")
    refuse_converted(net)

    def shift(layer: nn.Module) -> TemporalShift:
        return TemporalShift(layer, n_segments, n_segment_shifted, f_div, shift_depth, inplace=inplace)

    shift_before(net, {block.first: shift for stage in stages for block in stage[m_insert::n_insert] if block.first})
