"""Splits keys of checkpoints and puts them together for another network: see :mod:`tsm_jit.checkpoints`."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tsm_jit._checks import one_of
from tsm_jit.convert.architectures import ARCHITECTURES, HEADS, MOBILENET_V2, RESNET

Layout = Literal["torchvision", "video_model", "tsm", "mmaction2", "tsam"]


class _Style(NamedTuple):
    backbone: str  # the prefix of the backbone's names
    head: str | None  # the name of the last layer, if it is outside the backbone
    wrapper: str  # the name that a temporal module gives the module it contains


# timm's names have the torchvision layout.
_LAYOUTS: dict[Layout, _Style] = {
    "torchvision": _Style("", None, "net"),
    "video_model": _Style("backbone.", "head", "net"),
    "tsm": _Style("base_model.", "new_fc", "net"),
    "mmaction2": _Style("backbone.", "cls_head.fc_cls", "net"),
    "tsam": _Style("nn_backbone.base_model.", "last_fc", "layer"),
}
# Any network can have these layouts. The others exist for torchvision's ResNets, tsm and mmaction2 for MobileNetV2 too.
_ANY_NETWORK = ("torchvision", "video_model")

_HEAD = "<head>"  # the plain name of the last layer
_HEAD_NAMES = (
    *(style.head for style in _LAYOUTS.values() if style.head),
    *sorted(HEADS, key=len, reverse=True),
)
_BACKBONE_HEAD = re.compile(rf"({'|'.join(map(re.escape, sorted(HEADS, key=len, reverse=True)))})\.weight")

# PyTorch and Lightning insert these at any depth: torch.compile, FSDP, activation checkpointing, strategies.
_WRAPPER_PARTS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
# These may also be real submodules, so they stay part of the raw name. "module": DDP; the others: temporal modules.
_TEMPORAL_PARTS = ("net", "layer")
_OPTIONAL_PARTS = ("module", *_TEMPORAL_PARTS)
# Used only if the architecture is unknown and no network is given as the target.
_BACKBONE_WORDS = frozenset(part for style in _LAYOUTS.values() for part in style.backbone.split(".") if part)
_TRAINER_WORDS = frozenset(("model", "net", "network", "ema", "ema_model"))
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged|momentum|teacher)(?:[._]|$)")

_NON_LOCAL = re.compile(r"(?:.*\.)?layer\d\.\d+")  # a block inside TSM's non-local wrapper, which calls it "block"
_CONV_MODULE = re.compile(r"(?:^|\.)layer\d\.(?:net\.)?\d+\.(?:net\.|block\.)?conv1\.conv\.")

# The keys of a file that hold its weights, in this order. Averaged (EMA) weights come last.
_WEIGHT_KEYS = (
    "state_dict",
    "model",
    "model_state",
    "model_state_dict",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "params_ema",
)


@dataclass(frozen=True)
class Conversion:
    """The result of :func:`convert`.

    Attributes:
        state_dict: the weights under their new names. The tensors are not copied.
        source: the layout of the source.
        unplaced: maps each key of the source that has no place in the target to the reason.
        missing: the keys of the target that got no weight, if the target is a network.

    Example::

        weights = torchvision.models.resnet18().state_dict()
        converted = tsm_jit.checkpoints.convert(weights, target="tsm")
        assert converted.source == "torchvision"
        assert "base_model.layer1.0.conv1.net.weight" in converted.state_dict
        assert not converted.unplaced and not converted.missing
    """

    state_dict: dict[str, Tensor]
    source: Layout
    unplaced: dict[str, str]
    missing: list[str]


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the state dict in the file ``path`` to the CPU, without running code from the file.

    A state dict may be the whole file or one of its entries. Entries are tried in this order: ``state_dict``,
    ``model``, ``model_state``, ``model_state_dict``, ``net``, ``network``, ``module``, ``weights``, ``params``, then
    averaged weights: ``ema``, ``state_dict_ema``, ``model_ema``, ``ema_state_dict``, ``ema_model``, ``params_ema``.
    An entry may itself be such a mapping, as in ``{"model": {"state_dict": ...}}``.

    Without these keys, a single state dict under any key is taken. Several are joined as ``key.name``: TSAM saves one
    for each part of the network.

    Args:
        path: a file of ``torch.save``, or of safetensors if it ends in ``.safetensors``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has no state dict, or ``torch.load(weights_only=True)`` cannot read it.
        ImportError: it is a safetensors file, and the package safetensors is not installed.

    Example::

        weights = torchvision.models.resnet18().state_dict()
        torch.save({"epoch": 3, "model": {"state_dict": weights}}, "checkpoint.pth")
        assert tsm_jit.checkpoints.load("checkpoint.pth").keys() == weights.keys()
    """
    name = os.fspath(path)
    saved = _read_safetensors(name) if name.endswith(".safetensors") else _read_torch(name)
    weights = _find_weights(saved)
    if weights is not None:
        return weights
    try:
        _check_state_dict(_likely_weights(saved))
    except (TypeError, ValueError) as error:
        raise ValueError(f"path must be a file with a state dict, got {name!r}: {error}") from error
    raise ValueError(f"path must be a file with a state dict, got {name!r}")


