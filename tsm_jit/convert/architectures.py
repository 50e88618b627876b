"""The table of network architectures, with the names of their residual blocks and layers.

Network surgery, ``residual.fuse`` and checkpoint conversion read it. To support another network, add an entry. The
table identifies modules by name, so torchvision, timm and mmaction2 are not required.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from tsm_jit.modules.base import ClipModule, class_name

# The layouts of checkpoints: whose names they have.
Layout = Literal["torchvision", "video_model", "tsm", "mmaction2", "tsam"]


@dataclass(frozen=True)
class FusableBlock:
    """A block that computes ``activation(branch(x) + downsample(x))``, or ``+ x`` without a ``downsample``."""

    branch: tuple[str, ...]  # the modules of the residual branch in forward order, which may be layer groups
    activation: str  # the module after the sum


@dataclass(frozen=True)
class LayerGroup:
    """A module that calls its children in a fixed order."""

    # The children in forward order. Each has the name of the attribute that tells whether it is called, if any.
    children: Mapping[str, str | None]

    # Attributes that must have these values. With others the module computes something else. A missing one is None.
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class OtherNames:
    """The names of layers in a checkpoint layout, if they differ from the names in the network.

    The mappings go from the names in the layout to the names in the network. They contain no temporal modules.
    """

    # A regular expression for the names of all blocks in the layout.
    blocks: str

    # The layers of a block in forward order. There is one mapping for each kind of block, the shortest first.
    layers: tuple[Mapping[str, str], ...]

    # The layers outside the blocks. {next} stands for the number of blocks plus one.
    outside: Mapping[str, str] = field(default_factory=dict)

    # The name of a block in the network. {block} is its name in the layout, {number} counts the blocks from 1.
    block: str = "{block}"

    def in_layout(self, name: str) -> str:
        """Returns the name in the layout of a weight of the network, if blocks have the same names in both."""
        layers = {ours: theirs for kind in (*self.layers, self.outside) for theirs, ours in kind.items()}
        pattern = rf"(?<![^.])(?:{'|'.join(map(re.escape, layers))})(?=\.)"
        return re.sub(pattern, lambda match: layers[match[0]], name)


@dataclass(frozen=True)
class Architecture:
    """One architecture of one package. All names are module names of the unconverted network."""

    title: str

    # A regular expression for the names of all blocks. Its first group, if any, is the stage.
    blocks: str

    # Possible names of the first layer of a block, before which TSM shifts ("blockres").
    first: tuple[str, ...]

    # Possible names of the last layer of the network.
    head: tuple[str, ...]

    # For inverted residuals: the attribute of a block that tells whether the block has a skip branch.
    skips: str | None = None

    n_stages: int | None = None

    # Whether the blocks take tokens [N*T, L, C].
    tokens: bool = False

    # The name of a required base class of the network.
    base_class: str | None = None

    # TSM shifts every second block if the third stage has at least this number of blocks.
    sparse_from: int | None = None

    # A regular expression for the weights that TSM, TSAM or mmaction2 also have.
    checkpoint_weights: str | None = None

    # A regular expression for weights of variants that TSM, TSAM and mmaction2 do not have.
    variant_weights: str | None = None

    # The checkpoint layouts with other names for the layers.
    other_names: Mapping[Layout, OtherNames] = field(default_factory=dict)

    # The blocks that `residual.fuse` supports, by class name.
    fusable_blocks: Mapping[str, FusableBlock] = field(default_factory=dict)

    # Convolution, norm, activation and pooling before the first block, by class name of the network. The first may be a
    # layer group.
    stems: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def first_layers(self, names: Iterable[str]) -> dict[str, str]:
        """Returns the first layer of each block that has such weights, by the name of the block."""
        pattern = re.compile(rf"(({self.blocks})\.{re.escape(self.first[0])})\.")
        return {match[2]: match[1] for match in map(pattern.match, names) if match}

    def every(self, stage_lengths: list[int]) -> int:
        """Returns TSM's ``n_round`` for these stage lengths: 1 to shift every block, 2 for every second block."""
        return 2 if self.sparse_from is not None and stage_lengths[2] >= self.sparse_from else 1


