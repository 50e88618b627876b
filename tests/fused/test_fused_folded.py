"""``fuse(net, fold_norms=True)``: inference without norms."""

import copy
import pickle
import random

import pytest
import torch
from fused_networks import FORMATS, NETWORKS, pair, small, tsm
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

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
    fused = folded(net)
    layers = [module for name, module in fused.named_modules() if "layer" in name]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in layers)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-10, atol=1e-10)
        residual.unfuse(fused)
        torch.testing.assert_close(fused(x), expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_input(device):
    net, _, x = pair(lambda: tsm(small(layers=(1, 1, 1, 1))), device)
    fused, gradients = folded(net), []
    for each in (net.eval(), fused):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(each(leaf).square().sum(), leaf)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(cuda, dtype):
    """Large enough that the products read shifted rows. The network with norms has no smaller error."""
    net, _, _ = pair(lambda: tsm(small()), cuda)
    net.eval()
    x = torch.randn(64, 3, 96, 96, device=cuda, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        exact = net(x)
        scores = folded(net).to(dtype)(x.to(dtype))
        plain = copy.deepcopy(net).to(dtype)(x.to(dtype))
    assert (scores.double() - exact).norm() <= 1.5 * (plain.double() - exact).norm()


def test_autocast(device):
    net, _, x = pair(lambda: tsm(small()), device, dtype=torch.float32)
    net.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        scores, expected = folded(net)(x), net(x)
    assert scores.dtype == expected.dtype
    torch.testing.assert_close(scores.float(), expected.float(), rtol=0.1, atol=0.1)  # sums of roundings to bfloat16


@pytest.mark.feature("`fuse`, `fold_norms=True`", column="compiled")
def test_one_graph(device):
    net, _, x = pair(lambda: tsm(small(layers=(1, 1, 1, 1))), device)
    compiled = torch.compile(folded(net), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net.eval()(x), rtol=1e-10, atol=1e-10)


def test_copies_and_state(device, tmp_path):
    """Copies, pickles and a loaded state dict give the same scores; the clip length can change."""
    net, _, x = pair(lambda: tsm(small(layers=(1, 1, 1, 1))), device)
    fused = folded(net)
    assert not any(module.training for module in fused.modules())
    residual.fuse(fused, fold_norms=True)  # a second time changes nothing
    other = copy.deepcopy(fused)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(fused.state_dict())
    with torch.no_grad():
        expected = fused(x)
        for each in (other, pickle.loads(pickle.dumps(fused))):
            torch.testing.assert_close(each(x), expected, rtol=0, atol=0)
        tsm_jit.n_segment(fused, 2)
        tsm_jit.n_segment(net, 2)
        torch.testing.assert_close(fused(x), net.eval()(x), rtol=1e-10, atol=1e-10)


def share_convolution(net):
    net.layer2[2].conv2 = net.layer2[1].conv2


def share_norm(net):
    net.avgpool = nn.Sequential(net.layer4[0].bn2, net.avgpool)


def share_block(net):
    net.layer2[2] = net.layer2[1]


@pytest.mark.parametrize("share", [share_convolution, share_norm, share_block])
def test_layers_in_several_places_stay(device, share):
    """Folded for one place, they would be wrong in another."""
    net, _, x = pair(lambda: tsm(small(BasicBlock)), device)
    share(net)
    with torch.no_grad():
        torch.testing.assert_close(folded(net)(x), net.eval()(x), rtol=1e-10, atol=1e-10)


HOOKED = ("conv1", "bn1", "layer1.0.bn1", "layer2.0.downsample.1", "layer3.0.conv1.net")


def scores_and_seen(net: nn.Module, x: Tensor, names=HOOKED) -> tuple[Tensor, dict[str, Tensor]]:
    """The scores with hooks that change the outputs of some layers, and these outputs as they are at the end."""
    seen = {}

    def hook(name: str):
        return lambda module, args, out: seen.update({name: out + 1}) or seen[name]

    handles = [net.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    with torch.no_grad():
        scores = net(x)
    for handle in handles:
        handle.remove()
    return scores, seen


def test_hooks_on_replacements_of_norms(device):
    """Hooks are called. If no ReLU works in place, nothing changes the tensors that they have seen."""
    net, _, x = pair(lambda: tsm(small(BasicBlock, layers=(1, 1, 1, 1))), device)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    fused, plain = folded(net), folded(net)
    residual.unfuse(plain)
    (scores, seen), (expected, expected_seen) = (scores_and_seen(each, x) for each in (fused, plain))
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(seen, expected_seen, rtol=1e-10, atol=1e-10)
    assert seen.keys() == set(HOOKED)


def test_norms_with_hooks_stay(device):
    net, _, x = pair(lambda: tsm(small(BasicBlock, layers=(1, 1, 1, 1))), device)
    for norm in (net.bn1, net.layer2[0].bn1, net.layer2[0].downsample[1]):
        norm.register_forward_hook(lambda module, args, out: out.sin())
    with torch.no_grad():
        torch.testing.assert_close(folded(net)(x), net.eval()(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_shapes_on_the_meta_device(block):
    net, _, x = pair(lambda: tsm(small(block, layers=(1, 1, 1, 1))), torch.device("cpu"))
    with torch.no_grad():
        assert folded(net).to("meta")(x.to("meta")).shape == (8, 5)


def test_training_mode_raises(device):
    net = tsm(small(layers=(1, 1, 1, 1))).to(device)
    with pytest.raises(ValueError, match="net must be in evaluation mode"):
        residual.fuse(net, fold_norms=True)
    assert not isinstance(net, residual.FusedNetwork)
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
