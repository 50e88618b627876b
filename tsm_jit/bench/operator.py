"""Times the operator and other implementations of it, against a copy of as many bytes.

There are three measurements (see :mod:`tsm_jit.bench.timing`):

- a single call with cold caches, as in a network;
- many calls in a row on rotating buffers, on a GPU as a CUDA graph, which measures the kernel time;
- the CPU overhead of a call, on a very small tensor.

The lower bound of the time is measured as well. It is the number of bytes that an operation must move
(:func:`tsm_jit.bench.peers.bytes_moved`), divided by the bandwidth of PyTorch's copy in the same process.

Every output is compared with the reference before it is timed. The outputs of tsm_jit must be bit-identical. Other
outputs must be equal, since some implementations turn -0.0 into 0.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsm_jit import ops, reference
from tsm_jit.bench import peers, timing
from tsm_jit.bench.rows import Mismatch, Row, mebibytes
from tsm_jit.functional import temporal_shift
from tsm_jit.plans import Shift, temporal

Operation = tuple[str, str, bool, Callable[[Tensor], Any]]  # operation, implementation, whether in place, function
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("NCHW", "channels_last")


@dataclass(frozen=True)
class Shape:
    """The size of an input: ``batch`` clips of ``frames`` frames. A fold has ``channels // fold_div`` channels."""

    batch: int
    frames: int
    channels: int
    height: int
    width: int
    fold_div: int = 8

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parses ``B,T,C,H,W`` or ``B,T,C,H,W,DIV``. Raises ValueError for other text."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (5, 6) or min(numbers) < 1 or numbers[5:] == [1]:
            raise ValueError(
                "a shape must be B,T,C,H,W or B,T,C,H,W,DIV with integers of at least 1, DIV of at least 2"
            )
        return cls(*numbers)

    def tensor(self, dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
        frames = (self.batch * self.frames, self.channels, self.height, self.width)
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        return torch.randn(frames, device=device).to(dtype).contiguous(memory_format=memory)

    def shift(self, depth: int) -> Shift:
        """Returns TSM's shift for depth 0, or TSAM's shift with padding ``keep`` for depths 1 to 4."""
        plan = temporal(self.channels, self.fold_div, max(depth, 1))
        return Shift(self.frames, self.frames, 1, "keep" if depth else "zeros", plan).canonical()

    def __str__(self) -> str:
        return f"({self.batch}, {self.frames}, {self.channels}, {self.height}, {self.width})/{self.fold_div}"


SHAPES = (
    Shape(10, 16, 256, 32, 32, 4),
    Shape(8, 8, 64, 56, 56),
    Shape(8, 8, 256, 56, 56),
    Shape(8, 8, 512, 28, 28),
    Shape(8, 8, 2048, 7, 7),
    Shape(64, 8, 256, 56, 56),
)
QUICK_SHAPES = (Shape(2, 8, 64, 28, 28),)

# --- timed operations ------------------------------------------------------------------------------------------------


def operations(x: Tensor, shift: Shift, with_compiled: bool) -> Iterator[Operation]:
    """Yields forward and backward of all implementations, for tensors like ``x``."""
    forward: dict[str, peers.Peer] = {"copy": peers.copy, "eager": peers.eager, "tsm_jit": peers.ours}
    if shift.padding == "zeros":
        forward["split and cat"] = peers.split_cat
    if with_compiled:
        forward["compiled"] = peers.compiled_stock
    for name, peer in forward.items():
        yield "forward", name, False, _shifting(peer, shift)
    yield "forward", "tsm_jit in place", True, lambda x: peers.ours_in_place(x, shift)
    encoded = shift.encode()
    yield "backward", "copy", False, lambda grad: peers.copy(grad, shift)
    for name, peer in forward.items():
        if name != "copy":
            leaf = x.detach().requires_grad_()
            out = peer(leaf, shift)
            yield "backward", name, False, _differentiating(out, leaf)
    yield "backward", "tsm_jit in place", True, lambda grad: _adjoint_in_place(grad, encoded)


def _shifting(peer: peers.Peer, shift: Shift) -> Callable[[Tensor], Tensor]:
    return lambda x: peer(x, shift)


def _differentiating(out: Tensor, leaf: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda grad: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]


def _adjoint_in_place(grad: Tensor, encoded: str) -> Tensor:
    torch.ops.tsm_jit.temporal_shift_backward_(grad, encoded)
    return grad


def check(operation: str, name: str, call: Callable[[Tensor], Any], x: Tensor, shift: Shift) -> None:
    """Raises Mismatch unless the call computes the values of the reference."""
    if name == "copy":
        return
    compute = reference.temporal_shift if operation == "forward" else reference.temporal_shift_backward
    expected = compute(x, shift)
    argument = torch.empty_like(x).copy_(x)
    torch.full_like(x, float("nan"))  # the allocator reuses this memory for the output, so unwritten elements are NaN
    actual = call(argument)
    if name.startswith("tsm_jit"):
        expected, actual = _bits(expected), _bits(actual)
    if not torch.equal(actual, expected):
        raise Mismatch(f"{operation} of {name} differs from the reference for {list(x.shape)} and {shift}")


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


# --- rows -------------------------------------------------------------------------------------------------------------


def peer_rows(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    depth: int,
    device: torch.device,
    repeats: int,
    with_compiled: bool,
) -> list[Row]:
    """Times all implementations for one shape, dtype, layout and plan, forward and backward."""
    values, shift = shape.tensor(dtype, layout, device), shape.shift(depth)
    size = values.numel() * values.element_size()
    x = torch.empty_like(values).copy_(values)
    peers.reset_compiler()
    calls: dict[tuple[str, str], timing.Call] = {}
    moved: dict[tuple[str, str], int] = {}
    for operation, name, in_place, call in operations(x, shift, with_compiled):
        check(operation, name, call, x, shift)
        calls[operation, name] = functools.partial(call, x)
        is_backward = operation == "backward"
        moved[operation, name] = 2 * size if name == "copy" else peers.bytes_moved(x, shift, in_place, is_backward)
    seconds = timing.medians(calls, device, lambda: x.copy_(values), repeats, seconds=0.5)
    copy_bandwidth = 2 * size / seconds["forward", "copy"]
    return [
        {
            "shape": str(shape),
            "dtype": _name(dtype),
            "layout": layout,
            "depth": depth,
            "operation": operation,
            "who": name,
            "milliseconds": each * 1e3,
            "gigabytes_per_second": moved[operation, name] / each * 1e-9,
            "of_copy": moved[operation, name] / each / copy_bandwidth,
            "against_eager": seconds[operation, "eager"] / each,
            "peak_mebibytes": mebibytes(timing.peak_bytes(calls[operation, name], device)),
        }
        for (operation, name), each in seconds.items()
    ]


def floor_row(shape: Shape, dtype: torch.dtype, layout: str, depth: int, device: torch.device) -> Row:
    """Compares forward and adjoint, in place and out of place, with the measured lower bound for one shape."""
    x, shift = shape.tensor(dtype, layout, device), shape.shift(depth)
    encoded, size = shift.encode(), x.numel() * x.element_size()
    # The buffers exceed the cache several times. In-place operations touch fewer bytes, so they need more buffers.
    in_place_bytes = peers.bytes_moved(x, shift, in_place=True)
    count = min(64, 1 + 3 * timing.cache_bytes(device) // max(1, min(in_place_bytes, size)))
    buffers = [torch.empty_like(x).copy_(x) for _ in range(count)]
    targets = [torch.empty_like(x) for _ in range(min(count, 1 + 3 * timing.cache_bytes(device) // size))]
    row: Row = {"shape": str(shape), "dtype": _name(dtype), "layout": layout, "depth": depth, "mebibytes": size / 2**20}
    bandwidths: dict[int, float] = {}  # of a copy, by the number of bytes that an operation moves

    def refill() -> None:  # in-place shifts replace values by zeros
        for buffer in buffers:
            buffer.copy_(x)

    def bandwidth(moved: int) -> float:
        if moved not in bandwidths:
            part = max(1, moved // 2)
            part -= part % min(part, 4096)  # unaligned copies are slower
            # Each copy has a separate source and target, so that caches are as cold as for the shift.
            windows = size // part
            pairs = [
                (_bytes(a)[:part], _bytes(targets[k // windows % len(targets)]).narrow(0, k % windows * part, part))
                for k, a in enumerate(buffers)
            ]
            calls = [functools.partial(b.copy_, a) for a, b in pairs]
            bandwidths[moved] = 2 * part / timing.in_a_row(calls, device, refill)
        return bandwidths[moved]

    for name, in_place, adjoint, call in (
        ("forward", False, False, lambda b: ops.temporal_shift(b, encoded)),
        ("backward", False, True, lambda b: ops.temporal_shift_backward(b, encoded)),
        ("forward in place", True, False, lambda b: ops.temporal_shift_(b, encoded)),
        ("backward in place", True, True, lambda b: _adjoint_in_place(b, encoded)),
    ):
        check("backward" if adjoint else "forward", "tsm_jit", call, x, shift)
        moved = peers.bytes_moved(x, shift, in_place, adjoint)
        seconds = timing.in_a_row([functools.partial(call, b) for b in buffers], device, refill)
        row[name] = {
            "microseconds": seconds * 1e6,
            "gigabytes_per_second": moved / seconds * 1e-9,
            "of_floor": moved / seconds / bandwidth(moved),
        }
    return row


def _bytes(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


def sweep(largest: int) -> Iterator[Shape]:
    """Yields float32 shapes from 64 KB up to ``largest`` bytes, by factors of 4.

    Small ones are limited by the launch overhead, large ones by the memory bandwidth.
    """
    last = largest.bit_length() - 1
    for exponent in (*range(16, last, 2), last):
        small = exponent < 22
        yield Shape(2 ** (exponent - 16), 8, 64, 8, 4) if small else Shape(2 ** (exponent - 22), 8, 64, 64, 32)


def call_overhead_rows(device: torch.device) -> list[Row]:
    """Measures the CPU overhead of one call, on 8 frames with 64 channels of 2x2 pixels."""
    x = torch.randn(8, 64, 2, 2, device=device)
    leaf, shift = x.clone().requires_grad_(), Shift(8, 8, 1, "zeros", temporal(64))
    with torch.no_grad():
        times = {
            "torch.relu_": timing.host_seconds(lambda: torch.relu_(x)),
            "stock, no_grad": timing.host_seconds(lambda: peers.stock(x, shift)),
            "tsm_jit, no_grad": timing.host_seconds(lambda: temporal_shift(x, 8)),
            "tsm_jit in place, no_grad": timing.host_seconds(lambda: temporal_shift(x, 8, inplace=True)),
        }
    times["stock, requires grad"] = timing.host_seconds(lambda: peers.stock(leaf, shift))
    times["tsm_jit, requires grad"] = timing.host_seconds(lambda: temporal_shift(leaf, 8))
    return [
        {
            "call": name,
            "microseconds": seconds * 1e6,
            "cheaper_than_stock": times[f"stock, {name.split(', ')[1]}"] / seconds if name.startswith("tsm") else None,
        }
        for name, seconds in times.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
