"""Convolutions and linear layers of shifted frames as one autograd function, against the shift, then the layer.

Values are small integers, so sums are exact in any order and all bits must be equal.
"""

import copy
import random

import pytest
import torch
from support import UndefinedGradient, assert_same_bits
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tsm_jit
from tsm_jit import tsam

T = 4


class Apart(nn.Module):
    """The shift, then the layer."""

    def __init__(self, net: nn.Module, keep: bool = False):
        super().__init__()
        self.net, self.keep = net, keep

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.net, nn.Linear):
            moved = tsm_jit.temporal_shift(x[:, 1:], T, channel_dim=-1)
            return self.net(torch.cat([x[:, :1], moved], 1))
        plan = {"n_segment_shifted": T - 1, "shift_depth": 2, "padding": "keep"} if self.keep else {}
        return self.net(tsm_jit.temporal_shift(x, T, **plan))


def together(net: nn.Module, keep: bool = False) -> nn.Module:
    if isinstance(net, nn.Linear):
        return tsm_jit.TokenShift(net, T, inplace=True)
    if keep:
        return tsam.TemporalShift(net, T, T - 1, 8, 2, inplace=True)
    return tsm_jit.TemporalShift(net, T, inplace=True)


def integers(*shape: int, dtype: torch.dtype = torch.float64, device="cpu") -> Tensor:
    values = torch.randint(-3, 4, (2, *shape), device=device).double()
    return (torch.complex(*values) if dtype.is_complex else values[0]).to(dtype)


def layer(kind: str, device, dtype: torch.dtype = torch.float64) -> nn.Module:
    net = nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(16, 8, 3, padding=(0, 1))
    return with_integers(net.to(device, dtype))


