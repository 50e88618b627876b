"""The operators against the naive kernels (``kernels/*/*_naive.cuh``), about ten lines for each operation.

On a GPU nvcc compiles ``naive.cu``, and the operators are the CUDA kernels. On the CPU g++ compiles it with
the launch of ``tests/kernels/cuda_on_cpu``, and the operators are the CPU kernels.
"""

import ctypes
import functools
import random
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import Structure, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from support import assert_same_bits, random_bits
from torch import Tensor

import tsm_jit
from tsm_jit.ops.residual import acc_dtype
from tsm_jit.plans import PADDINGS, Shift

ROOT = Path(__file__).parents[2]
OPS = torch.ops.tsm_jit
DTYPES = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.float64: 4}  # as DType in core/dtype.h
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
EPSILON = 1e-3

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Shape(Structure):
    """``NaiveShape`` of ``core/naive.cuh``."""

    _fields_ = [
        *((name, c_int64) for name in ("clips", "frames", "outer_size", "channels", "channel_numel")),
        *(("offset", c_void_p), ("n_segment_shifted", c_int32), ("padding", c_int32)),
        *(("boundary_begin", c_void_p), ("boundary_frame", c_void_p), ("boundary_numel", c_int64)),
    ]


class Stream(Structure):
    _fields_ = [("data", c_void_p), ("boundary", c_void_p), ("is_shifted", c_int32)]


class Norm(Structure):
    _fields_ = [(name, c_void_p) for name in ("mean", "variance", "weight", "bias")] + [("epsilon", c_double)]


@functools.cache
def library(device: str) -> ctypes.CDLL:
    folder, source = tempfile.mkdtemp(prefix="tsm_jit_naive_"), ROOT / "tests/kernels/naive/naive.cu"
    if device == "cuda":
        from torch.utils.cpp_extension import load

        path = f"{folder}/naive.so"
        load("naive", [str(source)], extra_include_paths=[str(ROOT / "kernels")], build_directory=folder,
             extra_cuda_cflags=["-std=c++17"], is_python_module=False)  # fmt: skip
    else:
        path = f"{folder}/libnaive.so"
        folders = [f"-I{ROOT / name}" for name in ("tests/kernels/cuda_on_cpu", "kernels")]
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-x", "c++"]
        subprocess.run(["g++", *options, *folders, str(source), "-o", path], check=True)
    return ctypes.CDLL(path)


@pytest.fixture
def naive(device):
    """Calls a function of ``tests/kernels/naive/naive.cu``."""
    if not tsm_jit.info()["devices"][device.type].startswith("compiled kernels"):
        pytest.skip(f"no kernels were compiled for {device.type}")
    if shutil.which("nvcc" if device.type == "cuda" else "g++") is None:
        pytest.skip("needs nvcc for a GPU, or g++")

    def call(name: str, *arguments) -> None:
        function = getattr(library(device.type), name)
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        assert error is None, error
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


class Case:
    """A random shift of activations ``[N*T, C, H, W]`` of odd sizes."""

    def __init__(self, layout: str, device: torch.device, padding: str):
        self.layout, self.device = layout, device
        self.frames = random.randint(2, 9)
        self.clips, self.height, self.width = random.randint(1, 3), random.randint(1, 7), random.randint(1, 7)
        n = random.randint(1, self.frames)
        groups = [(random.choice((1, 3, 8)), random.randint(-3, 3)) for _ in range(random.randint(1, 4))]
        rest = random.choice((0, 5, 8))
        self.channels = sum(width for width, _ in groups) + rest
        if self.channels == 1:  # both layouts at once
            self.channels, rest = 2, rest + 1
        self.shift = Shift(self.frames, n, 1, padding, tuple(groups)).canonical()
        self.encoded = self.shift.encode()
        offset, begin, frame = [], [], []
        pixels, first = (1 if layout == "NHWC" else self.height * self.width), 0
        for width, distance in (*self.shift.plan, (rest, 0)):
            offset += [distance] * width
            begin += [(first + channel) * pixels for channel in range(width)]
            frame += [width * pixels] * width
            first += 0 if padding == "circular" else width * abs(distance)
        self.boundary_channels = first
        self.per_channel = [torch.tensor(offset, dtype=torch.int32), torch.tensor(begin), torch.tensor(frame)]
        self.per_channel = [each.to(device) for each in self.per_channel]
        offset, begin, frame = map(pointer, self.per_channel)
        outer = self.height * self.width // pixels
        self.shape = Shape(self.clips, self.frames, outer, self.channels, pixels, offset, n, PADDINGS.index(padding),
                           begin, frame, first * pixels)  # fmt: skip

    def values(self, dtype: torch.dtype, *, frames: int | None = None, channels: int | None = None) -> Tensor:
        """Integers, whose sums are exact, and which are often 0."""
        sizes = (frames or self.clips * self.frames, self.channels if channels is None else channels)
        return self.laid_out(torch.randint(-5, 6, (*sizes, self.height, self.width), device=self.device).to(dtype))

    def boundary(self, dtype: torch.dtype) -> Tensor:
        return self.values(dtype, frames=self.clips, channels=self.boundary_channels)

    def laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=LAYOUTS[self.layout])

    def norm(self, dtype: torch.dtype) -> list[Tensor]:
        """Mean, variance, weight and bias."""
        parts = torch.randn(4, self.channels, device=self.device, dtype=acc_dtype(dtype))
        return [*(part.abs() if k == 1 else part for k, part in enumerate(parts.unbind()))]


