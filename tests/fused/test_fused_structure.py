"""Which networks are fused, and what stays as it was."""

import copy
import functools
import io

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from fused_networks import NETWORKS, assert_same_step, pair, small, tsam, tsm
from support import assert_same_bits
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import tsm_jit
from tsm_jit import residual


def test_keys_stay_in_both_directions():
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], torch.device("cpu"))
    assert list(fused.state_dict()) == list(net.state_dict())
    other = NETWORKS["ResNet, bottlenecks"]().double()
    residual.fuse(other)
    other.load_state_dict(net.state_dict())
    net.load_state_dict(other.state_dict())
    stages = [fused.layer1, fused.layer4]
    residual.unfuse(fused)
    assert [fused.layer1, fused.layer4] == stages
    assert not any(isinstance(module, residual.Stage) for module in fused.modules())
    assert_same_bits(fused.eval()(x), net.eval()(x))


def test_copies_and_pickles_are_fused():
    _, fused, x = pair(NETWORKS["ResNet, basic blocks"], torch.device("cpu"))
    file = io.BytesIO()
    torch.save(fused.eval(), file)
    file.seek(0)
    for each in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert isinstance(each.layer2, residual.Stage)
        assert type(each) is type(fused)
        assert isinstance(each, residual.FusedNetwork)
        assert isinstance(each, ResNet)
        assert_same_bits(each(x), fused(x))
        residual.unfuse(each)
        assert type(each) is ResNet


def test_clip_lengths_and_removal_after_fusing(device):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        tsm_jit.n_segment(each, 8)
    assert_same_step(net, fused, x)
    for each in (net, fused):
        tsm_jit.remove_temporal_shift(each)
    assert_same_step(net, fused, x)


def test_plans_that_differ_from_block_to_block(device):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        each.layer2[1].conv1.fold_div = 4
        each.layer2[2].conv1.n_segment = 2
    assert_same_step(net, fused, x)


def test_a_plan_of_more_groups_than_the_kernels_take(device):
    net, fused, x = pair(lambda: tsam(small(BasicBlock), f_div=2, shift_depth=16), device)
    assert_same_step(net, fused, x)


def test_a_forward_set_on_a_module_is_called(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    for each in (net, fused):
        for module in (each.layer1[0].bn2, each.layer2[1].conv1, each.layer2[2].relu):
            module.forward = lambda x, module=module: 2 * type(module).forward(module, x)
    assert_same_step(net, fused, x)


def test_global_hooks_see_every_module():
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], torch.device("cpu"))
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(out)), torch.no_grad():
        for each in (net, fused):
            each.eval()(x)
    half = len(seen) // 2
    for theirs, ours in zip(seen[:half], seen[half:], strict=True):
        assert_same_bits(ours, theirs)


class SqueezeExcite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "relu", nn.GELU()), "ends in GELU, not in a ReLU"),
        (lambda block: block.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda block: setattr(block, "forward", functools.partial(BasicBlock.forward, block)), "its own forward"),
        (lambda block: setattr(block, "downsample", nn.Sequential()), "its downsample is not"),
        (lambda block: block.relu.register_forward_hook(lambda *_: None), "not in a ReLU without hooks"),
        (lambda block: setattr(block, "se", SqueezeExcite()), "has an attention"),
        (lambda block: setattr(block, "drop_path", nn.Dropout()), "has stochastic depth"),
        (lambda block: setattr(block, "__class__", type("Other", (BasicBlock,), {})), "is not a supported block"),
    ],
)
def test_an_unsupported_block_is_named_and_called(change, reason):
    net = tsm(small(BasicBlock, (3, 1, 1, 1))).double().eval()
    change(net.layer1[1])
    fused = copy.deepcopy(net)
    with pytest.warns(UserWarning, match=rf"layer1\.1: .*{reason}"):
        residual.fuse(fused)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    assert_same_step(net, fused, x)


def test_timm_blocks_with_attention_or_stochastic_depth_are_called(device):
    for more, reason in (
        ({"drop_path_rate": 0.2}, "stochastic depth"),
        ({"block_args": {"attn_layer": "se"}}, "attention"),
    ):
        net = tsm(timm.create_model("resnet18", num_classes=5, **more)).double().to(device)
        fused = copy.deepcopy(net)
        with (
            pytest.warns(UserWarning, match=reason)
            if reason == "stochastic depth"
            else pytest.raises(ValueError, match=reason)
        ):
            residual.fuse(fused)
        x = torch.randn(8, 3, 32, 32, dtype=torch.float64, device=device)
        assert_same_step(net.train(), fused.train(), x)


@pytest.mark.parametrize(
    "places",
    [
        ("layer2.1.conv1", "layer3.0.conv1.net", "layer2.2.bn3", "layer2.1.conv3"),
        ("layer2",),
        ("conv1", "bn1"),
        ("relu", "layer1.0.downsample.0"),
        ("maxpool", "layer2.0.downsample.0"),
        ("layer1.0.conv1", "layer2.0.conv1.net", "avgpool"),
    ],
    ids=lambda places: places[0],
)
def test_hooks_see_what_they_saw_before(places):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], torch.device("cpu"))
    seen: dict[str, list[Tensor]] = {"net": [], "fused": []}
    for name, each in (("net", net), ("fused", fused)):
        each.eval()
        for place in places:
            each.get_submodule(place).register_forward_hook(
                lambda module, inputs, out, name=name: seen[name].extend([inputs[0].clone(), out.clone()])
            )
        with torch.no_grad():
            each(x)
    for ours, theirs in zip(seen["fused"], seen["net"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 3, TypeError, "net must be a ResNet"),
        (lambda: torchvision.models.vgg11(), TypeError, "net must be a ResNet"),
        (lambda: tsm_jit.VideoModel(tsm(small(BasicBlock))), TypeError, "got a VideoModel: fuse its backbone"),
        (lambda: small(BasicBlock), ValueError, "net must have temporal shifts to be fused"),
        (
            lambda: tsm(small(BasicBlock), place="block"),
            ValueError,
            r"layer1\.0, .*: its shift is before the",
        ),
    ],
)
def test_networks_that_cannot_be_fused_are_an_error_and_unchanged(make, error, message):
    net = make()
    kinds = [type(module) for module in net.modules()] if isinstance(net, nn.Module) else []
    with pytest.raises(error, match=message):
        residual.fuse(net)
    assert kinds == ([type(module) for module in net.modules()] if kinds else [])


def test_unfuse_of_an_unfused_network_raises():
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got int"):
        residual.unfuse(3)
    with pytest.raises(ValueError, match="net must be fused to be unfused, got ResNet"):
        residual.unfuse(small())
    net = tsm(small(BasicBlock))
    residual.fuse(net)
    residual.fuse(net)  # already is
    residual.unfuse(net)


def test_a_hook_on_the_last_block_may_change_its_gradient(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)

    def hook(module: nn.Module, inputs: tuple, out: Tensor) -> None:
        out.register_hook(lambda grad: grad.mul_(2))

    for each in (net, fused):
        each.layer4[-1].register_forward_hook(hook)
    assert_same_step(net, fused, F.interpolate(x, scale_factor=3))
