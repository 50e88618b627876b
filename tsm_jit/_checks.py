"""Argument checks of the public functions. Each error names the argument, the rule and the actual value."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

from torch import Tensor


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """Returns ``value`` as an int. Raises TypeError if it is not an integer, ValueError if it is below ``minimum``."""
    is_int = isinstance(value, int) and not isinstance(value, bool)  # first, since Dynamo traces no hasattr of a SymInt
    if not is_int and (isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__")):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    value = operator.index(value)
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def refuse_scripting(module: Any = None) -> NoReturn:
    """Raises the error of ``torch.jit.script``, which calls ``__prepare_scriptable__`` of what it will compile."""
    name = "a function" if module is None else type(module).__name__
    raise NotImplementedError(
        f"torch.jit.script does not support temporal shifts, got {name}: use torch.jit.trace or torch.export"
    )
