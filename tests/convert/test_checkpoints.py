"""Checkpoints: weights in the layouts of TSM, mmaction2 and TSAM in ours, and the other way round."""

import copy

import pytest
import torch
import torchvision
from checkpoint_networks import (
    CASES,
    FRAMES,
    LAYOUTS,
    MOBILENETS,
    RESNETS,
    SEGMENTS,
    TSAM,
    MobileRecognizer,
    Recognizer,
    flat_mobilenet,
    mobilenet_of_tsm,
    on_meta,
    online_demo,
    ours,
    prefixed,
    randomised,
    tsm,
)
from torch import nn

import tsm_jit
from tsm_jit import checkpoints


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


def test_few_matching_weights_raise():
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
    with pytest.raises(ValueError, match=r"60 parameters .*, got 28 "):
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


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_folded_norms(name):
    """Weights with norms must not go to a network whose norms are folded, nor the other way round."""
    net = ours(name).eval()
    folded = copy.deepcopy(net)
    tsm_jit.residual.fuse(folded, fold_norms=True)
    for weights, target in ((net.state_dict(), folded), (folded.state_dict(), net)):
        with pytest.raises(ValueError, match=r"layer1\.0\."):
            checkpoints.convert(prefixed("module.", weights), target=target)
    converted = checkpoints.convert(prefixed("module.", folded.state_dict()), target=folded)
    assert (converted.unplaced, converted.missing) == ({}, [])


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


@pytest.mark.parametrize("make", [lambda: Recognizer().backbone, flat_mobilenet])
def test_a_video_model_of_a_network_of_others(make):
    """The given source says only where the backbone and the last layer are."""
    video = on_meta(lambda: tsm_jit.VideoModel(make(), nn.Linear(512, 5)))
    for source in (None, "video_model"):
        converted = checkpoints.convert(video.state_dict(), source, target=video)
        assert (list(converted.state_dict), converted.unplaced) == (list(video.state_dict()), {})


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
