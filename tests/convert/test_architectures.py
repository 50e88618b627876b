"""A new architecture is one entry of the table: for surgery and for the checkpoints of other packages."""

import random

import pytest
import torch
from checkpoint_networks import Around, ConvModule, prefixed
from torch import nn

import tsm_jit
from tsm_jit import checkpoints
from tsm_jit.convert import architectures
from tsm_jit.convert.architectures import Architecture, OtherNames

CHAIN = Architecture(
    title="Chain (test)",
    blocks=r"chain\.link\d+",
    first=("branch.0",),
    head=("score",),
    checkpoint_weights=r"(?:chain\.link\d+\.branch|stem|top)\.\d+\.\w+",
    other_names={
        "mmaction2": OtherNames(
            blocks=r"part\d\.\d+",
            block="chain.link{number}",
            layers=(
                {"a.conv": "branch.0", "a.bn": "branch.1"},
                {"a.conv": "branch.0", "a.bn": "branch.1", "b.conv": "branch.3", "b.bn": "branch.4"},
            ),
            outside={"start.conv": "stem.0", "start.bn": "stem.1", "end": "top.{next}"},
        )
    },
)


class Link(nn.Module):
    def __init__(self, convolutions):
        super().__init__()
        layers = [(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(convolutions)]
        self.branch = nn.Sequential(*(layer for each in layers for layer in each))

    def forward(self, x):
        return x + self.branch(x)


class Chain(nn.Module):
    def __init__(self, links):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.chain = nn.Sequential()
        for number, convolutions in enumerate(links, 1):
            self.chain.add_module(f"link{number}", Link(convolutions))
        self.top = nn.ModuleDict({str(len(links) + 1): nn.Conv2d(8, 8, 1)})
        self.score = nn.Linear(8, 5)

    def forward(self, x):
        (top,) = self.top.values()
        return self.score(top(self.chain(self.stem(x))).mean((2, 3)))


class OtherChain(nn.Module):
    """The same weights with other names: blocks by stage, a shift around a convolution and its norm."""

    def __init__(self, chain, per_stage):
        super().__init__()
        self.backbone, self.cls_head = nn.Module(), nn.Module()
        self.backbone.start = ConvModule(*chain.stem)
        links = list(chain.chain)
        for i in range(0, len(links), per_stage):
            stage = nn.ModuleList()
            for link in links[i : i + per_stage]:
                block, layers = nn.Module(), list(link.branch)
                block.a = Around("net", ConvModule(layers[0], layers[1]))
                if len(layers) > 3:
                    block.b = ConvModule(layers[3], layers[4])
                stage.append(block)
            self.backbone.add_module(f"part{i // per_stage}", stage)
        (self.backbone.end,) = chain.top.values()
        self.cls_head.fc_cls = chain.score


@pytest.mark.parametrize("prefix", ["", "model.", "part0.1.", "layer1.0."])
def test_one_entry_is_enough(monkeypatch, prefix):
    # More than 10 blocks: they are ordered by number, not by text.
    links, per_stage = random.choices((1, 2), k=random.randint(12, 20)), random.randint(11, 12)
    net = Chain(links)
    theirs = prefixed(prefix, OtherChain(net, per_stage).state_dict())
    original = net.state_dict()
    with pytest.raises(TypeError, match="net"):
        tsm_jit.make_temporal_shift(net, 4)
    with pytest.raises(ValueError, match="state_dict"):
        checkpoints.convert(theirs, target=net)

    monkeypatch.setattr(architectures, "ARCHITECTURES", (*architectures.ARCHITECTURES, CHAIN))
    tsm_jit.make_temporal_shift(net, 4)
    shifts = [name for name, module in net.named_modules() if isinstance(module, tsm_jit.TemporalShift)]
    assert shifts == [f"chain.link{number}.branch.0" for number, _ in enumerate(links, 1)]
    ours = net.state_dict()
    for target in (net, "torchvision"):
        converted = checkpoints.convert(theirs, target=target)
        assert (converted.source, converted.unplaced, converted.missing) == ("mmaction2", {}, [])
        assert {name: value.data_ptr() for name, value in converted.state_dict.items()} == {
            name: value.data_ptr() for name, value in ours.items()
        }
    back = checkpoints.convert(prefixed(prefix, ours), target=Chain(links))
    assert list(back.state_dict) == list(original)
    assert all(torch.equal(value, original[name]) for name, value in back.state_dict.items())
