"""Checkpoints: small networks in the layouts of TSM, mmaction2 and TSAM, written anew, and their weights in ours."""

import argparse
import copy
import functools
import pickle
import random
import sys

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
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


def flat_mobilenet():
    """TSM's MobileNetV2: the layers of a block in one list."""
    net = torchvision.models.mobilenet_v2(num_classes=5)
    for block in list(net.features)[1:-1]:
        flat = nn.Sequential(
            *(inner for layer in block.conv for inner in (layer if len(list(layer.children())) else [layer]))
        )
        if len(flat) == 8 and block.use_res_connect:
            flat[0] = Around("net", flat[0])
        block.conv = flat
    return net


def mobilenet_of_tsm():
    return TSN(flat_mobilenet(), "classifier")


def online_demo():
    """TSM's demo: the last layer alone, and all at the top of the names. Its shifts leave no trace in the names."""
    net = flat_mobilenet()
    net.classifier = net.classifier[1]
    return net


class MobileRecognizer(nn.Module):
    """mmaction2's, of a MobileNetV2: blocks by stage, shifts around a convolution and its normalisation."""

    def __init__(self):
        super().__init__()
        first, *blocks, last = torchvision.models.mobilenet_v2().features
        self.backbone = nn.Module()
        self.backbone.conv1 = ConvModule(first[0], first[1])
        for number, length in enumerate((1, 2, 3, 4, 3, 3, 1), 1):
            stage, blocks = blocks[:length], blocks[length:]
            for block in stage:
                *lists, conv, norm = block.conv
                modules = [ConvModule(each[0], each[1]) for each in lists] + [ConvModule(conv, norm)]
                if len(modules) == 3 and block.use_res_connect:
                    modules[0] = Around("net", modules[0])
                block.conv = nn.Sequential(*modules)
            self.backbone.add_module(f"layer{number}", nn.Sequential(*stage))
        self.backbone.conv2 = ConvModule(last[0], last[1])
        self.cls_head = nn.Module()
        self.cls_head.fc_cls = nn.Linear(1280, 5)

    def forward(self, x):
        x = nn.functional.relu6(self.backbone.conv1(x))
        for number in range(1, 8):
            for block in getattr(self.backbone, f"layer{number}"):
                out = x
                for i, module in enumerate(block.conv, 1):
                    out = module(out) if i == len(block.conv) else nn.functional.relu6(module(out))
                x = x + out if block.use_res_connect else out
        x = nn.functional.relu6(self.backbone.conv2(x))
        return self.cls_head.fc_cls(x.mean((2, 3)))


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
    "tsm, online demo": ("tsm", online_demo, lambda: ours("mobilenet_v2")),
    "mmaction2": ("mmaction2", Recognizer, ours),
    "mmaction2, MobileNetV2": ("mmaction2", MobileRecognizer, lambda: ours("mobilenet_v2")),
    "tsam": ("tsam", TSAM, ours_tsam),
}


MOBILENETS = ("tsm, MobileNetV2", "tsm, online demo", "mmaction2, MobileNetV2")


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


@pytest.mark.parametrize("case", [case for case in CASES if case not in MOBILENETS])
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