@dataclass(frozen=True)
class Block:
    """A residual block of a network, with module names of the network as it is."""

    name: str  # "layer1.0"
    first: str | None  # the first layer, "layer1.0.conv1"; None if TSM does not shift this block


RESNET = Architecture(
    title="ResNet, ResNeXt, Wide-ResNet, ResNet-D (torchvision, timm, mmaction2)",
    blocks=r"layer([1-4])\.\d+",
    first=("conv1", "conv1.conv"),
    head=("fc",),
    n_stages=4,
    sparse_from=23,
    checkpoint_weights=r"(?:conv1|bn1|layer[1-4]\.\d+\."
    r"(?:conv\d|bn\d|downsample\.[01]|nl\.(?:theta|phi|g|W)(?:\.[01])?))\.\w+",
    variant_weights=r".*\.downsample\.2\..*",  # ResNet-D
    other_names={
        # A convolution and its norm are one module.
        "mmaction2": OtherNames(
            blocks=r"layer[1-4]\.\d+",
            layers=(
                {
                    "conv1.conv": "conv1",
                    "conv1.bn": "bn1",
                    "conv2.conv": "conv2",
                    "conv2.bn": "bn2",
                    "conv3.conv": "conv3",
                    "conv3.bn": "bn3",
                    "downsample.conv": "downsample.0",
                    "downsample.bn": "downsample.1",
                },
            ),
            outside={"conv1.conv": "conv1", "conv1.bn": "bn1"},
        ),
    },
    fusable_blocks={
        "torchvision.models.resnet.BasicBlock": FusableBlock(("conv1", "bn1", "relu", "conv2", "bn2"), "relu"),
        "torchvision.models.resnet.Bottleneck": FusableBlock(
            ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"), "relu"
        ),
        "timm.models.resnet.BasicBlock": FusableBlock(
            ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"), "act2"
        ),
        "timm.models.resnet.Bottleneck": FusableBlock(
            ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"), "act3"
        ),
        "mmaction.models.backbones.resnet.BasicBlock": FusableBlock(("conv1", "conv2"), "relu"),
        "mmaction.models.backbones.resnet.Bottleneck": FusableBlock(("conv1", "conv2", "conv3"), "relu"),
    },
    stems={
        "torchvision.models.resnet.ResNet": ("conv1", "bn1", "relu", "maxpool"),
        "timm.models.resnet.ResNet": ("conv1", "bn1", "act1", "maxpool"),
        "mmaction.models.backbones.resnet.ResNet": ("conv1", "maxpool"),
        "mmaction.models.backbones.resnet_tsm.ResNetTSM": ("conv1", "maxpool"),
    },
)
MOBILENET_V2 = Architecture(
    title="MobileNetV2 (torchvision)",
    blocks=r"features\.\d+",
    first=("conv.0.0", "conv.0"),
    head=("classifier.1",),
    skips="use_res_connect",
    checkpoint_weights=r"features\.\d+\.(?:[01]|conv\.\d(?:\.\d)?)\.\w+",
    other_names={
        # The layers of a block are in one list, activations among them.
        "tsm": OtherNames(
            blocks=r"features\.\d+",
            layers=(
                {"conv.0": "conv.0.0", "conv.1": "conv.0.1", "conv.3": "conv.1", "conv.4": "conv.2"},
                {
                    "conv.0": "conv.0.0",
                    "conv.1": "conv.0.1",
                    "conv.3": "conv.1.0",
                    "conv.4": "conv.1.1",
                    "conv.6": "conv.2",
                    "conv.7": "conv.3",
                },
            ),
        ),
        # Blocks are numbered by stage. A convolution and its norm are one module.
        "mmaction2": OtherNames(
            blocks=r"layer\d\.\d+",
            block="features.{number}",
            layers=(
                {
                    "conv.0.conv": "conv.0.0",
                    "conv.0.bn": "conv.0.1",
                    "conv.1.conv": "conv.1",
                    "conv.1.bn": "conv.2",
                },
                {
                    "conv.0.conv": "conv.0.0",
                    "conv.0.bn": "conv.0.1",
                    "conv.1.conv": "conv.1.0",
                    "conv.1.bn": "conv.1.1",
                    "conv.2.conv": "conv.2",
                    "conv.2.bn": "conv.3",
                },
            ),
            outside={
                "conv1.conv": "features.0.0",
                "conv1.bn": "features.0.1",
                "conv2.conv": "features.{next}.0",
                "conv2.bn": "features.{next}.1",
            },
        ),
    },
)
ARCHITECTURES = (
    RESNET,
    Architecture("RegNet (torchvision)", r"trunk_output\.block([1-4])\.block\d-\d+", ("f.a.0",), ("fc",)),
    Architecture("RegNet (timm)", r"s([1-4])\.b\d+", ("conv1.conv",), ("head.fc",)),
    Architecture("ConvNeXt (torchvision)", r"features\.([1357])\.\d+", ("block.0",), ("classifier.2",)),
    Architecture("ConvNeXt (timm)", r"stages\.(\d+)\.blocks\.\d+", ("conv_dw",), ("head.fc",)),
    MOBILENET_V2,
    Architecture(
        "MobileNetV3 (torchvision)", r"features\.\d+", ("block.0.0",), ("classifier.3",), skips="use_res_connect"
    ),
    Architecture(
        "EfficientNet (torchvision)", r"features\.([1-9])\.\d+", ("block.0.0",), ("classifier.1",), "use_res_connect"
    ),
    Architecture("MNASNet (torchvision)", r"layers\.(\d+)\.\d+", ("layers.0",), ("classifier.1",), "apply_residual"),
    Architecture(
        "MobileNetV2, MobileNetV3, EfficientNet (timm)",
        r"blocks\.(\d+)\.\d+",
        ("conv_pw", "conv_exp"),
        ("classifier",),
        "has_skip",
    ),
    Architecture("ViT (timm)", r"blocks\.\d+", ("attn.qkv",), ("head",), tokens=True, base_class="VisionTransformer"),
)
# Modules that consist of several layers, by class name.
LAYER_GROUPS = {
    "mmcv.cnn.bricks.conv_module.ConvModule": LayerGroup(
        {"conv": None, "bn": "with_norm", "activate": "with_activation"},
        {"order": ("conv", "norm", "act"), "with_explicit_padding": False, "efficient_conv_bn_eval_forward": None},
    ),
}
# Last layers of networks that are not in the table.
_OTHER_HEADS = ("heads.head",)


