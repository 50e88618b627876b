"""Messages between the ranks of a process group. They travel while the caller does other work.

- :func:`ranks_of` returns the :class:`Ranks` of a group. Their :meth:`Ranks.compare` compares the calls of all ranks.
- :meth:`Ranks.courier` returns an object that carries messages of one shape. There are two kinds:

  - :class:`_Mailboxes`, if each GPU reaches the memory of all others with atomic operations, as over NVLink. One kernel
    writes into memory of the receivers and signals. Another one waits and reads.
  - :class:`_Collective`, otherwise: one ``all_to_all_single`` of NCCL or gloo.

On a GPU the host waits for the device only when :meth:`Ranks.compare` sees a call for the first time.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsm_jit.ops.compat import collectives, current_stream_handle, direct, has_kernel, process_group, time_out
from tsm_jit.ops.cuda_driver import (
    free_shared_memory,
    has_atomics,
    map_shared_memory,
    new_shared_memory,
    unmap_shared_memory,
)

Strided = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride and offset, the arguments of as_strided


MAX_CALLS = 4096  # the most that a rank remembers: about 2 KB each. A ResNet-50 makes 17 for each clip length


class Places:
    """Where the parts of all messages lie in tensors of one size and layout."""

    def __init__(self, parts: Sequence[Strided]):
        self.parts = parts
        self.table: Tensor | None = None  # for the kernel of _Mailboxes

    def views(self, x: Tensor) -> list[Tensor]:
        begin = x.storage_offset()
        return [x.as_strided(size, stride, begin + offset) for size, stride, offset in self.parts]


class Messages(NamedTuple):
    """The messages to and from each rank. A message consists of parts, which lie one after another."""

    dtype: torch.dtype
    dim: int  # of each part
    sent: tuple[tuple[Strided, ...], ...]
    received: tuple[tuple[Strided, ...], ...]


def one_after_another(messages: Sequence[tuple[Strided, ...]]) -> tuple[Places, int]:
    """Returns the places of the parts in a tensor that holds all messages, and the number of its elements."""
    parts, begin = [], 0
    for message in messages:
        parts += [(size, stride, begin + offset) for size, stride, offset in message]
        begin += _numel(message)
    return Places(parts), begin


def _numel(message: tuple[Strided, ...]) -> int:
    return sum([torch.Size(size).numel() for size, _, _ in message])


# --- the ranks of a group --------------------------------------------------------------------------------------------


class Ranks:
    """The ranks of a process group, as this one of them sees them from one device."""

    def __init__(self, name: str, device: torch.device):
        group = process_group(name)
        self.name, self.device, self.group = name, device, weakref.ref(group)
        self.rank, self.size = group.rank(), group.size()
        self.prepared: dict[Any, Any] = {}  # by callers, for each call
        self._memory_of_calls: dict[str, _PeerMemory | None] = {}
        self._memories: list[_PeerMemory] = []  # the last one is in use; CUDA graphs may have captured the others
        self._shares_memory: bool | None = None  # unknown before the first message

    def compare(self, call: str, layer: str = "", message_bytes: int = 0) -> None:
        """Raises ValueError on all ranks, before any data moves, unless all ranks make the same ``call``.

        ``layer`` makes the call, and is compared, too. If a forward fails on one rank, and it calls again, this rank is
        in an earlier layer than the others.

        The ranks must agree on when they compare calls: PyTorch would match the collective of a comparison on one rank
        with another collective elsewhere. On CPUs, where communication blocks the host anyway, they compare at each
        call. On GPUs the comparison waits for the device, so a rank takes part when it first sees a call. All earlier
        calls were equal, so a call is new to all ranks or to none. If ranks differ and for one of them the call is not
        new, the time-out of the group ends all of them.

        ``message_bytes`` is the size of the largest message of any rank in this call.
        """
        if self.device.type != "cpu" and call in self._memory_of_calls:
            return
        is_cuda = self.device.type == "cuda"
        if is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"split clips must run once before a CUDA graph captures them, got a new call: {call}")
        place = f"{call} in {layer!r}" if layer else call
        digest = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little", signed=True)
        own = torch.full((self.size,), digest, dtype=torch.int64, device=self.device)
        ones = [1] * self.size
        others = collectives().wait_tensor(collectives().all_to_all_single(own, ones, ones, self.name))
        if not torch.equal(own, others):
            got = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(self._gather(place)))
            raise ValueError(
                "all ranks must call the same shift with the same shape, dtype and clip length, and with a gradient on "
                f"all of them or on none, got {got}"
            )
        uses_memory = is_cuda and 0 < message_bytes <= _MOST_BYTES
        if uses_memory:
            self._reserve(message_bytes)
        if len(self._memory_of_calls) >= MAX_CALLS:  # on all ranks at once, since they have seen the same calls
            self._memory_of_calls.clear()
            self.prepared.clear()
        self._memory_of_calls[call] = self._memories[-1] if uses_memory and self._shares_memory else None

    def remember(self, key: Any, prepared: Any) -> None:
        if len(self.prepared) >= MAX_CALLS:
            self.prepared.clear()
        self.prepared[key] = prepared

    def courier(self, call: str, messages: Messages) -> _Mailboxes | _Collective:
        """Returns what carries the ``messages`` of a call that :meth:`compare` has seen."""
        # The memory in use when the call was new: all ranks find the same one, even if it has grown since.
        memory = self._memory_of_calls[call]
        if memory is None or messages.dim >= _DIMS:
            return _Collective(self, messages)
        return _Mailboxes(memory, messages)

    def _reserve(self, message_bytes: int) -> None:
        """Makes sure that the ranks share enough memory, if they can. All ranks call it."""
        if self._shares_memory is None:
            uuids = self._gather(str(torch.cuda.get_device_properties(self.device).uuid))
            reaches_all = False
            with contextlib.suppress(RuntimeError, OSError):  # of the driver
                reaches_all = _reaches_all(self.device, uuids)
            self._shares_memory = all(self._gather(reaches_all))
        if not self._shares_memory or (self._memories and self._memories[-1].capacity >= message_bytes):
            return
        capacity = max(2**20, 1 << (message_bytes - 1).bit_length())  # doubling bounds the sum of all memories
        buffers = self._share(_PeerMemory.size(self.size, capacity))
        self._shares_memory = buffers is not None
        if buffers is not None:
            self._memories.append(_PeerMemory(self, capacity, buffers))

    def _share(self, size: int) -> list[int] | None:
        """The addresses of new memory of each rank, which all ranks reach. None if any rank does not."""
        own, handle, addresses = 0, None, list[int]()
        # No memory may be left, or a container may forbid processes to share it.
        with torch.cuda.device(self.device), contextlib.suppress(RuntimeError):
            own, handle = new_shared_memory(size)
        handles = self._gather(handle)
        if None not in handles:
            with torch.cuda.device(self.device), contextlib.suppress(RuntimeError):
                for rank, each in enumerate(handles):
                    addresses.append(own if rank == self.rank else map_shared_memory(each))
        if all(self._gather(len(addresses) == self.size)):
            return addresses
        with torch.cuda.device(self.device):
            for address in addresses:
                if address != own:
                    unmap_shared_memory(address)
            self._gather(None)  # nobody maps the memory any more
            if own:
                free_shared_memory(own)
        return None

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            torch.distributed.all_gather_object(values, value, group=process_group(self.name))
        return values


_ranks: dict[tuple[str, torch.device], Ranks] = {}


def ranks_of(name: str, device: torch.device) -> Ranks:
    """Returns the ranks of the process group with this name."""
    ranks = _ranks.get((name, device))
    if ranks is None or ranks.group() is not process_group(name):  # a group that was destroyed may have had this name
        ranks = _ranks[name, device] = Ranks(name, device)
    return ranks


# --- by a collective -------------------------------------------------------------------------------------------------


class _Collective:
    """Carries messages in one buffer. NCCL uses a separate stream, in parallel with the stream of the caller."""

    def __init__(self, ranks: Ranks, messages: Messages):
        self._group, self._device, self._dtype = ranks.name, ranks.device, messages.dtype
        size = messages.dtype.itemsize
        self._sizes = [[size * _numel(each) for each in part] for part in (messages.received, messages.sent)]
        self._sent, self._numel = one_after_another(messages.sent)
        self._received, _ = one_after_another(messages.received)

    def start(self, x: Tensor, places: Places) -> Tensor:
        """Sends the parts of ``x`` at these places. Returns what :meth:`finish` takes."""
        buffer = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        for part, value in zip(self._sent.views(buffer), places.views(x), strict=True):
            part.copy_(value)
        # Not every backend transfers every dtype.
        return collectives().all_to_all_single(buffer.view(torch.uint8), *self._sizes, self._group)

    def finish(self, pending: Tensor, out: Tensor, places: Places) -> None:
        """Waits, and writes the parts that arrived to these places of ``out``."""
        arrived = collectives().wait_tensor(pending).view(self._dtype)
        for target, part in zip(places.views(out), self._received.views(arrived), strict=True):
            target.copy_(part)

    def abandon(self, pending: Tensor) -> None:
        """Waits, after an error between :meth:`start` and :meth:`finish`."""
        collectives().wait_tensor(pending)


# --- through the memory of the receiver ------------------------------------------------------------------------------

_MOST_BYTES = 2**30  # of a message: the kernel numbers its elements in 32 bits
_SLOTS = 2
_SIGNAL_BYTES, _COUNTER_BYTES = 16, 8
_WORDS_BYTES = _SIGNAL_BYTES + 2 * _COUNTER_BYTES  # an EdgeCounter of kernels/shift/edges.cuh for each direction
_DIMS = 8  # kEdgeDims of kernels/shift/edges.h: the dimensions of a part, and its run of bytes

_library = torch.library.Library("tsm_jit", "FRAGMENT")
_library.define("send_edges(Tensor x, Tensor parts, int slot_bytes, int milliseconds) -> ()")
_library.define("receive_edges(Tensor(a!) out, Tensor parts, int slot_bytes, int milliseconds) -> ()")
_send = direct(torch.ops.tsm_jit.send_edges.default)
_receive = direct(torch.ops.tsm_jit.receive_edges.default)


class _PeerMemory:
    """Memory of each GPU into which the other ranks of a group write: a mailbox with two slots for each sender.

    **When may a slot be written again?** In exchange ``k`` each of two ranks writes message ``k``, signals ``k``, waits
    for signal ``k`` of the other, and reads. It signals even if it has no message. Streams run in order, and
    :meth:`follow` orders streams. So signal ``k`` also means "I have read message ``k-1``". Message ``k+1`` may take
    the slot of ``k-1``, but not that of ``k``: two slots take turns. Gradients and recomputations are exchanges like
    others.

    **CUDA graphs.** The kernels count the messages in memory of the GPU. So a replay takes the next slot, also if other
    calls have sent messages since its capture.

    An exchange that started always ends, also after an exception, else a rank would lose count. If a signal does not
    come within the time-out of the group, the kernel stops with an error. The caller's next operation raises it.
    """

    def __init__(self, ranks: Ranks, capacity: int, buffers: list[int]):
        self.device, self.rank, self.capacity, self._buffers = ranks.device, ranks.rank, capacity, buffers
        self.milliseconds = int(time_out(process_group(ranks.name), ranks.device).total_seconds() * 1000)
        self._words_begin = ranks.size * _SLOTS * capacity
        self._streams: dict[bool, torch.cuda.Stream] = {}  # of the last exchange outside and within a capture
        self._last_handle = -1  # the stream of the last exchange

    @staticmethod
    def size(ranks: int, capacity: int) -> int:
        """The bytes on each GPU. For each rank, also this one: two slots, a signal and two counters."""
        return ranks * (_SLOTS * capacity + _WORDS_BYTES)

    def addresses(self, peer: int, sends: bool) -> tuple[int, int, int]:
        """The addresses of the mailbox, the signal and the counter for messages to or from ``peer``."""
        receiver, sender = (peer, self.rank) if sends else (self.rank, peer)
        mailbox = self._buffers[receiver] + sender * _SLOTS * self.capacity
        signal = self._buffers[receiver] + self._words_begin + sender * _WORDS_BYTES
        counters = self._buffers[self.rank] + self._words_begin + peer * _WORDS_BYTES + _SIGNAL_BYTES
        return mailbox, signal, counters + sends * _COUNTER_BYTES

    def follow(self) -> None:
        """Lets the current stream wait for the last exchange, if that ran on another stream."""
        handle = current_stream_handle(self.device)
        if handle == self._last_handle:
            return
        stream = torch.cuda.current_stream(self.device)
        captures = _is_capturing(stream)
        last = self._streams.get(captures)
        # A capture cannot wait for streams outside of it. A replay follows the work of the stream that it runs on.
        if last is not None and _is_capturing(last) == captures:
            stream.wait_stream(last)
        self._streams[captures], self._last_handle = stream, handle


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


class _Mailboxes:
    """Carries messages of one shape through the memory of the receiver."""

    def __init__(self, memory: _PeerMemory, messages: Messages):
        self._memory, self._messages = memory, messages
        self._limits = memory.capacity, memory.milliseconds
        ranks = range(len(messages.sent))
        self._peers = [peer for peer in ranks if messages.sent[peer] or messages.received[peer]]

    def start(self, x: Tensor, places: Places) -> None:
        """Sends the parts of ``x`` at these places."""
        if places.table is None:
            places.table = self._table(self._messages.sent, places.parts, sends=True)
        self._memory.follow()
        _send(x, places.table, *self._limits)

    def finish(self, _: None, out: Tensor, places: Places) -> None:
        """Waits, and writes the parts that arrived to these places of ``out``."""
        if places.table is None:
            places.table = self._table(self._messages.received, places.parts, sends=False)
        _receive(out, places.table, *self._limits)

    def abandon(self, _: None) -> None:
        """Waits, after an error between :meth:`start` and :meth:`finish`."""
        nothing_read = self._table([()] * len(self._messages.received), [], sends=False)
        _receive(torch.empty(0, device=self._memory.device), nothing_read, *self._limits)

    def _table(self, messages: Sequence[tuple[Strided, ...]], places: Sequence[Strided], sends: bool) -> Tensor:
        """The rows ``EdgePart`` of kernels/shift/edges.h, in memory of the host. A message without parts has a row."""
        rows, remaining = [], iter(places)
        for peer in self._peers:
            message = messages[peer]
            head = [*self._memory.addresses(peer, sends), max(1, len(message))]
            boxes = [_box(next(remaining), in_message, self._messages.dtype.itemsize) for in_message in message]
            rows += [[*head, *box] for box in boxes or [[0] * (3 + 2 * _DIMS)]]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").view(len(rows), 7 + 2 * _DIMS)


def _box(in_tensor: Strided, in_message: Strided, element_size: int) -> list[int]:
    """The fields of ``EdgePart`` from ``message_begin`` on, in bytes, with as few dimensions as possible."""
    size, strides, begin = in_tensor
    _, message_strides, message_begin = in_message
    dimensions = [(element_size, 1)]  # the innermost first
    for _, length, stride in sorted(zip(message_strides, size, strides, strict=True)):
        inner_length, inner_stride = dimensions[-1]
        if length == 1:
            continue
        if stride * element_size == inner_length * inner_stride:
            dimensions[-1] = (inner_length * length, inner_stride)
        else:
            dimensions.append((length, stride * element_size))
    dimensions += [(1, 0)] * (_DIMS - len(dimensions))
    lengths, distances = zip(*reversed(dimensions), strict=True)
    return [message_begin * element_size, begin * element_size, torch.Size(lengths).numel(), *lengths, *distances]


def _reaches_all(device: torch.device, uuids: list[str]) -> bool:
    """Whether ``device`` reaches the memory of the GPUs with these UUIDs, each another, with atomic operations.

    Only over such links does CUDA guarantee that another GPU sees a message before its signal.
    """
    count = torch.cuda.device_count()
    visible = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(count)}
    indices = [visible.get(uuid) for uuid in uuids]
    if len(set(uuids)) < len(uuids) or not has_kernel("tsm_jit::send_edges", "CUDA"):
        return False
    return all(
        index is not None
        and (
            index == device.index
            or (torch.cuda.can_device_access_peer(device.index, index) and has_atomics(device.index, index))
        )
        for index in indices
    )
