"""Checkpoints: small networks in the layouts of TSM, mmaction2 and TSAM, written anew, and their weights in ours."""

import copy
import pickle
import random

import pytest
import torch
import torchvision
from torch import nn

import tsm_jit
from tsm_jit import checkpoints

FRAMES, SEGMENTS = 8, 4


class Around(nn.Module):
    """A shift in plain torch around a module of any name."""

    def __init__(self, name, module, segments=SEGMENTS, keep=False):
        super().__init__()
        self.add_module(name, module)
        self.name, self.segments, self.keep = name, segments, keep

    def forward(self, x):
        clips = x.unflatten(0, (-1, self.segments))
        fold = clips.shape[2] // 8
        out = clips.clone() if self.keep else torch.zeros_like(clips)
        out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
        out[:, :-1, :fold] = clips[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        return getattr(self, self.name)(out.flatten(0, 1))


class Pool(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        clips = x.unflatten(0, (-1, SEGMENTS)).transpose(1, 2)
        clips = nn.functional.max_pool3d(clips, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        return self.net(clips.transpose(1, 2).flatten(0, 1))


class TSN(nn.Module):
    """TSM's: `base_model`, its `fc` a dropout, and `new_fc`."""

    def __init__(self, base_model, head):
        super().__init__()
        features = getattr(base_model, head).in_features if head == "fc" else base_model.classifier[-1].in_features
        setattr(base_model, head, nn.Dropout(0.5))
        self.base_model = base_model
        self.new_fc = nn.Linear(features, 5)

    def forward(self, x):
        return self.new_fc(self.base_model(x))


def stages(net):
    return [getattr(net, f"layer{i}") for i in (1, 2, 3, 4)]


def tsm(name="resnet18", place="blockres", pool=False):
    net = getattr(torchvision.models, name)(num_classes=5)
    every = 2 if name == "resnet101" else 1
    for number, stage in enumerate(stages(net)):
        segments = SEGMENTS // 2 if pool and number else SEGMENTS
        for i, block in enumerate(stage):
            if place == "block":
                stage[i] = Around("net", block, segments)
            elif i % every == 0:
                block.conv1 = Around("net", block.conv1, segments)
    if pool:
        net.layer2 = Pool(net.layer2)
    return TSN(net, "fc")


class ConvModule(nn.Sequential):
    """mmaction2's: a convolution and its normalisation, `conv` and `bn`."""

    def __init__(self, conv, bn):
        super().__init__()
        self.add_module("conv", conv)
        self.add_module("bn", bn)


class RecognizerBlock(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv1 = ConvModule(Around("net", block.conv1), block.bn1)
        self.conv2 = ConvModule(block.conv2, block.bn2)
        if block.downsample is not None:
            self.downsample = ConvModule(*block.downsample)

    def forward(self, x):
        skip = self.downsample(x) if hasattr(self, "downsample") else x
        return (self.conv2(self.conv1(x).relu()) + skip).relu()


class Recognizer(nn.Module):
    """mmaction2's, of a ResNet of basic blocks."""

    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet18()
        self.backbone = nn.Module()
        self.backbone.conv1 = ConvModule(net.conv1, net.bn1)
        for i, stage in enumerate(stages(net), 1):
            self.backbone.add_module(f"layer{i}", nn.Sequential(*map(RecognizerBlock, stage)))
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(512, 5)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.backbone.conv1(x).relu(), 3, 2, 1)
        for stage in stages(self.backbone):
            x = stage(x)
        return self.cls_head.fc_cls(x.mean((2, 3)))


class TSAM(nn.Module):
    def __init__(self):
        super().__init__()
        net = torchvision.models.resnet18()
        for stage in stages(net):
            for block in stage:
                block.conv1 = Around("layer", block.conv1, keep=True)
        net.fc = nn.Identity()
        self.nn_backbone = nn.Module()
        self.nn_backbone.base_model = net
        self.last_fc = nn.Linear(512, 5)

    def forward(self, x):
        return self.last_fc(self.nn_backbone.base_model(x))


def mobilenet_of_tsm():
    """Its layers of a block in one list."""
    net = torchvision.models.mobilenet_v2()
    for block in list(net.features)[1:-1]:
        flat = nn.Sequential(
            *(inner for layer in block.conv for inner in (layer if len(list(layer.children())) else [layer]))
        )
        if len(flat) == 8 and block.use_res_connect:
            flat[0] = Around("net", flat[0])
        block.conv = flat
    return TSN(net, "classifier")


def ours(name="resnet18", clips=False, **arguments):
    net = getattr(torchvision.models, name)(num_classes=5)
    tsm_jit.make_temporal_shift(net, SEGMENTS, inplace=True, **arguments)
    if arguments.get("temporal_pool"):
        tsm_jit.make_temporal_pool(net, SEGMENTS)
    if clips:
        net.fc = nn.Identity()
        return tsm_jit.VideoModel(net, nn.Linear(512, 5))
    return net


def ours_tsam():
    net = torchvision.models.resnet18(num_classes=5)
    tsm_jit.tsam.make_Shift(net, SEGMENTS, SEGMENTS, 8, 1, 1, 0)
    return net


def randomised(net):
    """Statistics as if it had been trained."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.double().eval()


CASES = {
    "tsm": ("tsm", tsm, ours),
    "tsm, before the block": ("tsm", lambda: tsm(place="block"), lambda: ours(place="block")),
    "tsm, pooled": ("tsm", lambda: tsm(pool=True), lambda: ours(temporal_pool=True)),
    "tsm, ResNet-101": ("tsm", lambda: tsm("resnet101"), lambda: ours("resnet101")),
    "tsm, MobileNetV2": ("tsm", mobilenet_of_tsm, lambda: ours("mobilenet_v2")),
    "mmaction2": ("mmaction2", Recognizer, ours),
    "tsam": ("tsam", TSAM, ours_tsam),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_of_others_in_our_networks(case):
    """And back: every weight has its place, and the network computes the same."""
    layout, theirs, mine = CASES[case]
    theirs, mine, x = randomised(theirs()), randomised(mine()), torch.randn(FRAMES, 3, 32, 32, dtype=torch.float64)
    for prefix in ("", "module."):
        weights = {prefix + key: value for key, value in theirs.state_dict().items()}
        for source in (None, layout):
            converted = checkpoints.convert(weights, source, target=mine)
            assert (converted.source, converted.unplaced, converted.missing) == (layout, {}, [])
    mine.load_state_dict(converted.state_dict)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x))
    back = checkpoints.convert(mine.state_dict(), target=theirs)
    assert (back.source, back.unplaced, back.missing) == ("torchvision", {}, [])
    assert all(torch.equal(value, back.state_dict[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("case", [case for case in CASES if "Mobile" not in case])
def test_layouts_as_targets(case):
    """Without a network, the shifts are where they were."""
    layout, theirs, mine = CASES[case]
    theirs, mine = theirs().state_dict(), mine().state_dict()
    assert list(checkpoints.convert(theirs, target=layout).state_dict) == list(theirs)
    if case != "tsam":
        assert list(checkpoints.convert(theirs, target="torchvision").state_dict) == list(mine)
    back = checkpoints.convert(mine, target=layout)
    assert list(back.state_dict) == list(theirs)
    clips = checkpoints.convert(theirs, target="video_model")
    assert checkpoints.convert(clips.state_dict, target=layout).state_dict.keys() == theirs.keys()
    assert clips.unplaced == back.unplaced == {}


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
def test_weights_without_shifts(name):
    """ImageNet's, for instance: in the networks, and in the layouts where TSM would put the shifts."""
    net = getattr(torchvision.models, name)(num_classes=5)
    weights = net.state_dict()
    mine = ours(name)
    converted = checkpoints.convert(weights, target=mine)
    assert (converted.source, converted.unplaced, converted.missing) == ("torchvision", {}, [])
    mine.load_state_dict(converted.state_dict)
    assert list(checkpoints.convert(weights, target="tsm").state_dict) == list(tsm(name).state_dict())
    with pytest.raises(ValueError, match="target must be a network for weights without shifts, got 'tsam'"):
        checkpoints.convert(weights, target="tsam")
    converted = checkpoints.convert(weights, target=TSAM() if name == "resnet18" else tsm(name))
    assert (converted.unplaced, converted.missing) == ({}, [])


def test_clips_and_non_local_blocks():
    model = ours(clips=True)
    converted = checkpoints.convert(tsm().state_dict(), target=model)
    assert (converted.unplaced, converted.missing) == ({}, [])
    assert checkpoints.convert(model.state_dict(), target="tsm").source == "video_model"
    net = torchvision.models.resnet50(num_classes=5)
    tsm_jit.make_temporal_shift(net, SEGMENTS, non_local="embedded_gaussian")
    weights = checkpoints.convert(net.state_dict(), target="tsm").state_dict
    assert "base_model.layer2.0.block.conv1.net.weight" in weights
    assert "base_model.layer3.4.nl.theta.weight" in weights
    converted = checkpoints.convert(weights, target=net)
    assert (converted.unplaced, converted.missing) == ({}, [])
    lost = checkpoints.convert(net.state_dict(), target="mmaction2").unplaced
    assert lost.keys() == {key for key in net.state_dict() if ".nl." in key}


def test_what_has_no_place_is_told():
    weights = tsm().state_dict()
    weights["base_model.layer5.0.conv1.net.weight"] = torch.zeros(1)
    weights["module.new_fc.weight"] = weights["new_fc.weight"]
    del weights["base_model.bn1.weight"]
    net = torchvision.models.resnet18(num_classes=7)
    tsm_jit.make_temporal_shift(net, SEGMENTS)
    converted = checkpoints.convert(weights, target=net)
    assert converted.unplaced == {
        "base_model.layer5.0.conv1.net.weight": "the target has nothing like it",
        "new_fc.weight": "it is [5, 512], fc.weight is [7, 512]",
        "new_fc.bias": "it is [5], fc.bias is [7]",
        "module.new_fc.weight": "it is [5, 512], fc.weight is [7, 512]",
    }
    assert converted.missing == ["bn1.weight", "fc.weight", "fc.bias"]
    assert not net.load_state_dict(converted.state_dict, strict=False).unexpected_keys
    twice = checkpoints.convert(weights, target="torchvision").unplaced
    assert twice == {
        "base_model.layer5.0.conv1.net.weight": "the target has nothing like it",
        "module.new_fc.weight": "another key has become fc.weight",
    }


def test_the_tensors_are_those_given():
    weights = tsm().state_dict()
    before = copy.copy(weights)
    converted = checkpoints.convert(weights, target="torchvision")
    assert list(weights) == list(before)
    for (_, new), (_, old) in zip(converted.state_dict.items(), weights.items(), strict=True):
        assert new is old


def test_files(tmp_path):
    weights, path = {"fc.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth"
    for saved in (weights, {"epoch": 3, "state_dict": weights, "best_prec1": 0.5}):
        torch.save(saved, path)
        assert torch.equal(checkpoints.load(path)["fc.weight"], weights["fc.weight"])
    torch.save({"state_dict": weights, "random": random.Random()}, path)
    with pytest.raises(ValueError, match=r"path must be a file that torch.load\(weights_only=True\) reads, got '.*': "):
        checkpoints.load(path)
    path.write_bytes(pickle.dumps(weights)[:20])
    with pytest.raises(ValueError, match=r"path must be a file that torch.load"):
        checkpoints.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"path must be a file with a state dict, got .*: .* got list"):
        checkpoints.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "none")


def test_errors():
    weights = tsm().state_dict()
    with pytest.raises(TypeError, match="state_dict must map names to tensors, got list"):
        checkpoints.convert([weights], target="tsm")
    with pytest.raises(TypeError, match="state_dict must map names to tensors, got OrderedDict for 'state_dict'"):
        checkpoints.convert({"state_dict": weights}, target="tsm")
    with pytest.raises(ValueError, match="state_dict must hold weights, got none"):
        checkpoints.convert({}, target="tsm")
    with pytest.raises(ValueError, match=r"source must be one of .*, got 'caffe'"):
        checkpoints.convert(weights, "caffe", target="tsm")
    with pytest.raises(ValueError, match=r"target must be one of .*, got 'caffe'"):
        checkpoints.convert(weights, target="caffe")
    with pytest.raises(ValueError, match="must be a network for what is no ResNet of torchvision, got 'mmaction2'"):
        checkpoints.convert(ours("mobilenet_v2").state_dict(), target="mmaction2")


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small", "convnext_tiny", "alexnet", "resnet18"])
def test_every_network_keeps_the_name_of_its_head(name):
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(num_classes=5)
    weights = net.state_dict()
    for target in ("torchvision", net):
        converted = checkpoints.convert(weights, target=target)
        assert list(converted.state_dict) == list(weights)
        assert converted.unplaced == {}
    clips = checkpoints.convert(weights, target="video_model").state_dict
    assert list(clips) == list(tsm_jit.VideoModel(net).state_dict())
    assert list(checkpoints.convert(clips, target="torchvision").state_dict) == list(weights)


def test_the_mobilenet_of_tsm_as_torchvisions():
    converted = checkpoints.convert(mobilenet_of_tsm().state_dict(), target="torchvision")
    assert list(converted.state_dict) == list(ours("mobilenet_v2").state_dict())
    assert converted.unplaced == {}


def test_a_head_behind_a_backbone_with_one():
    model = tsm_jit.VideoModel(torchvision.models.resnet18(num_classes=512), nn.Linear(512, 512))
    weights = model.state_dict()
    converted = checkpoints.convert(weights, target=model)
    assert (converted.unplaced, converted.missing) == ({}, [])
    assert all(converted.state_dict[key] is value for key, value in weights.items())


def test_a_video_model_of_a_network_with_blocks_of_convolution_and_normalisation():
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'tsm-jit[test]'")
    net = timm.create_model("regnetx_002", num_classes=5)
    weights = net.state_dict()
    tsm_jit.make_temporal_shift(net, SEGMENTS)
    for model in (tsm_jit.VideoModel(net), net):
        converted = checkpoints.convert(weights, target=model)
        assert (converted.unplaced, converted.missing) == ({}, [])
    assert checkpoints.convert(tsm_jit.VideoModel(net).state_dict(), target=net).source == "video_model"


def test_names_that_a_layout_does_not_have_are_told():
    weights = tsm().state_dict() | {"base_model.extra.junk": torch.zeros(1)}
    for target in ("tsm", "mmaction2", "torchvision"):
        assert checkpoints.convert(weights, target=target).unplaced.keys() == {"base_model.extra.junk"}
    block = "backbone.layer2.0.non_local_block.g.weight"
    theirs = Recognizer().state_dict() | {block: torch.zeros(1)}
    for target in ("tsm", "tsam", "torchvision", "video_model"):
        assert checkpoints.convert(theirs, target=target).unplaced.keys() == {block}
    deep = {
        "conv1.0.weight": torch.zeros(1),
        "layer1.0.conv1.weight": torch.zeros(1),
        "layer1.0.downsample.2.weight": torch.zeros(1),
    }
    with pytest.raises(ValueError, match="must be a network for what is no ResNet of torchvision, got 'tsm'"):
        checkpoints.convert(deep, target="tsm")
