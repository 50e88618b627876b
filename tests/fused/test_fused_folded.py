"""``fuse(net, fold_norms=True)``: inference without norms."""

import copy
import pickle
import random

import pytest
import torch
from fused_networks import FORMATS, NETWORKS, pair, small, tsm
from torch import nn

import tsm_jit
from tsm_jit import residual


def folded(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net).eval()
    residual.fuse(net, fold_norms=True)
    return net


@pytest.mark.feature("`fuse`, `fold_norms=True`")
@pytest.mark.parametrize("name", NETWORKS)
def test_scores(device, name):
    """Equal to the network's in float64, with and without gradients."""
    net, _, x = pair(NETWORKS[name], device, random.choice(list(FORMATS)))
    net.eval()
    found = folded(net)
    layers = [module for name, module in found.named_modules() if "layer" in name]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in layers)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(found(x), expected, rtol=1e-10, atol=1e-10)
        residual.unfuse(found)
        torch.testing.assert_close(found(x), expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_input(device):
    net, _, x = pair(lambda: tsm(small(layers=(1, 1, 1, 1))), device)
    found, gradients = folded(net), []
    for each in (net.eval(), found):
        given = x.clone().requires_grad_()
        gradients += torch.autograd.grad(each(given).square().sum(), given)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(cuda, dtype):
    """Large enough that the products read shifted rows. The error is at most that of the network with norms."""
    net, _, _ = pair(lambda: tsm(small()), cuda)
    net.eval()
    x = torch.randn(64, 3, 96, 96, device=cuda, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        exact = net(x)
        found = folded(net).to(dtype)(x.to(dtype))
        plain = copy.deepcopy(net).to(dtype)(x.to(dtype))
    assert (found.double() - exact).norm() <= 1.5 * (plain.double() - exact).norm()


def test_autocast(device):
    net, _, x = pair(lambda: tsm(small()), device, dtype=torch.float32)
    net.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        found, expected = folded(net)(x), net(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)  # sums of roundings to bfloat16


@pytest.mark.feature("`fuse`, `fold_norms=True`", column="compiled")
def test_one_graph(device):
    net, _, x = pair(lambda: tsm(small(layers=(1, 1, 1, 1))), device)
    compiled = torch.compile(folded(net), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net.eval()(x), rtol=1e-10, atol=1e-10)


def test_copies_and_state(device, tmp_path):
    """Copies, pickles and a loaded state dict give the same scores; the clip length can change."""
    net, _, x = pair(lambda: tsm(small(layers=(1, 1, 1, 1))), device)
    found = folded(net)
    other = copy.deepcopy(found)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(found.state_dict())
    with torch.no_grad():
        expected = found(x)
        for each in (other, pickle.loads(pickle.dumps(found))):
            torch.testing.assert_close(each(x), expected, rtol=0, atol=0)
        tsm_jit.n_segment(found, 2)
        tsm_jit.n_segment(net, 2)
        torch.testing.assert_close(found(x), net.eval()(x), rtol=1e-10, atol=1e-10)


def test_training_mode_is_refused(device):
    net = tsm(small(layers=(1, 1, 1, 1))).to(device)
    with pytest.raises(ValueError, match="net must be in evaluation mode"):
        residual.fuse(net, fold_norms=True)
    assert not isinstance(net, residual.FusedNetwork)
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
