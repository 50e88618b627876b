"""What several test files share: tensors of random bits and values, comparison bit by bit, layouts."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import tsm_jit
from tsm_jit.plans import Padding

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
OTHERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
DTYPES = FLOATING + OTHERS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def random_groups(channels: int, unit: int, length: int) -> list[tuple[int, int]]:
    """Up to four groups ``(width, offset)``, whose widths are multiples of ``unit``."""
    left, groups = channels // unit, []
    for _ in range(random.randint(1, 4)):
        width = random.randint(0, left)
        left -= width
        groups.append((width * unit, random.randint(-length, length)))
    return groups


def error(actual: Tensor, exact: Tensor) -> float:
    """The norm of the error, relative to the norm of the float64 result ``exact``."""
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def requested_bytes(which: str = "current") -> int:
    """What tensors asked for on a GPU, or its ``"peak"``. The allocator may have given them larger blocks."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that ``work`` asks for at a time on a GPU, with its result. Its first call loads libraries.

    The threads of autograd may free a gradient late, which makes a peak smaller: this is the largest of three.
    """
    work()
    peaks = []
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested_bytes()
        result = work()
        peaks.append(requested_bytes("peak") - before)
        del result
    return max(peaks)


@contextlib.contextmanager
def limited_gpu_memory(device: torch.device, free_bytes: int) -> Iterator[None]:
    """Lets PyTorch allocate only ``free_bytes`` more on ``device``."""
    gc.collect()  # what earlier tests left would become free memory
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def rotated_video(folder: Path, frames: int) -> Path:
    """Writes a video of 48x64 with a white top left corner, which asks to be turned clockwise by 90 degrees."""
    from tsm_jit import video_io

    upright = torch.zeros(frames, 3, 48, 64, dtype=torch.uint8)
    upright[:, :, :12, :16] = 255
    path = folder / "rotated.mp4"
    video_io.write_video(path, upright)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # the display matrix of the track, ISO 14496-12
    assert struct.unpack_from(">9i", data, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data)
    return path


def random_bits(shape, dtype: torch.dtype, device="cpu") -> Tensor:
    """Any bits at all, NaN payloads and infinities included."""
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), device=device).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (count * size,), dtype=torch.uint8, device=device)
    return (data.view(dtype) if count else torch.empty(0, dtype=dtype, device=device)).view(tuple(shape))


def random_values(shape, dtype: torch.dtype, device="cpu") -> Tensor:
    """Finite values that addition rounds."""
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device, dtype=torch.float64).to(dtype)


def bits(x: Tensor) -> Tensor:
    flat = x.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8) if flat.numel() else flat


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    a, b = bits(actual), bits(expected)
    assert torch.equal(a, b), f"{(a != b).sum().item()} of {a.numel()} bytes differ"


@contextlib.contextmanager
def separate_shifts() -> Iterator[None]:
    """Modules shift their input, then call their layer, in two kernels with the bits of both."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class UndefinedGradient(torch.autograd.Function):
    """A copy, whose backward has no gradient, not even one of zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def poison(x: Tensor) -> None:
    """Fills memory that torch is about to hand out again with what no test expects."""
    scratch = torch.empty_like(x)
    if scratch.numel():
        scratch.view(-1).view(torch.uint8).fill_(0xA5) if scratch.is_contiguous() else None
    del scratch


PLAN = ((2, 1), (2, -2), (1, 3))


def shifted(x: Tensor, padding: Padding = "keep", inplace: bool = False, channel_dim: int = 1) -> Tensor:
    """Shifts 6 channels by ``Shift(5, 4, channel_dim, padding, PLAN)``. One channel and one frame do not move."""
    return tsm_jit.shift_groups(
        x, 5, PLAN, padding=padding, n_segment_shifted=4, channel_dim=channel_dim, inplace=inplace
    )


# name: (channel dimension, a tensor [N*T, C, H, W] of random bits in that layout). 5-D layouts are [N, T, C, H, W].
Make = Callable[..., Tensor]


def layouts(n: int, t: int, c: int, h: int, w: int, dtype: torch.dtype, device, make: Make = random_bits) -> dict:
    def new(*shape: int) -> Tensor:
        return make(shape, dtype, device)

    def offset(*shape: int) -> Tensor:
        return new(math.prod(shape) + 1)[1:].view(shape)

    return {
        "NCHW": (1, new(n * t, c, h, w)),
        "channels_last": (1, new(n * t, h, w, c).permute(0, 3, 1, 2)),
        "NTCHW": (2, new(n, t, c, h, w)),
        "NTHWC": (2, new(n, t, h, w, c).permute(0, 1, 4, 2, 3)),
        "NCDHW": (1, new(n * t, c, 2, h, w)),
        "NC": (1, new(n * t, c)),
        "NCL": (1, new(n * t, c, h)),
        "tokens": (2, new(n * t, h, c)),
        "storage offset": (1, offset(n * t, c, h, w)),
        "channels_last, storage offset": (1, offset(n * t, h, w, c).permute(0, 3, 1, 2)),
        "some channels": (1, new(n * t, c + 3, h, w)[:, 2 : 2 + c]),
        "some channels, channels_last": (1, new(n * t, h, w, c + 3).permute(0, 3, 1, 2)[:, 1 : 1 + c]),
        "every second frame": (1, new(2 * n * t, c, h, w)[::2]),
        "cropped": (1, new(n * t, c, h + 2, w + 1)[:, :, 1:-1, 1:]),
        "channels outermost": (1, new(c, n * t, w, h).permute(1, 0, 3, 2)),
    }
