"""Modules on a GPU whose shift is inside a 1x1 convolution or a linear layer, and those whose shift must stay apart."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import tsm_jit
from tsm_jit import tsam

T, CHANNELS = 8, 64
INPLACE = pytest.mark.parametrize("inplace", [False, True])


def make(kind: str, net: nn.Module, inplace: bool = False) -> nn.Module:
    if kind == "tsm":
        return tsm_jit.TemporalShift(net, T, inplace=inplace)
    if kind == "tokens":
        return tsm_jit.TokenShift(net, T, inplace=inplace)
    return tsam.TemporalShift(net, T, T - 1, 4, 2, inplace=inplace)


def layer(kind: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    net = nn.Linear(CHANNELS, 96) if kind == "tokens" else nn.Conv2d(CHANNELS, 96, 1, bias=False)
    return net.to(device, dtype)


def frames(kind: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if kind == "tokens":
        return torch.randn(2 * T, 1111, CHANNELS, device=device, dtype=dtype)
    x = torch.randn(2 * T, CHANNELS, 33, 34, device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def results(module: nn.Module, x: Tensor, dz: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    z = module(x)
    return [z.detach(), *torch.autograd.grad(z, [x, *module.parameters()], dz)]


def kernels_of(function) -> str:
    """The names of the GPU kernels that ``function`` runs, without the first call."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
    return " ".join(event.key for event in profile.key_averages())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("kind", ["tsm", "tokens", "tsam"])
@INPLACE
def test_values_and_gradients(cuda, kind, inplace):
    net, x = layer(kind, cuda), frames(kind, cuda)
    module = make(kind, net, inplace)
    exact = make(kind, copy.deepcopy(net).double())
    dz = torch.randn_like(module(x))
    names = kernels_of(lambda: module(x))
    assert "forward" in names
    assert "shift_tile" not in names
    assert "shift_stream" not in names
    for a, b in zip(results(module, x, dz), results(exact, x.double(), dz.double()), strict=True):
        assert relative(a, b) < 2**-8  # one rounding to bfloat16
    with torch.no_grad():
        assert relative(module(x), exact(x.double())) < 2**-8


@pytest.mark.parametrize("kind", ["tsm", "tokens", "tsam"])
@INPLACE
def test_the_input_is_never_written(cuda, kind, inplace):
    """Two threads on two streams call modules with one input, without gradients. Both read its values."""
    x = frames(kind, cuda)
    module = make(kind, layer(kind, cuda), inplace)
    depthwise = nn.Conv2d(CHANNELS, 8, 3, groups=8, device=cuda, dtype=x.dtype)
    apart = make("tsm", depthwise, inplace) if kind != "tokens" else module  # a separate kernel shifts
    with torch.no_grad():
        expected = module(x), apart(x)
    before, version = x.clone(), x._version

    def all_equal(each: nn.Module, result: Tensor) -> bool:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            return all(torch.equal(each(x), result) for _ in range(50))

    torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(all_equal, (module, apart), expected))
    torch.cuda.synchronize()
    assert torch.equal(x, before)
    assert x._version == version


class Lora(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


APART = {
    "a hook": lambda net: net.register_forward_hook(lambda *_: None) and None,
    "a parametrization": lambda net: torch.nn.utils.parametrizations.weight_norm(net) and None,
    "a padded convolution": lambda net: nn.Conv2d(CHANNELS, 96, 1, padding=1),
    "a grouped convolution": lambda net: nn.Conv2d(CHANNELS, 96, 1, groups=2),
    "a 3x3 convolution": lambda net: nn.Conv2d(CHANNELS, 96, 3),
    "an unknown subclass": lambda net: Lora(CHANNELS, 96),
    "odd folds": lambda net: None,
}


@pytest.mark.parametrize("why", APART)
@INPLACE
def test_layers_that_need_a_separate_shift(cuda, why, inplace):
    """Then outputs and gradients have the bits of the shift, and then the module."""
    kind = "tokens" if why == "an unknown subclass" else "tsm"
    net = layer(kind, cuda)
    net = (APART[why](net) or net).to(cuda, torch.bfloat16)
    module = make(kind, net, inplace)
    if why == "odd folds":
        module.fold_div = 5
    x = frames(kind, cuda)

    def apart(x: Tensor) -> Tensor:
        if kind == "tsm":
            return net(tsm_jit.temporal_shift(x, T, module.fold_div))
        return net(torch.cat([x[:, :1], tsm_jit.temporal_shift(x[:, 1:], T, channel_dim=-1)], 1))

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        dz = torch.randn_like(module(x))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for call, leaf in zip((module, apart), inputs, strict=True):
            call(leaf).backward(dz)
        with torch.no_grad():
            torch.testing.assert_close(module(x), apart(x), rtol=0, atol=0)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=0)


def test_checkpoint_of_another_clip_length(cuda):
    module, x = make("tsm", layer("tsm", cuda)), frames("tsm", cuda).requires_grad_()
    z = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    module.n_segment = 4
    with pytest.raises((RuntimeError, torch.utils.checkpoint.CheckpointError)):
        z.sum().backward()


def test_autocast_of_a_network(cuda):
    """A step of two layers under autocast: gradients as in float64, up to rounding. Parameters stay in float32."""
    block = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), make("tsm", layer("tsm", cuda, torch.float32))).to(cuda)
    block = block.to(memory_format=torch.channels_last)
    x = frames("tsm", cuda, torch.float32)[:, :3].contiguous(memory_format=torch.channels_last)
    exact = copy.deepcopy(block).double()
    with torch.autocast("cuda", torch.bfloat16):
        z = block(x)
    dz = torch.randn_like(z)
    z.backward(dz)
    exact(x.double()).backward(dz.double())
    for a, b in zip(block.parameters(), exact.parameters(), strict=True):
        assert a.grad.dtype is torch.float32
        assert relative(a.grad, b.grad) < 0.02  # some roundings to bfloat16, 2^-9 each


def test_a_weight_that_changes_before_the_backward(cuda):
    """Autocast computes with a copy of the weight, so the weight may change. Without autocast autograd reports it."""
    x = frames("tsm", cuda).requires_grad_()
    module = make("tsm", layer("tsm", cuda, torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        z = module(x)
    with torch.no_grad():
        module.net.weight.mul_(0.9)
    z.sum().backward()
    half = make("tsm", layer("tsm", cuda))
    z = half(x)
    with torch.no_grad():
        half.net.weight.mul_(0.9)
    with pytest.raises(RuntimeError):
        z.sum().backward()
    assert half.net.weight.grad is None
