"""``shift_conv1x1`` and ``shift_linear``: the same as a shift and then PyTorch's own convolution or linear layer.

On a GPU their kernels round, so their error from float64 is compared with the error of PyTorch's own.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tsm_jit
from tsm_jit import ops, plans

HALF = (torch.float16, torch.bfloat16)


class Case:
    """A random product of shifted frames or tokens, large enough for the kernels on a GPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype, padding: str, tokens: bool, large: bool = True):
        unit = 8 if device.type == "cuda" else 1
        clips, self.length = random.randint(1, 3), random.randint(1, 9)
        self.padding, self.stride = padding, 1 if tokens else random.choice((1, 2))
        self.shifted = random.randint(1, self.length)
        channels, outputs = unit * random.randint(1, 24), unit * random.randint(1, 24)
        self.prefix = random.randint(0, 2) if tokens else 0
        self.groups = random_groups(channels, unit, self.length)
        side = 3
        if large:  # so that the rows fill a GPU
            side = self.stride * int((140 * 128 / clips / self.length) ** 0.5 + 1)
        frames = clips * self.length
        height, width = side, side + random.randint(0, 3)
        shape = (frames, height * width, channels) if tokens else (frames, channels, height, width)
        kernel = () if tokens else (1, 1)
        options = {"device": device, "dtype": dtype}
        self.x = torch.randn(shape, **options)
        if not tokens:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.weight = torch.randn(outputs, channels, *kernel, **options) / channels**0.5
        self.bias = torch.randn(outputs, **options) if random.random() < 0.5 else None
        self.dz = torch.randn_like(self(self.x, self.weight, self.bias))

    def _shifted(self, x: Tensor) -> Tensor:
        options = {"padding": self.padding, "n_segment_shifted": self.shifted}
        if x.dim() == 4:
            return tsm_jit.shift_groups(x, self.length, self.groups, **options)
        tokens = tsm_jit.shift_groups(x[:, self.prefix :], self.length, self.groups, channel_dim=-1, **options)
        return torch.cat([x[:, : self.prefix], tokens], 1)

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shifted = self._shifted(x)
        return F.conv2d(shifted, weight, bias, self.stride) if x.dim() == 4 else F.linear(shifted, weight, bias)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = {"padding": self.padding, "n_segment_shifted": self.shifted}
        if x.dim() == 4:
            return tsm_jit.shift_conv1x1(x, weight, bias, self.length, self.groups, stride=self.stride, **options)
        return tsm_jit.shift_linear(x, weight, bias, self.length, self.groups, num_prefix_tokens=self.prefix, **options)

    def results(self, function, dtype: torch.dtype, autocast: torch.dtype | None = None) -> list[Tensor]:
        """The output and the gradients of ``function`` computed in ``dtype``."""
        inputs = [
            None if each is None else each.to(dtype).requires_grad_() for each in (self.x, self.weight, self.bias)
        ]
        with torch.autocast(self.x.device.type, autocast, enabled=autocast is not None):
            z = function(*inputs)
        needed = [each for each in inputs if each is not None]
        return [z, *torch.autograd.grad(z, needed, self.dz.to(z.dtype))]

    def kernels_serve(self) -> bool:
        shift = plans.Shift(self.length, self.shifted, 1, self.padding, tuple(self.groups)).canonical()
        if self.x.dim() == 4:
            return ops.served_conv1x1(self.x, self.weight, self.bias, shift.encode(), self.stride) is not None
        shift = shift._replace(channel_dim=2)
        return ops.served_linear(self.x, self.weight, self.bias, shift.encode(), self.prefix) is not None


def random_groups(channels: int, unit: int, length: int) -> list[tuple[int, int]]:
    left, groups = channels // unit, []
    for _ in range(random.randint(1, 4)):
        width = random.randint(0, left)
        left -= width
        groups.append((width * unit, random.randint(-length, length)))
    return groups


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


both_kinds = pytest.mark.parametrize("tokens", [False, True], ids=["conv1x1", "linear"])


