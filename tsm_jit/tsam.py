"""The module and network surgery of TSAM, temporal shift with an audio modality, under its names.

Names, constructors, state-dict keys and placement are those of https://github.com/aav-antonov/TSAM. A clip is
``n_segment`` segments, of which the first ``n_segment_shifted`` are video frames that are shifted among each other; the
others, spectrograms of the sound as images, pass as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from tsm_jit._checks import integer
from tsm_jit._families import resnet_stages
from tsm_jit._networks import ShiftedModule, refuse_converted, shift_before
from tsm_jit.functional import encode_temporal


class TemporalShift(ShiftedModule):
    """Shift, then ``layer``: the drop-in for TSAM's class of this name (https://github.com/aav-antonov/TSAM).

    The input is frames ``[N*T, C, *]``, ``T = n_segment``, of any dtype; the output is that of ``layer``. The shift is
    :func:`tsm_jit.temporal_shift` with ``padding="keep"``: a frame whose source does not exist keeps its own value.

    Args:
        layer: the module that receives the shifted frames, typically a block's first convolution.
        n_segment: the clip length in segments, video and audio together.
        n_segment_shifted: the leading segments that are shifted.
        f_div: 2 or more; ``C // f_div`` channels move each way, in ``shift_depth`` folds of equal width.
        shift_depth: how many frames away the farthest fold reads, 1 to 4 in TSAM.
        inplace: keep no second activation, as in :class:`tsm_jit.TemporalShift`: the input holds the same bits
            afterwards, outputs and gradients are exact.

    Raises:
        TypeError, ValueError: an argument is no integer or outside its range; on a call, as
            :func:`tsm_jit.temporal_shift`.

    Example::

        block.conv1 = TemporalShift(block.conv1, n_segment=9, n_segment_shifted=8, f_div=8, shift_depth=2)
    """

    def __init__(
        self,
        layer: nn.Module,
        n_segment: int,
        n_segment_shifted: int,
        f_div: int,
        shift_depth: int,
        *,
        inplace: bool = False,
    ):
        super().__init__()
        self.layer = layer
        self.n_segment = integer("n_segment", n_segment, 1)
        self.n_segment_shifted = integer("n_segment_shifted", n_segment_shifted, 1)
        self.f_div = integer("f_div", f_div, 2)  # each way, so that no plan is wider than C
        self.shift_depth = integer("shift_depth", shift_depth, 1)
        self.inplace = inplace

    def shift_of(self, x: Tensor) -> str:
        return encode_temporal(x, self.n_segment, self.f_div, self.n_segment_shifted, self.shift_depth, "keep")

    def forward(self, x: Tensor) -> Tensor:
        return self.call_shifted(x, self.shift_of(x))

    def extra_repr(self) -> str:
        return (
            f"n_segment={self.n_segment}, n_segment_shifted={self.n_segment_shifted}, f_div={self.f_div}, "
            f"shift_depth={self.shift_depth}, inplace={self.inplace}"
        )


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
    """Puts a :class:`TemporalShift` before ``conv1`` of blocks of a ResNet, in place on the network, as TSAM does.

    In each stage the blocks ``i`` with ``i % n_insert == m_insert`` are shifted. Keys of the state dict become those of
    TSAM: ``layer1.0.conv1.layer.weight``.

    Args:
        net: a ResNet with stages ``layer1`` to ``layer4`` of blocks with a ``conv1``: those of torchvision and timm.
        n_segments, n_segment_shifted, f_div, shift_depth, inplace: as in :class:`TemporalShift`.
        n_insert: every so many blocks of a stage are shifted, all with 1.
        m_insert: which of them, ``0..n_insert - 1``.

    Raises:
        TypeError: ``net`` has no such stages. ValueError: an argument outside its range; a network that was converted
            already.
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

    shift_before(net, {block.first: shift for stage in stages for block in stage[m_insert::n_insert]})