def convert(
    state_dict: Mapping[str, Tensor], source: Layout | None = None, *, target: nn.Module | Layout
) -> Conversion:
    """Renames the weights of one layout for another.

    ==============  =======================================================================================
    layout          example names
    ==============  =======================================================================================
    torchvision     ``layer1.0.conv1.weight``, ``layer1.0.conv1.net.weight``, ``fc.weight`` (also timm)
    video_model     ``backbone.layer1.0.conv1.net.weight``, ``head.weight``: :class:`tsm_jit.VideoModel`
    tsm             ``base_model.layer1.0.conv1.net.weight``, ``new_fc.weight``;
                    MobileNetV2 with one list of layers per block: ``features.1.conv.7.weight``
    mmaction2       ``backbone.layer1.0.conv1.conv.net.weight``, ``cls_head.fc_cls.weight``
    tsam            ``nn_backbone.base_model.layer1.0.conv1.layer.weight``, ``last_fc.weight``
    ==============  =======================================================================================

    Prefixes are removed from the source and added for the target. The prefix is the one under which most names match
    the target, or a known architecture if the target is a layout. So the prefixes of DDP, ``torch.compile``,
    Lightning, EMA copies and unknown trainers need no option. Of two copies that match equally well, one without an
    averaging word (``ema``, ``swa``, ``avg``, ``teacher``, ``momentum``) is taken, then the first one. Only known
    prefixes are removed if the target is a layout and the architecture is unknown.

    Shifts before whole blocks, temporal pools and TSM's non-local blocks are supported. The last layer may
    have different names in source and target.

    Args:
        state_dict: names to tensors.
        source: the layout of ``state_dict``; by default it is detected from the names.
        target: a network, whose names and shapes decide, or a layout. For a layout, shifts stay where the source has
            them. A ResNet without shifts gets TSM's shifts (``blockres``).

    Raises:
        TypeError: ``state_dict`` does not map names to tensors.
        ValueError: ``state_dict`` is empty; ``source`` or ``target`` is no layout; ``target`` must be a network but is
            a layout: ``"tsam"`` for weights without shifts; ``"tsm"``, ``"mmaction2"`` or ``"tsam"`` for a network that
            is no ResNet of torchvision.
        ValueError: too few weights match. A network as ``target`` must get at least half of its parameters. Buffers
            and the last layer do not count. A layout as ``target`` must get at least one weight.

    Example::

        net = torchvision.models.resnet18(num_classes=5)
        tsm_jit.make_temporal_shift(net, n_segment=8)
        weights = torchvision.models.resnet18().state_dict()
        converted = tsm_jit.checkpoints.convert({f"model.{key}": weights[key] for key in weights}, target=net)
        net.load_state_dict(converted.state_dict, strict=False)
        assert converted.missing == ["fc.weight", "fc.bias"]
        assert converted.unplaced["model.fc.weight"] == "shape [1000, 512], but fc.weight has shape [5, 512]"
    """
    _check_state_dict(state_dict)
    if source is not None:
        one_of("source", source, tuple(_LAYOUTS))
    if isinstance(target, nn.Module):
        return _convert_for_network(state_dict, source, target)
    one_of("target", target, tuple(_LAYOUTS))
    names = _split_names(state_dict, source)
    weights = _parse(names, _own_prefix(names), state_dict, source)
    keys = _keys_in_layout(weights, target)
    result, unplaced = _place(state_dict, keys, {}, weights)
    if not result:
        raise ValueError(
            f"state_dict must hold weights for target={target!r}, but none match: {_first(unplaced)} (source layout: "
            f"{weights.layout!r})"
        )
    return Conversion(_with_versions(result, _renamed_versions(state_dict, keys)), weights.layout, unplaced, [])