def with_integers(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for each in net.parameters():
            each.copy_(integers(*each.shape, dtype=each.dtype))
    return net


def frames(kind: str, device, dtype: torch.dtype = torch.float64, clips: int = 2) -> Tensor:
    shape = (clips * T, 5, 16) if kind == "linear" else (clips * T, 16, 5, 6)
    return integers(*shape, dtype=dtype, device=device)


def compare(net: nn.Module, x: Tensor, run, keep: bool = False) -> None:
    """``run(module, x)`` returns tensors, or None for no gradient."""
    results = []
    for make in (together, Apart):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
        state = torch.random.get_rng_state()
        results.append(run(make(copy.deepcopy(net), keep), leaf))
        torch.random.set_rng_state(state)
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert_same_bits(ours, expected)


def step(module: nn.Module, x: Tensor) -> list:
    z = module(x)
    z.backward(integers(*z.shape, dtype=z.dtype).to(z.device))
    return [z.detach(), x.grad, *(each.grad for each in module.parameters())]


KINDS = pytest.mark.parametrize("kind", ["conv", "linear"])


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_random_layers(device, dtype):
    for _ in range(25):
        groups, kernel = random.choice((1, 1, 2, 16)), (random.choice((1, 3)), random.choice((1, 3)))
        conv = nn.Conv2d(
            16, 16, kernel, stride=(random.choice((1, 2)), random.choice((1, 2))), groups=groups,
            padding=random.choice((0, (1, 0), (0, 2))), padding_mode=random.choice(("zeros", "zeros", "circular")),
            bias=random.random() < 0.5,
        )  # fmt: skip
        kind, net = random.choice((("conv", conv), ("linear", nn.Linear(16, 8, bias=random.random() < 0.5))))
        net = with_integers(net.to(device, dtype))
        x = frames(kind, device, dtype, clips=random.choice((0, 1, 3)))
        if random.random() < 0.5:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        for each in (x, *net.parameters()):
            each.requires_grad_(random.random() < 0.8)
        if x.requires_grad or any(each.requires_grad for each in net.parameters()):
            compare(net, x, step)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_frozen_weight_keeps_the_memory_format(device, channels_last):
    """A convolution chooses its kernels by the strides of an input that it does not read."""
    net = layer("conv", device, torch.float32).requires_grad_(False)
    x = frames("conv", device, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format).requires_grad_()
    dz = torch.randn_like(net(x))
    grads = [torch.autograd.grad(each(x), x, dz)[0] for each in (together(net), Apart(net))]
    assert grads[0].stride() == grads[1].stride()
    if device.type == "cpu":
        assert_same_bits(*grads)


@KINDS
def test_no_gradient_is_not_one_of_zeros(device, kind):
    def run(module, x):
        UndefinedGradient.apply(module(x)).sum().backward()
        return [each.grad for each in module.parameters()]

    compare(layer(kind, device), frames(kind, device).requires_grad_(), run)


@KINDS
def test_the_output_may_be_written(device, kind):
    def run(module, x):
        z = module(x)
        z.add_(1)
        z[1:].mul_(2)
        z.sum().backward()
        return [z.detach(), x.grad, *(each.grad for each in module.parameters())]

    compare(layer(kind, device), frames(kind, device).requires_grad_(), run)


@KINDS
def test_dtypes_are_not_mixed_without_autocast(device, kind):
    module = together(layer(kind, device))
    x = frames(kind, device, torch.float32).requires_grad_()
    for recording in (False, True):
        with torch.set_grad_enabled(recording), pytest.raises(RuntimeError):
            module(x)


@pytest.mark.parametrize("keep", [False, True])
def test_autocast(device, keep):
    """With padding of their own values, frames get sums of gradients, in the dtype of the frames."""

    def run(module, x):
        with torch.autocast(device.type, torch.bfloat16):
            z = module(x)
        z.backward(torch.randn(z.shape, dtype=torch.float64).to(z))
        return [x.grad]

    net = with_integers(nn.Conv2d(16, 8, 1, stride=3).to(device))  # not a product that kernels serve
    compare(net, frames("conv", device, torch.float32).requires_grad_(), run, keep)


@KINDS
@pytest.mark.parametrize("frozen", ["nothing", "x", "weight"])
def test_many_gradients_and_second_order(device, kind, frozen):
    def run(module, x):
        module.net.weight.requires_grad_(frozen != "weight")
        inputs = [each for each in (x, *module.parameters()) if each.requires_grad]
        z = module(x)
        many = integers(3, *z.shape).to(z.device)
        at_once = torch.autograd.grad(z, inputs, many, is_grads_batched=True, retain_graph=True)
        mapped = torch.func.vmap(lambda dz: torch.autograd.grad(z, inputs, dz, retain_graph=True))(many)
        first = torch.autograd.grad(z.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), inputs)
        return [*at_once, *mapped, *first, *second]

    compare(layer(kind, device), frames(kind, device).requires_grad_(frozen != "x"), run)


@KINDS
@pytest.mark.parametrize("part", ["forward", "backward", "both"])
def test_counted_operations(device, kind, part):
    def run(module, x):
        counter = FlopCounterMode(display=False)
        with counter:
            loss = module(x).sum() if part != "backward" else None
            if part == "both":
                loss.backward()
        if part == "backward":
            loss = module(x).sum()
            with counter:
                loss.backward()
        return [torch.tensor(counter.get_total_flops())]

    compare(layer(kind, device), frames(kind, device).requires_grad_(), run)


def test_a_weight_that_no_gradient_reads_may_change(device):
    def run(module, x):
        z = module(x)
        with torch.no_grad():
            module.net.weight.zero_()
        z.sum().backward()
        return [each.grad for each in module.parameters()]

    compare(layer("linear", device), frames("linear", device), run)


@KINDS
def test_parameters_of_another_type_compute_in_their_own_way(device, kind):
    calls = []

    class Counted(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    module = together(layer(kind, device))
    module.net.weight = nn.Parameter(module.net.weight.detach().as_subclass(Counted))
    z = module(frames(kind, device).requires_grad_())
    assert type(z) is Counted
    assert "conv2d" in calls or "linear" in calls