def test_unplaced_and_missing_keys():
    weights = tsm().state_dict()
    weights["base_model.layer5.0.conv1.net.weight"] = torch.zeros(1)
    weights["module.new_fc.weight"] = weights["new_fc.weight"]
    del weights["base_model.bn1.weight"]
    net = torchvision.models.resnet18(num_classes=7)
    tsm_jit.make_temporal_shift(net, SEGMENTS)
    converted = checkpoints.convert(weights, target=net)
    assert converted.unplaced == {
        "base_model.layer5.0.conv1.net.weight": "not in the target",
        "new_fc.weight": "shape [5, 512], but fc.weight has shape [7, 512]",
        "new_fc.bias": "shape [5], but fc.bias has shape [7]",
        "module.new_fc.weight": "shape [5, 512], but fc.weight has shape [7, 512]",
    }
    assert converted.missing == ["bn1.weight", "fc.weight", "fc.bias"]
    assert not net.load_state_dict(converted.state_dict, strict=False).unexpected_keys
    twice = checkpoints.convert(weights, target="torchvision").unplaced
    assert twice == {
        "base_model.layer5.0.conv1.net.weight": "not in the target",
        "module.new_fc.weight": "fc.weight is taken by another key",
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


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, tsm_jit.VideoModel])
def test_versions_of_modules(wrap, tmp_path):
    """``load_state_dict`` of MNASNet raises without its version; a batch normalisation accepts older files by its."""
    net = wrap(torchvision.models.mnasnet0_5(num_classes=5))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "weights.pth")
    weights = checkpoints.load(tmp_path / "weights.pth")
    net.load_state_dict(weights)
    mine = torchvision.models.mnasnet0_5(num_classes=5)
    tsm_jit.make_temporal_shift(mine, SEGMENTS)
    for target in (mine, tsm_jit.VideoModel(mine)):
        target.load_state_dict(checkpoints.convert(weights, target=target).state_dict)
    bare = torchvision.models.mnasnet0_5(num_classes=5)
    bare.load_state_dict(checkpoints.convert(weights, target="torchvision").state_dict)
    old = tsm().state_dict()
    for name in [name for name in old if name.endswith("num_batches_tracked")]:
        del old[name]
    for version in old._metadata.values():
        version.pop("version", None)
    ours().load_state_dict(checkpoints.convert(old, target=ours()).state_dict)


WEIGHTS, AVERAGED = {"fc.weight": torch.ones(2, 2)}, {"fc.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "saved",
    [
        *(
            {"epoch": 3, key: WEIGHTS}
            for key in (
                *("state_dict", "model", "model_state", "model_state_dict", "net", "network", "module", "weights"),
                *("params", "ema", "state_dict_ema", "model_ema", "anything"),
            )
        ),
        {"model": {"state_dict": WEIGHTS}, "best": torch.tensor(3.0)},
        {"model": {"epoch": 1, "net": WEIGHTS}},
        {"ema": {"decay": 0.99, "shadow": WEIGHTS}},
        {"ema": AVERAGED, "model": WEIGHTS},
        {"state_dict_ema": AVERAGED, "state_dict": WEIGHTS, "arch": "resnet18", "args": argparse.Namespace(lr=0.1)},
        {"ema_state_dict": AVERAGED, "message_hub": {}, "state_dict": WEIGHTS},
        {"params_ema": AVERAGED, "params": WEIGHTS},
        {"net": AVERAGED, "model": WEIGHTS},
        {"net": "resnet18", "model": "TSN", "state_dict": WEIGHTS},
        {"model": {"ema": AVERAGED, "module": WEIGHTS}},
        {"optimizer": {"state": {0: {"step": torch.tensor(1)}}, "param_groups": []}, "network": WEIGHTS},
    ],
    ids=lambda saved: " ".join(saved),
)
def test_entries_of_files(saved, tmp_path):
    torch.save(saved, tmp_path / "weights.pth")
    weights = checkpoints.load(tmp_path / "weights.pth")
    assert weights.keys() == WEIGHTS.keys()
    assert torch.equal(weights["fc.weight"], WEIGHTS["fc.weight"])


def test_a_file_of_tsam(tmp_path):
    """One state dict for each part of the network; the input has no weights."""
    theirs = TSAM()
    parts = {"nn_input": {}, "nn_backbone": theirs.nn_backbone.state_dict(), "last_fc": theirs.last_fc.state_dict()}
    torch.save({"data_state": {"epoch": 3}, "model_state": parts, "optimizer_state_dict": {}}, tmp_path / "tsam.tar")
    weights = checkpoints.load(tmp_path / "tsam.tar")
    assert weights.keys() == theirs.state_dict().keys()
    converted = checkpoints.convert(weights, target=ours_tsam())
    assert (converted.source, converted.unplaced, converted.missing) == ("tsam", {}, [])


def test_files_without_weights(tmp_path):
    path = tmp_path / "weights.pth"
    for saved, message in (
        ({}, "state_dict must hold weights, got none"),
        ({"epoch": 3}, "got int for 'epoch'"),
        ({"state_dict": WEIGHTS | {"decay": 0.9}}, "got float for 'decay'"),
        (WEIGHTS | {"more": AVERAGED}, "got dict for 'more'"),
        ({1: {2: WEIGHTS}}, "got dict for 1"),
        (torch.zeros(2), "got Tensor"),
    ):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=rf"path must be a file with a state dict, got .*: .*{message}"):
            checkpoints.load(path)


