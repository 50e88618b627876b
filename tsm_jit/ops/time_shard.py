"""Which frames of a clip a rank holds, and which of them travel to other ranks.

Ranks hold consecutive frames. A frame may read a frame of another rank. Only these edges travel::

    rank 0        rank 1        rank 2
    0  1  2  3 |  4  5  6  7 |  8  9 10 11      frames of the clip
             <--  4                             a group with offset +1: frame 3 reads frame 4
             3 -->                              a group with offset -1: frame 4 reads frame 3
"""

from __future__ import annotations

import contextlib
import functools
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from torch import Tensor

from tsm_jit.ops.compat import eager
from tsm_jit.ops.exchange import ranks_of
from tsm_jit.plans import Shift, decode


class TimeShard(NamedTuple):
    """The place of this process among the ranks that share the frames of every clip.

    Each rank holds ``n_segment // ranks`` consecutive frames, the first ``n_segment % ranks`` ranks one more.
    """

    rank: int
    ranks: int
    group: str  # the name of the process group
    layer: str = ""  # the name of the module, for ranks to compare; not in compiled graphs, which many modules share

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (places are few, and may live as long as the process)
    def in_layer(self, layer: str) -> TimeShard:
        """The same place, in the layer with this name."""
        return self._replace(layer=layer)

    def length(self, n_segment: int, x: Tensor | None = None) -> int:
        """The number of frames that this rank holds of a clip. Raises ValueError if a rank would have none.

        ``x`` is the input if the call is collective: see :meth:`refuse`.
        """
        if n_segment < self.ranks:
            self.refuse(f"n_segment must be at least the number of ranks, {self.ranks}, got {n_segment}", x)
        return n_segment // self.ranks + (self.rank < n_segment % self.ranks)

    def frames(self, n_segment: int) -> range:
        """The frames that this rank holds of a clip. Raises ValueError if a rank would have none."""
        length = self.length(n_segment)
        begin = self.rank * (n_segment // self.ranks) + min(self.rank, n_segment % self.ranks)
        return range(begin, begin + length)

    def exchange(self, shift: str) -> Exchange:
        """What this rank sends and receives for an encoded shift of whole clips."""
        return _exchange_of(shift, self.rank, self.ranks)

    def check_frames(self, x: Tensor, n_segment: int, name: str) -> int:
        """Returns the frames that this rank holds of a clip. Raises ValueError if ``x`` has others.

        ``x`` is the argument ``name``: ``[N, L, C, H, W]``, or ``[N*L, ...]`` of other dimensions.
        """
        held = self.length(n_segment, x)
        if x.dim() == 0 or (x.shape[1] != held if x.dim() == 5 else x.shape[0] % held != 0):
            self.refuse(
                f"{name} must have the {held} frames of each clip that rank {self.rank} of {self.ranks} holds of "
                f"n_segment={n_segment}, got {list(x.shape)}",
                x,
            )
        return held

    def refuse(self, message: str, x: Tensor | None) -> NoReturn:
        """Raises ValueError for the input ``x``, on CPUs also on the ranks that wait for this one to exchange frames.

        On GPUs the others may wait for frames already. PyTorch would match this comparison with that wait.
        """
        if x is not None and x.device.type == "cpu" and eager():
            with contextlib.suppress(RuntimeError):  # the others died, or do not call
                ranks_of(self.group, x.device).compare(message)
        raise ValueError(message)


# --- which frames travel ---------------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """Frames of a channel group that one rank sends to another, or to itself."""

    channel: int
    width: int
    source: int  # the first frame, counted from the first that the sender holds
    target: int  # the first frame that reads it, counted from the first that the receiver holds
    length: int


class HaloSize(NamedTuple):
    """The size of a ``Halo`` for one clip."""

    reach: int  # the largest distance
    frames: int  # of each clip: those of its first and last ``reach`` frames, or of all if there are fewer
    channels: int  # up to the last one that moves


class Exchange(NamedTuple):
    """The part of a rank in one shift."""

    length: int  # the number of frames of a clip on this rank
    local: str  # the shift of these frames, with zero padding
    sent: tuple[tuple[Edge, ...], ...]  # to each rank
    received: tuple[tuple[Edge, ...], ...]  # from each rank
    is_needed: bool  # whether any rank sends an edge
    shifted: int  # the number of frames of a clip on this rank that take part, at least 1
    halo: HaloSize


@functools.lru_cache(maxsize=4096)
def _exchange_of(encoded: str, rank: int, ranks: int) -> Exchange:
    shift = decode(encoded)
    frames = [TimeShard(each, ranks, "").frames(shift.n_segment) for each in range(ranks)]
    edges: list[list[list[Edge]]] = [[[] for _ in range(ranks)] for _ in range(ranks)]  # [from][to]
    starts = [each.start for each in frames]
    channel = moved = 0
    for width, offset in shift.plan:
        for receiver, target in _edge_frames(shift, width, offset, frames):
            source = _source(shift, target + offset, target)
            if source is not None:
                sender = bisect_right(starts, source) - 1
                edge = Edge(channel, width, source - starts[sender], target - starts[receiver], length=1)
                _append(edges[sender][receiver], edge)
        channel += width
        moved = channel if offset else moved
    local = _local_shift(shift, frames[rank])
    reach = max([abs(offset) for _, offset in local.plan], default=0)
    return Exchange(
        length=len(frames[rank]),
        local=local.encode(),
        sent=tuple(tuple(each) for each in edges[rank]),
        received=tuple(tuple(each[rank]) for each in edges),
        is_needed=any(map(any, edges)),
        shifted=local.n_segment_shifted,
        halo=HaloSize(reach, min(2 * reach, local.n_segment_shifted), moved),
    )


def _edge_frames(shift: Shift, width: int, offset: int, frames: list[range]) -> Iterator[tuple[int, int]]:
    """Yields each rank and its frames for which the shift of the local frames has no source."""
    if width == 0 or offset == 0:
        return
    for rank, held in enumerate(frames):
        shifted = range(held.start, min(held.stop, shift.n_segment_shifted))
        for target in shifted:
            if target + offset not in shifted:
                yield rank, target


def _source(shift: Shift, source: int, target: int) -> int | None:
    """The frame of the clip that ``target`` reads if the plan names ``source``; None if the padding is zero."""
    n = shift.n_segment_shifted
    if 0 <= source < n:
        return source
    if shift.padding == "zeros":
        return None
    if shift.padding == "keep":
        return target
    return source % n if shift.is_circular else min(max(source, 0), n - 1)


def _append(edges: list[Edge], edge: Edge) -> None:
    """Appends an edge, or extends the last one by it if both are of one group and of consecutive frames."""
    if edges:
        last = edges[-1]
        if last._replace(source=last.source + last.length, target=last.target + last.length, length=1) == edge:
            edges[-1] = last._replace(length=last.length + 1)
            return
    edges.append(edge)


def _local_shift(shift: Shift, held: range) -> Shift:
    shifted = min(held.stop, shift.n_segment_shifted) - held.start
    plan = shift.plan if shifted > 0 else ()  # else this rank holds no frame that takes part
    return Shift(len(held), max(shifted, 1), shift.channel_dim, "zeros", plan).canonical()
