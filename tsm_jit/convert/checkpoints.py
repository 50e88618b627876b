"""Puts the weights of one network under the names of another: see :mod:`tsm_jit.checkpoints`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tsm_jit._checks import one_of
from tsm_jit.convert.architectures import (
    RESNET,
    Architecture,
    Layout,
    architecture_of_weights,
    resnet_layers_of_tsm,
)
from tsm_jit.convert.checkpoint_files import check_state_dict, with_versions
from tsm_jit.convert.checkpoint_names import (
    ANY_NETWORK,
    HEAD,
    LAYOUTS,
    TEMPORAL_PARTS,
    Weights,
    from_indices,
    join,
    matching_prefixes,
    own_names,
    own_prefix,
    parse,
    split_names,
    with_dots,
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

    If the target is a network, names may also be those of ``nn.Sequential(*net.children())``
    (``4.0.conv1.weight``), or names without dots, as in LitEma's copies (``layer10conv1weight``).

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
        ValueError: too few weights match. A network as ``target`` must get at least half of its parameters. Buffers,
            the last layer and layers that get only some of their parameters do not count. A layout as ``target`` must
            get at least one weight.

    Example::

        net = torchvision.models.resnet18(num_classes=5)
        tsm_jit.make_temporal_shift(net, n_segment=8)
        weights = torchvision.models.resnet18().state_dict()
        converted = tsm_jit.checkpoints.convert({f"model.{key}": weights[key] for key in weights}, target=net)
        net.load_state_dict(converted.state_dict, strict=False)
        assert converted.missing == ["fc.weight", "fc.bias"]
        assert converted.unplaced["model.fc.weight"] == "shape [1000, 512], but fc.weight has shape [5, 512]"
    """
    check_state_dict(state_dict)
    if source is not None:
        one_of("source", source, tuple(LAYOUTS))
    if isinstance(target, nn.Module):
        return _convert_for_network(state_dict, source, target)
    one_of("target", target, tuple(LAYOUTS))
    names = split_names(own_names(state_dict))
    weights = parse(names, own_prefix(names), state_dict, source)
    keys = _keys_in_layout(weights, target)
    result, unplaced = _place(state_dict, keys, {}, weights)
    if not result:
        raise ValueError(
            f"state_dict must hold weights for target={target!r}, but none match: {_first(unplaced)} (source layout: "
            f"{weights.layout!r})"
        )
    return Conversion(with_versions(result, _renamed_versions(state_dict, keys)), weights.layout, unplaced, [])


# ---- Layouts


def _keys_in_layout(weights: Weights, target: Layout) -> dict[str, str]:
    """Each key that the layout ``target`` has, with its name there."""
    architecture = architecture_of_weights(weights.plain.values())
    if target not in ANY_NETWORK and architecture is not RESNET:
        raise ValueError(
            f"target must be a network for weights of other networks than torchvision's ResNets, got {target!r}"
        )
    head = _head_in_layout(weights, target, architecture)
    renamed = {
        key: name.replace(HEAD, head)
        for key, name in weights.plain.items()
        if head is not None and name.startswith(HEAD)
    }
    backbone = {key: name for key, name in weights.plain.items() if not name.startswith(HEAD)}
    if weights.layout in ANY_NETWORK and target in ANY_NETWORK:
        return renamed | {key: LAYOUTS[target].backbone + weights.raw[key] for key in backbone}
    known = re.compile(architecture.checkpoint_weights or "" if architecture else "")
    wrapped = _inner_modules(weights, TEMPORAL_PARTS)
    if target not in ANY_NETWORK and not wrapped:
        if target == "tsam":
            raise ValueError("target must be a network for weights without shifts, got 'tsam', which chooses places")
        wrapped = resnet_layers_of_tsm(backbone.values())
    non_local = _inner_modules(weights, ("block",))
    for key, name in backbone.items():
        # mmaction2 has other names inside of non-local blocks.
        if known.fullmatch(name) and not (target == "mmaction2" and ".nl." in name):
            renamed[key] = _name_in_layout(name, target, wrapped, non_local)
    return renamed


def _head_in_layout(weights: Weights, target: Layout, architecture: Architecture | None) -> str | None:
    if target in ANY_NETWORK and weights.head is not None:
        return LAYOUTS[target].backbone + weights.head
    if target != "torchvision":
        return LAYOUTS[target].head
    return architecture.head[0] if architecture else None


def _inner_modules(weights: Weights, wrappers: tuple[str, ...]) -> set[str]:
    """The plain names of modules inside a module that gives them one of the names ``wrappers``."""
    modules = set()
    for key in weights.plain:
        parts = weights.names.parts[key]
        for i, (part, left_out) in enumerate(parts):
            if left_out and part in wrappers and (outer := f"{join(parts[:i])}.").startswith(weights.prefix):
                modules.add(outer[len(weights.prefix) : -1])
    return modules - {""}


def _name_in_layout(name: str, layout: Layout, wrapped: set[str], non_local: set[str]) -> str:
    parts = name.split(".")
    written: list[str] = []
    for i, part in enumerate(parts):
        module = ".".join(parts[: i + 1])
        written.append(part)
        if module in wrapped:
            written.append(LAYOUTS[layout].wrapper)
        if module in non_local and parts[i + 1] != "nl":
            written.append("block")
    name = ".".join(written)
    if layout in RESNET.other_names:
        name = RESNET.other_names[layout].in_layout(name)
    return LAYOUTS[layout].backbone + name


