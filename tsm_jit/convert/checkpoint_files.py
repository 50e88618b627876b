"""Reads the weights of checkpoint files: see :mod:`tsm_jit.checkpoints`."""

from __future__ import annotations

import argparse
import os
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

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


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads the state dict in the file ``path`` to the CPU, without running code from the file.

    A state dict may be the whole file or one of its entries. Entries are tried in this order: ``state_dict``,
    ``model``, ``model_state``, ``model_state_dict``, ``net``, ``network``, ``module``, ``weights``, ``params``, then
    averaged weights: ``ema``, ``state_dict_ema``, ``model_ema``, ``ema_state_dict``, ``ema_model``, ``params_ema``.
    An entry may itself be such a mapping, as in ``{"model": {"state_dict": ...}}``.

    Without these keys, a single state dict under any key is taken. Several are joined as ``key.name``: TSAM saves one
    for each part of the network.

    Files of trainers also hold other objects, such as the logs of mmengine. Their classes could run code, so these
    objects are skipped. Classes that ``torch.serialization.safe_globals`` allows are read.

    Args:
        path: a file of ``torch.save``, or of safetensors if it ends in ``.safetensors``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has no state dict, ``torch.load(weights_only=True)`` cannot read it, or its weights are part of
            objects that would be skipped, such as a whole network.
        ImportError: it is a safetensors file, and the package safetensors is not installed.

    Example::

        weights = torchvision.models.resnet18().state_dict()
        torch.save({"epoch": 3, "model": {"state_dict": weights}}, "checkpoint.pth")
        assert tsm_jit.checkpoints.load("checkpoint.pth").keys() == weights.keys()
    """
    name = os.fspath(path)
    is_safetensors = name.endswith(".safetensors")
    unknown = [] if is_safetensors else _unknown_classes(name)
    saved = _read_safetensors(name) if is_safetensors else _read_torch(name, unknown)
    weights = _find_weights(saved)
    if weights is not None:
        return weights
    if unknown:
        raise ValueError(f"path must be a file with a state dict, got {name!r}: {_needs_code(unknown)}")
    try:
        check_state_dict(_likely_weights(saved))
    except (TypeError, ValueError) as error:
        raise ValueError(f"path must be a file with a state dict, got {name!r}: {error}") from error
    raise ValueError(f"path must be a file with a state dict, got {name!r}")


def check_state_dict(state_dict: Any) -> None:
    """Raises TypeError unless ``state_dict`` maps names to tensors, ValueError if it is empty."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must map names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"state_dict must map names to tensors, got {type(value).__name__} for {key!r:.80}")
    if not state_dict:
        raise ValueError("state_dict must hold weights, got none")


class _Skipped:
    """Stands for an object of a class that could run code. It keeps no values."""

    def __new__(cls, *_: Any) -> _Skipped:
        return super().__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unknown_classes(path: str) -> list[str]:
    """The classes and functions in a file of ``torch.save`` that ``torch.load(weights_only=True)`` refuses."""
    try:
        return [each for each in torch.serialization.get_unsafe_globals_in_checkpoint(path) if each != _NAMESPACE]
    except Exception:  # no file, no zip file, or a damaged one: torch.load tells
        return []


_NAMESPACE = "argparse.Namespace"


def _read_torch(path: str, unknown: list[str]) -> Any:
    skipped: list[Any] = [(type("_Skipped", (_Skipped,), {}), name) for name in unknown]
    try:
        with _allow_namespace(), torch.serialization.safe_globals(skipped):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of a damaged file, any
        problem = _needs_code(unknown) if unknown else str(error).partition("\n")[0]
        raise ValueError(
            f"path must be a file that torch.load(weights_only=True) reads, got {path!r}: {problem}"
        ) from error


def _allow_namespace() -> AbstractContextManager[Any]:
    """Allows ``argparse.Namespace``, in which timm saves its options; it holds values and runs no code."""
    if argparse.Namespace in torch.serialization.get_safe_globals():
        return nullcontext()  # the context manager would remove what the caller has allowed
    return torch.serialization.safe_globals([argparse.Namespace])


def _needs_code(classes: list[str]) -> str:
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
        return with_versions(saved, getattr(saved, "_metadata", None))
    if not isinstance(saved, Mapping) or not depth:
        return None
    for key in _WEIGHT_KEYS:
        if isinstance(saved.get(key), _Skipped):
            return None  # later keys would have other weights
        weights = _find_weights(saved.get(key), depth - 1)
        if weights is not None:
            return weights
    if any(isinstance(value, _Skipped) or (isinstance(value, Tensor) and value.dim()) for value in saved.values()):
        return None  # parts of the weights would not be the whole
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


def with_versions(weights: Mapping[str, Tensor], versions: dict[str, Any] | None) -> dict[str, Tensor]:
    """A copy with the versions of the modules, which ``load_state_dict`` of some modules reads."""
    copy = OrderedDict(weights)
    if versions is not None:
        copy._metadata = versions  # type: ignore[attr-defined]
    return copy