def test_files_that_need_code(tmp_path):
    """The error names the classes and two remedies, and both work."""
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": WEIGHTS, "random": random.Random(), "args": argparse.Namespace(lr=1)}, path)
    allowed = torch.serialization.get_safe_globals()
    with pytest.raises(ValueError, match=r"contains random.Random, which .* weights_only=False\) .*\.safe_globals\("):
        checkpoints.load(path)
    torch.save({"state_dict": WEIGHTS, "case": Around, "args": argparse.Namespace(lr=1)}, path)
    with torch.serialization.safe_globals([Around, argparse.Namespace]):
        assert checkpoints.load(path).keys() == WEIGHTS.keys()
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert torch.serialization.get_safe_globals() == allowed
    for damaged in (b"", b"\x80", b"PK\x03\x04" + bytes(40), b"text", bytes(200)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path must be a file that torch.load"):
            checkpoints.load(path)


def test_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match="is a safetensors file: pip install safetensors"):
            checkpoints.load(path)
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install safetensors")
    with pytest.raises(ValueError, match="path must be a file that safetensors reads, got "):
        checkpoints.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "none.safetensors")
    safetensors.save_file(WEIGHTS, path)
    assert torch.equal(checkpoints.load(str(path))["fc.weight"], WEIGHTS["fc.weight"])


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
    with pytest.raises(
        ValueError, match="must be a network for weights of other networks than torchvision's ResNets, got 'mmaction2'"
    ):
        checkpoints.convert(ours("mobilenet_v2").state_dict(), target="mmaction2")


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "mobilenet_v3_small",
        "convnext_tiny",
        "alexnet",
        "resnet18",
        "densenet121",
        "googlenet",
        "swin_t",
    ],
)
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


@pytest.mark.parametrize("theirs", [mobilenet_of_tsm, MobileRecognizer])
def test_mobilenets_of_others_as_torchvisions(theirs):
    converted = checkpoints.convert(theirs().state_dict(), target="torchvision")
    assert sorted(converted.state_dict) == sorted(ours("mobilenet_v2").state_dict())
    assert converted.unplaced == {}


def test_the_mobilenet_of_the_online_demo():
    """314 of 314 weights, with shifts or without, and with the names before and after the last layer was a list."""
    weights = online_demo().state_dict()
    names = list(torchvision.models.mobilenet_v2().state_dict())
    older = {key.replace("classifier.", "classifier.1."): value for key, value in weights.items()}
    unshifted = {key.replace(".net.", "."): value for key, value in weights.items()}
    assert len(names) == 314
    for saved in (weights, older, unshifted):
        for source in (None, "tsm"):
            for target in (ours("mobilenet_v2"), torchvision.models.mobilenet_v2(num_classes=5), online_demo()):
                converted = checkpoints.convert(saved, source, target=target)
                assert (converted.source, converted.unplaced, converted.missing) == ("tsm", {}, [])
                assert len(converted.state_dict) == 314
    assert list(checkpoints.convert(unshifted, target="torchvision").state_dict) == names


@pytest.mark.parametrize(
    "name", ["swin_small_patch4_window7_224", "nfnet_l0", "vit_small_r26_s32_224", "res2net50_26w_4s"]
)
def test_parts_of_a_network_are_no_network(name):
    """Stages, stems and patch embeddings may have the names of a known architecture."""
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'tsm-jit[test]'")
    net = on_meta(lambda: timm.create_model(name, num_classes=5))
    weights = net.state_dict()
    for prefix, target in (("", "torchvision"), ("model.", "torchvision"), ("a.b.", net)):
        converted = checkpoints.convert(prefixed(prefix, weights), target=target)
        assert (list(converted.state_dict), converted.unplaced) == (list(weights), {})


def test_unknown_networks_and_layouts_as_targets():
    """Only known prefixes of a whole network are removed."""
    weights = on_meta(torchvision.models.densenet121).state_dict()
    for prefix in ("model.", "module.net._orig_mod.", "ema_model.module.", "backbone."):
        assert list(checkpoints.convert(prefixed(prefix, weights), target="torchvision").state_dict) == list(weights)
    unknown = prefixed("foo.", weights)
    assert list(checkpoints.convert(unknown, target="torchvision").state_dict) == list(unknown)


