"""The checks that every public function shares: each error names the argument, the rule and the value it got."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int; TypeError if it is none, ValueError below ``least``."""
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    value = operator.index(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