def _check_state_dict(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must map names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"state_dict must map names to tensors, got {type(value).__name__} for {key!r:.80}")
    if not state_dict:
        raise ValueError("state_dict must hold weights, got none")


# ---- Files


def _read_torch(path: str) -> Any:
    try:
        with _allow_namespace():
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a damaged file, any
        raise ValueError(
            f"path must be a file that torch.load(weights_only=True) reads, got {path!r}: {_load_problem(path, error)}"
        ) from error


def _allow_namespace() -> AbstractContextManager[Any]:
    """Allows ``argparse.Namespace``, in which timm saves its options; it holds values and runs no code."""
    if argparse.Namespace in torch.serialization.get_safe_globals():
        return nullcontext()  # the context manager would remove what the caller has allowed
    return torch.serialization.safe_globals([argparse.Namespace])


def _load_problem(path: str, error: Exception) -> str:
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip file, or a damaged one
        classes = []
    classes = [each for each in classes if each != "argparse.Namespace"]
    if not classes:
        return str(error).partition("\n")[0]
    return (
        f"it contains {', '.join(classes)}, which could run code. If you trust the file, open it with "
        "torch.load(path, weights_only=False) and pass its state dict to convert. Or call load inside "
        "torch.serialization.safe_globals([...]) with these classes."
    )


def _read_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"path {path!r} is a safetensors file: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"path must be a file that safetensors reads, got {path!r}: {error}") from error


def _find_weights(saved: Any, depth: int = 2) -> dict[str, Tensor] | None:
    """The state dict in a file, at most ``depth`` keys deep; None if there is none."""
    if _is_state_dict(saved):
        return _with_versions(saved, getattr(saved, "_metadata", None))
    if not isinstance(saved, Mapping) or not depth:
        return None
    for key in _WEIGHT_KEYS:
        weights = _find_weights(saved.get(key), depth - 1)
        if weights is not None:
            return weights
    if any(isinstance(value, Tensor) and value.dim() for value in saved.values()):
        return None  # a state dict with entries that are no tensors; parts of it would not be the whole
    parts = {key: value for key, value in saved.items() if _is_state_dict(value)}
    if len(parts) == 1:
        return _find_weights(next(iter(parts.values())))
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()} or None


def _likely_weights(saved: Any) -> Any:
    """The entry that should have been a state dict, for the error message."""
    if not isinstance(saved, Mapping):
        return saved
    return next((saved[key] for key in _WEIGHT_KEYS if isinstance(saved.get(key), Mapping)), saved)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _with_versions(weights: Mapping[str, Tensor], versions: dict[str, Any] | None) -> dict[str, Tensor]:
    """A copy with the versions of the modules, which ``load_state_dict`` of some modules reads."""
    copy = OrderedDict(weights)
    if versions is not None:
        copy._metadata = versions  # type: ignore[attr-defined]
    return copy


# ---- Names


@dataclass
class _Names:
    """The names of one state dict, split into parts, in torchvision's spelling."""

    parts: dict[str, list[tuple[str, bool]]]  # of each key: the part, and whether the plain name leaves it out
    full: dict[str, str]  # of each key: the plain name, with the prefix
    has_conv_modules: bool  # mmaction2 puts a convolution and its norm into one module
    is_flat: bool  # MobileNetV2 with one list of layers per block


@dataclass
class _Weights:
    """The names of one state dict relative to the prefix of its backbone."""

    names: _Names
    layout: Layout
    prefix: str  # in plain names
    plain: dict[str, str]  # of each key below the prefix, and of the last layer
    raw: dict[str, str]  # of each key below the prefix: the name with temporal modules
    head: str | None  # the name of the last layer, if it is inside the backbone


def _split_names(keys: Iterable[str], source: Layout | None) -> _Names:
    visible = {key: _without_wrapper_parts(key) for key in keys}
    has_conv_modules = False
    if source in (None, "mmaction2"):
        visible, has_conv_modules = _from_mmaction2_mobilenet(visible)
        if any(map(_CONV_MODULE.search, visible.values())):
            visible, has_conv_modules = {key: _without_conv_modules(name) for key, name in visible.items()}, True
    visible, is_flat = _nested_mobilenet(visible)
    parts = {key: _split(name) for key, name in visible.items()}
    _keep_real_submodules(parts)
    return _Names(parts, {key: _join(each) for key, each in parts.items()}, has_conv_modules, is_flat)


