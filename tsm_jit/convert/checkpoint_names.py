"""The names in checkpoints: their parts, prefixes and layouts. See :mod:`tsm_jit.checkpoints`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from tsm_jit.convert.architectures import ARCHITECTURES, HEADS, MOBILENET_V2, RESNET

Layout = Literal["torchvision", "video_model", "tsm", "mmaction2", "tsam"]


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
# Any network can have these layouts. The others exist for torchvision's ResNets, tsm and mmaction2 for MobileNetV2 too.
ANY_NETWORK = ("torchvision", "video_model")

HEAD = "<head>"  # the plain name of the last layer
_HEAD_NAMES = (
    *(style.head for style in LAYOUTS.values() if style.head),
    *sorted(HEADS, key=len, reverse=True),
)
_BACKBONE_HEAD = re.compile(rf"({'|'.join(map(re.escape, sorted(HEADS, key=len, reverse=True)))})\.weight")

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
_CONV_MODULE = re.compile(rf"(?:.*\.)?{RESNET.blocks}\.{re.escape(RESNET.mmaction2_names['conv1'])}\.")
_CONV_MODULE_NAMES = {theirs: name for name, theirs in RESNET.mmaction2_names.items()}


# ---- _Names


@dataclass
class _Names:
    """The names of one state dict, split into parts, in torchvision's spelling."""

    parts: dict[str, list[tuple[str, bool]]]  # of each key: the part, and whether the plain name leaves it out
    full: dict[str, str]  # of each key: the plain name, with the prefix
    has_conv_modules: bool  # mmaction2 puts a convolution and its norm into one module
    is_flat: bool  # MobileNetV2 with one list of layers per block


@dataclass
class Weights:
    """The names of one state dict relative to the prefix of its backbone."""

    names: _Names
    layout: Layout
    prefix: str  # in plain names
    plain: dict[str, str]  # of each key below the prefix, and of the last layer
    raw: dict[str, str]  # of each key below the prefix: the name with temporal modules
    head: str | None  # the name of the last layer, if it is inside the backbone


def own_names(keys: Iterable[str]) -> dict[str, str]:
    """The name of each key, without what PyTorch and Lightning insert."""
    return {key: _without_wrapper_parts(key) for key in keys}


def split_names(visible: dict[str, str], source: Layout | None) -> _Names:
    """Splits the names of one state dict, from :func:`own_names`, into parts."""
    has_conv_modules = False
    if source in (None, "mmaction2"):
        visible, has_conv_modules = _from_mmaction2_mobilenet(visible)
        if any(_CONV_MODULE.match(join(_split(name))) for name in visible.values()):
            visible = {key: with_parts_replaced(name, _CONV_MODULE_NAMES) for key, name in visible.items()}
            has_conv_modules = True
    visible, is_flat = _nested_mobilenet(visible)
    parts = {key: _split(name) for key, name in visible.items()}
    _keep_real_submodules(parts)
    return _Names(parts, {key: join(each) for key, each in parts.items()}, has_conv_modules, is_flat)


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
            optional = _NON_LOCAL.fullmatch(join(parts)) is not None
        parts.append((part, optional))
    return [*parts, (last, False)]


def _keep_real_submodules(parts: dict[str, list[tuple[str, bool]]]) -> None:
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
    """The plain name of the parts."""
    return ".".join(part for part, left_out in parts if not left_out)


def with_parts_replaced(name: str, parts: Mapping[str, str]) -> str:
    """Replaces each of ``parts``, such as ``bn1`` or ``downsample.0``, where it is in ``name`` as a whole."""
    pattern = rf"(?<![^.])(?:{'|'.join(map(re.escape, parts))})(?=\.)"
    return re.sub(pattern, lambda match: parts[match[0]], name)


_FLAT_BLOCK = re.compile(rf"((?:.*\.)?{MOBILENET_V2.blocks}(?:\.net)?\.conv)\.(\d)(\..*)")
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
    heads = [f"{head}.{last}" for head in _HEAD_NAMES for last in ("weight", "bias")]
    spelled: dict[str, set[str]] = {}
    for name in [*dotted, *heads]:
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
        backbone_head = "classifier.1" if names.is_flat else head.removeprefix(prefix)
    return Weights(names, layout, prefix, plain, _raw_names(names, prefix), backbone_head)


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
        return f".{prefix}".endswith(f".{LAYOUTS[layout].backbone}")

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
    own = LAYOUTS[layout].head
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
