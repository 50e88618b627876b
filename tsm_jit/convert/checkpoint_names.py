"""The names in checkpoints: their parts, prefixes and layouts. See :mod:`tsm_jit.checkpoints`.

=============  ==============================================  ==========================================
name           contains                                        example
=============  ==============================================  ==========================================
key            all that is in the state dict                   ``module.model.layer1.0.conv1.net.weight``
own name       no modules of PyTorch and Lightning             ``model.layer1.0.conv1.net.weight``
full name      no temporal modules; layers as in the table     ``model.layer1.0.conv1.weight``
plain name     no prefix either                                ``layer1.0.conv1.weight``
raw name       a plain name and its temporal modules           ``layer1.0.conv1.net.weight``
=============  ==============================================  ==========================================

The table is ``architectures.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tsm_jit.convert import architectures
from tsm_jit.convert.architectures import RESNET, Architecture, Layout, OtherNames, heads


class Style(NamedTuple):
    """How a layout names the parts of a network."""

    backbone: str  # the prefix of the backbone's names
    head: str | None  # the name of the last layer, if it is outside the backbone
    wrapper: str  # the name that a temporal module gives the module it contains


# timm's names have the torchvision layout.
LAYOUTS: dict[Layout, Style] = {
    "torchvision": Style("", None, "net"),
    "video_model": Style("backbone.", "head", "net"),
    "tsm": Style("base_model.", "new_fc", "net"),
    "mmaction2": Style("backbone.", "cls_head.fc_cls", "net"),
    "tsam": Style("nn_backbone.base_model.", "last_fc", "layer"),
}
# Any network can have these layouts. The others exist for architectures with `checkpoint_weights`.
ANY_NETWORK = ("torchvision", "video_model")

HEAD = "<head>"  # the plain name of the last layer

# PyTorch and Lightning insert these at any depth: torch.compile, FSDP, activation checkpointing, strategies.
_WRAPPER_PARTS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))
# These may also be real submodules, so they stay part of the raw name. "module": DDP; the others: temporal modules.
TEMPORAL_PARTS = ("net", "layer")
_OPTIONAL_PARTS = ("module", *TEMPORAL_PARTS)
# Used only if the architecture is unknown and no network is given as the target.
_BACKBONE_WORDS = frozenset(part for style in LAYOUTS.values() for part in style.backbone.split(".") if part)
_TRAINER_WORDS = frozenset(("model", "net", "network", "ema", "ema_model"))
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged|momentum|teacher)(?:[._]|$)")

_NON_LOCAL = re.compile(rf"(?:.*\.)?{RESNET.blocks}")  # a block inside TSM's non-local wrapper, which calls it "block"


# ---- Parts of names

_Parts = list[tuple[str, bool]]  # the parts of an own name, and whether the full name leaves them out


@dataclass
class _Names:
    """The names of one state dict by their keys."""

    parts: dict[str, _Parts]
    full: dict[str, str]
    # The layout and the architecture, if the layout has other names for layers.
    other_layout: Layout | None
    architecture: Architecture | None


@dataclass
class Weights:
    """The names of one state dict relative to the prefix of its backbone, by their keys."""

    names: _Names
    layout: Layout
    prefix: str  # of the full names
    plain: dict[str, str]  # also of the last layer, which may be outside the backbone
    raw: dict[str, str]
    head: str | None  # the plain name of the last layer, if it is inside the backbone


def own_names(keys: Iterable[str]) -> dict[str, str]:
    """The name of each key, without what PyTorch and Lightning insert."""
    return {key: _without_wrapper_parts(key) for key in keys}


def split_names(names: Mapping[str, str]) -> _Names:
    """Splits the names of one state dict, from :func:`own_names`, into parts."""
    parts, other_layout, architecture = _with_names_of_network({key: _split(name) for key, name in names.items()})
    _keep_real_submodules(parts)
    return _Names(parts, {key: join(each) for key, each in parts.items()}, other_layout, architecture)


def _without_wrapper_parts(key: str) -> str:
    *above, last = key.split(".")
    above = [part for part in above if part not in _WRAPPER_PARTS]
    while above and above[0] == "module":
        above = above[1:]
    return ".".join([*above, last])


def _split(name: str) -> _Parts:
    """The parts of a name; those that contain a temporal module, or DDP's ``module``, are marked as left out."""
    parts: _Parts = []
    *above, last = name.split(".")
    for part in above:
        optional = bool(parts) and part in _OPTIONAL_PARTS
        if part == "block":
            optional = _NON_LOCAL.fullmatch(join(parts)) is not None
        parts.append((part, optional))
    return [*parts, (last, False)]