@pytest.mark.feature("shift inside a 1x1 convolution or a linear layer")
@both_kinds
@pytest.mark.parametrize("padding", plans.PADDINGS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_errors_on_a_gpu_are_those_of_pytorch(cuda, dtype, padding, tokens, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    for _ in range(5):
        case = Case(cuda, dtype, padding, tokens)
        assert case.kernels_serve()
        exact = case.results(case.expected, torch.float64)
        pytorch = case.results(case.expected, dtype)
        for a, b, c in zip(case.results(case, dtype), pytorch, exact, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            # Both round the result. The sums before differ in their order.
            assert error(a, c) <= 1.05 * error(b, c) + 1e-7


@both_kinds
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(cuda, dtype, tokens):
    case = Case(cuda, torch.float32, "zeros", tokens)
    exact = case.results(case.expected, torch.float64)
    pytorch = case.results(case.expected, torch.float32, dtype)
    found = case.results(case, torch.float32, dtype)
    for a, b, c in zip(found, pytorch, exact, strict=True):
        assert a.dtype == b.dtype
        assert error(a, c) <= 1.05 * error(b, c)


@both_kinds
@pytest.mark.parametrize("padding", plans.PADDINGS)
def test_the_cpu_computes_what_it_stands_for(padding, tokens):
    for _ in range(10):
        case = Case(torch.device("cpu"), torch.float64, padding, tokens, large=False)
        for a, b in zip(case.results(case, torch.float64), case.results(case.expected, torch.float64), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@both_kinds
def test_double_backward_vmap_and_forward_mode(device, tokens):
    case = Case(device, torch.float64, "keep", tokens, large=False)
    tensors = [each.requires_grad_() for each in (case.x, case.weight)]
    assert torch.autograd.gradcheck(
        lambda x, w: case(x, w, None), tensors, check_batched_grad=True, check_forward_ad=True
    )
    assert torch.autograd.gradgradcheck(lambda x, w: case(x, w, None), tensors)
    xs = torch.stack([case.x, 2 * case.x]).detach()
    mapped = torch.vmap(lambda x: case(x, case.weight, None))(xs)
    torch.testing.assert_close(mapped[1], case(xs[1], case.weight, None))


@both_kinds
def test_double_backward_through_the_kernels(cuda, tokens):
    case = Case(cuda, torch.bfloat16, "zeros", tokens)
    assert case.kernels_serve()
    found = []
    for function in (case, case.expected):
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        grads = torch.autograd.grad(function(x, weight, None), [x, weight], case.dz, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), [x, weight]))
    for a, b in zip(*found, strict=True):
        assert error(a, b.double()) < 0.02  # two products in bfloat16, whose rounding has a relative error of 2^-9


@both_kinds
def test_many_gradients_at_once(cuda, tokens):
    case = Case(cuda, torch.bfloat16, "zeros", tokens)
    x = case.x.clone().requires_grad_()
    z = case(x, case.weight, None)
    dz = torch.stack([case.dz, -2 * case.dz])
    (many,) = torch.autograd.grad(z, x, dz, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(z, x, dz[1])
    assert error(many[1], one.double()) < 0.01


@both_kinds
def test_graphs(device, tokens):
    """A compiled function, an exported program and a fake tensor."""
    case = Case(device, torch.float32, "zeros", tokens, large=False)
    expected = case.expected(case.x, case.weight, case.bias)

    class Net(torch.nn.Module):
        def forward(self, x):
            return case(x, case.weight, case.bias)

    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(case.x), expected)
    torch.testing.assert_close(torch.export.export(Net(), (case.x,)).module()(case.x), expected)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = case(*(None if each is None else mode.from_tensor(each) for each in (case.x, case.weight, case.bias)))
    assert (fake.shape, fake.stride()) == (expected.shape, expected.stride())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_bits_where_they_are_asked_for(cuda, dtype, monkeypatch):
    """float64, float32 without TF32, and deterministic algorithms: the bits of the shift and the convolution."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    case = Case(cuda, dtype, "zeros", False)
    assert not case.kernels_serve()
    half = Case(cuda, torch.bfloat16, "zeros", False)
    torch.use_deterministic_algorithms(True)
    try:
        assert not half.kernels_serve()
        for each in (case, half):
            inputs = each.x, each.weight, each.bias
            torch.testing.assert_close(each(*inputs), each.expected(*inputs), rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


@both_kinds
def test_a_cuda_graph(cuda, tokens):
    case = Case(cuda, torch.bfloat16, "zeros", tokens)
    inputs = [each.clone().requires_grad_() for each in (case.x, case.weight)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(case(*inputs, None), inputs, case.dz)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    for each in found:
        each.fill_(torch.nan)
    graph.replay()
    for a, b in zip(found, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@both_kinds
def test_nothing_shifted_is_kept(cuda, tokens):
    """Training takes no more memory than the product without a shift, but for the parts of the weight's gradient."""
    case = Case(cuda, torch.bfloat16, "zeros", tokens)
    peaks = []
    for function in (case, F.linear if tokens else lambda x, w, b: F.conv2d(x, w, b, case.stride)):
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        for _ in range(2):  # the first call loads libraries
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            z = function(x, weight, None)
            held = torch.cuda.memory_allocated() - before
            torch.autograd.grad(z, [x, weight], case.dz)
            peak = torch.cuda.max_memory_allocated() - before
            del z
        peaks.append((held, peak))
    (held, peak), (plain_held, plain_peak) = peaks
    parts = 4 * weight.numel() * (torch.cuda.get_device_properties(cuda).multi_processor_count + 2)
    assert held <= plain_held + 4096
    assert peak <= plain_peak + parts


@pytest.mark.parametrize(
    ("function", "shapes", "options", "says"),
    [
        (tsm_jit.shift_conv1x1, [(8, 16, 3), (4, 16, 1, 1)], {}, r"x must be .*\[8, 16, 3\]"),
        (tsm_jit.shift_conv1x1, [(8, 16, 3, 3), (4, 16, 3, 3)], {}, r"weight must be .*\[4, 16, 3, 3\]"),
        (tsm_jit.shift_conv1x1, [(8, 16, 3, 3), (4, 16, 1, 1)], {"stride": 3}, "stride must be 1 or 2, got 3"),
        (tsm_jit.shift_linear, [(8, 16), (4, 16)], {}, r"x must be .*\[8, 16\]"),
        (tsm_jit.shift_linear, [(8, 5, 16), (4, 5)], {}, r"weight must be .*\[4, 5\]"),
        (tsm_jit.shift_linear, [(8, 5, 16), (4, 16)], {"num_prefix_tokens": 6}, "num_prefix_tokens must be .* 6"),
    ],
)
def test_wrong_arguments(function, shapes, options, says):
    x, weight = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=says):
        function(x, weight, None, 4, [(8, 1)], **options)


def test_the_kernels_in_the_interpreter():
    """The kernels on the CPU, against float64."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "interpreted_gemm.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
