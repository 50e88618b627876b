"""Operators for clips whose frames are split over processes: each rank of a group holds consecutive frames.

A frame may read a frame of another rank. Only these edges travel::

    rank 0        rank 1        rank 2
    0  1  2  3 |  4  5  6  7 |  8  9 10 11      frames of the clip
             <--  4                             a group with offset +1: frame 3 reads frame 4
             3 -->                              a group with offset -1: frame 4 reads frame 3

- ``sharded_shift(x, shift, shard) -> Tensor`` and its adjoint ``sharded_shift_backward``. Each is the derivative of the
  other. ``shift`` is the encoded shift of the whole clip.
- ``sum_over_ranks(x, shard) -> Tensor``, which is its own adjoint.

Each call sends all edges, one message to each rank that needs one (:mod:`tsm_jit.ops.exchange`). While they travel,
the local frames are shifted with zero padding. Then the edges that arrived are written. The adjoint sends the
gradients of the edges back and adds them.

Backward computes gradients of the sum of the losses of all ranks. In compiled graphs these operators are opaque.
"""

from __future__ import annotations

import contextlib
import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from tsm_jit.ops.compat import (
    collectives,
    eager,
    empty_like_real,
    has_saved_tensor_hooks,
    is_exporting,
    transforms_are_active,
)
from tsm_jit.ops.exchange import Messages, Ranks, Strided, ranks_of
from tsm_jit.ops.temporal_shift import (
    check_marks,
    clip_length_mark,
    has_no_overlap,
    temporal_shift,
    temporal_shift_backward,
)
from tsm_jit.plans import Shift, decode
from tsm_jit.reference import has_clip_dim


class TimeShard(NamedTuple):
    """The place of this process among the ranks that share the frames of every clip.

    Each rank holds ``n_segment // ranks`` consecutive frames, the first ``n_segment % ranks`` ranks one more.
    """

    rank: int
    ranks: int
    group: str  # the name of the process group
    layer: str = ""  # the name of the module, for ranks to compare; not in compiled graphs, which many modules share

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

    def refuse(self, message: str, x: Tensor | None) -> NoReturn:
        """Raises ValueError for the input ``x``, on CPUs also on the ranks that wait for this one to exchange frames.

        On GPUs the others may not compare calls, and would take a comparison for their frames.
        """
        if x is not None and x.device.type == "cpu" and eager():
            with contextlib.suppress(RuntimeError):  # the others died, or do not call
                ranks_of(self.group, x.device).compare(message)
        raise ValueError(message)


# --- which frames travel ---------------------------------------------------------------------------------------------


class _Edge(NamedTuple):
    """Frames of a channel group that one rank sends to another, or to itself."""

    channel: int
    width: int
    source: int  # the first frame, counted from the first that the sender holds
    target: int  # the first frame that reads it, counted from the first that the receiver holds
    length: int


class _Exchange(NamedTuple):
    length: int  # the number of frames of a clip on this rank
    local: str  # the shift of these frames, with zero padding
    sent: tuple[tuple[_Edge, ...], ...]  # to each rank
    received: tuple[tuple[_Edge, ...], ...]  # from each rank
    is_needed: bool  # whether any rank sends an edge