def _keep_real_submodules(parts: dict[str, _Parts]) -> None:
    """Keeps parts such as ``net`` if names would be equal without them: ``a.net.weight`` and ``a.weight``."""
    while True:
        same: dict[str, dict[tuple[str, ...], list[str]]] = {}
        for key, each in parts.items():
            same.setdefault(join(each), {}).setdefault(tuple(part for part, _ in each), []).append(key)
        keys = [key for raw in same.values() if len(raw) > 1 for each in raw.values() for key in each]
        keys = [key for key in keys if any(left_out for _, left_out in parts[key])]
        if not keys:
            return
        for key in keys:
            first = next(i for i, (_, left_out) in enumerate(parts[key]) if left_out)
            parts[key][first] = (parts[key][first][0], False)


def join(parts: Iterable[tuple[str, bool]]) -> str:
    """The full name of the parts."""
    return ".".join(part for part, left_out in parts if not left_out)


# ---- Layouts with other names for layers


def _with_names_of_network(parts: dict[str, _Parts]) -> tuple[dict[str, _Parts], Layout | None, Architecture | None]:
    """Gives layers the names that the network has. Also returns the layout and the architecture of other names."""
    names = [join(each) for each in parts.values()]
    candidates = [
        (_modules_of_network(names, other), layout, architecture)
        for architecture in architectures.ARCHITECTURES
        for layout, other in architecture.other_names.items()
    ]
    # A layer may match several architectures, depending on the prefix. The one with most matches comes last and wins.
    candidates = sorted((each for each in candidates if each[0]), key=lambda each: len(each[0]))
    if not candidates:
        return parts, None, None
    modules = {module: name for renamed, *_ in candidates for module, name in renamed.items()}
    _, layout, architecture = candidates[-1]
    return {key: _with_layer_renamed(each, modules) for key, each in parts.items()}, layout, architecture


def _modules_of_network(names: Iterable[str], other: OtherNames) -> dict[str, str]:
    """The names in the network of all modules with names of ``other``, if there are blocks with its first layer."""
    pattern = re.compile(rf"(?P<above>(?:.*\.)?)(?P<block>{other.blocks})\.(?P<layer>.+)\.[^.]+")
    networks: dict[str, dict[str, set[str]]] = {}  # of each prefix and block: the layers
    for match in filter(None, map(pattern.fullmatch, names)):
        networks.setdefault(match["above"], {}).setdefault(match["block"], set()).add(match["layer"])
    modules: dict[str, str] = {}
    for above, blocks in networks.items():
        kinds = {block: max(other.layers, key=lambda kind: len(there & kind.keys())) for block, there in blocks.items()}
        known = [block for block, kind in kinds.items() if next(iter(kind)) in blocks[block]]
        for number, block in enumerate(sorted(known, key=_numbers), 1):
            name = other.block.format(block=block, number=number)
            modules[above + block] = above + name
            modules |= _layers_of_network(f"{above}{block}.", f"{above}{name}.", kinds[block])
        if known:
            outside = {layer: name.format(next=len(known) + 1) for layer, name in other.outside.items()}
            modules |= _layers_of_network(above, above, outside)
    return modules


def _layers_of_network(above: str, new_above: str, layers: Mapping[str, str]) -> dict[str, str]:
    """The names of layers in the network. A module that contains several layers gets the name of the first."""
    modules: dict[str, str] = {}
    for layer, name in layers.items():
        for end, _ in _prefixes(f"{layer}."):
            if end:
                modules.setdefault(above + end[:-1], new_above + name)
    return modules