def pointer(x: Tensor | None) -> c_void_p:
    return c_void_p(None if x is None or x.numel() == 0 else x.data_ptr())


def stream(x: Tensor | None, boundary: Tensor | None = None, is_shifted: bool = False) -> Stream:
    return Stream(pointer(x), pointer(boundary), is_shifted)


def naive_norm(parts: Sequence[Tensor]) -> Norm:
    return Norm(*map(pointer, parts), EPSILON) if parts else Norm()


def assert_close(actual: Tensor, expected: Tensor, *, rounds: bool, scale: float = 1.0) -> None:
    """The same numbers. If ``rounds``, within some roundings of numbers of size ``scale``, and one of the result."""
    assert actual.shape == expected.shape
    if not rounds:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    atol = 64 * torch.finfo(acc_dtype(actual.dtype)).eps * scale
    rtol = 2 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


@both_layouts
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES, torch.complex128])
def test_shift(device, naive, layout, dtype, padding):
    for _ in range(10):
        case = Case(layout, device, padding)
        x = case.laid_out(random_bits(case.values(torch.uint8).shape, dtype, device))
        expected = torch.empty_like(x)
        naive("temporal_shift", x.element_size(), pointer(expected), pointer(x), case.shape)
        assert_same_bits(OPS.temporal_shift.kernel(x, case.encoded), expected)
        shifted = x.clone()
        OPS.temporal_shift_(shifted, case.encoded)
        assert_same_bits(shifted, expected)


@both_layouts
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_backward(device, naive, layout, dtype, padding):
    for _ in range(10):
        case = Case(layout, device, padding)
        grad = case.values(dtype)
        expected = torch.empty_like(grad)
        naive("temporal_shift_backward", DTYPES[dtype], pointer(expected), pointer(grad), case.shape)
        assert_close(OPS.temporal_shift_backward.kernel(grad, case.encoded), expected, rounds=False)


@both_layouts
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_add_relu(device, naive, layout, dtype, padding):
    for _ in range(10):
        case = Case(layout, device, padding)
        z, identity = case.values(dtype), case.values(dtype)
        boundary = random.choice((None, case.boundary(dtype)))
        z_norm, identity_norm = random.choice(([], case.norm(dtype))), random.choice(([], case.norm(dtype)))
        shifted = random.random() < 0.5
        out, boundary_out = OPS.norm_add_relu(
            z, z_norm, EPSILON, identity, identity_norm, EPSILON, boundary, case.encoded, shifted
        )
        expected = torch.empty_like(z), case.boundary(dtype)
        naive(
            "norm_add_relu",
            *(DTYPES[dtype], stream(*expected, shifted), stream(z), naive_norm(z_norm)),
            *(stream(identity, boundary, boundary is not None), naive_norm(identity_norm), case.shape, 1),
        )
        rounds = bool(z_norm or identity_norm)
        assert_close(out, expected[0], rounds=rounds, scale=1e3)
        if shifted:
            assert_close(boundary_out, expected[1], rounds=rounds, scale=1e3)


