"""mmaction2's ResNets, whose convolutions are inside of ConvModules: fused against unfused, and refusals."""

import copy
import pickle

import mmaction2_package
import pytest
import torch
from fused_networks import assert_same_step, counted, pair
from support import assert_same_bits
from torch import Tensor, nn

import tsm_jit
from tsm_jit import mmaction2, residual
from tsm_jit.fused import execute


@pytest.fixture
def models(monkeypatch):
    """``mmaction.models`` with our shift, whose ResNets are as small as ResNets can be."""
    models = mmaction2_package.models()
    for depth, (block, _) in models.ResNet.arch_settings.items():
        monkeypatch.setitem(models.ResNet.arch_settings, depth, (block, (1, 2, 1, 1)))
    mmaction2.apply()
    yield models
    mmaction2.restore()


def resnet_tsm(models, depth=18, **options) -> nn.Module:
    return models.ResNetTSM(depth, num_segments=4, pretrained2d=False, **options)


def converted(models, convert) -> nn.Module:
    net = models.ResNet(18)
    convert(net)
    return net


NETWORKS = {
    "ResNetTSM-18": resnet_tsm,
    "ResNetTSM-50": lambda models: resnet_tsm(models, 50, shift_div=5),
    "caffe": lambda models: resnet_tsm(models, 50, style="caffe"),
    "dilated": lambda models: resnet_tsm(models, strides=(1, 2, 2, 1), dilations=(1, 1, 2, 4)),
    "frozen stages": lambda models: resnet_tsm(models, frozen_stages=2),
    "frozen norms": lambda models: resnet_tsm(models, norm_eval=True),
    "partial norms": lambda models: resnet_tsm(models, partial_bn=True),
    "group norms": lambda models: resnet_tsm(models, norm_cfg={"type": "GN", "num_groups": 4}),
    "no norms": lambda models: resnet_tsm(models, norm_cfg=None),
    "no activations": lambda models: resnet_tsm(models, act_cfg=None),
    "other activations": lambda models: resnet_tsm(models, act_cfg={"type": "SiLU"}),
    "TSM": lambda models: converted(models, lambda net: tsm_jit.make_temporal_shift(net, 4)),
    "TSM, pooled": lambda models: converted(models, pooled),
    "TSAM": lambda models: converted(models, lambda net: tsm_jit.tsam.make_Shift(net, 4, 3, 4, 2, 1, 0)),
}


def pooled(net: nn.Module) -> None:
    tsm_jit.make_temporal_shift(net, 4, temporal_pool=True)
    tsm_jit.make_temporal_pool(net, 4)


@pytest.mark.filterwarnings("ignore:tsm_jit.residual.fuse does not fuse some blocks")  # with group norms
@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "channels_last") for name in NETWORKS), ("ResNetTSM-18", "NCHW")]
)
def test_fused_equals_unfused(device, merged, models, name, layout):
    net, fused, x = pair(lambda: NETWORKS[name](models), device, layout)
    assert isinstance(fused, residual.FusedNetwork)
    assert list(fused.state_dict()) == list(net.state_dict())
    assert_same_step(net, fused, x)
    net.eval(), fused.eval()
    with torch.no_grad():
        expected, actual = net(x), fused(x)
    assert (actual - expected).norm() <= 1e-9 * expected.norm()


def test_blocks_and_stem_run_in_the_fused_kernels(models, monkeypatch):
    """Not only the sum at their ends: convolution, norm and ReLU of a ConvModule are separate layers."""
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: True)
    blocks, stems = counted(monkeypatch, execute, "residual_block"), counted(monkeypatch, execute, "norm_relu_max_pool")
    _, fused, x = pair(lambda: resnet_tsm(models), torch.device("cpu"))
    fused(x)
    assert [len(layers) for _, layers, *_ in blocks] == [2] * 5
    downsamples = [downsample for *_, downsample, _, _, _, _ in blocks]
    assert [each is not None for each in downsamples] == [False, True, False, True, True]
    assert len(stems) == 0
    fused.eval()
    with torch.no_grad():
        fused(x)
    assert (len(blocks), len(stems)) == (5, 1)


