"""Names in checkpoints: prefixes and wrappers of trainers, several copies of a network."""

import copy
import random

import pytest
import torch
import torchvision
from checkpoint_networks import LAYOUTS, expected, networks, on_meta, online_demo, ours, prefixed, tsm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import tsm_jit
from tsm_jit import checkpoints


def check_prefix(prefix, name):
    """A prefix changes nothing in the result."""
    theirs, mine, weights = networks(name)
    for target in (mine, theirs, "torchvision", "video_model"):
        converted = checkpoints.convert(prefixed(prefix, weights), target=target)
        assert converted.unplaced == expected(name, target).unplaced == {}
        assert converted.missing == expected(name, target).missing == []
        assert list(converted.state_dict) == list(expected(name, target).state_dict)
        assert all(value is expected(name, target).state_dict[key] for key, value in converted.state_dict.items())


PREFIXES = (
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
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix):
    for name in random.sample(list(LAYOUTS), 3):
        check_prefix(prefix, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_every_layout(prefix, name):
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


def small_densenet() -> nn.Module:
    return torchvision.models.DenseNet(block_config=(2, 2, 2, 2))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("make", [tsm, online_demo, ours, torchvision.models.alexnet, small_densenet])
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
    net = on_meta(lambda: ours(direction="past")).eval()
    online = tsm_jit.online.convert(net)
    for source, target in ((net, online), (online, net)):
        converted = checkpoints.convert(source.state_dict(), target=target)
        assert (list(converted.state_dict), converted.unplaced) == (list(target.state_dict()), {})


def undotted(net):
    """What LitEma stores: the parameters, with names without dots."""
    counts = {"decay": torch.tensor(0.9), "num_updates": torch.tensor(3)}
    return counts | {name.replace(".", ""): weight.detach() for name, weight in net.named_parameters()}


TARGETS = {
    "a network": ours,
    "clips": lambda: ours(clips=True),
    "compiled": lambda: torch.compile(ours(), backend="eager"),
}


@pytest.mark.parametrize("prefix", ["", "model_ema."])
@pytest.mark.parametrize("source", ["torchvision", "torchvision, no shifts", "video_model"])
@pytest.mark.parametrize("target", TARGETS)
def test_names_without_dots(target, source, prefix):
    net, theirs = on_meta(TARGETS[target]), on_meta(LAYOUTS[source])
    weights = prefixed(prefix, undotted(theirs))
    converted = checkpoints.convert(weights, target=net)
    assert set(converted.unplaced) == {f"{prefix}decay", f"{prefix}num_updates"}
    expected = checkpoints.convert(dict(theirs.named_parameters()), target=net).state_dict
    assert list(converted.state_dict) == list(expected)
    assert converted.missing == [name for name, _ in net.named_buffers()]
    both = weights | prefixed("model.", networks("torchvision")[2])
    assert checkpoints.convert(both, target=net).missing == []  # averaged weights come last


def test_names_without_dots_that_belong_to_two_layers_are_unplaced():
    blocks = [nn.Conv2d(2, 2, 1) for _ in range(12)]
    net = nn.ModuleDict({"a1": nn.Sequential(*blocks), "a": nn.Sequential(*blocks)})
    weights = {name.replace(".", ""): value for name, value in net.state_dict().items()}
    converted = checkpoints.convert(weights, target=net)
    assert set(converted.unplaced) == {"a10weight", "a10bias", "a11weight", "a11bias"}
    for name, value in converted.state_dict.items():
        assert value is weights[name.replace(".", "")]


@pytest.mark.parametrize("prefix", ["", "module.features."])
@pytest.mark.parametrize("source", ["torchvision", "torchvision, no shifts", "torchvision, MobileNetV2"])
@pytest.mark.parametrize("target", TARGETS)
def test_children_in_a_list(target, source, prefix):
    theirs = on_meta(LAYOUTS[source])
    net = on_meta(lambda: ours("mobilenet_v2") if "Mobile" in source else TARGETS[target]())
    listed = prefixed(prefix, nn.Sequential(*theirs.children()).state_dict())
    converted = checkpoints.convert(listed, target=net)
    assert (converted.unplaced, converted.missing) == ({}, [])
    expected = checkpoints.convert(theirs.state_dict(), target=net).state_dict
    assert list(converted.state_dict) == list(expected)
    backbone = prefixed(prefix, nn.Sequential(*list(theirs.children())[:-1]).state_dict())
    converted = checkpoints.convert(backbone | {"new_fc.weight": torch.empty(5, 512, device="meta")}, target=net)
    assert set(converted.unplaced) <= {"new_fc.weight"}
    assert all(".bn" not in name and ".conv" not in name for name in converted.missing)


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
