"""``shift_conv1x1`` and ``shift_linear``: the same as a shift and then PyTorch's own convolution or linear layer.

On a GPU their kernels round, so their error from float64 is compared with the error of PyTorch's own.
"""

import functools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import error, peak_of, random_groups, requested_bytes, separate_shifts
from torch import Tensor

import tsm_jit
from tsm_jit import ops, plans

HALF = (torch.float16, torch.bfloat16)


class Case:
    """A random product of shifted frames or tokens. A large one fills a GPU, or leaves most of it idle."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        padding: str,
        tokens: bool,
        large: bool = True,
        rows_of_a_processor: tuple[int, ...] = (128, 128, 20),
    ):
        unit = 8 if large else 1  # the kernels move 8 channels at once
        clips, self.length = random.randint(1, 3), random.randint(1, 9 if large else 4)
        self.padding, self.stride = padding, 1 if tokens else random.choice((1, 2))
        self.shifted = random.randint(1, self.length)
        channels, outputs = [unit * random.randint(1, 24 if large else 6) for _ in range(2)]
        self.prefix = random.randint(0, 2) if tokens else 0
        self.groups = random_groups(channels, unit, self.length)
        side = 2
        if large:
            gpu = torch.cuda.get_device_properties(device)
            if torch.version.cuda is None or gpu.major < 8 or gpu.shared_memory_per_block_optin < 160 * 1024:
                pytest.skip("needs tensor cores and their shared memory")
            pytest.importorskip("triton")
            rows = random.choice(rows_of_a_processor) * gpu.multi_processor_count
            side = self.stride * (math.isqrt(rows // clips // self.length) + 1)
        frames = clips * self.length
        height, width = side, side + random.randint(0, 3 if large else 1)
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
        tokens = self.x.dim() == 3
        plan = plans.Shift(self.length, self.shifted, 2 if tokens else 1, self.padding, tuple(self.groups))
        shift = plan.canonical().encode()
        layer = ops.Layer(shift, self.prefix) if tokens else ops.Layer.conv1x1(shift, self.stride)
        return ops.shifted_layer(self.x, self.weight, self.bias, layer) is not None


def strides(x: Tensor) -> list[int]:
    """The strides of dimensions with more than one element. Of the others any stride is right."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


both_kinds = pytest.mark.parametrize("tokens", [False, True], ids=["conv1x1", "linear"])


@pytest.mark.feature("`shift_conv1x1`, `shift_linear`")
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
            assert (a.shape, a.dtype, strides(a)) == (b.shape, b.dtype, strides(b))
            # Both round the result to half precision, and the sums before differ in their order. TF32 may round to the
            # nearest or toward zero, and for few channels cuDNN has kernels without it.
            assert error(a, c) <= (1.05 * error(b, c) if dtype in HALF else 3 * error(b, c) + 2**-10)


@both_kinds
@pytest.mark.parametrize("dtype", HALF)
def test_autocast(cuda, dtype, tokens):
    case = Case(cuda, torch.float32, "zeros", tokens)
    with torch.autocast("cuda", dtype):
        assert case.kernels_serve()
    exact = case.results(case.expected, torch.float64)
    pytorch = case.results(case.expected, torch.float32, dtype)
    actual = case.results(case, torch.float32, dtype)
    for a, b, c in zip(actual, pytorch, exact, strict=True):
        assert a.dtype == b.dtype
        assert error(a, c) <= 1.05 * error(b, c)


@pytest.mark.feature("`shift_conv1x1`, `shift_linear`", text="as two steps")
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
    second_grads = []
    for function in (case, case.expected):
        x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
        grads = torch.autograd.grad(function(x, weight, None), [x, weight], case.dz, create_graph=True)
        second_grads.append(torch.autograd.grad(sum(grad.float().square().sum() for grad in grads), [x, weight]))
    for a, b in zip(*second_grads, strict=True):
        assert error(a, b.double()) < 0.02  # two products in bfloat16, whose rounding has a relative error of 2^-9