def on_meta(make):
    with torch.device("meta"):
        return make()


LAYOUTS = {  # a network with the names of each layout, and of each kind of names within it
    "torchvision": ours,
    "torchvision, no shifts": lambda: torchvision.models.resnet18(num_classes=5),
    "torchvision, MobileNetV2": lambda: ours("mobilenet_v2"),
    "torchvision, MobileNetV2, blocks": lambda: ours("mobilenet_v2", place="block"),
    "video_model": lambda: ours(clips=True),
    **{case: theirs for case, (_, theirs, _) in CASES.items()},
}
RESNETS = [name for name in LAYOUTS if "Mobile" not in name and "demo" not in name and "101" not in name]


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


@functools.cache
def networks(name):
    """The one with the names of the layout, one of ours for its weights, and these."""
    depth = "mobilenet_v2" if name in MOBILENETS or "Mobile" in name else "resnet101" if "101" in name else "resnet18"
    theirs = on_meta(LAYOUTS[name])
    return theirs, on_meta(lambda: ours(depth)), theirs.state_dict()


@functools.cache
def expected(name, target):
    return checkpoints.convert(networks(name)[2], target=target)


def check_prefix(prefix, name):
    """A prefix changes nothing in the result."""
    theirs, mine, weights = networks(name)
    for target in (mine, theirs, "torchvision", "video_model"):
        converted = checkpoints.convert(prefixed(prefix, weights), target=target)
        assert converted.unplaced == expected(name, target).unplaced == {}
        assert converted.missing == expected(name, target).missing == []
        assert list(converted.state_dict) == list(expected(name, target).state_dict)
        assert all(value is expected(name, target).state_dict[key] for key, value in converted.state_dict.items())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",  # DataParallel, DDP
        "_orig_mod.",  # torch.compile
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",  # Lightning
        "model._orig_mod.",
        "_forward_module.model.module.",  # Lightning and DeepSpeed
        "net.",
        "model.net.",
        "layer.",
        "backbone.",
        "module.backbone.",
        "0.",
        "ema.",
        "ema_model.module.",
        "student.encoder.",
        "_fsdp_wrapped_module._checkpoint_wrapped_module.",
        "anything.at_all.1.",
        "layer1.0.",  # as a block is called
        "features.3.conv.0.",
    ],
)
def test_prefixes(prefix, name):
    check_prefix(prefix, name)


