"""Checkpoints of TSM, TSAM, mmaction2 and torchvision for one another's networks: weights are renamed, never changed.

Every name is taken apart into what it is called in the network without temporal modules, and where those are. From
there it is put together again in the layout of the target.

Example::

    weights = tsm_jit.checkpoints.load("TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e50.pth")
    net = torchvision.models.resnet50(num_classes=400)
    tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
    converted = tsm_jit.checkpoints.convert(weights, target=net)
    net.load_state_dict(converted.state_dict)  # strict=False if converted.missing may be
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tsm_jit._checks import one_of
from tsm_jit.convert.architectures import HEADS, MOBILENET_V2, RESNET

Layout = Literal["torchvision", "video_model", "tsm", "mmaction2", "tsam"]


class _Names(NamedTuple):
    backbone: str  # the prefix of the backbone's names
    head: str | None  # the name of the last layer, if that is not the backbone's
    wrapper: str  # the name that a temporal module has for what it wraps


# torchvision is timm too, converted or not.
_LAYOUTS: dict[str, _Names] = {
    "torchvision": _Names("", None, "net"),
    "video_model": _Names("backbone.", "head", "net"),
    "tsm": _Names("base_model.", "new_fc", "net"),
    "mmaction2": _Names("backbone.", "cls_head.fc_cls", "net"),
    "tsam": _Names("nn_backbone.base_model.", "last_fc", "layer"),
}
_ANY_NETWORK = (
    "torchvision",
    "video_model",
)  # the other layouts are of torchvision's ResNets, TSM's of MobileNetV2 too
_HEADS = re.compile(rf"({'|'.join(map(re.escape, sorted(HEADS, key=len, reverse=True)))})\.weight")
_HEAD = "<head>"  # its plain name
_WRAPPERS = ("net", "layer")
_NON_LOCAL = re.compile(r"layer\d\.\d+")  # what a non-local block wraps as "block"


class Conversion(NamedTuple):
    """What :func:`convert` returns."""

    state_dict: dict[str, Tensor]  # the weights under their new names; the tensors are those that were given
    source: Layout  # the layout they came from
    unplaced: dict[str, str]  # each key of the source that has no place in the target, and why
    missing: list[str]  # each key of the target, if that is a network, that has no source


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in the file ``path``, on the CPU: what was saved, or its entry ``"state_dict"``. Runs no code.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds no state dict, or more than
            ``torch.load(weights_only=True)`` reads.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"path must be a file that torch.load(weights_only=True) reads, got {os.fspath(path)!r}: {error}"
        ) from error
    if isinstance(saved, Mapping) and isinstance(saved.get("state_dict"), Mapping):
        saved = saved["state_dict"]
    try:
        return dict(_checked(saved))
    except TypeError as error:
        raise ValueError(f"path must be a file with a state dict, got {os.fspath(path)!r}: {error}") from error


def convert(
    state_dict: Mapping[str, Tensor], source: Layout | None = None, *, target: nn.Module | Layout
) -> Conversion:
    """Renames the weights of one layout for another.

    ==============  =======================================================================================
    layout          such as
    ==============  =======================================================================================
    torchvision     ``layer1.0.conv1.weight``, ``layer1.0.conv1.net.weight``, ``fc.weight`` (timm's too)
    video_model     ``backbone.layer1.0.conv1.net.weight``, ``head.weight``: :class:`tsm_jit.VideoModel`
    tsm             ``module.base_model.layer1.0.conv1.net.weight``, ``module.new_fc.weight``
    mmaction2       ``backbone.layer1.0.conv1.conv.net.weight``, ``cls_head.fc_cls.weight``
    tsam            ``nn_backbone.base_model.layer1.0.conv1.layer.weight``, ``last_fc.weight``
    ==============  =======================================================================================

    ``module.`` before any of them is dropped. Shifts before whole blocks, temporal pools (``layer2.net``) and TSM's
    non-local blocks are known, and TSM's MobileNetV2 is for torchvision's. The last layer goes to the last layer.

    Args:
        state_dict: names to tensors.
        source: its layout; without, it is told by the names.
        target: the network that is to be loaded: its names and shapes decide; or a layout. Shifts then are where they
            are in the source, and if it has none, where TSM places them (``blockres``) in a ResNet.

    Raises:
        TypeError, ValueError: ``state_dict`` does not map names to tensors, or is empty; ``source`` or ``target`` is no
            layout; a layout as ``target`` where it takes a network: ``"tsam"`` for weights without shifts, whose places
            TSAM chooses for each network, and of those above only the first two for what is no ResNet of torchvision.
    """
    state_dict = _checked(state_dict)
    if source is None:
        source = _layout_of(state_dict)
    one_of("source", source, tuple(_LAYOUTS))
    names = _Plain(state_dict, source)
    unplaced: dict[str, str] = {}
    if isinstance(target, nn.Module):
        there = target.state_dict()
        places = {plain: key for key, plain in _Plain(there, _layout_of(there)).of.items()}
    else:
        one_of("target", target, tuple(_LAYOUTS))
        places = _written(names, source, target)
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        place = places.get(names.of[key])
        if place is None:
            unplaced[key] = "the target has nothing like it"
        elif place in result:
            unplaced[key] = f"another key has become {place}"
        elif isinstance(target, nn.Module) and there[place].shape != tensor.shape:
            unplaced[key] = f"it is {list(tensor.shape)}, {place} is {list(there[place].shape)}"
        else:
            result[place] = tensor
    missing = [key for key in there if key not in result] if isinstance(target, nn.Module) else []
    return Conversion(result, source, unplaced, missing)


def _checked(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must map names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"state_dict must map names to tensors, got {type(value).__name__} for {key!r:.80}")
    if not state_dict:
        raise ValueError("state_dict must hold weights, got none")
    return state_dict


def _layout_of(keys: Iterable[str]) -> Layout:
    keys = [key.removeprefix("module.") for key in keys]
    for layout in ("tsam", "tsm"):
        if any(key.startswith(_LAYOUTS[layout].backbone) for key in keys):
            return layout
    if any(key.startswith("backbone.") for key in keys):
        # A convolution and its batch normalisation are one module in mmaction2.
        theirs = re.compile(r"backbone\.(layer\d\.\d+\.)?conv1\.conv\.|cls_head\.")
        return "mmaction2" if any(theirs.match(key) for key in keys) else "video_model"
    return "torchvision"


class _Plain:
    """``of`` has each name of a state dict as it is without temporal modules, ``wrapped`` the plain names of what they
    wrap, ``non_local`` those of the blocks before a non-local block. ``head`` is the last layer of the backbone, if
    that is the head."""

    def __init__(self, state_dict: Mapping[str, Tensor], layout: Layout):
        names = _LAYOUTS[layout]
        self.of: dict[str, str] = {}
        self.wrapped: set[str] = set()
        self.non_local: set[str] = set()
        for key in state_dict:
            name = key.removeprefix("module.")
            above, _, last = name.rpartition(".")
            if names.head is not None and above.removeprefix("nn_backbone.") == names.head:
                self.of[key] = f"{_HEAD}.{last}"
                continue
            name = name.removeprefix(names.backbone)
            if layout == "mmaction2":
                name = re.sub(r"\b(conv\d)\.conv\.", r"\1.", name)
                name = re.sub(r"\bconv(\d)\.bn\.", r"bn\1.", name)
                name = name.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")
            self.of[key] = self._unwrapped(name)
        if layout == "tsm":
            self._nest_mobilenet()
        self.head: str | None = None
        if f"{_HEAD}.weight" not in self.of.values():
            matrices = [plain for key, plain in self.of.items() if state_dict[key].dim() == 2]
            heads = [match[1] for plain in matrices if (match := _HEADS.fullmatch(plain))]
            if heads:
                self.head = heads[-1]
                ends = {f"{self.head}.{last}": f"{_HEAD}.{last}" for last in ("weight", "bias")}
                self.of = {key: ends.get(plain, plain) for key, plain in self.of.items()}

    def _unwrapped(self, name: str) -> str:
        plain: list[str] = []
        for part in name.split("."):
            so_far = ".".join(plain)
            if part in _WRAPPERS and plain:
                self.wrapped.add(so_far)
            elif part == "block" and _NON_LOCAL.fullmatch(so_far):
                self.non_local.add(so_far)
            else:
                plain.append(part)
        return ".".join(plain)

    def _nest_mobilenet(self) -> None:
        """TSM's MobileNetV2 has the layers of a block in one list, torchvision's a list for each convolution."""
        three = {match[1] for name in self.of.values() if (match := re.match(r"(features\.\d+\.conv)\.7\.", name))}

        def nested(name: str) -> str:
            match = re.match(r"(features\.\d+\.conv)\.(\d)(.*)", name)
            if match is None:
                return name
            layers = _FLAT_THREE if match[1] in three else _FLAT_TWO
            return f"{match[1]}.{layers.get(match[2], match[2])}{match[3]}"

        self.of = {key: nested(name) for key, name in self.of.items()}
        self.wrapped = {nested(name) for name in self.wrapped}


_FLAT_TWO = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
_FLAT_THREE = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}


def _written(names: _Plain, source: Layout, target: Layout) -> dict[str, str]:
    """The plain names that ``target`` has, each with its name there."""
    plain, wrapped = set(names.of.values()), names.wrapped
    is_resnet = "layer1.0.conv1.weight" in plain and not any("downsample.2." in name for name in plain)
    if target not in _ANY_NETWORK:
        if not is_resnet:
            raise ValueError(f"target must be a network for what is no ResNet of torchvision, got {target!r}")
        if target == "tsam" and not wrapped:
            raise ValueError("target must be a network for weights without shifts, got 'tsam', which chooses")
        wrapped = wrapped or _places_of_tsm(plain)
    if source not in _ANY_NETWORK or target not in _ANY_NETWORK:
        known = (RESNET if is_resnet else MOBILENET_V2).checkpoint_names
        plain = {name for name in plain if re.fullmatch(known, name) or name.startswith(_HEAD)}
    if target == "mmaction2":  # it calls what is in a non-local block otherwise
        plain = {name for name in plain if ".nl." not in name}
    head = _LAYOUTS[target].head
    if target in _ANY_NETWORK and names.head is not None:
        head = _LAYOUTS[target].backbone + names.head
    elif target == "torchvision":
        head = "fc" if is_resnet else "classifier.1" if source == "tsm" else None
    written = {}
    for name in plain:
        if not name.startswith(_HEAD):
            written[name] = _written_name(name, target, wrapped, names.non_local)
        elif head is not None:
            written[name] = name.replace(_HEAD, head)
    return written


def _places_of_tsm(plain: Iterable[str]) -> set[str]:
    """The ``conv1`` of a ResNet's blocks that TSM shifts."""
    blocks = {(match[1], int(match[2])) for name in plain if (match := re.match(r"layer([1-4])\.(\d+)\.conv1\.", name))}
    every = RESNET.every([sum(stage == str(number) for stage, _ in blocks) for number in range(1, 5)])
    return {f"layer{stage}.{i}.conv1" for stage, i in blocks if i % every == 0}


def _written_name(name: str, layout: Layout, wrapped: set[str], non_local: set[str]) -> str:
    names = _LAYOUTS[layout]
    parts = name.split(".")
    written: list[str] = []
    for i, part in enumerate(parts):
        so_far = ".".join(parts[: i + 1])
        if layout == "mmaction2":
            if re.fullmatch(r"conv\d", part):
                part = f"{part}.conv"
            elif re.fullmatch(r"bn\d", part):
                part = f"conv{part[2:]}.bn"
            elif i and parts[i - 1] == "downsample":
                part = {"0": "conv", "1": "bn"}.get(part, part)
        written.append(part)
        if so_far in wrapped:
            written.append(names.wrapper)
        if so_far in non_local and parts[i + 1] != "nl":
            written.append("block")
    return names.backbone + ".".join(written)
