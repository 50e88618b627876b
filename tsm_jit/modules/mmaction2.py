"""The module of mmaction2 (https://github.com/open-mmlab/mmaction2) for TSM's shift (arXiv:1811.08383)."""

from __future__ import annotations

from torch import Tensor, nn

from tsm_jit._checks import integer
from tsm_jit.functional import temporal_shift
from tsm_jit.modules import tsm


class TemporalShift(tsm.TemporalShift):
    """Shifts its input, then calls ``net``: drop-in for mmaction2's class (https://github.com/open-mmlab/mmaction2).

    The input is frames ``[N*T, C, *]`` of any dtype, where ``T = num_segments``. The output is the output of ``net``.
    As in TSM, a fold has ``C // shift_div`` channels. The first fold reads the next frame, the second the previous one.
    A frame without a source frame gets zeros. For finite inputs these are the same bits as in mmaction2, which computes
    its zeros as ``x - x``: NaN for infinite values and NaN.

    It is a :class:`tsm_jit.TemporalShift` with other names: ``n_segment`` and ``fold_div`` are the same values as
    ``num_segments`` and ``shift_div``. It has ``inplace=True``, so it stores no second activation, see there.

    Args:
        net: the module that receives the shifted frames.
        num_segments: the clip length in frames.
        shift_div: 2 or more, the divisor of the fold width.

    Raises:
        TypeError, ValueError: a number is not an integer or outside its range. In ``forward``: as
            :func:`tsm_jit.temporal_shift`.

    Example::

        import tsm_jit.mmaction2

        shift = tsm_jit.mmaction2.TemporalShift(torch.nn.Conv2d(64, 64, 1), num_segments=8, shift_div=8)
        y = shift(torch.randn(2 * 8, 64, 56, 56))
    """

    inplace = True  # also of modules in mmaction2's pickles

    def __init__(self, net: nn.Module, num_segments: int = 3, shift_div: int = 8):
        super().__init__(
            net, integer("num_segments", num_segments, 1), integer("shift_div", shift_div, 2), inplace=True
        )

    # mmaction2's names are stored, since its pickles have them.
    @property
    def n_segment(self) -> int:  # type: ignore[override]
        return self.num_segments

    @n_segment.setter
    def n_segment(self, value: int) -> None:
        self.num_segments = value

    @property
    def fold_div(self) -> int:  # type: ignore[override]
        return self.shift_div

    @fold_div.setter
    def fold_div(self, value: int) -> None:
        self.shift_div = value

    @staticmethod
    def shift(x: Tensor, num_segments: int, shift_div: int = 3) -> Tensor:  # type: ignore[override]
        """Calls :func:`tsm_jit.temporal_shift`, as the module does."""
        return temporal_shift(x, integer("num_segments", num_segments, 1), integer("shift_div", shift_div, 2))

    def extra_repr(self) -> str:
        return f"num_segments={self.num_segments}, shift_div={self.shift_div}"