def _numbers(block: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", block)]


def _with_layer_renamed(parts: _Parts, modules: Mapping[str, str]) -> _Parts:
    """Renames the layer of a weight. Temporal modules stay around the same module."""
    layer = join(parts[:-1])
    if layer not in modules:
        return parts
    around: dict[str, _Parts] = {}
    for i, (part, left_out) in enumerate(parts):
        if left_out:
            module = join(parts[:i])
            around.setdefault(modules.get(module, module), []).append((part, True))
    renamed: _Parts = []
    for name in modules[layer].split("."):
        renamed.append((name, False))
        renamed += around.get(join(renamed), [])
    return [*renamed, parts[-1]]


# ---- Other spellings of the names of a network


def from_indices(names: dict[str, str], children: list[str], below: Iterable[str]) -> dict[str, str]:
    """Renames the weights of ``nn.Sequential(*net.children())``: ``4.0.bn1.bias`` becomes ``layer1.0.bn1.bias``.

    ``children`` are the names of the children of ``net``, ``below`` all of its names.
    """
    known = {join(_split(name)) for name in below}
    votes: Counter[str] = Counter()
    for name in names.values():
        for prefix, rest in _prefixes(name):
            if join(_split(_with_child(rest, children))) in known and rest[:1].isdecimal():
                votes[prefix] += 1
    prefix = _most_votes(votes)
    renamed = {key: name for key, name in names.items() if name.startswith(prefix)}
    return names | {key: prefix + _with_child(name.removeprefix(prefix), children) for key, name in renamed.items()}


def _with_child(name: str, children: list[str]) -> str:
    index, _, rest = name.partition(".")
    return f"{children[int(index)]}.{rest}" if index.isdecimal() and int(index) < len(children) else name


def with_dots(names: dict[str, str], dotted: Iterable[str]) -> dict[str, str]:
    """Renames weights whose names have lost their dots, as in LitEma's copies: ``layer10bn1bias``.

    ``dotted`` are the names in the target. Of two that differ only in their dots neither is used.
    """
    last_layers = [f"{head}.{last}" for head in _head_names() for last in ("weight", "bias")]
    spelled: dict[str, set[str]] = {}
    for name in [*dotted, *last_layers]:
        for each in (name, join(_split(name))):
            spelled.setdefault(each.replace(".", ""), set()).add(each)
    unique = {name: next(iter(each)) for name, each in spelled.items() if len(each) == 1 and name not in each}
    votes: Counter[str] = Counter()
    for name in names.values():
        for start in range(name.rfind(".") + 1, len(name)):
            if name[start:] in unique:
                votes[name[:start]] += 1
    prefix = _most_votes(votes)
    renamed = dict(names)
    for above in (prefix[: prefix.rfind(".") + 1], prefix):  # a last layer may be outside the prefix
        for key, name in names.items():
            if name.startswith(above) and (dotted_name := unique.get(name.removeprefix(above))):
                renamed[key] = f"{above.removesuffix('.')}.{dotted_name}".lstrip(".")
    return renamed


# ---- Prefixes


def own_prefix(names: _Names) -> str:
    """The prefix of the network of a known architecture with most names; else known words, such as ``backbone.``"""
    full = names.full.values()
    votes: Counter[str] = Counter()
    for architecture in architectures.ARCHITECTURES:
        votes |= _names_in_blocks(full, re.compile(rf"(?:{architecture.blocks})\."))
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


def matching_prefixes(
    source: _Names, state_dict: Mapping[str, Tensor], target: _Names, there: Mapping[str, Tensor]
) -> tuple[str, str]:
    """The prefixes of source and target below which most names agree; equal shapes count twice."""
    own = own_prefix(target)
    best = (0, own_prefix(source), own)
    for prefix in dict.fromkeys((own, *_common_prefixes(target.full.values()))):
        shapes = {
            name.removeprefix(prefix): there[key].shape for key, name in target.full.items() if name.startswith(prefix)
        }
        votes: Counter[str] = Counter()
        for key, name in source.full.items():
            for above, rest in _prefixes(name):
                if rest in shapes:
                    votes[above] += 1 + (shapes[rest] == state_dict[key].shape)
        source_prefix = _most_votes(votes)
        if votes[source_prefix] > best[0]:
            best = (votes[source_prefix], source_prefix, prefix)
        if best[0] >= len(shapes):
            break
    return best[1], best[2]


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of more than half of the names, the shortest first."""
    names = list(names)
    counts = Counter(prefix for name in names for prefix, _ in _prefixes(name))
    return sorted((prefix for prefix, count in counts.items() if 2 * count > len(names)), key=len)


# ---- Layouts


def parse(names: _Names, prefix: str, tensors: Mapping[str, Tensor], source: Layout | None) -> Weights:
    """The names relative to ``prefix``, with their layout and last layer."""
    layout = source or _layout_of(names, prefix)
    plain = {key: name.removeprefix(prefix) for key, name in names.full.items() if name.startswith(prefix)}
    matrices = {name: key for key, name in names.full.items() if tensors[key].dim() == 2}
    head, in_backbone = _find_head(matrices, prefix, layout)
    if head is not None:
        for key, name in names.full.items():
            above, _, last = name.rpartition(".")
            if above == head and last in ("weight", "bias"):
                plain[key] = f"{HEAD}.{last}"
    backbone_head = None
    if in_backbone and head is not None:
        backbone_head = names.architecture.head[0] if names.architecture else head.removeprefix(prefix)
    return Weights(names, layout, prefix, plain, _raw_names(names, prefix), backbone_head)


def _raw_names(names: _Names, prefix: str) -> dict[str, str]:
    """The names below the prefix, with temporal modules. Wrappers of the whole backbone belong to the prefix."""
    rest = {key: parts for key, parts in names.parts.items() if names.full[key].startswith(prefix)}
    for above in prefix.split(".")[:-1]:
        rest = {key: _after(parts, above) for key, parts in rest.items()}
    while rest and all(parts[0][1] for parts in rest.values()):
        rest = {key: parts[1:] for key, parts in rest.items()}
    return {key: ".".join(part for part, _ in parts) for key, parts in rest.items()}


def _after(parts: _Parts, above: str) -> _Parts:
    return parts[parts.index((above, False)) + 1 :]


def _head_names() -> list[str]:
    return [*(style.head for style in LAYOUTS.values() if style.head), *heads()]


def _layout_of(names: _Names, prefix: str) -> Layout:
    def below(layout: Layout) -> bool:
        return f".{prefix}".endswith(f".{LAYOUTS[layout].backbone}")

    if below("tsam"):
        return "tsam"
    if below("tsm"):
        return "tsm"
    has_theirs = any(".cls_head.fc_cls." in f".{name}" for name in names.full.values())
    if names.other_layout == "mmaction2" or (has_theirs and below("mmaction2")):
        return "mmaction2"
    if below("video_model"):
        return "video_model"
    return names.other_layout or "torchvision"


def _find_head(matrices: Mapping[str, str], prefix: str, layout: Layout) -> tuple[str | None, bool]:
    """The name of the last layer, with the prefix, and whether it is inside the backbone.

    Where the layout has it; else inside the backbone; else outside, under any known name.
    """
    above = [outer for outer, _ in _prefixes(prefix) if outer != prefix][::-1] or [""]
    own = LAYOUTS[layout].head
    for outer in above:
        if own is not None and f"{outer}{own}.weight" in matrices:
            return f"{outer}{own}", False
    last_layers = {f"{prefix}{head}.weight" for head in heads()}
    inside = [name.removesuffix(".weight") for name in matrices if name in last_layers]
    if inside:
        return inside[-1], True
    for outer in (prefix, *above):
        for name in _head_names():
            if f"{outer}{name}.weight" in matrices:
                return f"{outer}{name}", False
    return None, False