def _without_wrapper_parts(key: str) -> str:
    *above, last = key.split(".")
    above = [part for part in above if part not in _WRAPPER_PARTS]
    while above and above[0] == "module":
        above = above[1:]
    return ".".join([*above, last])


def _split(name: str) -> list[tuple[str, bool]]:
    """The parts of a name; those that contain a temporal module, or DDP's ``module``, are marked as left out."""
    parts: list[tuple[str, bool]] = []
    *above, last = name.split(".")
    for part in above:
        optional = bool(parts) and part in _OPTIONAL_PARTS
        if part == "block":
            optional = _NON_LOCAL.fullmatch(_join(parts)) is not None
        parts.append((part, optional))
    return [*parts, (last, False)]


def _keep_real_submodules(parts: dict[str, list[tuple[str, bool]]]) -> None:
    """Keeps parts such as ``net`` if names would be equal without them: ``a.net.weight`` and ``a.weight``."""
    while True:
        same: dict[str, dict[tuple[str, ...], list[str]]] = {}
        for key, each in parts.items():
            same.setdefault(_join(each), {}).setdefault(tuple(part for part, _ in each), []).append(key)
        keys = [key for raw in same.values() if len(raw) > 1 for each in raw.values() for key in each]
        keys = [key for key in keys if any(left_out for _, left_out in parts[key])]
        if not keys:
            return
        for key in keys:
            first = next(i for i, (_, left_out) in enumerate(parts[key]) if left_out)
            parts[key][first] = (parts[key][first][0], False)


def _join(parts: Iterable[tuple[str, bool]]) -> str:
    return ".".join(part for part, left_out in parts if not left_out)


def _without_conv_modules(name: str) -> str:
    """The name of a ResNet's layer in mmaction2, whose convolutions and norms are pairs, in torchvision's spelling."""
    name = re.sub(r"\b(conv\d)\.conv\.", r"\1.", name)
    name = re.sub(r"\bconv(\d)\.bn\.", r"bn\1.", name)
    return name.replace("downsample.conv.", "downsample.0.").replace("downsample.bn.", "downsample.1.")


_FLAT_BLOCK = re.compile(r"((?:.*\.)?features\.\d+(?:\.net)?\.conv)\.(\d)(\..*)")
_FLAT_TWO = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
_FLAT_THREE = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}


def _nested_mobilenet(names: dict[str, str]) -> tuple[dict[str, str], bool]:
    """Renames a MobileNetV2 with one list of layers per block to torchvision's list per convolution.

    In such a block, layer 0 is a convolution: ``conv.0.weight``. In torchvision's it is a list: ``conv.0.0.weight``.
    """
    layers: dict[str, set[str]] = {}
    flat: set[str] = set()
    matches = {key: match for key, name in names.items() if (match := _FLAT_BLOCK.fullmatch(name))}
    for match in matches.values():
        layers.setdefault(match[1], set()).add(match[2])
        if match[2] == "0" and match[3] in (".weight", ".net.weight", ".layer.weight"):
            flat.add(match[1])
    renamed = dict(names)
    for key, match in matches.items():
        if match[1] in flat:
            index = _FLAT_THREE if "7" in layers[match[1]] else _FLAT_TWO
            renamed[key] = f"{match[1]}.{index.get(match[2], match[2])}{match[3]}"
    return renamed, bool(flat)


_MMACTION2_BLOCK = re.compile(r"((?:.*\.)?)(layer(\d)\.(\d+))\.conv\.(\d)\.(net\.)?(conv|bn)\.(.*)")