parts = st.sampled_from(
    ["module", "_orig_mod", "_fsdp_wrapped_module", "model", "net", "layer", "backbone", "ema", "0", "base_model"]
) | st.from_regex(r"[A-Za-z_][A-Za-z_0-9]{0,6}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(parts, min_size=1, max_size=5), st.sampled_from(list(LAYOUTS)))
@example(["a", "net", "layer", "module"], "tsam")
def test_any_prefix(chain, name):
    check_prefix("".join(f"{part}." for part in chain), name)


def test_wrappers_within_the_names():
    """FSDP, activation checkpointing, compiled and distributed submodules."""
    net = on_meta(ours)
    weights = net.state_dict()
    wrapped = {
        "_fsdp_wrapped_module." + key.replace("layer2.", "layer2._checkpoint_wrapped_module."): value
        for key, value in weights.items()
    }
    ddp = {key.replace("layer3.", "layer3.module."): value for key, value in weights.items()}
    net.layer1, net.layer4[0].conv1 = torch.compile(net.layer1), torch.compile(net.layer4[0].conv1)
    assert "layer1._orig_mod.0.conv1.net.weight" in net.state_dict()
    for saved in (wrapped, ddp, net.state_dict()):
        for target in (net, on_meta(ours)):
            converted = checkpoints.convert(saved, target=target)
            assert (converted.unplaced, converted.missing) == ({}, [])
    for saved in (wrapped, net.state_dict()):
        assert list(checkpoints.convert(saved, target="torchvision").state_dict) == list(weights)


class Trainer(nn.Module):
    """As Lightning's: a network under any name, and other modules."""

    def __init__(self, net):
        super().__init__()
        self.whatever = net
        self.loss = nn.Linear(3, 3)


WRAPPERS = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "DataParallel of compiled": lambda net: nn.DataParallel(torch.compile(net)),
    "compiled DataParallel": lambda net: torch.compile(nn.DataParallel(net)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "Sequential": lambda net: nn.Sequential(nn.Identity(), net),
    "trainer": Trainer,
    "trainer of compiled": lambda net: Trainer(torch.compile(net)),
    "clips": tsm_jit.VideoModel,
    "compiled clips": lambda net: torch.compile(tsm_jit.VideoModel(net)),
    "trainer of clips": lambda net: Trainer(tsm_jit.VideoModel(net)),
    "clips of compiled": lambda net: tsm_jit.VideoModel(torch.compile(net)),
}
OTHERS = {"n_averaged", "loss.weight", "loss.bias"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("make", [tsm, online_demo, ours, torchvision.models.alexnet, torchvision.models.densenet121])
def test_wrapped_targets(make, wrapper):
    """The names are those of the target, its own wrappers among them; and wrapped weights go to bare networks."""
    theirs = on_meta(make)
    weights = theirs.state_dict()
    mine = on_meta(lambda: ours("mobilenet_v2") if make is online_demo else ours() if make is tsm else make())
    wrapped = WRAPPERS[wrapper](on_meta(lambda: copy.deepcopy(mine)))
    names = list(wrapped.state_dict())
    converted = checkpoints.convert(prefixed("model.module.", weights), target=wrapped)
    assert (list(converted.state_dict), converted.unplaced) == ([name for name in names if name not in OTHERS], {})
    assert set(converted.missing) <= OTHERS
    for target in (theirs, mine, wrapped):
        back = checkpoints.convert(wrapped.state_dict(), target=target)
        assert back.unplaced.keys() <= OTHERS
        assert back.missing == []


def test_online_networks():
    net = on_meta(lambda: ours(direction="past"))
    online = tsm_jit.online.convert(net)
    for source, target in ((net, online), (online, net)):
        converted = checkpoints.convert(source.state_dict(), target=target)
        assert (list(converted.state_dict), converted.unplaced) == (list(target.state_dict()), {})


def test_several_copies_in_one_state_dict():
    """One without an averaging word is taken, then the first; the others are reported. Shapes decide before that."""
    net = on_meta(ours)
    weights, other = net.state_dict(), on_meta(ours).state_dict()
    deep = on_meta(lambda: torchvision.models.resnet50()).state_dict()
    counter = {"model_ema.n_averaged": torch.tensor(1), "initted": torch.tensor(1)}
    for first, second, taken in (
        ("model.", "model_ema.module.", "model."),
        ("ema_model.module.", "online_model.", "online_model."),
        ("encoder_q.", "encoder_k.", "encoder_q."),
        ("a.teacher.", "a.student.", "a.student."),
    ):
        saved = prefixed(first, weights) | prefixed(second, other) | counter
        chosen = weights if taken == first else other
        for target in (net, "torchvision"):
            converted = checkpoints.convert(saved, target=target)
            assert [id(value) for value in converted.state_dict.values()] == [id(value) for value in chosen.values()]
            reason = f"outside the prefix {taken!r} of the matched network"
            assert converted.unplaced == {key: reason for key in saved if not key.startswith(taken)}
    saved = prefixed("student.", deep) | prefixed("teacher.", weights)
    assert list(checkpoints.convert(saved, target=net).state_dict) == list(weights)


def test_real_submodules_with_the_names_of_wrappers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Module()
            self.encoder.layer = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.encoder.norm = nn.LayerNorm(2)
            self.net = nn.Linear(2, 2)
            self.a = nn.Linear(2, 2)
            self.a.net, self.a.module = nn.Linear(2, 2), nn.Linear(2, 2)

    net = Net()
    weights = net.state_dict()
    for prefix in ("", "module.", "k."):
        converted = checkpoints.convert(prefixed(prefix, weights), target=net)
        assert (list(converted.state_dict), converted.unplaced) == (list(weights), {})
        assert all(value is weights[key] for key, value in converted.state_dict.items())
    assert list(checkpoints.convert(weights, target="torchvision").state_dict) == list(weights)
    assert list(checkpoints.convert(weights, target="video_model").state_dict) == [f"backbone.{key}" for key in weights]


@pytest.mark.parametrize("source", RESNETS)
def test_every_layout_to_every_layout_and_back(source):
    names = list(on_meta(LAYOUTS[source]).state_dict())
    weights = on_meta(LAYOUTS[source]).state_dict()
    layout = checkpoints.convert(weights, target="torchvision").source
    shifted = any(part in name for name in names for part in (".net.", ".layer."))
    for target in ("torchvision", "video_model", "tsm", "mmaction2", "tsam"):
        if target == "tsam" and not shifted:
            continue
        there = checkpoints.convert(weights, target=target)
        again = checkpoints.convert(there.state_dict, target=layout)
        assert (there.unplaced, again.unplaced) == ({}, {})
        assert there.source == layout
        assert checkpoints.convert(there.state_dict, target=target).source == target
        if shifted or target in ("torchvision", "video_model"):
            # torchvision's names do not say that the last layer was outside the backbone.
            assert [key.replace("backbone.fc.", "head.") for key in again.state_dict] == names
        assert all(value is weights[key] for key, value in again.state_dict.items() if key in weights)
        assert len(again.state_dict) == len(names)


def test_little_is_placed():
    net = on_meta(ours)
    vgg = on_meta(torchvision.models.vgg11).state_dict()
    with pytest.raises(
        ValueError, match=r"at least half of the target's 60 parameters apart from the last layer, got 0"
    ) as error:
        checkpoints.convert(vgg, target=net)
    assert "Unplaced: 'features.0.weight' (not in the target; nearest: 'fc.weight')" in str(error.value)
    assert "and 19 more. Missing: 'conv1.weight' (nearest: 'features.18.weight')" in str(error.value)
    weights = net.state_dict()
    parameters = [name for name, _ in net.named_parameters() if not name.startswith("fc.")]
    with pytest.raises(ValueError, match=r"60 parameters .*, got 29 "):
        checkpoints.convert({name: weights[name] for name in parameters[:29]}, target=net)
    converted = checkpoints.convert({name: weights[name] for name in parameters[:30]}, target=net)
    assert converted.missing == [key for key in weights if key not in parameters[:30]]
    converted = checkpoints.convert({name: weights[name] for name in parameters}, target=net)  # an EMA copy: no buffers
    assert len(converted.state_dict) == 60
    with pytest.raises(ValueError, match="got 0 "):
        checkpoints.convert({"fc.weight": weights["fc.weight"]}, target=net)
    deep = on_meta(lambda: torchvision.models.resnet50(num_classes=7)).state_dict()
    with pytest.raises(ValueError, match=r"nearest: 'conv1.weight'.* has shape"):
        checkpoints.convert(
            {key: value[:, :1] if value.dim() == 4 else value[:3] for key, value in deep.items() if value.dim()},
            target=net,
        )
    with pytest.raises(
        ValueError, match=r"state_dict must hold weights for target='torchvision', but none match: 'a.b'"
    ):
        checkpoints.convert({"a.b": torch.zeros(1)}, "mmaction2", target="torchvision")


def test_another_number_of_classes_is_no_error():
    net = on_meta(ours)
    for make in (tsm, Recognizer, TSAM):
        theirs = on_meta(make)
        for module in theirs.modules():
            if isinstance(module, nn.Linear):
                module.weight, module.bias = nn.Parameter(torch.zeros(9, 512)), nn.Parameter(torch.zeros(9))
        converted = checkpoints.convert(prefixed("module.", theirs.state_dict()), target=net)
        assert converted.missing == ["fc.weight", "fc.bias"]
        assert list(converted.unplaced.values()) == [
            "shape [9, 512], but fc.weight has shape [5, 512]",
            "shape [9], but fc.bias has shape [5]",
        ]


def test_a_last_layer_beside_a_backbone_of_any_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torchvision.models.resnet18()
            self.encoder.fc = nn.Identity()
            self.classifier = nn.Linear(512, 5)

    model, net = on_meta(Model), on_meta(ours)
    for source, target in ((model, net), (net, model)):
        converted = checkpoints.convert(source.state_dict(), target=target)
        assert (converted.unplaced, converted.missing) == ({}, [])
    assert "new_fc.weight" in checkpoints.convert(model.state_dict(), target="tsm").state_dict


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


def test_names_that_a_layout_does_not_have_are_unplaced():
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
    with pytest.raises(
        ValueError, match="must be a network for weights of other networks than torchvision's ResNets, got 'tsm'"
    ):
        checkpoints.convert(deep, target="tsm")