@both_kinds
def test_many_gradients_at_once(cuda, tokens):
    case = Case(cuda, torch.bfloat16, "zeros", tokens)
    assert case.kernels_serve()
    x = case.x.clone().requires_grad_()
    z = case(x, case.weight, None)
    dz = torch.stack([case.dz, -2 * case.dz])
    (many,) = torch.autograd.grad(z, x, dz, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(z, x, dz[1])
    assert error(many[1], one.double()) < 0.01


@pytest.mark.feature("`shift_conv1x1`, `shift_linear`", column="compiled", text="as two steps")
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
    assert half.kernels_serve()
    with separate_shifts():
        assert not half.kernels_serve()
        for each in (case, half):
            inputs = each.x, each.weight, each.bias
            torch.testing.assert_close(each(*inputs), each.expected(*inputs), rtol=0, atol=0)


@both_kinds
def test_a_cuda_graph(cuda, tokens):
    case = Case(cuda, torch.bfloat16, "zeros", tokens)
    assert case.kernels_serve()
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
        grads = step()
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    for each in grads:
        each.fill_(torch.nan)
    graph.replay()
    for a, b in zip(grads, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@both_kinds
def test_nothing_shifted_is_kept(cuda, tokens):
    """Training takes no more memory than the product without a shift, except for the parts of the weight's gradient.

    Of small products PyTorch computes the gradients, with work space of its own choice.
    """
    case = Case(cuda, torch.bfloat16, "zeros", tokens, rows_of_a_processor=(128,))
    plain = F.linear if tokens else functools.partial(F.conv2d, stride=case.stride)
    x, weight = case.x.requires_grad_(), case.weight.requires_grad_()

    def train(function):
        return torch.autograd.grad(function(x, weight, None), [x, weight], case.dz)

    def held(function):
        before = requested_bytes()
        z = function(x, weight, None)
        assert z.requires_grad
        return requested_bytes() - before

    parts = 4 * weight.numel() * (torch.cuda.get_device_properties(cuda).multi_processor_count + 2)
    assert peak_of(lambda: case(x, weight, None)) <= peak_of(lambda: plain(x, weight, None))
    assert held(case) <= held(plain)  # before a backward, whose threads may free memory late
    assert peak_of(lambda: train(case)) <= peak_of(lambda: train(plain)) + parts


@both_kinds
def test_unusual_gradients(cuda, tokens):
    """Frozen weights and inputs, a gradient at an odd address, saved tensors that come back in another layout."""
    case = Case(cuda, torch.bfloat16, "zeros", tokens)
    assert case.kernels_serve()
    x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    expected = torch.autograd.grad(case(x, weight, None), [x, weight], case.dz)
    (dx,) = torch.autograd.grad(case(x, case.weight, None), x, case.dz)
    (dw,) = torch.autograd.grad(case(case.x, weight, None), weight, case.dz)
    layout = torch.contiguous_format if tokens else torch.channels_last
    odd = torch.empty(case.dz.numel() + 5, device=cuda, dtype=case.dz.dtype)[5:]
    odd = odd.as_strided(case.dz.shape, case.dz.contiguous(memory_format=layout).stride()).copy_(case.dz)
    assert odd.data_ptr() % 16
    at_odd_address = torch.autograd.grad(case(x, weight, None), [x, weight], odd)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        z = case(x, weight, None)
    offloaded = torch.autograd.grad(z, [x, weight], case.dz)
    for a, b in zip((dx, dw), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    # PyTorch's own products may sum in another order at another address or in another layout.
    for a, b in zip((*at_odd_address, *offloaded), 2 * expected, strict=True):
        assert error(a, b.double()) < 0.01  # rounding in bfloat16 has a relative error of 2^-9


def test_a_frozen_weight_keeps_no_activation(cuda):
    case = Case(cuda, torch.bfloat16, "zeros", False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.numel()), lambda each: each):
        case(case.x.clone().requires_grad_(), case.weight, None)
    assert sum(saved) <= case.weight.numel()


def test_modes_that_must_see_pytorchs_operators(cuda):
    """A tracer and a counter of operations."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    case = Case(cuda, torch.bfloat16, "zeros", False)
    traced = make_fx(lambda x: case(x, case.weight, None))(case.x)
    assert error(traced(2 * case.x), case(2 * case.x, case.weight, None).double()) < 0.01
    with FlopCounterMode(display=False) as counter:
        z = case(case.x, case.weight, None)
    assert counter.get_total_flops() == 2 * z.numel() * case.x.shape[1]


def test_channels_that_do_not_match(cuda):
    x = torch.randn(256, 128, 14, 14, device=cuda, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    module = tsm_jit.TemporalShift(torch.nn.Conv2d(64, 64, 1), 8).to(cuda, torch.bfloat16)
    with pytest.raises(RuntimeError):
        module(x)
    weight = torch.randn(64, 128, 1, 1, device=cuda, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        tsm_jit.shift_conv1x1(x, weight, torch.randn(1, device=cuda, dtype=torch.bfloat16), 8, [(8, 1)])


@pytest.mark.parametrize(
    ("function", "shapes", "options", "message"),
    [
        (tsm_jit.shift_conv1x1, [(8, 16, 3), (4, 16, 1, 1)], {}, r"x must be .*\[8, 16, 3\]"),
        (tsm_jit.shift_conv1x1, [(8, 16, 3, 3), (4, 16, 3, 3)], {}, r"weight must be .*\[4, 16, 3, 3\]"),
        (tsm_jit.shift_conv1x1, [(8, 16, 3, 3), (4, 16, 1, 1)], {"stride": 3}, "stride must be 1 or 2, got 3"),
        (tsm_jit.shift_linear, [(8, 16), (4, 16)], {}, r"x must be .*\[8, 16\]"),
        (tsm_jit.shift_linear, [(8, 5, 16), (4, 5)], {}, r"weight must be .*\[4, 5\]"),
        (tsm_jit.shift_linear, [(8, 5, 16), (4, 16)], {"num_prefix_tokens": 6}, "num_prefix_tokens must be .* 6"),
    ],
)
def test_wrong_arguments(function, shapes, options, message):
    x, weight = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        function(x, weight, None, 4, [(8, 1)], **options)


@pytest.mark.parametrize(
    ("function", "shape"), [(tsm_jit.shift_conv1x1, (8, 16, 3, 3)), (tsm_jit.shift_linear, (8, 5, 16))]
)
def test_parameters_that_are_no_tensors(function, shape):
    x, weight = torch.zeros(shape), torch.zeros(4, 16, *[1] * (len(shape) // 4 * 2))
    for parameters, message in (
        ((None, None), "weight must be .* NoneType"),
        ((weight, [0.0] * 4), "bias must be .* list"),
    ):
        with pytest.raises(TypeError, match=message):
            function(x, *parameters, 4, [(8, 1)])


@pytest.mark.parametrize("script", ["interpreted_gemm.py", "interpreted_split_gemm.py"])
def test_the_kernels_in_the_interpreter(script):
    """The kernels on the CPU, against float64."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / script
    folders = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