@both_layouts
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_relu_backward(device, naive, layout, dtype, padding):
    for _ in range(10):
        case = Case(layout, device, padding)
        shifted, to_shifted = random.random() < 0.5, random.random() < 0.5
        out, grad_a, grad_b = case.values(dtype), case.values(dtype), random.choice((None, case.values(dtype)))
        boundary_out, grad_boundary = (case.boundary(dtype), case.boundary(dtype)) if shifted else (None, None)
        none = (None, [], 0.0)
        actual = OPS.add_relu_backward(
            grad_a, grad_b, grad_boundary, out, boundary_out, *none, *none, case.encoded, to_shifted
        )
        expected = torch.empty_like(out), torch.empty_like(out), case.boundary(dtype)
        naive(
            "add_relu_backward",
            *(DTYPES[dtype], stream(expected[0]), stream(*expected[1:], True) if to_shifted else stream(None)),
            *(stream(out, boundary_out, shifted), stream(grad_a, grad_boundary, shifted)),
            *(stream(grad_b, None, shifted), case.shape),
        )
        for ours, theirs in zip(actual[: 3 if to_shifted else 1], expected, strict=False):
            assert_close(ours, theirs, rounds=False)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_relu_max_pool(device, naive, dtype, padding):
    for _ in range(10):
        case = Case("NHWC", device, padding)
        height, width = 2 * case.height - random.randint(0, 1), 2 * case.width - random.randint(0, 1)
        z = torch.randn(case.clips * case.frames, case.channels, height, width, device=device).to(dtype)
        z, norm = case.laid_out(z), case.norm(dtype)
        actual = OPS.norm_relu_max_pool(z, norm, EPSILON, case.encoded, True, True)
        expected = case.values(dtype), case.values(dtype), case.boundary(dtype)
        for out in (stream(expected[0]), stream(*expected[1:], True)):
            naive("norm_relu_max_pool", DTYPES[dtype], out, pointer(z), naive_norm(norm), case.shape, height, width)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_close(ours, theirs, rounds=True, scale=1e3)


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_relu_backward(device, naive, dtype, of_batch):
    for _ in range(10):
        case = Case("NHWC", device, "zeros")
        grad, z, norm = case.values(dtype), case.values(dtype), case.norm(dtype)
        rows = z.numel() // case.channels
        grad_z, grad_weight, grad_bias = OPS.norm_relu_backward(grad, z, norm, EPSILON, [of_batch, True, True])
        # Once for the mask, whose sums give the gradients of the norm; and again with the norm of the batch.
        masked, expected = torch.empty_like(z), torch.empty_like(z)
        tensors = DTYPES[dtype], pointer(expected), pointer(masked), pointer(grad), pointer(z), naive_norm(norm)
        naive("norm_relu_backward", *tensors, Norm(), c_int64(rows), c_int64(case.channels))
        sums = torch.zeros(3, case.channels, device=device, dtype=torch.float64)
        sizes = c_int64(rows), c_int64(case.channels)
        naive("channel_sums", DTYPES[dtype], pointer(sums), pointer(masked), pointer(z),
              pointer(norm[0]), *sizes)  # fmt: skip
        parts = [part.double() for part in norm]
        grads = torch.empty(4, case.channels, device=device, dtype=torch.float64)
        naive("norm_grads", *(pointer(each) for each in (grads, sums, parts[1], parts[2])),
              c_double(EPSILON), *sizes)  # fmt: skip
        if of_batch:
            batch_norm = [norm[0], norm[1], *grads[2:].to(norm[0].dtype).unbind()]
            naive("norm_relu_backward", *tensors, naive_norm(batch_norm), *sizes)
        scale = float(1e3 * (1 + grads.abs().max()))
        assert_close(grad_weight, grads[0].to(norm[0].dtype), rounds=True, scale=scale)
        assert_close(grad_bias, grads[1].to(norm[0].dtype), rounds=True, scale=scale)
        assert_close(grad_z, expected, rounds=True, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_stats(device, naive, dtype):
    for _ in range(10):
        case = Case("NHWC", device, "zeros")
        x = case.laid_out(torch.randn(case.values(dtype).shape, device=device).to(dtype))
        running = torch.zeros(2, case.channels, device=device, dtype=acc_dtype(dtype)).unbind()
        count = torch.tensor(41, device=device)
        actual = OPS.batch_norm_stats_(x, *running, count, 1.0)
        expected = torch.empty(2, case.channels, device=device, dtype=torch.float64)
        mean, variance = map(pointer, expected)
        sizes = c_int64(x.numel() // case.channels), c_int64(case.channels)
        naive("batch_norm_stats", DTYPES[dtype], mean, variance, pointer(x), *sizes)
        for ours, theirs in zip(actual, expected.to(acc_dtype(dtype)).unbind(), strict=True):
            assert_close(ours, theirs, rounds=True, scale=1e2)
        assert int(count) == 42