@functools.lru_cache(maxsize=4096)
def _exchange_of(encoded: str, rank: int, ranks: int) -> _Exchange:
    shift = decode(encoded)
    frames = [TimeShard(each, ranks, "").frames(shift.n_segment) for each in range(ranks)]
    edges: list[list[list[_Edge]]] = [[[] for _ in range(ranks)] for _ in range(ranks)]  # [from][to]
    starts = [each.start for each in frames]
    channel = 0
    for width, offset in shift.plan:
        for receiver, target in _edge_frames(shift, width, offset, frames):
            source = _source(shift, target + offset, target)
            if source is not None:
                sender = bisect_right(starts, source) - 1
                edge = _Edge(channel, width, source - starts[sender], target - starts[receiver], length=1)
                _append(edges[sender][receiver], edge)
        channel += width
    return _Exchange(
        length=len(frames[rank]),
        local=_local_shift(shift, frames[rank]).encode(),
        sent=tuple(tuple(each) for each in edges[rank]),
        received=tuple(tuple(each[rank]) for each in edges),
        is_needed=any(edge for row in edges for edge in row),
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


def _append(edges: list[_Edge], edge: _Edge) -> None:
    """Appends an edge, or extends the last one by it if both are of one group and of consecutive frames."""
    if edges:
        last = edges[-1]
        if last._replace(source=last.source + last.length, target=last.target + last.length, length=1) == edge:
            edges[-1] = last._replace(length=last.length + 1)
            return
    edges.append(edge)


def _local_shift(shift: Shift, held: range) -> Shift:
    shifted = min(held.stop, shift.n_segment_shifted) - held.start
    plan = shift.plan if shifted > 0 else ()  # all of these frames never take part
    return Shift(len(held), max(shifted, 1), shift.channel_dim, "zeros", plan).canonical()


# --- communication ---------------------------------------------------------------------------------------------------


PREPARED_CALLS = 4096  # the most that are saved: about 2 KB each, for 128 clip lengths of a ResNet-50


def _ranks(shard: TimeShard, x: Tensor) -> Ranks:
    """The ranks that share the frames. Raises ValueError if another process than this one split the network."""
    ranks = ranks_of(shard.group, x.device)
    if (ranks.rank, ranks.size) != (shard.rank, shard.ranks):  # it was pickled, or this process joined another group
        shard.refuse(
            f"net must be split by parallelize_time in the process that calls it, which is rank {ranks.rank} of "
            f"{ranks.size}, got a network that was split as rank {shard.rank} of {shard.ranks}",
            x,
        )
    return ranks


class _Call:
    """The messages of a shift, or of its adjoint, for tensors with one shape, dtype and layout."""

    def __init__(self, x: Tensor, encoded: str, shard: TimeShard, ranks: Ranks, is_gradient: bool):
        shift = decode(encoded)
        self.exchange = exchange = _exchange_of(encoded, shard.rank, shard.ranks)
        self.adds = is_gradient and shift.needs_sum
        # float8 has no sum, and more than two values in 16 bits would be rounded more than once.
        narrow = x.dtype.is_floating_point and x.element_size() < (4 if shift.padding == "replicate" else 2)
        self.sum_dtype = torch.float32 if self.adds and narrow else x.dtype
        self._dim = dim = shift.channel_dim - x.dim()  # counted from the end
        self._has_clip_dim = has_clip_dim(x.dim(), shift.channel_dim)
        self._sent, self._received = exchange.sent, exchange.received
        if is_gradient:
            self._sent, self._received = self._received, self._sent
        self._is_gradient = is_gradient
        self._targets: dict[tuple[int, ...], list[Strided]] = {}
        if not exchange.is_needed:
            return
        clips, frame = x.shape[0] // exchange.length, list(x.shape[1:])
        if self._has_clip_dim:
            clips, _, *frame = x.shape
        whose = "the gradient of " if is_gradient else ""
        self.text = f"{whose}clips {[clips, shift.n_segment, *frame]} {x.dtype}, {encoded}"
        all_messages = chain(*[_exchange_of(encoded, rank, shard.ranks).sent for rank in range(shard.ranks)])
        most = max([sum([edge.width * edge.length for edge in edges]) for edges in all_messages])
        self.message_bytes = most * clips * math.prod(frame) // frame[dim] * x.element_size()
        ranks.compare(self.text, shard.layer, self.message_bytes)
        sent, received = [
            tuple([_parts(edges, clips, frame, dim) for edges in direction])
            for direction in (self._sent, self._received)
        ]
        self.courier = ranks.courier(self.text, Messages(x.dtype, sent, received))
        self._sources = self._places(x, self._sent, at_source=not is_gradient)

    def values(self, x: Tensor) -> list[Tensor]:
        """The frames ``[N, length, ...]`` of ``x`` that this rank sends."""
        return _views(x, self._sources)

    def targets(self, out: Tensor) -> list[Tensor]:
        """The frames ``[N, length, ...]`` of the result that receive what arrives."""
        places = self._targets.get(out.stride())
        if places is None:
            places = self._places(out, self._received, at_source=self._is_gradient)
            self._targets[out.stride()] = places
        return _views(out, places)

    def _places(self, x: Tensor, edges_of_ranks: tuple[tuple[_Edge, ...], ...], *, at_source: bool) -> list[Strided]:
        x = torch.empty_strided(x.shape, x.stride(), device="meta")
        if not self._has_clip_dim:
            x = x.unflatten(0, (-1, self.exchange.length))
        frames = [(edge.source if at_source else edge.target, edge) for edge in chain(*edges_of_ranks)]
        views = [x.narrow(1, at, edge.length).narrow(self._dim, edge.channel, edge.width) for at, edge in frames]
        return [(view.shape, view.stride(), int(view.storage_offset())) for view in views]


def _parts(edges: tuple[_Edge, ...], clips: int, frame: list[int], dim: int) -> tuple[Strided, ...]:
    """The places of edges in a message, one after another, with the channels innermost."""
    parts, begin = [], 0
    for edge in edges:
        pixels = [size for each, size in enumerate(frame, -len(frame)) if each != dim]
        part = torch.empty(clips, edge.length, *pixels, edge.width, device="meta").movedim(-1, dim)
        parts.append((part.shape, part.stride(), begin))
        begin += part.numel()
    return tuple(parts)


def _views(x: Tensor, places: list[Strided]) -> list[Tensor]:
    begin = x.storage_offset()
    return [x.as_strided(size, stride, begin + offset) for size, stride, offset in places]


class _Transfer:
    """The edges of ``x`` on their way to the frames that read them, or the gradients of edges on their way back.

    They travel while the code in its context runs, and have arrived at its end. The next transfer overwrites them,
    unless ``keep``.
    """

    def __init__(self, x: Tensor, encoded: str, shard: TimeShard, *, is_gradient: bool = False, keep: bool = False):
        ranks = _ranks(shard, x)
        key = x.shape, x.stride(), x.dtype, encoded, is_gradient
        call = ranks.prepared.get(key)
        if call is None:
            if len(ranks.prepared) >= PREPARED_CALLS:
                ranks.prepared.clear()
            call = ranks.prepared[key] = _Call(x, encoded, shard, ranks, is_gradient)
        elif call.exchange.is_needed and x.device.type == "cpu":
            ranks.compare(call.text, shard.layer)
        self._call, self._x, self._keep = call, x, keep
        self.local, self.sum_dtype = call.exchange.local, call.sum_dtype

    _pending: Any

    def __enter__(self) -> _Transfer:
        if self._call.exchange.is_needed:
            self._pending = self._call.courier.start(self._call.values(self._x))
        return self

    def __exit__(self, *_: object) -> None:
        if self._call.exchange.is_needed:
            self._arrived = self._call.courier.finish(self._pending, self._keep)
        del self._x

    def write(self, out: Tensor) -> None:
        """Writes the edges into ``out``, or adds gradients that meet. ``out`` has the shape of the tensor sent."""
        if self._call.exchange.is_needed:
            for target, part in zip(self._call.targets(out), self._arrived, strict=True):
                target.add_(part.to(target.dtype)) if self._call.adds else target.copy_(part)


# --- the maps, without autograd --------------------------------------------------------------------------------------


def _shift(x: Tensor, shift: str, shard: TimeShard, transfers: list[_Transfer] | None = None) -> Tensor:
    if transfers:
        return _written(temporal_shift(x, transfers[0].local), transfers[0])
    with _Transfer(x, shift, shard, keep=transfers is not None) as transfer:
        out = temporal_shift(x, transfer.local)
    if transfers is not None:
        transfers.append(transfer)
    return _written(out, transfer)


def _shift_adjoint(grad: Tensor, shift: str, shard: TimeShard) -> Tensor:
    with _Transfer(grad, shift, shard, is_gradient=True) as transfer:
        out = temporal_shift_backward(grad, transfer.local)
    return _written(out.to(transfer.sum_dtype), transfer).to(grad.dtype)


def _written(out: Tensor, transfer: _Transfer) -> Tensor:
    if not has_no_overlap(out):  # an expanded tensor was shifted before expansion
        out = out.contiguous()
    transfer.write(out)
    return out


def _sum(x: Tensor, shard: TimeShard) -> Tensor:
    _ranks(shard, x).compare(f"the sum of {list(x.shape)} {x.dtype} over ranks")
    return collectives().wait_tensor(collectives().all_reduce(x.contiguous(), "sum", shard.group))


# --- autograd and compilers ------------------------------------------------------------------------------------------


class _Linear(Function):
    """A linear map ``kernel(x, shard)`` or ``kernel(x, shift, shard)``, and its ``adjoint``."""

    @staticmethod
    def forward(ctx, x, kernel, adjoint, *arguments):
        ctx.adjoint, ctx.arguments = adjoint, arguments
        ctx.is_marked = len(arguments) > 1 and has_saved_tensor_hooks()  # a shift, not a sum
        if ctx.is_marked:
            ctx.save_for_backward(clip_length_mark(x, arguments[0]))
        return kernel(x, *arguments)

    @staticmethod
    def backward(ctx, grad):
        if ctx.is_marked:
            check_marks(ctx.saved_tensors, ctx.arguments[0])
        return ctx.adjoint(grad, *ctx.arguments), None, None, *(None for _ in ctx.arguments)


def _linear(x: Tensor, kernel: Callable[..., Tensor], adjoint: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Calls ``_Linear`` where autograd needs it, as it takes time on the host."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Linear.apply(x, kernel, adjoint, *arguments)
    return kernel(x, *arguments)


def sharded_shift(x: Tensor, shift: str, shard: TimeShard, transfers: list[_Transfer] | None = None) -> Tensor:
    """Applies ``shift`` to split clips. ``x`` has the frames of this rank.

    A call with an empty list ``transfers`` keeps the edges that arrive in it. Later calls with it repeat the shift of
    the same ``x`` without communication.
    """
    if _is_compiling(x):
        return torch.ops.tsm_jit.sharded_shift.default(x, shift, *shard[:3])
    return _linear(x, functools.partial(_shift, transfers=transfers), sharded_shift_backward, shift, shard)


def sharded_shift_backward(grad: Tensor, shift: str, shard: TimeShard) -> Tensor:
    """The adjoint of :func:`sharded_shift`: the gradient of the sum of what all ranks compute."""
    if _is_compiling(grad):
        return torch.ops.tsm_jit.sharded_shift_backward.default(grad, shift, *shard[:3])
    return _linear(grad, _shift_adjoint, sharded_shift, shift, shard)


def sum_over_ranks(x: Tensor, shard: TimeShard) -> Tensor:
    """The sum of ``x`` over the ranks, equal on all of them. Its gradient is the sum of the gradients of all ranks."""
    if _is_compiling(x):
        return torch.ops.tsm_jit.sum_over_ranks.default(x, *shard[:3])
    return _linear(x, _sum, sum_over_ranks, shard)


def _is_compiling(x: Tensor) -> bool:
    """Whether a compiler calls with ``x``. Raises NotImplementedError for tracers and transforms of functions."""
    if eager():
        return type(x) is not Tensor  # compilers trace gradients with subclasses
    if is_compiling() and not is_exporting() and not transforms_are_active():
        return True
    raise NotImplementedError(
        "a network whose clips are split over ranks must not be traced, exported or transformed by torch.func: its "
        "shifts exchange frames with other processes"
    )


_library = torch.library.Library("tsm_jit", "FRAGMENT")


def _register(name: str, arguments: str, compute: Callable[..., Tensor], adjoint: Callable[..., Tensor]) -> None:
    for overload in ("", ".kernel"):  # compiled graphs contain the second, which has no autograd
        schema = f"{name}{overload}({arguments}, int rank, int ranks, str group) -> Tensor"
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.tsm_jit, name)

    @torch.no_grad()
    def kernel(x: Tensor, *others: Any) -> Tensor:
        return compute(x, *others[:-3], TimeShard(*others[-3:]))

    def dispatched_kernel(x: Tensor, *others: Any) -> Tensor:
        return op.kernel(x, *others[:-1], *others[-1][:3])

    def autograd_kernel(x: Tensor, *others: Any) -> Tensor:
        return _Linear.apply(x, dispatched_kernel, adjoint, *others[:-3], TimeShard(*others[-3:]))

    for each in (op.default, op.kernel):
        _library.impl(each, kernel, "CompositeExplicitAutograd")
        _library.impl(each, lambda x, *_: empty_like_real(x), "Meta")
    _library.impl(op.default, autograd_kernel, "Autograd")


_register("sharded_shift", "Tensor x, str shift", _shift, sharded_shift_backward)
_register("sharded_shift_backward", "Tensor grad, str shift", _shift_adjoint, sharded_shift)
_register("sum_over_ranks", "Tensor x", _sum, sum_over_ranks)
