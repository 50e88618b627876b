"""Surgery of every architecture, against shifts of PyTorch placed by hand; surgery of any other network."""

import contextlib
import copy
import functools
import io
import subprocess
import sys

import mmaction2_package
import pytest
import torch
import torchvision
from support import assert_same_bits
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock

import tsm_jit
from tsm_jit import TemporalShift, TokenShift, checkpoints, make_temporal_shift, shift_before
from tsm_jit.non_local import make_non_local

CLIP = 4
# A shift moves bits. But the order of a convolution's sums depends on the strides of its input and on the batch size.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def without_denormals():
    """Denormal numbers of an untrained EfficientNet make its convolutions a hundred times slower on a CPU."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


class Plain(nn.Module):
    """TSM's formula around ``net``. Of tokens the first stays."""

    def __init__(self, net, tokens=False, past=False):
        super().__init__()
        self.net, self.tokens, self.past = net, tokens, past

    def forward(self, x):
        still, x = (x[:, :1], x[:, 1:].transpose(1, 2)) if self.tokens else (None, x)
        clips = x.unflatten(0, (-1, CLIP))
        fold, out = clips.shape[2] // 8, torch.zeros_like(clips)
        if self.past:
            out[:, 1:, :fold] = clips[:, :-1, :fold]
            out[:, :, fold:] = clips[:, :, fold:]
        else:
            out[:, :-1, :fold] = clips[:, 1:, :fold]
            out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
            out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
        out = out.flatten(0, 1)
        return self.net(torch.cat([still, out.transpose(1, 2)], 1) if self.tokens else out)


def timm_model(name, **options):
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'tsm-jit[test]'")
    return timm.create_model(name, num_classes=3, **options)


def torchvision_model(name):
    return getattr(torchvision.models, name)(num_classes=3)


def places(pattern, *counts, first_stage=1, first_block=0):
    return [pattern.format(stage, i + first_block) for stage, n in enumerate(counts, first_stage) for i in range(n)]


def places_in_regnet(*counts):
    return [f"trunk_output.block{s}.block{s}-{i}.f.a.0" for s, n in enumerate(counts, 1) for i in range(n)]


def places_in_convnext(*counts):
    return [f"features.{2 * s + 1}.{i}.block.0" for s, n in enumerate(counts) for i in range(n)]


def not_first(pattern, counts):
    """All but the first block of each stage, in ``counts`` by its number."""
    return [pattern.format(stage, i) for stage, n in counts.items() for i in range(1, n)]


# For each row of the table of the guides: a function that makes a short network, its frame size, the shifted layers.
NETWORKS = {
    "ResNet, ResNeXt, Wide-ResNet (torchvision)": (
        lambda: torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3),
        32,
        places("layer{}.{}.conv1", 1, 2, 1, 1),
    ),
    "ResNet, ResNet-D (timm)": (
        lambda: timm_model("resnet14t", channels=(16, 24, 32, 48)),
        32,
        places("layer{}.{}.conv1", 1, 1, 1, 1),
    ),
    "ResNet (mmaction2)": (mmaction2_package.small_resnet, 32, places("layer{}.{}.conv1.conv", 1, 1, 1, 1)),
    "RegNet (torchvision)": (
        lambda: torchvision.models.RegNet(
            BlockParams([1, 1, 2, 1], [32, 64, 64, 96], [16] * 4, [1.0] * 4, [2] * 4), num_classes=3
        ),
        32,
        places_in_regnet(1, 1, 2, 1),
    ),
    "RegNet (timm)": (
        lambda: timm_model("regnetx_002", depth=8),
        32,
        places("s{}.b{}.conv1.conv", 1, 1, 4, 2, first_block=1),
    ),
    "ConvNeXt (torchvision)": (
        lambda: torchvision.models.ConvNeXt(
            [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 1), CNBlockConfig(48, 64, 2), CNBlockConfig(64, None, 1)],
            num_classes=3,
        ),
        32,
        places_in_convnext(1, 1, 2, 1),
    ),
    "ConvNeXt (timm)": (
        lambda: timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
        32,
        places("stages.{}.blocks.{}.conv_dw", 1, 1, 2, 1, first_stage=0),
    ),
    "MobileNetV2 (torchvision)": (
        lambda: torchvision.models.MobileNetV2(
            3, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 2, 2]]
        ),
        32,
        [f"features.{i}.conv.0.0" for i in (3, 5, 6, 8)],
    ),
    "MobileNetV3 (torchvision)": (
        lambda: torchvision.models.MobileNetV3(
            [
                InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
                InvertedResidualConfig(16, 3, 72, 24, False, "RE", 2, 1, 1.0),
                InvertedResidualConfig(24, 3, 88, 24, False, "RE", 1, 1, 1.0),
                InvertedResidualConfig(24, 5, 96, 40, True, "HS", 2, 1, 1.0),
                InvertedResidualConfig(40, 5, 240, 40, True, "HS", 1, 1, 1.0),
            ],
            last_channel=64,
            num_classes=3,
        ),
        32,
        [f"features.{i}.block.0.0" for i in (3, 5)],
    ),
    "EfficientNet (torchvision)": (
        lambda: torchvision.models.EfficientNet(
            [
                MBConvConfig(1, 3, 1, 32, 16, 1),
                MBConvConfig(6, 3, 2, 16, 24, 2),
                MBConvConfig(6, 5, 2, 24, 40, 3),
                MBConvConfig(6, 3, 1, 40, 48, 2),
            ],
            dropout=0.2,
            num_classes=3,
        ),
        32,
        not_first("features.{}.{}.block.0.0", {2: 2, 3: 3, 4: 2}),
    ),
    "MNASNet (torchvision)": (
        lambda: torchvision_model("mnasnet0_5"),
        32,
        [f"layers.{s}.{i}.layers.0" for s, n in enumerate((3, 3, 3, 2, 4, 1), 8) for i in range(1, n)],
    ),
    "MobileNetV2, MobileNetV3, EfficientNet (timm)": (
        lambda: timm_model("mobilenetv2_035"),
        32,
        [f"blocks.{s}.{i}.conv_pw" for s, n in ((1, 2), (2, 3), (3, 4), (4, 3), (5, 3)) for i in range(1, n)],
    ),
    "ViT (timm)": (lambda: timm_model("test_vit", dynamic_img_size=False), 160, places("blocks.{1}.attn.qkv", 6)),
}


