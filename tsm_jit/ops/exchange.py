"""Messages between the ranks of a process group. They travel while the caller does other work.

- :func:`ranks_of` returns the :class:`Ranks` of a group. Their :meth:`Ranks.compare` compares the calls of all ranks.
- :meth:`Ranks.courier` returns an object that carries messages of one shape. There are two kinds:

  - :class:`_PeerMemory`, if each GPU reaches the memory of all others with atomic operations, as over NVLink. A rank
    writes into memory of the receiver and signals. A message takes four small kernels of the two ranks.
  - :class:`_Collective`, otherwise: one ``all_to_all_single`` of NCCL or gloo.

On a GPU the host waits for the device only when :meth:`Ranks.compare` sees a call for the first time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsm_jit.ops.compat import collectives, current_stream_handle, process_group, symmetric_memory, time_out

Strided = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride and offset, the arguments of as_strided


class Messages(NamedTuple):
    """The messages to and from each rank. A message consists of parts, which lie one after another."""

    dtype: torch.dtype
    sent: tuple[tuple[Strided, ...], ...]
    received: tuple[tuple[Strided, ...], ...]


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
        self._memory: _PeerMemory | None = None
        self._shares_memory: bool | None = None  # unknown before the first message

    def compare(self, call: str, layer: str = "", message_bytes: int = 0) -> None:
        """Raises ValueError on all ranks, before any data moves, unless all ranks make the same ``call``.

        It is a call of ``layer``. Ranks are in different layers if one of them failed in another, and began again.

        The ranks must agree on when they compare calls: a comparison on one rank would meet another operation on the
        next. On CPUs, where communication blocks the host anyway, they compare at each call. On GPUs the comparison
        waits for the device, so a rank takes part when it first sees a call. All earlier calls were equal, so a call is
        new to all ranks or to none. If ranks differ and for one of them the call is not new, the time-out of the group
        ends all of them.

        ``message_bytes`` is the size of the largest message of any rank in this call.
        """
        is_cpu = self.device.type == "cpu"
        if not is_cpu and call in self._memory_of_calls:
            return
        if not is_cpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"split clips must run once before a CUDA graph captures them, got a new call: {call}")
        place = f"{call} in {layer!r}" if layer else call
        digest = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little", signed=True)
        own = torch.full((self.size,), digest, dtype=torch.int64, device=self.device)
        ones = [1] * self.size
        others = collectives().wait_tensor(collectives().all_to_all_single(own, ones, ones, self.name))
        if not torch.equal(own, others):
            got = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(self._gather(place)))
            raise ValueError(
                f"all ranks must call the same shift with the same shape, dtype and clip length, got {got}"
            )
        if not is_cpu and message_bytes > 0:
            self._reserve(message_bytes)
        self._memory_of_calls[call] = self._memory if message_bytes > 0 else None

    def courier(self, call: str, messages: Messages) -> _Mailboxes | _Collective:
        """Returns what carries the ``messages`` of a call that :meth:`compare` has seen."""
        # The memory in use when the call was new: all ranks find the same one, even if it has grown since.
        memory = self._memory_of_calls[call]
        return _Collective(self, messages) if memory is None else _Mailboxes(memory, messages)

    def _reserve(self, message_bytes: int) -> None:
        """Makes sure that the ranks share enough memory, if they can. All ranks call it."""
        if self._shares_memory is None:
            devices = self._gather(str(torch.cuda.get_device_properties(self.device).uuid))
            self._shares_memory = all(self._gather(_reaches_all(self.device, devices)))
        if not self._shares_memory or (self._memory is not None and self._memory.capacity >= message_bytes):
            return
        memory = error = None
        try:
            # The memory in use stays: CUDA graphs may have captured it. Doubling bounds their sum.
            memory = _PeerMemory(self, max(2**20, 1 << (message_bytes - 1).bit_length()))
        except RuntimeError as failure:  # a container may forbid processes to share memory
            error = str(failure)
        self._shares_memory = not any(self._gather(error))
        self._memory = memory if self._shares_memory else None

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
        size = torch.empty(0, dtype=messages.dtype).element_size()
        self._sizes = [[size * _numel(each) for each in part] for part in (messages.received, messages.sent)]
        self._sent, self._numel = self._in_one_buffer(messages.sent)
        self._received, _ = self._in_one_buffer(messages.received)

    @staticmethod
    def _in_one_buffer(messages: tuple[tuple[Strided, ...], ...]) -> tuple[list[Strided], int]:
        parts, begin = [], 0
        for message in messages:
            parts += [(size, stride, begin + offset) for size, stride, offset in message]
            begin += _numel(message)
        return parts, begin

    def start(self, values: Sequence[Tensor]) -> Tensor:
        """Sends ``values``, the parts of all messages. Returns what :meth:`finish` takes."""
        buffer = torch.empty(self._numel, dtype=self._dtype, device=self._device)
        for value, part in zip(values, self._sent, strict=True):
            buffer.as_strided(*part).copy_(value)
        # Not every backend transfers every dtype.
        return collectives().all_to_all_single(buffer.view(torch.uint8), *self._sizes, self._group)

    def finish(self, pending: Tensor, keep: bool) -> list[Tensor]:
        """Waits, and returns the parts of the messages that arrived."""
        arrived = collectives().wait_tensor(pending).view(self._dtype)
        return [arrived.as_strided(*part) for part in self._received]


# --- through the memory of the receiver ------------------------------------------------------------------------------

_SLOTS = 4  # two for eager calls and two for CUDA graphs


class _PeerMemory:
    """Memory of each GPU into which the other ranks of a group write: a mailbox with four slots for each sender.

    **When may a slot be written again?** Two ranks that exchange messages also exchange signals, even if only one has a
    message. For exchange ``k`` a rank writes its message, signals, waits for the signal of the other, and reads. So the
    signal ``k`` of a rank also says that it has read the message ``k-1``: its stream runs in order, and :meth:`follow`
    orders streams. A rank that has received signal ``k`` knows that the other has read all but its message ``k``. The
    next message therefore needs another slot than message ``k``: two slots take turns. Gradients and recomputations are
    exchanges like others. The order of the ranks' calls decides, not what the calls are.

    **CUDA graphs.** A replay writes the slots of the capture, whatever was written last. So graphs have two slots of
    their own: after an eager call, and before one, the slot is another. Between graphs it may not be: the last message
    of a replay and the first of the next may have the same slot. The first exchange of a pair in each graph therefore
    begins with a signal in both directions, without a message. After it all earlier messages are read.

    **Signals.** A signal sets a word to 1 after it was 0, and waiting sets it to 0 after it was 1. So signals are
    neither lost nor overtaken. An exchange that started always ends, also after an exception, else the next one would
    take its signal. If a signal does not come within the time-out of the group, the kernel stops with an error: the
    caller's next operation raises it, and no result of the kernel is used.
    """

    def __init__(self, ranks: Ranks, capacity: int):
        self.device, self.rank, self.capacity = ranks.device, ranks.rank, capacity
        self._milliseconds = int(time_out(process_group(ranks.name), ranks.device).total_seconds() * 1000)
        shared = symmetric_memory()
        with torch.inference_mode(False), torch.cuda.device(self.device), _without_multicast():
            own = shared.empty(ranks.size * _SLOTS * capacity, dtype=torch.uint8, device=self.device)
            self._handle = shared.rendezvous(own, ranks.name)
            self._buffers = [
                own if rank == ranks.rank else self._handle.get_remote_tensor(rank, own.shape, own.dtype)
                for rank in range(ranks.size)
            ]
        self.side = torch.cuda.Stream(self.device, priority=-1)
        self._turns = [[0] * ranks.size, [0] * ranks.size]  # of eager calls and of CUDA graphs, with each rank
        self._captures = [0] * ranks.size  # the last capture of an exchange with each rank
        self._streams: dict[int, torch.cuda.Stream] = {}  # the last one of eager calls, and of each capture

    def slots(self, receiver: int, sender: int) -> list[Tensor]:
        """The mailbox of ``receiver`` for messages of ``sender``."""
        box = self._buffers[receiver].narrow(0, sender * _SLOTS * self.capacity, _SLOTS * self.capacity)
        return list(box.split(self.capacity))

    def follow(self, capture: int) -> None:
        """Lets the current stream wait for the last exchange, if that ran on another stream."""
        last = self._streams.get(capture)
        if last is None or last.cuda_stream != current_stream_handle(self.device):
            stream = torch.cuda.current_stream(self.device)
            if last is not None:
                stream.wait_stream(last)
            self._streams[capture] = stream

    def take_turns(self, peers: Sequence[int], capture: int) -> list[int]:
        """Returns the slot of the next message, for each peer. ``capture`` is 0 outside of CUDA graphs."""
        if capture:
            new = [peer for peer in peers if self._captures[peer] != capture]
            self.signal(new)
            self.wait(new)
            for peer in new:
                self._captures[peer] = capture
        turns = self._turns[capture != 0]
        for peer in peers:
            turns[peer] ^= 1
        return [turns[peer] + (2 if capture else 0) for peer in peers]

    def signal(self, peers: Sequence[int]) -> None:
        for peer in peers:
            self._handle.put_signal(peer, 0, self._milliseconds)

    def wait(self, peers: Sequence[int]) -> None:
        for peer in peers:
            self._handle.wait_signal(peer, 0, self._milliseconds)


class _Mailboxes:
    """Carries messages of one shape through the memory of the receiver."""

    def __init__(self, memory: _PeerMemory, messages: Messages):
        self._memory = memory
        ranks = range(len(messages.sent))
        self._peers = [peer for peer in ranks if messages.sent[peer] or messages.received[peer]]
        with torch.inference_mode(False):
            self._sent = [
                [_parts(slot, messages.dtype, messages.sent[peer]) for slot in memory.slots(peer, memory.rank)]
                for peer in self._peers
            ]
            self._received = [
                [_parts(slot, messages.dtype, messages.received[peer]) for slot in memory.slots(memory.rank, peer)]
                for peer in self._peers
            ]

    def start(self, values: Sequence[Tensor]) -> tuple[list[int], bool]:
        """Sends ``values``, the parts of all messages. Returns what :meth:`finish` takes."""
        memory = self._memory
        capture = _capture(memory.device)
        memory.follow(capture)
        if not capture:
            return self._send(values, capture), False
        # Branches of a graph cost the host nothing, so the whole exchange runs in parallel with the work of the caller.
        memory.side.wait_stream(torch.cuda.current_stream(memory.device))
        with torch.cuda.stream(memory.side):
            slots = self._send(values, capture)
            memory.wait(self._peers)
        return slots, True

    def _send(self, values: Sequence[Tensor], capture: int) -> list[int]:
        slots = self._memory.take_turns(self._peers, capture)
        targets = chain.from_iterable([parts[slot] for parts, slot in zip(self._sent, slots, strict=True)])
        for value, target in zip(values, targets, strict=True):
            target.copy_(value)
        self._memory.signal(self._peers)
        return slots

    def finish(self, pending: tuple[list[int], bool], keep: bool) -> list[Tensor]:
        """Waits, and returns the parts of the messages that arrived. The next call overwrites them, unless ``keep``."""
        slots, captured = pending
        if captured:
            torch.cuda.current_stream(self._memory.device).wait_stream(self._memory.side)
        else:
            self._memory.wait(self._peers)
        parts = list(chain.from_iterable([parts[slot] for parts, slot in zip(self._received, slots, strict=True)]))
        return [part.clone() for part in parts] if keep else parts


def _parts(slot: Tensor, dtype: torch.dtype, message: tuple[Strided, ...]) -> list[Tensor]:
    values = slot.view(dtype)
    return [values.as_strided(size, stride, values.storage_offset() + offset) for size, stride, offset in message]


@contextlib.contextmanager
def _without_multicast() -> Iterator[None]:
    """Lets PyTorch share memory without an NVLink multicast object, which nothing here uses."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# --- what the driver knows -------------------------------------------------------------------------------------------


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _capture(device: torch.device) -> int:
    """The number of the capture of a CUDA graph that the current stream takes part in, otherwise 0."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    handle = ctypes.c_void_p(current_stream_handle(device))
    _checked(
        _driver().cuStreamGetCaptureInfo_v2(handle, ctypes.byref(status), ctypes.byref(number), None, None, None),
        "cuStreamGetCaptureInfo",
    )
    return number.value


def _reaches_all(device: torch.device, others: list[str]) -> bool:
    """Whether ``device`` reaches the memory of the GPUs with these UUIDs, each another, with atomic operations."""
    count = torch.cuda.device_count()
    visible = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(count)}
    indices = [visible.get(uuid) for uuid in others]
    if len(set(others)) < len(others) or symmetric_memory().get_backend(device) != "CUDA":
        return False
    return all(
        index is not None
        and (
            index == device.index
            or (torch.cuda.can_device_access_peer(device.index, index) and _has_atomics(device.index, index))
        )
        for index in indices
    )


def _has_atomics(device: int, other: int) -> bool:
    handles = [ctypes.c_int(), ctypes.c_int()]
    for handle, index in zip(handles, (device, other), strict=True):
        _checked(_driver().cuDeviceGet(ctypes.byref(handle), index), "cuDeviceGet")
    value, native_atomics = ctypes.c_int(), 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    _checked(
        _driver().cuDeviceGetP2PAttribute(ctypes.byref(value), native_atomics, *handles), "cuDeviceGetP2PAttribute"
    )
    return value.value == 1


def _checked(error: int, name: str) -> None:
    if error:
        raise RuntimeError(f"{name} of the CUDA driver failed with error {error}")