def _from_mmaction2_mobilenet(names: dict[str, str]) -> tuple[dict[str, str], bool]:
    """Renames mmaction2's MobileNetV2, which numbers blocks by stage, to torchvision's, which numbers them in a row."""
    matches = {key: match for key, name in names.items() if (match := _MMACTION2_BLOCK.fullmatch(name))}
    blocks: dict[str, set[tuple[int, int, str]]] = {}
    last: Counter[str] = Counter()  # of each block: the index of its last convolution
    for match in matches.values():
        blocks.setdefault(match[1], set()).add((int(match[3]), int(match[4]), match[2]))
        last[match[1] + match[2]] = max(last[match[1] + match[2]], int(match[5]))
    starts: dict[str, str] = {}
    for above, each in blocks.items():
        for i, (_, _, block) in enumerate(sorted(each), 1):
            starts[above + block] = f"{above}features.{i}"
        for pair, i in (("conv1", 0), ("conv2", len(each) + 1)):
            starts |= {f"{above}{pair}.{part}": f"{above}features.{i}.{j}" for j, part in enumerate(("conv", "bn"))}
    renamed = dict(names)
    for key, name in names.items():
        if match := matches.get(key):
            block = match[1] + match[2]
            renamed[key] = f"{starts[block]}.conv.{_mobilenet_layer(match, last[block])}{match[8]}"
        else:
            start, _, weight = name.rpartition(".")
            renamed[key] = f"{starts.get(start, start)}.{weight}".lstrip(".")
    return renamed, bool(matches)


def _mobilenet_layer(match: re.Match[str], last: int) -> str:
    """What torchvision calls a layer that ``_MMACTION2_BLOCK`` matches."""
    index, is_norm = int(match[5]), match[7] == "bn"
    if index == last:  # this convolution and its norm are in no list
        return f"{index + is_norm}."
    # The shift is around the convolution, in mmaction2 around convolution and norm.
    return f"{index}.1." if is_norm else f"{index}.0.{match[6] or ''}"


# ---- Prefixes


def _own_prefix(names: _Names) -> str:
    """The prefix of the network of a known architecture with most names; else known words, such as ``backbone.``"""
    full = names.full.values()
    votes: Counter[str] = Counter()
    for pattern in _BLOCKS:
        votes |= _names_in_blocks(full, pattern)
    siblings = Counter(_INDEX.sub("#", prefix) for prefix in votes)
    largest = max(votes.values(), default=0)
    networks = {
        prefix: count
        for prefix, count in votes.items()
        # "layers.2." is a stage of a larger network if there is "layers.1.".
        if siblings[_INDEX.sub("#", prefix)] == 1 and 2 * count >= max(largest, sum(map(_starts(prefix), full)))
    }
    plain = {prefix: count for prefix, count in networks.items() if not _AVERAGED.search(prefix)}
    return _most_votes(plain or networks) or _word_prefix(full)


def _names_in_blocks(names: Iterable[str], pattern: re.Pattern[str]) -> Counter[str]:
    """How many names below each prefix are in blocks, if there are several blocks."""
    blocks: dict[str, Counter[str]] = {}
    for name in names:
        for prefix, rest in _prefixes(name):
            if match := pattern.match(rest):
                blocks.setdefault(prefix, Counter())[match[0]] += 1
    return Counter({prefix: each.total() for prefix, each in blocks.items() if len(each) > 1})


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix)


_BLOCKS = tuple(re.compile(rf"(?:{each.blocks})\.") for each in ARCHITECTURES)
_INDEX = re.compile(r"(?<![^.])\d+(?=\.)")


def _prefixes(name: str) -> Iterator[tuple[str, str]]:
    """Each way to cut a name into a prefix and the rest, the shortest prefix first."""
    start = 0
    while True:
        yield name[:start], name[start:]
        start = name.find(".", start) + 1
        if not start:
            return


def _most_votes(votes: Mapping[str, int]) -> str:
    """The prefix with most votes; of equal ones the first that is not of averaged weights."""
    return max(votes, key=lambda prefix: (votes[prefix], not _AVERAGED.search(prefix)), default="")


def _word_prefix(names: Iterable[str]) -> str:
    """Known words at the start: of all names, or of most names if it is the backbone of a layout."""
    names, prefix = [name for name in names if "." in name], ""
    while names:
        word, count = Counter(name.partition(".")[0] for name in names).most_common(1)[0]
        is_backbone = word in _BACKBONE_WORDS and 2 * count > len(names)
        if not is_backbone and not (word in _TRAINER_WORDS and count == len(names)):
            break
        prefix += f"{word}."
        names = [name.removeprefix(f"{word}.") for name in names if name.startswith(f"{word}.")]
        names = [name for name in names if "." in name]
    return prefix


