"""Shift plans: which channels read which frame.

A plan is a tuple of ``(width, offset)`` channel groups, in order from channel 0. The channels of a group read the frame
``offset`` frames later, or earlier if ``offset`` is negative. Channels after the last group do not move.

Example::

    plan = tsm_jit.plans.temporal(64, fold_div=8)  # ((8, 1), (8, -1))
    y = tsm_jit.shift_groups(torch.randn(16, 64, 56, 56), 8, plan)
"""

import functools
import re
import struct
from typing import Any, Literal, NamedTuple

from torch.compiler import is_compiling

from tsm_jit._checks import integer, one_of

__all__ = ["Direction", "Padding", "Plan", "Shift", "decode", "paddle", "temporal"]

Plan = tuple[tuple[int, int], ...]
Padding = Literal["zeros", "keep", "replicate", "circular"]
Direction = Literal["both", "past", "future"]

PADDINGS = ("zeros", "keep", "replicate", "circular")
DIRECTIONS = ("both", "past", "future")


def temporal(channels: int, fold_div: int = 8, shift_depth: int = 1, direction: Direction = "both") -> Plan:
    """Returns the plan of TSM (``shift_depth=1``) or TSAM (any depth).

    A fold has ``channels // fold_div // shift_depth`` channels.

    Papers: TSM, arXiv:1811.08383; TSAM, https://github.com/aav-antonov/TSAM.

    Args:
        channels: the number of channels of the input.
        fold_div: the divisor of the fold width.
        shift_depth: the largest distance in frames.
        direction: ``"both"`` gives two folds for each distance ``d``: one reads ``d`` frames ahead, one ``d`` frames
            behind. ``"past"`` gives only the folds that read earlier frames (TSM's uni-directional form), ``"future"``
            only those that read later frames.

    Returns:
        The ``(width, offset)`` groups, as for :func:`tsm_jit.shift_groups`.

    Raises:
        TypeError: ``fold_div`` or ``shift_depth`` is not an integer.
        ValueError: ``fold_div`` or ``shift_depth`` is below 1, or ``direction`` is unknown.

    Example::

        tsm_jit.plans.temporal(64)  # ((8, 1), (8, -1))
        tsm_jit.plans.temporal(64, shift_depth=2)  # ((4, 1), (4, -1), (4, 2), (4, -2))
    """
    fold_div = integer("fold_div", fold_div, 1)
    shift_depth = integer("shift_depth", shift_depth, 1)
    one_of("direction", direction, DIRECTIONS)
    fold = channels // fold_div // shift_depth
    signs = {"both": (1, -1), "past": (-1,), "future": (1,)}[direction]
    return tuple((fold, sign * depth) for depth in range(1, shift_depth + 1) for sign in signs)


def paddle(channels: int, shift_ratio: float = 0.25) -> Plan:
    """Returns the plan of Paddle's ``temporal_shift``. The first fold reads the previous frame, the second the next.

    Source: https://www.paddlepaddle.org.cn/documentation/docs/en/api/paddle/nn/functional/temporal_shift_en.html.
    The folds end at channels ``int(channels * ratio)`` and ``int(channels * 2 * ratio)``. As in Paddle, the products
    are computed in float32.

    Args:
        channels: the number of channels of the input.
        shift_ratio: the part of the channels in each fold, 0 to 0.5.

    Returns:
        The ``(width, offset)`` groups, as for :func:`tsm_jit.shift_groups`.

    Raises:
        TypeError: ``channels`` is not an integer, or ``shift_ratio`` is not a number.
        ValueError: ``channels`` is negative, or ``shift_ratio`` is outside its range.

    Example::

        tsm_jit.plans.paddle(64)  # ((16, -1), (16, 1))
    """
    channels = integer("channels", channels, 0)
    if not isinstance(shift_ratio, (int, float)):
        raise TypeError(f"shift_ratio must be a number, got {shift_ratio!r}")
    if not 0 <= shift_ratio <= 0.5:
        raise ValueError(f"shift_ratio must be from 0 to 0.5, got {shift_ratio}")
    first = int(_float32(channels * _float32(shift_ratio)))
    both = int(_float32(channels * 2 * _float32(shift_ratio)))
    return ((first, -1), (both - first, 1))


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