def test_several_outputs(device, merged, models):
    class Concatenated(nn.Module):
        def __init__(self, net: nn.Module):
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([each.mean((2, 3)) for each in self.net(x)], 1)

    net, fused, x = pair(lambda: resnet_tsm(models, out_indices=(0, 2, 3)), device)
    assert_same_step(Concatenated(net), Concatenated(fused), x)


@pytest.mark.filterwarnings("ignore:tsm_jit.residual.fuse does not fuse some blocks")
@pytest.mark.parametrize(
    "places",
    [("conv1", "maxpool"), ("layer1.0.conv1", "layer2.1.conv2"), ("layer2.0.downsample", "layer2.1.conv1.activate")],
    ids=lambda places: places[0],
)
def test_hooks_see_what_they_saw_before(models, places):
    seen: dict[bool, list[Tensor]] = {False: [], True: []}

    def run(net: nn.Module, is_fused: bool) -> None:
        net.eval()
        for place in places:
            net.get_submodule(place).register_forward_hook(
                lambda module, inputs, out: seen[is_fused].extend([inputs[0].clone(), out.clone()])
            )
        if is_fused:
            residual.fuse(net)
        with torch.no_grad():
            net(x)

    net, _, x = pair(lambda: resnet_tsm(models), torch.device("cpu"))
    other = copy.deepcopy(net)
    run(net, False), run(other, True)
    assert len(seen[True]) == 4
    for ours, theirs in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_copies_pickles_and_unfusing(models):
    _, fused, x = pair(lambda: resnet_tsm(models), torch.device("cpu"))
    fused.eval()
    for each in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(each, residual.FusedNetwork)
        assert isinstance(each, models.ResNetTSM)
        assert_same_bits(each(x), fused(x))
        residual.unfuse(each)
        assert type(each) is models.ResNetTSM
        assert type(each.layer1) is nn.Sequential


def test_clip_lengths_and_removal_after_fusing(device, models):
    net, fused, x = pair(lambda: resnet_tsm(models), device)
    for each in (net, fused):
        tsm_jit.n_segment(each, 8)
    assert fused.layer1[0].conv1.conv.num_segments == 8
    assert_same_step(net, fused, x)
    for each in (net, fused):
        tsm_jit.remove_temporal_shift(each)
    assert "layer1.0.conv1.conv.weight" in fused.state_dict()
    assert_same_step(net, fused, x)


def test_compiled(models):
    net, fused, x = pair(lambda: resnet_tsm(models), torch.device("cpu"))
    torch.compiler.reset()
    assert_same_step(net, torch.compile(fused, fullgraph=True, backend="eager"), x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depth": 50, "with_cp": True}, ValueError, r"layer1\.0, .*: it has activation checkpointing"),
        ({"shift_place": "block"}, ValueError, r"layer1\.0, .*: its shift is before the whole block"),
        ({"temporal_pool": True}, TypeError, "net must be a ResNet with stages layer1 to layer4 .* got ResNetTSM"),
        (
            {"depth": 50, "non_local": ((1,), (0, 1), (0,), (0,)), "non_local_cfg": {"mode": "dot_product"}},
            TypeError,
            r"got ResNetTSM, whose layer1\.0 is a mmaction\.models\.backbones\.resnet_tsm\.NL3DWrapper",
        ),
        ({"is_shift": False}, ValueError, "net must have temporal shifts to be fused"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_networks_that_cannot_be_fused_raise_with_a_reason(models, options, error, message):
    net = resnet_tsm(models, **options)
    kinds = [type(module) for module in net.modules()]
    with pytest.raises(error, match=message):
        residual.fuse(net)
    assert [type(module) for module in net.modules()] == kinds


def test_a_network_with_their_shift_raises_with_a_reason(models):
    mmaction2.restore()
    for call in (residual.fuse, lambda net: tsm_jit.tsam.make_Shift(net, 4, 3, 8, 1, 1, 0)):
        with pytest.raises(
            TypeError, match=r"whose layer1\.0\.conv1\.conv is a mmaction\..*\.resnet_tsm.TemporalShift"
        ):
            call(resnet_tsm(models))