def _matching_prefixes(
    source: _Names, state_dict: Mapping[str, Tensor], target: _Names, there: Mapping[str, Tensor]
) -> tuple[str, str]:
    """The prefixes of source and target below which most names agree; equal shapes count twice."""
    own = _own_prefix(target)
    best = (0, _own_prefix(source), own)
    for prefix in dict.fromkeys((own, *_common_prefixes(target.full.values()))):
        shapes = {
            name.removeprefix(prefix): there[key].shape for key, name in target.full.items() if name.startswith(prefix)
        }
        votes: Counter[str] = Counter()
        for key, name in source.full.items():
            for above, rest in _prefixes(name):
                if rest in shapes:
                    votes[above] += 1 + (shapes[rest] == state_dict[key].shape)
        found = _most_votes(votes)
        if votes[found] > best[0]:
            best = (votes[found], found, prefix)
        if best[0] >= len(shapes):
            break
    return best[1], best[2]


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of more than half of the names, the shortest first."""
    names = list(names)
    counts = Counter(prefix for name in names for prefix, _ in _prefixes(name))
    return sorted((prefix for prefix, count in counts.items() if 2 * count > len(names)), key=len)


# ---- Layouts


def _parse(names: _Names, prefix: str, tensors: Mapping[str, Tensor], source: Layout | None) -> _Weights:
    layout = source or _layout_of(names, prefix)
    plain = {key: name.removeprefix(prefix) for key, name in names.full.items() if name.startswith(prefix)}
    matrices = {name: key for key, name in names.full.items() if tensors[key].dim() == 2}
    head, in_backbone = _find_head(matrices, prefix, layout)
    if head is not None:
        for key, name in names.full.items():
            above, _, last = name.rpartition(".")
            if above == head and last in ("weight", "bias"):
                plain[key] = f"{_HEAD}.{last}"
    backbone_head = None
    if in_backbone and head is not None:
        backbone_head = "classifier.1" if names.is_flat else head.removeprefix(prefix)
    return _Weights(names, layout, prefix, plain, _raw_names(names, prefix), backbone_head)


def _raw_names(names: _Names, prefix: str) -> dict[str, str]:
    """The names below the prefix, with temporal modules. Wrappers of the whole backbone belong to the prefix."""
    rest = {key: parts for key, parts in names.parts.items() if names.full[key].startswith(prefix)}
    for above in prefix.split(".")[:-1]:
        rest = {key: _after(parts, above) for key, parts in rest.items()}
    while rest and all(parts[0][1] for parts in rest.values()):
        rest = {key: parts[1:] for key, parts in rest.items()}
    return {key: ".".join(part for part, _ in parts) for key, parts in rest.items()}


def _after(parts: list[tuple[str, bool]], above: str) -> list[tuple[str, bool]]:
    return parts[parts.index((above, False)) + 1 :]


def _layout_of(names: _Names, prefix: str) -> Layout:
    def below(layout: Layout) -> bool:
        return f".{prefix}".endswith(f".{_LAYOUTS[layout].backbone}")

    if below("tsam"):
        return "tsam"
    if below("tsm"):
        return "tsm"
    has_theirs = any(".cls_head.fc_cls." in f".{name}" for name in names.full.values())
    if names.has_conv_modules or (has_theirs and below("mmaction2")):
        return "mmaction2"
    if below("video_model"):
        return "video_model"
    return "tsm" if names.is_flat else "torchvision"


def _find_head(matrices: Mapping[str, str], prefix: str, layout: Layout) -> tuple[str | None, bool]:
    """The name of the last layer, with the prefix, and whether it is inside the backbone.

    Where the layout has it; else inside the backbone; else outside, under any known name.
    """
    above = [outer for outer, _ in _prefixes(prefix) if outer != prefix][::-1] or [""]
    own = _LAYOUTS[layout].head
    for outer in above:
        if own is not None and f"{outer}{own}.weight" in matrices:
            return f"{outer}{own}", False
    inside = [name for name in matrices if name.startswith(prefix)]
    heads = [match[1] for name in inside if (match := _BACKBONE_HEAD.fullmatch(name.removeprefix(prefix)))]
    if heads:
        return f"{prefix}{heads[-1]}", True
    for outer in (prefix, *above):
        for name in _HEAD_NAMES:
            if f"{outer}{name}.weight" in matrices:
                return f"{outer}{name}", False
    return None, False


def _keys_in_layout(weights: _Weights, target: Layout) -> dict[str, str]:
    """Each key that the layout ``target`` has, with its name there."""
    plain = set(weights.plain.values())
    is_resnet = "layer1.0.conv1.weight" in plain and not any("downsample.2." in name for name in plain)
    if target not in _ANY_NETWORK and not is_resnet:
        raise ValueError(
            f"target must be a network for weights of other networks than torchvision's ResNets, got {target!r}"
        )
    head = _head_in_layout(weights, target, is_resnet)
    renamed = {
        key: name.replace(_HEAD, head)
        for key, name in weights.plain.items()
        if head is not None and name.startswith(_HEAD)
    }
    backbone = {key: name for key, name in weights.plain.items() if not name.startswith(_HEAD)}
    if weights.layout in _ANY_NETWORK and target in _ANY_NETWORK:
        return renamed | {key: _LAYOUTS[target].backbone + weights.raw[key] for key in backbone}
    known = re.compile((RESNET if is_resnet else MOBILENET_V2).checkpoint_names or "")
    wrapped = _places(weights, _TEMPORAL_PARTS)
    if target not in _ANY_NETWORK and not wrapped:
        if target == "tsam":
            raise ValueError("target must be a network for weights without shifts, got 'tsam', which chooses places")
        wrapped = _places_of_tsm(plain)
    non_local = _places(weights, ("block",))
    for key, name in backbone.items():
        # mmaction2 has other names inside of non-local blocks.
        if known.fullmatch(name) and not (target == "mmaction2" and ".nl." in name):
            renamed[key] = _name_in_layout(name, target, wrapped, non_local)
    return renamed


def _head_in_layout(weights: _Weights, target: Layout, is_resnet: bool) -> str | None:
    if target in _ANY_NETWORK and weights.head is not None:
        return _LAYOUTS[target].backbone + weights.head
    if target != "torchvision":
        return _LAYOUTS[target].head
    is_mobilenet = any(name.startswith("features.1.conv.0.0.") for name in weights.plain.values())
    return "fc" if is_resnet else "classifier.1" if is_mobilenet else None


def _places(weights: _Weights, wrappers: tuple[str, ...]) -> set[str]:
    """The plain names of the modules around which there are modules that call them so."""
    places = set()
    for key in weights.plain:
        parts = weights.names.parts[key]
        for i, (part, left_out) in enumerate(parts):
            if left_out and part in wrappers and (above := f"{_join(parts[:i])}.").startswith(weights.prefix):
                places.add(above[len(weights.prefix) : -1])
    return places - {""}


def _places_of_tsm(plain: Iterable[str]) -> set[str]:
    """The ``conv1`` of each block of a ResNet that TSM shifts."""
    blocks = {(match[1], int(match[2])) for name in plain if (match := re.match(r"layer([1-4])\.(\d+)\.conv1\.", name))}
    every = RESNET.every([sum(stage == str(number) for stage, _ in blocks) for number in range(1, 5)])
    return {f"layer{stage}.{i}.conv1" for stage, i in blocks if i % every == 0}


def _name_in_layout(name: str, layout: Layout, wrapped: set[str], non_local: set[str]) -> str:
    parts = name.split(".")
    written: list[str] = []
    for i, part in enumerate(parts):
        above = ".".join(parts[: i + 1])
        written.append(_in_conv_module(parts, i) if layout == "mmaction2" else part)
        if above in wrapped:
            written.append(_LAYOUTS[layout].wrapper)
        if above in non_local and parts[i + 1] != "nl":
            written.append("block")
    return _LAYOUTS[layout].backbone + ".".join(written)


def _in_conv_module(parts: list[str], i: int) -> str:
    """What mmaction2 calls part ``i`` of a name: it puts a convolution and its norm into one module."""
    part = parts[i]
    if re.fullmatch(r"conv\d", part):
        return f"{part}.conv"
    if re.fullmatch(r"bn\d", part):
        return f"conv{part[2:]}.bn"
    if i and parts[i - 1] == "downsample":
        return {"0": "conv", "1": "bn"}.get(part, part)
    return part


# ---- Placing


def _convert_for_network(state_dict: Mapping[str, Tensor], source: Layout | None, network: nn.Module) -> Conversion:
    there = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    names, target_names = _split_names(state_dict, source), _split_names(there, None)
    prefix, target_prefix = _matching_prefixes(names, state_dict, target_names, there)
    weights = _parse(names, prefix, state_dict, source)
    target = _parse(target_names, target_prefix, there, None)
    keys = _keys_in_network(weights, target)
    result, unplaced = _place(state_dict, keys, there, weights)
    missing = [key for key in there if key not in result]
    buffers = dict(network.named_buffers(remove_duplicate=False))
    needed = [key for key in there if key not in buffers and not target.plain.get(key, "").startswith(_HEAD)]
    placed = sum(key in result for key in needed)
    if 2 * placed < len(needed) or not result:
        raise ValueError(
            f"state_dict must hold at least half of the target's {len(needed)} parameters apart from the last layer, "
            f"got {placed} (source layout: {weights.layout!r}). Unplaced: {_first(unplaced, there)}. Missing: "
            f"{_first(dict.fromkeys(missing), state_dict)}"
        )
    return Conversion(_with_versions(result, _renamed_versions(state_dict, keys)), weights.layout, unplaced, missing)


def _renamed_versions(state_dict: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Any] | None:
    """The versions of the modules under their new names, if ``state_dict`` has them."""
    versions = getattr(state_dict, "_metadata", None)
    if versions is None:
        return None
    renamed: dict[str, Any] = {}
    for key, place in keys.items():
        old, new = key.split("."), place.split(".")
        while old and new and old[-1] == new[-1]:  # the module, and modules around both
            old, new = old[:-1], new[:-1]
            version = versions.get(".".join(old))
            if version is not None:
                renamed.setdefault(".".join(new), version)
    return renamed


def _keys_in_network(weights: _Weights, target: _Weights) -> dict[str, str]:
    """Each key of the source that the target has too, with its key there."""
    by_plain = {name: key for key, name in target.plain.items()}
    by_raw = {name: key for key, name in target.raw.items() if not target.plain[key].startswith(_HEAD)}
    by_full = {name: key for key, name in target.names.full.items()}
    # Modules outside the backbone keep their names below the outer prefixes. With backbones at "model.encoder." and
    # "encoder.", these are "model." and "".
    outer, target_outer = weights.prefix.split("."), target.prefix.split(".")
    while outer and target_outer and outer[-1] == target_outer[-1]:
        outer, target_outer = outer[:-1], target_outer[:-1]
    above, target_above = ("".join(f"{part}." for part in each) for each in (outer, target_outer))
    keys = {}
    for key, name in weights.names.full.items():
        plain = weights.plain.get(key, "")
        place = by_plain.get(plain)
        if not plain.startswith(_HEAD):  # a real submodule may be called "net": equal names come first
            place = by_raw.get(weights.raw.get(key, ""), place)
        if place is None and name.startswith(above):
            place = by_full.get(target_above + name.removeprefix(above))
        if place is not None:
            keys[key] = place
    return keys


def _place(
    state_dict: Mapping[str, Tensor], keys: Mapping[str, str], there: Mapping[str, Tensor], weights: _Weights
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under their new keys, and the reason for each key that is not among them."""
    result: dict[str, Tensor] = {}
    unplaced: dict[str, str] = {}
    for key, tensor in state_dict.items():
        place = keys.get(key)
        if place is None:
            beside = key not in weights.plain
            unplaced[key] = (
                f"outside the prefix {weights.prefix!r} of the matched network" if beside else "not in the target"
            )
        elif place in result:
            unplaced[key] = f"{place} is taken by another key"
        elif place in there and there[place].shape != tensor.shape:
            unplaced[key] = f"shape {list(tensor.shape)}, but {place} has shape {list(there[place].shape)}"
        else:
            result[place] = tensor
    return result, unplaced


def _first(keys: Mapping[str, str | None], others: Iterable[str] = (), count: int = 3) -> str:
    """The first keys, each with the reason if there is one, and the most similar of the other keys."""
    others, texts = list(others), []
    for key, reason in list(keys.items())[:count]:
        nearest = difflib.get_close_matches(key, others, n=1, cutoff=0)
        notes = [each for each in (reason, f"nearest: {nearest[0]!r}" if nearest else None) if each]
        texts.append(f"{key!r} ({'; '.join(notes)})" if notes else repr(key))
    more = len(keys) - len(texts)
    return (", ".join(texts) or "none") + (f" and {more} more" if more else "")
