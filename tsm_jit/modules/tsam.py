"""The module of TSAM, temporal shift with an audio modality (https://github.com/aav-antonov/TSAM)."""

from __future__ import annotations

from torch import Tensor, nn

from tsm_jit._checks import integer
from tsm_jit.functional import encode_temporal, temporal_shift
from tsm_jit.modules.base import ShiftedModule


class TemporalShift(ShiftedModule):
    """Shifts its input, then calls ``layer``: drop-in for TSAM's class (https://github.com/aav-antonov/TSAM).

    The input is frames ``[N*T, C, *]`` of any dtype, where ``T = n_segment``. The output is the output of ``layer``.
    The shift is :func:`tsm_jit.temporal_shift` with ``padding="keep"``: a frame without a source frame keeps its value.

    Args:
        layer: the module that receives the shifted frames, usually the first convolution of a residual block.
        n_segment: the clip length in segments, video and audio together.
        n_segment_shifted: the number of leading segments that are shifted.
        f_div: 2 or more. ``C // f_div`` channels move in each direction, in ``shift_depth`` folds of equal width.
        shift_depth: the largest distance in frames, 1 to 4 in TSAM.
        inplace: store no second activation, as in :class:`tsm_jit.TemporalShift`. The input is never written.

    Raises:
        TypeError, ValueError: an argument is not an integer or outside its range. In ``forward``: as
            :func:`tsm_jit.temporal_shift`.

    Example::

        block = torchvision.models.resnet50().layer1[0]
        block.conv1 = tsm_jit.tsam.TemporalShift(
            block.conv1, n_segment=9, n_segment_shifted=8, f_div=8, shift_depth=2
        )
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
        self.f_div = integer("f_div", f_div, 2)  # folds in both directions must fit into C channels
        self.shift_depth = integer("shift_depth", shift_depth, 1)
        self.inplace = inplace

    def shift_of(self, x: Tensor) -> str:
        length = self.checked_n_segment(x)
        return encode_temporal(x, length, self.f_div, self.n_segment_shifted, self.shift_depth, "keep")

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            self.refuse_split(x)
            depth, shifted = self.shift_depth, self.n_segment_shifted
            plan = {"shift_depth": depth, "n_segment_shifted": shifted, "padding": "keep"}
            return self.layer(temporal_shift(x, self.n_segment, self.f_div, **plan))
        return self.call_shifted(x, self.shift_of(self.whole_clips(x)))

    def extra_repr(self) -> str:
        return (
            f"n_segment={self.n_segment}, n_segment_shifted={self.n_segment_shifted}, f_div={self.f_div}, "
            f"shift_depth={self.shift_depth}, inplace={self.inplace}"
        )