# ---- Placing


def _convert_for_network(state_dict: Mapping[str, Tensor], source: Layout | None, network: nn.Module) -> Conversion:
    target_state = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    attempts = _attempts(state_dict, source, network, target_state)
    conversion, target = max(attempts, key=lambda attempt: len(attempt[0].state_dict))  # the first of equal ones
    buffers = dict(network.named_buffers(remove_duplicate=False))
    needed = [key for key in target_state if key not in buffers and not target.plain.get(key, "").startswith(HEAD)]
    # Part of a layer is worth nothing: a network with folded norms would get weights without the biases they need.
    partly = {_layer(key) for key in needed if key not in conversion.state_dict}
    placed = sum(_layer(key) not in partly for key in needed)
    if 2 * placed < len(needed) or not conversion.state_dict:
        raise ValueError(
            f"state_dict must hold at least half of the target's {len(needed)} parameters apart from the last layer, "
            f"got {placed} in complete layers (source layout: {conversion.source!r}). Unplaced: "
            f"{_first(conversion.unplaced, target_state)}. "
            f"Missing: {_first(dict.fromkeys(conversion.missing), state_dict)}"
        )
    return conversion


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _attempts(
    state_dict: Mapping[str, Tensor], source: Layout | None, network: nn.Module, target_state: Mapping[str, Tensor]
) -> Iterator[tuple[Conversion, Weights]]:
    """The conversion of each spelling of the source's names, and the names of the target. Ends if all are placed."""
    target_names = split_names(own_names(target_state))
    for spelled in _spellings(own_names(state_dict), network, target_state):
        names = split_names(spelled)
        prefix, target_prefix = matching_prefixes(names, state_dict, target_names, target_state)
        weights = parse(names, prefix, state_dict, source)
        target = parse(target_names, target_prefix, target_state, None)
        keys = _keys_in_network(weights, target)
        result, unplaced = _place(state_dict, keys, target_state, weights)
        missing = [key for key in target_state if key not in result]
        versions = _renamed_versions(state_dict, keys)
        yield Conversion(with_versions(result, versions), weights.layout, unplaced, missing), target
        if not unplaced:
            return


def _spellings(
    names: dict[str, str], network: nn.Module, target_state: Mapping[str, Tensor]
) -> Iterator[dict[str, str]]:
    """The names of the source: as they are, then with the names of children for their indices, then with dots."""
    yield names
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        inside = [key.removeprefix(prefix) for key in target_state if key.startswith(prefix)]
        if 2 * len(inside) > len(target_state):  # the network, or what a wrapper contains
            known = own_names(inside).values()
            yield from_indices(names, [name for name, _ in module.named_children()], known)
            yield with_dots(names, known)


def _renamed_versions(state_dict: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Any] | None:
    """The versions of the modules under their new names, if ``state_dict`` has them."""
    versions = getattr(state_dict, "_metadata", None)
    if versions is None:
        return None
    renamed: dict[str, Any] = {}
    for key, new_key in keys.items():
        old, new = key.split("."), new_key.split(".")
        while old and new and old[-1] == new[-1]:  # the module, and modules around both
            old, new = old[:-1], new[:-1]
            version = versions.get(".".join(old))
            if version is not None:
                renamed.setdefault(".".join(new), version)
    return renamed


def _keys_in_network(weights: Weights, target: Weights) -> dict[str, str]:
    """Each key of the source that the target has too, with its key there."""
    by_plain = {name: key for key, name in target.plain.items()}
    by_raw = {name: key for key, name in target.raw.items() if not target.plain[key].startswith(HEAD)}
    by_full = {name: key for key, name in target.names.full.items()}
    # Modules outside the backbone keep their names below the outer prefixes. With backbones at "model.encoder." and
    # "encoder.", these are "model." and "".
    outer, target_outer = weights.prefix.split("."), target.prefix.split(".")
    while outer and target_outer and outer[-1] == target_outer[-1]:
        outer, target_outer = outer[:-1], target_outer[:-1]
    prefix, target_prefix = ("".join(f"{part}." for part in each) for each in (outer, target_outer))
    keys = {}
    for key, name in weights.names.full.items():
        plain = weights.plain.get(key, "")
        new_key = by_plain.get(plain)
        if not plain.startswith(HEAD):  # a real submodule may be called "net": equal names come first
            new_key = by_raw.get(weights.raw.get(key, ""), new_key)
        if new_key is None and name.startswith(prefix):
            new_key = by_full.get(target_prefix + name.removeprefix(prefix))
        if new_key is not None:
            keys[key] = new_key
    return keys


def _place(
    state_dict: Mapping[str, Tensor], keys: Mapping[str, str], target_state: Mapping[str, Tensor], weights: Weights
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under their new keys, and the reason for each key that is not among them."""
    result: dict[str, Tensor] = {}
    unplaced: dict[str, str] = {}
    for key, tensor in state_dict.items():
        new_key = keys.get(key)
        if new_key is None:
            beside = key not in weights.plain
            unplaced[key] = (
                f"outside the prefix {weights.prefix!r} of the matched network" if beside else "not in the target"
            )
        elif new_key in result:
            unplaced[key] = f"{new_key} is taken by another key"
        elif new_key in target_state and target_state[new_key].shape != tensor.shape:
            unplaced[key] = f"shape {list(tensor.shape)}, but {new_key} has shape {list(target_state[new_key].shape)}"
        else:
            result[new_key] = tensor
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
