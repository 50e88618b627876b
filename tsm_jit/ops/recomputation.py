"""Tells compiled code whether activation checkpointing computes, or will compute, a forward again.

Compiled code holds what was true when ``torch.compile`` traced it. But before each call, its guards read again what
the traced code has read. So reading an attribute of this module, which :func:`__getattr__` computes, gives a version of
the code for each value, and each call runs the version for the value at that time.

- ``saves_marks``: whether this forward is in a non-reentrant checkpoint. For each shift, its backward then reads a
  tensor that the recomputation has saved, whose shape tells the clip length.
- ``is_nested``: whether this forward is in such a checkpoint for the first time, but in another for the second time.
- ``phase``: see :func:`current_phase`. It is ``"forward"`` in all non-reentrant checkpoints, and only there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tsm_jit.ops.compat import (
    compiled_code_saves_marks,
    has_saved_tensor_hooks,
    in_backward,
    in_reentrant_checkpoint,
    non_reentrant_checkpoint,
)

saves_marks: bool
is_nested: bool
phase: str


def __getattr__(name: str) -> bool | str:
    if name == "saves_marks":
        return torch.is_grad_enabled() and non_reentrant_checkpoint() != "" and compiled_code_saves_marks()
    if name == "is_nested":
        return in_backward() and non_reentrant_checkpoint() == "forward"
    if name == "phase":
        if in_backward() or not torch.is_grad_enabled():
            return current_phase()
        return "forward" if non_reentrant_checkpoint() else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def current_phase() -> str:
    """Returns what runs this forward.

    - ``"recomputation"``: a backward.
    - ``"reentrant forward"``: a reentrant checkpoint.
    - ``"forward"``: hooks for saved tensors, such as those of a non-reentrant checkpoint.
    - ``""``: nothing that will compute it again.
    """
    if in_backward():
        return "recomputation"
    if not torch.is_grad_enabled():
        return "reentrant forward" if in_reentrant_checkpoint() else ""
    return "forward" if has_saved_tensor_hooks() else ""


def changed_length(length: int, others: Iterable[int]) -> RuntimeError:
    """The error if a forward with the clip length ``length`` repeats one that had another."""
    return RuntimeError(
        f"n_segment must be the clip length of the forward when checkpointing computes it again, got {length} after a "
        f"forward with {' and '.join(map(str, sorted(others)))}: call backward() before changing n_segment"
    )