def shows(column):
    """Marks a test of every network with its cells of README's table."""

    def mark(test):
        parameters = [
            pytest.param(name, id=name.replace(" ", ""), marks=pytest.mark.feature(name, column=column))
            for name in NETWORKS
        ]
        return pytest.mark.parametrize("name", parameters)(test)

    return mark


def network_case(name):
    """A network, one shifted by hand, its frames."""
    make, size, where = NETWORKS[name]
    net = make().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained, so that shifts change the scores
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if type(module).__name__ == "ConvNeXtBlock":
            nn.init.normal_(module.gamma)
        if type(module).__name__ == "CNBlock":
            nn.init.normal_(module.layer_scale)
    return net, where, torch.randn(2 * CLIP, 3, size, size, dtype=torch.float64)


def by_hand(net, where, **options):
    net = copy.deepcopy(net)
    for place in where:
        above, _, child = place.rpartition(".")
        tokens = hasattr(net, "patch_embed")
        setattr(net.get_submodule(above), child, Plain(net.get_submodule(place), tokens, **options))
    return net


def run(net, x, seed):
    """Output and every gradient. ``seed`` is for dropout."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = net(x)
    out.pow(2).sum().backward()
    return [out, x.grad, *(p.grad for p in net.parameters())]


def check_against_plain(name, inplace, seed, place="blockres"):
    net, where, x = network_case(name)
    if place == "block":
        ends = (".conv1.conv", ".conv_dw", ".conv.0.0", ".attn.qkv")
        where = [each.removesuffix(next(end for end in ends if each.endswith(end))) for each in where]
    unshifted, plain = copy.deepcopy(net), by_hand(net, where)
    make_temporal_shift(net, CLIP, inplace=inplace, place=place)
    for actual, expected in zip(run(net, x, seed), run(plain, x, seed), strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)
    net.eval(), plain.eval(), unshifted.eval()
    with torch.inference_mode():
        torch.testing.assert_close(net(x), plain(x), **CLOSE)
        assert not torch.allclose(net(x), unshifted(x))
    assert {module.inplace for module in net.modules() if isinstance(module, TemporalShift)} == {inplace}


@shows("convert")
def test_converted_against_shifts_placed_by_hand(name, seed):
    check_against_plain(name, False, seed)


@pytest.mark.parametrize("name", ["ConvNeXt (timm)", "MobileNetV2 (torchvision)", "RegNet (timm)", "ViT (timm)"])
def test_before_the_block_against_shifts_placed_by_hand(name, seed):
    check_against_plain(name, False, seed, "block")


@shows("in place")
def test_in_place_against_shifts_placed_by_hand(name, seed):
    check_against_plain(name, True, seed)


@shows("checkpoint keys")
def test_keys_and_back(name):
    net, where, _ = network_case(name)
    weights = net.state_dict()
    make_temporal_shift(net, CLIP)
    expected = []
    for key in weights:
        place = next((place for place in where if key.startswith(place + ".")), None)
        expected.append(key if place is None else f"{place}.net{key[len(place) :]}")
    assert list(net.state_dict()) == expected
    converted = checkpoints.convert(weights, target=net)
    assert (converted.unplaced, converted.missing) == ({}, [])
    net.load_state_dict(converted.state_dict)
    with pytest.raises(ValueError, match="converted before"):
        make_temporal_shift(net, CLIP)
    assert list(net.state_dict()) == expected
    tsm_jit.remove_temporal_shift(net)
    assert list(net.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())


@shows("compiled")
def test_one_graph(name):
    net, _, x = network_case(name)
    make_temporal_shift(net.eval(), CLIP, inplace=True)  # eval: without random numbers
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, x, 0), run(net, x, 0), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@shows("ONNX")
def test_onnx(name):
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime: pip install 'tsm-jit[test]'")
    runtime = pytest.importorskip("onnxruntime")
    net, _, x = network_case(name)
    net, x, file = net.float().eval(), x.float(), io.BytesIO()
    make_temporal_shift(net, CLIP, inplace=True)
    clips = CLIP * torch.export.Dim("clips", min=1, max=16)
    torch.onnx.export(net, (x,), file, dynamic_shapes=({0: clips},), dynamo=True)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for frames in (x, x[:CLIP], torch.randn(3 * CLIP, *x.shape[1:])):
        (actual,) = session.run(None, {session.get_inputs()[0].name: frames.numpy()})
        with torch.no_grad():
            # float32, summed in another order by each of the convolutions of onnxruntime
            torch.testing.assert_close(torch.from_numpy(actual), net(frames), rtol=1e-3, atol=1e-3)


@shows("online")
def test_on_a_stream(name):
    net, where, x = network_case(name)
    net = net.eval()
    plain = by_hand(net, where, past=True)
    make_temporal_shift(net, CLIP, direction="past")
    stream = tsm_jit.online.convert(net)
    with torch.inference_mode():
        streams = x.unflatten(0, (2, CLIP))
        frames = torch.stack([stream(streams[:, t]) for t in range(CLIP)], 1)
        torch.testing.assert_close(frames.flatten(0, 1), plain(x), **CLOSE)
        stream.reset()
        torch.testing.assert_close(stream(streams[:, 0]), frames[:, 0], **CLOSE)


@shows("online")
def test_on_a_stream_in_both_directions(name):
    net, where, x = network_case(name)
    net, frames = net.eval(), 3
    make_temporal_shift(net, frames)
    stream, x = tsm_jit.online.convert(net), x[:frames]
    assert stream.latency == len(where)
    with torch.inference_mode():
        expected = net(x)
        outputs = [stream(frame[None]) for frame in x] + list(stream.flush())
        actual = torch.cat([scores for scores in outputs if scores is not None])
        # float64; a batch of one frame may take convolutions that sum in another order than a batch of all frames.
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def shifted_places(net):
    return [name for name, module in net.named_modules() if isinstance(module, TemporalShift)]


MOBILE = [f"features.{i}.conv.0.0" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]


@pytest.mark.parametrize(
    ("net", "where"),
    [
        ("resnet34", places("layer{}.{}.conv1", 3, 4, 6, 3)),
        ("resnext50_32x4d", places("layer{}.{}.conv1", 3, 4, 6, 3)),
        ("wide_resnet50_2", places("layer{}.{}.conv1", 3, 4, 6, 3)),
        ("resnet152", [f"layer{s}.{i}.conv1" for s, n in ((1, 3), (2, 8), (3, 36), (4, 3)) for i in range(0, n, 2)]),
        ("regnet_x_400mf", places_in_regnet(1, 2, 7, 12)),
        ("convnext_tiny", places_in_convnext(3, 3, 9, 3)),
        ("mobilenet_v2", MOBILE),
        ("mobilenet_v3_small", [f"features.{i}.block.0.0" for i in (3, 5, 6, 8, 10, 11)]),
        ("efficientnet_b0", not_first("features.{}.{}.block.0.0", {2: 2, 3: 2, 4: 3, 5: 3, 6: 4})),
        ("efficientnet_v2_s", not_first("features.{}.{}.block.0.0", {2: 4, 3: 4, 4: 6, 5: 9, 6: 15})),
        ("timm resnet26d", places("layer{}.{}.conv1", 2, 2, 2, 2)),
        ("timm regnety_002", places("s{}.b{}.conv1.conv", 1, 1, 4, 7, first_block=1)),
        ("timm convnext_atto", places("stages.{}.blocks.{}.conv_dw", 2, 2, 6, 2, first_stage=0)),
        ("timm efficientnet_b0", not_first("blocks.{}.{}.conv_pw", {1: 2, 2: 2, 3: 3, 4: 3, 5: 4})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_places_in_networks_of_full_depth(net, where):
    with contextlib.nullcontext() if "regnet" in net else torch.device("meta"):  # RegNets cannot be made there
        net = timm_model(net[5:]) if net.startswith("timm ") else torchvision_model(net)
    make_temporal_shift(net, 8)
    assert shifted_places(net) == where


def test_some_stages_and_blocks():
    def converted(net="resnet18", **options):
        with torch.device("meta"):
            net = torchvision_model(net)
        make_temporal_shift(net, 8, **options)
        return shifted_places(net)

    assert converted(stages=[3], blocks=[0]) == ["layer3.0.conv1"]
    assert converted(stages=(2, 4)) == places("layer{}.{}.conv1", 0, 2, 0, 2)
    assert converted(blocks={1}) == [f"layer{i}.1.conv1" for i in (1, 2, 3, 4)]
    assert converted(place="block", stages=range(1, 2)) == ["layer1.0", "layer1.1"]
    assert converted("resnet101", stages=[3], blocks=[1, 3]) == ["layer3.1.conv1", "layer3.3.conv1"]
    assert converted("mobilenet_v2", stages=[3]) == MOBILE[1:3]
    assert converted("mobilenet_v2", stages=[4], blocks=[2]) == MOBILE[4:5]
    assert converted("mobilenet_v2", place="block") == [place.removesuffix(".conv.0.0") for place in MOBILE]
    assert converted("convnext_tiny", stages=[3], blocks=[8]) == ["features.5.8.block.0"]
    for options, error, message in [
        ({"stages": [0]}, ValueError, r"stages must be from 1 to 4 for this network, got \[0\]"),
        ({"stages": [5]}, ValueError, r"stages must be from 1 to 4 for this network, got \[5\]"),
        ({"blocks": [2]}, ValueError, r"blocks must be from 0 to 1 for this network, got \[2\]"),
        ({"stages": []}, ValueError, r"must select a block that can be shifted, got \[\] and \[0, 1\]"),
        ({"net": "mobilenet_v2", "blocks": [0]}, ValueError, r"a block that can be shifted, got .* and \[0\]"),
        ({"stages": 3}, TypeError, "stages must be a collection of integers, got 3"),
        ({"stages": "3"}, TypeError, "stages must be a collection of integers, got '3'"),
        ({"blocks": ["0"]}, TypeError, "blocks must be an integer, got '0'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            converted(**options)


def test_any_network():
    """Shifts in places that no architecture has."""
    net = torchvision.models.squeezenet1_0(num_classes=3).double()
    x, where = torch.randn(2 * CLIP, 3, 64, 64, dtype=torch.float64), ["features.3", "features.7.expand3x3"]
    plain = by_hand(net, where).eval()
    shift = functools.partial(TemporalShift, n_segment=CLIP, inplace=True)
    shift_before(net.eval(), dict.fromkeys(where, shift))
    assert shifted_places(net) == where
    assert not any(module.training for module in net.modules())
    with torch.no_grad():
        assert_same_bits(net(x), plain(x))
    before = list(net.state_dict())
    for arguments, error, message in [
        ({"features.3": shift}, ValueError, "places must name modules without a shift, got 'features.3', which"),
        ({"features.5": shift, "features.3": shift}, ValueError, "places must name modules without a shift"),
        ({"features.99": shift}, ValueError, "got 'features.99', which SqueezeNet does not have"),
        ({"": shift}, ValueError, "places must name modules of net, got '', which"),
        ({3: shift}, TypeError, "places must map from module names, got 3"),
        ({"features.5": 8}, TypeError, "places must map to functions, got 8 for 'features.5'"),
        ({"features.5": nn.Identity}, TypeError, "return a temporal module, got Identity for 'features.5'"),
        (["features.5"], TypeError, "places must be a mapping from module names, got list"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            shift_before(net, arguments)
    with pytest.raises(TypeError, match=r"net must be a torch.nn.Module, got int"):
        shift_before(3, {})
    assert list(net.state_dict()) == before
    tsm_jit.remove_temporal_shift(net)
    assert shifted_places(net) == []


def test_the_error_of_an_unknown_network_names_the_architectures():
    with pytest.raises(TypeError, match=r"ResNet, .* RegNet .* ViT \(timm\); got SqueezeNet.*shift_before"):
        make_temporal_shift(torchvision.models.squeezenet1_0(), 8)
    with pytest.raises(TypeError, match=r"net must be a torch.nn.Module, got str"):
        make_temporal_shift("resnet18", 8)
    net = torchvision_model("resnet18")
    net.layer2[1] = nn.Conv2d(128, 128, 1)  # a block of another kind
    with pytest.raises(TypeError, match="net must have a supported architecture: "):
        make_temporal_shift(net, 8)
    # These have a part of the names.
    for name in ("hrnet_w18_small", "cait_xxs24_224", "mixnet_s"):
        with pytest.raises(TypeError, match="net must have a supported architecture: "):
            make_temporal_shift(timm_model(name), 8)


def test_pools_are_of_resnets_and_made_for_half():
    for options in ({"temporal_pool": True}, {"non_local": "dot_product"}):
        with pytest.raises(ValueError, match=r"temporal_pool and non_local must not be set .* for MobileNetV2"):
            make_temporal_shift(torchvision_model("mobilenet_v2"), 8, **options)
    net = torchvision_model("resnet18")
    tsm_jit.make_temporal_pool(net, 8)
    with pytest.raises(ValueError, match="temporal_pool must be True for a network with a temporal pool, got False"):
        make_temporal_shift(net, 8)
    make_temporal_shift(net, 8, temporal_pool=True)
    assert net.layer2.net[0].conv1.n_segment == 4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda net: make_temporal_shift(net, 8), lambda net: tsm_jit.make_temporal_pool(net, 8)),
        (lambda net: make_temporal_shift(net, 16, stages=[1]), lambda net: tsm_jit.make_temporal_pool(net, 8)),
        (lambda net: tsm_jit.make_temporal_pool(net, 8), lambda net: make_temporal_shift(net, 16, temporal_pool=True)),
        (lambda net: make_non_local(net, 8), lambda net: make_temporal_shift(net, 16)),
        (lambda net: make_temporal_shift(net, 16), lambda net: make_non_local(net, 8)),
        (lambda net: tsm_jit.make_temporal_pool(net, 8), lambda net: make_non_local(net, 8)),
    ],
)
def test_clip_lengths_that_do_not_fit_each_other(first, second):
    net = torchvision_model("resnet18")
    first(net)
    before = list(net.state_dict())
    with pytest.raises(
        ValueError, match=r"n_segment must match the temporal modules of net, got \d+ frames and \d+ from"
    ):
        second(net)
    assert list(net.state_dict()) == before


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("still", [0, 1, 3])
def test_token_shift(device, still, inplace):
    """Against the operator on the tokens that move; the input is as it was afterwards."""
    x = torch.randn(2 * CLIP, 5 + still, 16, device=device)
    net = nn.Linear(16, 4).to(device)
    shift = TokenShift(net, CLIP, inplace=inplace, num_prefix_tokens=still)
    moved = tsm_jit.temporal_shift(x[:, still:].contiguous(), CLIP, channel_dim=-1)
    expected = net(torch.cat([x[:, :still], moved], 1))
    before = x.clone()
    leaf = x.clone().requires_grad_()
    out = shift(leaf)
    out.sum().backward()
    assert_same_bits(out, expected)
    with torch.inference_mode():
        assert_same_bits(shift(x), expected)
    assert_same_bits(x, before)
    other = x.clone().requires_grad_()
    moved = tsm_jit.temporal_shift(other[:, still:], CLIP, channel_dim=-1)
    net(torch.cat([other[:, :still], moved], 1)).sum().backward()
    assert_same_bits(leaf.grad, other.grad)
    with pytest.raises(ValueError, match=r"x must be tokens \[N\*T, L, C\], got \[8, 3\]"):
        shift(torch.zeros(8, 3, device=device))
    with pytest.raises(ValueError, match="num_prefix_tokens must be at least 0, got -1"):
        TokenShift(net, CLIP, num_prefix_tokens=-1)


def test_networks_are_known_without_their_packages():
    """tsm_jit imports neither torchvision nor timm."""
    code = "import sys, tsm_jit; assert not {'torchvision', 'timm'} & set(sys.modules), 'imported'"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