def heads() -> list[str]:
    """Returns the possible names of the last layer of any network, the longest first."""
    names = {head for architecture in ARCHITECTURES for head in architecture.head} | set(_OTHER_HEADS)
    return sorted(names, key=lambda name: (-len(name), name))


def architecture_of_weights(names: Collection[str]) -> Architecture | None:
    """Returns the architecture with weights of these names, if TSM, TSAM or mmaction2 have it too."""
    for architecture in ARCHITECTURES:
        if architecture.checkpoint_weights is not None and architecture.first_layers(names):
            variant = architecture.variant_weights
            is_variant = variant is not None and any(re.fullmatch(variant, name) for name in names)
            return None if is_variant else architecture
    return None


def resnet_layers_of_tsm(names: Iterable[str]) -> set[str]:
    """Returns the layers of a ResNet before which TSM shifts, by the names of the weights."""
    layers = RESNET.first_layers(names)
    lengths = Counter(block.partition(".")[0] for block in layers)
    every = RESNET.every([lengths[f"layer{stage}"] for stage in range(1, 5)])
    return {layer for block, layer in layers.items() if int(block.rpartition(".")[2]) % every == 0}


def stages_of(net: nn.Module) -> tuple[Architecture, list[list[Block]]]:
    """Returns the architecture of ``net`` and the blocks of its stages.

    Raises:
        TypeError: ``net`` is not a module, or its architecture is not in the table.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    modules = dict(_unwrapped_modules(net))
    for architecture in ARCHITECTURES:
        stages = _stages(architecture, modules)
        if stages is not None and _is_instance(net, architecture, stages):
            return architecture, stages
    raise TypeError(
        "net must have a supported architecture: "
        + "; ".join(architecture.title for architecture in ARCHITECTURES)
        + f"; got {type(net).__name__}. For other networks, name the layers: tsm_jit.shift_before(net, "
        "{'name.of.conv': functools.partial(tsm_jit.TemporalShift, n_segment=8), ...})"
    )


def resnet_stages(net: nn.Module) -> list[list[Block]]:
    """Returns the four stages of a ResNet.

    Raises:
        TypeError: ``net`` is not a ResNet.
    """
    try:
        architecture, stages = stages_of(net)
    except TypeError:
        architecture, stages = None, []
    if architecture is not RESNET:
        raise TypeError(
            "net must be a ResNet with stages layer1 to layer4 of blocks with a convolution conv1, got "
            f"{type(net).__name__}{_first_other_block(net)}"
        )
    return stages


def _first_other_block(net: Any) -> str:
    """Returns the part of an error message that names the first block without a first convolution, if there is one."""
    modules = dict(_unwrapped_modules(net)) if isinstance(net, nn.Module) else {}
    for name in modules:
        places = [f"{name}.{first}" for first in RESNET.first]
        if re.fullmatch(RESNET.blocks, name) and not any(_is_layer(modules, place) for place in places):
            path, module = [modules[place] for place in (name, *places) if place in modules][-1]
            return f", whose {path} is a {class_name(type(module))}"
    return ""


def _is_instance(net: nn.Module, architecture: Architecture, stages: list[list[Block]]) -> bool:
    """Excludes other networks with the same names: HRNet has a ``layer1``, CaiT has blocks like those in a ViT."""
    if architecture.n_stages is not None and len(stages) != architecture.n_stages:
        return False
    if architecture.tokens and not hasattr(net, "num_prefix_tokens"):
        return False
    return architecture.base_class in (None, *(each.__name__ for each in type(net).__mro__))


def _unwrapped_modules(
    module: nn.Module, name: str = "", path: str = ""
) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """Yields every module that is not temporal: ``(name in the unconverted network, (current name, module))``."""
    if isinstance(module, ClipModule):
        child, inner = next(module.named_children())
        yield from _unwrapped_modules(inner, name, f"{path}.{child}".lstrip("."))
        return
    yield name, (path, module)
    for child, inner in module.named_children():
        yield from _unwrapped_modules(inner, f"{name}.{child}".lstrip("."), f"{path}.{child}".lstrip("."))


def _stages(architecture: Architecture, modules: dict[str, tuple[str, nn.Module]]) -> list[list[Block]] | None:
    stages: list[list[Block]] = []
    stage = None
    for name, (path, module) in modules.items():
        match = re.fullmatch(architecture.blocks, name)
        if not match or not hasattr(module, architecture.skips or "forward"):
            continue
        skips = architecture.skips is None or getattr(module, architecture.skips)
        candidates = [f"{name}.{first}" for first in architecture.first]
        first = next((each for each in candidates if _is_layer(modules, each)), None)
        if first is None and (architecture.skips is None or (skips and not modules.keys().isdisjoint(candidates))):
            return None  # another architecture
        if first is not None and architecture.skips is not None and not (skips and _expands(modules[first][1])):
            first = None
        # If the name does not contain the stage, a block without a skip branch starts a new one.
        previous, stage = stage, match[1] if match.re.groups else stage if skips else name
        if not stages or stage != previous:
            stages.append([])
        stages[-1].append(Block(path, None if first is None else modules[first][0]))
    return stages if any(block.first for stage in stages for block in stage) else None


def _is_layer(modules: dict[str, tuple[str, nn.Module]], name: str) -> bool:
    return name in modules and isinstance(modules[name][1], (nn.Conv2d, nn.Linear))


def _expands(convolution: nn.Module) -> bool:
    """Whether the first convolution of an inverted residual increases the number of channels."""
    return (
        isinstance(convolution, nn.Conv2d)
        and convolution.groups == 1
        and convolution.out_channels > convolution.in_channels
    )
