"""Shift plans: which channels read which frame, one function per family; and `Shift`, a plan with all it needs to run.

A plan is a tuple of ``(width, offset)`` channel groups laid from channel 0 upward: the channels of a group read the
frame ``offset`` later (earlier if negative). Channels past the last group do not move.
"""

from __future__ import annotations

import functools
import re
import struct
from typing import Literal, NamedTuple

from torch.compiler import is_compiling

from tsm_jit._checks import integer, one_of

Plan = tuple[tuple[int, int], ...]
Padding = Literal["zeros", "keep", "replicate", "circular"]
Direction = Literal["both", "past", "future"]

PADDINGS = ("zeros", "keep", "replicate", "circular")
DIRECTIONS = ("both", "past", "future")


def temporal(channels: int, fold_div: int = 8, shift_depth: int = 1, direction: Direction = "both") -> Plan:
    """The plan of TSM (``shift_depth=1``) and of TSAM (any depth).

    A fold is ``channels // fold_div // shift_depth`` channels. ``both`` gives, for each depth ``d``, one fold that
    reads ``d`` frames ahead and one that reads ``d`` frames behind; ``past`` and ``future`` give only the one or the
    other (``past`` is TSM's uni-directional, online form).

    Raises TypeError or ValueError for a ``fold_div`` or ``shift_depth`` below 1 and an unknown ``direction``.

    Papers: TSM, arXiv:1811.08383; TSAM, https://github.com/aav-antonov/TSAM.
    """
    fold_div = integer("fold_div", fold_div, 1)
    shift_depth = integer("shift_depth", shift_depth, 1)
    one_of("direction", direction, DIRECTIONS)
    fold = channels // fold_div // shift_depth
    signs = {"both": (1, -1), "past": (-1,), "future": (1,)}[direction]
    return tuple((fold, sign * depth) for depth in range(1, shift_depth + 1) for sign in signs)


def paddle(channels: int, shift_ratio: float = 0.25) -> Plan:
    """The plan of Paddle's ``temporal_shift``: the first fold reads the previous frame, the second the next one.

    The folds end at ``int(channels * ratio)`` and ``int(channels * 2 * ratio)``, multiplied in float32 as Paddle does.
    """
    first = int(_float32(channels * _float32(shift_ratio)))
    both = int(_float32(channels * 2 * _float32(shift_ratio)))
    return ((first, -1), (both - first, 1))


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


class Shift(NamedTuple):
    """A validated shift, and its encoding as the one string that the operators take.

    One string and not six arguments because an operator's call is most of its cost on a small tensor: each integer
    crosses from Python in 0.7 us, each list in 2 us, a string of any length in 0.6 us.
    """

    n_segment: int
    n_segment_shifted: int
    channel_dim: int
    padding: Padding
    plan: Plan

    def inverse(self) -> Shift:
        """What brings every frame back that was read by another: the offsets negated, the others left alone."""
        padding: Padding = "circular" if self.is_circular else "keep"
        return self._replace(padding=padding, plan=tuple((width, -offset) for width, offset in self.plan))

    @property
    def needs_sum(self) -> bool:
        """Whether the adjoint adds: a frame that was read twice receives a sum."""
        return self.padding in ("keep", "replicate")

    @property
    def is_circular(self) -> bool:
        return self.padding == "circular"

    def canonical(self) -> Shift:
        """The same shift with offsets of at most ``n_segment_shifted``: past the clip they all mean the same."""
        n, circular = self.n_segment_shifted, self.is_circular
        plan = []
        for width, offset in self.plan:
            distance = abs(offset) % n if circular else min(abs(offset), n)
            plan.append((width, distance if offset > 0 else -distance))
        return self._replace(plan=tuple(plan))

    def boundary_channels(self) -> int:
        """How many channels the frames make, in all, that no frame of the shifted clip reads."""
        if self.is_circular:
            return 0
        return sum(width * min(abs(offset), self.n_segment_shifted) for width, offset in self.plan)

    def encode(self) -> str:
        plan = ",".join([f"{width}:{offset}" for width, offset in self.plan])
        return (
            f"n_segment={self.n_segment} n_segment_shifted={self.n_segment_shifted} "
            f"channel_dim={self.channel_dim} padding={self.padding} plan={plan}"
        )

    @staticmethod
    def decode(encoded: str) -> Shift:
        match = _ENCODED.fullmatch(encoded)
        if match is None:
            raise ValueError(f"shift must look like {_EXAMPLE!r}, got {encoded!r}")
        n_segment, n_segment_shifted, channel_dim, padding, groups = match.groups()
        plan = tuple(tuple(map(int, group.split(":"))) for group in groups.split(",") if group)
        return Shift(int(n_segment), int(n_segment_shifted), int(channel_dim), padding, plan)


def decode(encoded: str) -> Shift:
    """:meth:`Shift.decode`, remembered: a network repeats its shifts."""
    return Shift.decode(encoded) if is_compiling() else _decode(encoded)  # compilers warn of functools caches


_decode = functools.lru_cache(maxsize=4096)(Shift.decode)
_EXAMPLE = "n_segment=8 n_segment_shifted=8 channel_dim=1 padding=zeros plan=8:1,8:-1"
_ENCODED = re.compile(  # here, and not where it is used, since compilers of models read what is called there
    r"n_segment=(\d+) n_segment_shifted=(\d+) channel_dim=(\d+) "
    rf"padding=({'|'.join(PADDINGS)}) plan=((?:\d+:-?\d+(?:,\d+:-?\d+)*)?)"
)
