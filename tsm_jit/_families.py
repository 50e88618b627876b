"""Where the residual blocks of known networks are, and the first convolution of each: found by names.

A new family is a line in the table. Networks of torchvision and timm are known without importing these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from tsm_jit._networks import ClipModule


class Block(NamedTuple):
    name: str  # of the block in the network, "layer1.0"
    first: str | None  # of what its residual branch begins with, "layer1.0.conv1"; None if it is no place for a shift


class Family(NamedTuple):
    title: str
    blocks: str  # the names of all blocks, as a regular expression; its first group, if any, tells the stage
    first: tuple[str, ...]  # where in a block its first convolution may be
    skips: str | None = None  # inverted residuals: the attribute of a block that tells whether it is one


_INVERTED = ("conv_pw", "conv_exp")
FAMILIES = (
    Family("ResNet, ResNeXt, Wide-ResNet, ResNet-D (torchvision, timm)", r"layer([1-4])\.\d+", ("conv1",)),
    Family("RegNet (torchvision)", r"trunk_output\.block([1-4])\.block\d-\d+", ("f.a.0",)),
    Family("RegNet (timm)", r"s([1-4])\.b\d+", ("conv1.conv",)),
    Family("ConvNeXt (torchvision)", r"features\.([1357])\.\d+", ("block.0",)),
    Family("ConvNeXt (timm)", r"stages\.(\d+)\.blocks\.\d+", ("conv_dw",)),
    Family("MobileNetV2 (torchvision)", r"features\.\d+", ("conv.0.0", "conv.0"), skips="use_res_connect"),
    Family("MobileNetV3 (torchvision)", r"features\.\d+", ("block.0.0",), skips="use_res_connect"),
    Family("EfficientNet (torchvision)", r"features\.([1-9])\.\d+", ("block.0.0",), skips="use_res_connect"),
    Family("MobileNetV2, MobileNetV3, EfficientNet (timm)", r"blocks\.(\d+)\.\d+", _INVERTED, skips="has_skip"),
    Family("ViT (timm)", r"blocks\.\d+", ("attn.qkv",)),
)
RESNET, VIT = FAMILIES[0], FAMILIES[-1]


def stages_of(net: nn.Module) -> tuple[Family, list[list[Block]]]:
    """The family of ``net`` and the blocks of its stages. Raises TypeError for what is no module or of no family."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    modules = dict(_unwrapped_modules(net))
    for family in FAMILIES:
        stages = _stages(family, modules)
        if stages is not None and _is_whole(net, family, stages):
            return family, stages
    raise TypeError(
        "net must be of a family whose blocks are known: "
        + "; ".join(family.title for family in FAMILIES)
        + f"; got {type(net).__name__}. Any other network: tsm_jit.shift_before(net, {{'name.of.conv': "
        "functools.partial(tsm_jit.TemporalShift, n_segment=8), ...})"
    )


def _is_whole(net: nn.Module, family: Family, stages: list[list[Block]]) -> bool:
    """Others have a part of its names: HRNet a ``layer1``, CaiT the blocks of a ViT, with no class token in them."""
    if family is VIT:
        names = [each.__name__ for each in type(net).__mro__]
        return "VisionTransformer" in names and hasattr(net, "num_prefix_tokens")
    return family is not RESNET or len(stages) == 4


def resnet_stages(net: nn.Module) -> list[list[Block]]:
    """The four stages of a ResNet. Raises TypeError for any other network."""
    try:
        family, stages = stages_of(net)
    except TypeError:
        family, stages = None, []
    if family is not RESNET:
        kind = type(net).__name__
        raise TypeError(f"net must be a ResNet with stages layer1 to layer4 of blocks with a conv1, got {kind}")
    return stages


def _unwrapped_modules(
    module: nn.Module, name: str = "", path: str = ""
) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """Every module that is no wrapper, by its name without wrappers: ``(that name, (its name now, it))``."""
    if isinstance(module, ClipModule):
        child, inner = next(module.named_children())
        yield from _unwrapped_modules(inner, name, f"{path}.{child}".lstrip("."))
        return
    yield name, (path, module)
    for child, inner in module.named_children():
        yield from _unwrapped_modules(inner, f"{name}.{child}".lstrip("."), f"{path}.{child}".lstrip("."))


def _stages(family: Family, modules: dict[str, tuple[str, nn.Module]]) -> list[list[Block]] | None:
    stages: list[list[Block]] = []
    number = None
    for name, (path, module) in modules.items():
        match = re.fullmatch(family.blocks, name)
        if not match or not hasattr(module, family.skips or "forward"):
            continue
        skips = family.skips is None or getattr(module, family.skips)
        candidates = [f"{name}.{first}" for first in family.first]
        first = next((each for each in candidates if _is_layer(modules, each)), None)
        if first is None and (family.skips is None or (skips and not modules.keys().isdisjoint(candidates))):
            return None  # a block of another kind
        if first is not None and family.skips is not None and not (skips and _expands(modules[first][1])):
            first = None
        # Where names do not tell, a stage begins with a block that does not skip.
        before, number = number, match[1] if match.re.groups else number if skips else name
        if not stages or number != before:
            stages.append([])
        stages[-1].append(Block(path, None if first is None else modules[first][0]))
    return stages if any(block.first for stage in stages for block in stage) else None


def _is_layer(modules: dict[str, tuple[str, nn.Module]], name: str) -> bool:
    return name in modules and isinstance(modules[name][1], (nn.Conv2d, nn.Linear))


def _expands(convolution: nn.Conv2d) -> bool:
    return convolution.groups == 1 and convolution.out_channels > convolution.in_channels