class Shift(NamedTuple):
    """A validated shift. The operators take it encoded as one string.

    On a small tensor most of an operator's time is call overhead. From Python to C++, each integer argument costs
    0.7 us and each list 2 us, but a string of any length 0.6 us.

    Example::

        plan = tsm_jit.plans.temporal(64)
        shift = tsm_jit.plans.Shift(8, 8, channel_dim=1, padding="zeros", plan=plan)
        y = torch.ops.tsm_jit.temporal_shift(torch.randn(16, 64, 56, 56), shift.encode())
    """

    n_segment: int
    n_segment_shifted: int
    channel_dim: int
    padding: Padding
    plan: Plan

    def inverse(self) -> "Shift":
        """The shift that moves every value back to its source frame. Frames that were not read keep their value."""
        padding: Padding = "circular" if self.is_circular else "keep"
        return self._replace(padding=padding, plan=tuple((width, -offset) for width, offset in self.plan))

    @property
    def needs_sum(self) -> bool:
        """Whether the adjoint adds: two frames may read one source, which then receives the sum of two gradients."""
        return self.padding in ("keep", "replicate")

    @property
    def is_circular(self) -> bool:
        """Whether the padding is circular: every frame is then read exactly once."""
        return self.padding == "circular"

    def canonical(self) -> "Shift":
        """The same shift, with offsets limited to the clip length: larger ones have the same effect."""
        n, circular = self.n_segment_shifted, self.is_circular
        plan = []
        for width, offset in self.plan:
            distance = abs(offset) % n if circular else min(abs(offset), n)
            plan.append((width, distance if offset > 0 else -distance))
        return self._replace(plan=tuple(plan))

    def boundary_channels(self) -> int:
        """The channels of a clip's boundary frames, which no frame of the shifted clip reads, summed over frames."""
        if self.is_circular:
            return 0
        return sum(width * min(abs(offset), self.n_segment_shifted) for width, offset in self.plan)

    def encode(self) -> str:
        """Returns the string that the operators take."""
        plan = ",".join([f"{width}:{offset}" for width, offset in self.plan])
        return (
            f"n_segment={self.n_segment} n_segment_shifted={self.n_segment_shifted} "
            f"channel_dim={self.channel_dim} padding={self.padding} plan={plan}"
        )

    @staticmethod
    def decode(encoded: str) -> "Shift":
        """Parses the result of :meth:`encode`. Raises ValueError for any other string."""
        match = _ENCODED.fullmatch(encoded)
        if match is None:
            raise ValueError(f"shift must look like {_EXAMPLE!r}, got {encoded!r}")
        fields: Any = match.groups()
        n_segment, n_segment_shifted, channel_dim, padding, groups = fields
        plan: Any = tuple(tuple(map(int, group.split(":"))) for group in groups.split(",") if group)
        return Shift(int(n_segment), int(n_segment_shifted), int(channel_dim), padding, plan)


def decode(encoded: str) -> "Shift":
    """Parses the encoding of a shift, as :meth:`Shift.decode`, with a cache, since a network repeats its shifts.

    Args:
        encoded: the result of :meth:`Shift.encode`.

    Raises:
        ValueError: ``encoded`` is any other string.

    Example::

        shift = tsm_jit.plans.decode("n_segment=8 n_segment_shifted=8 channel_dim=1 padding=zeros plan=8:1,8:-1")
    """
    return Shift.decode(encoded) if is_compiling() else _decode(encoded)  # Dynamo warns about functools caches


_decode = functools.lru_cache(maxsize=4096)(Shift.decode)
_EXAMPLE = "n_segment=8 n_segment_shifted=8 channel_dim=1 padding=zeros plan=8:1,8:-1"
_ENCODED = re.compile(  # a global, since Dynamo would trace a call of re.compile in `decode`
    r"n_segment=(\d+) n_segment_shifted=(\d+) channel_dim=(\d+) "
    rf"padding=({'|'.join(PADDINGS)}) plan=((?:\d+:-?\d+(?:,\d+:-?\d+)*)?)"
)
