"""Tells compiled code whether activation checkpointing computes, or will compute, a forward again.

Compiled code holds what was true when ``torch.compile`` traced it. But before each call, its guards read again what
the traced code has read. So reading an attribute of this module, which :func:`__getattr__` computes, gives a version of
the code for each value, and each call runs the version for the value at that time.

- ``saves_marks``: whether a non-reentrant checkpoint compares the saved tensors of this forward with those of the
  recomputation. It is the same in both.
- ``is_nested``: whether this forward is in such a checkpoint for the first time, but in another for the second time.
- ``phase``: ``"recomputation"`` in a backward, else ``"reentrant forward"``, ``"forward"`` in a non-reentrant
  checkpoint, or empty.
"""

from __future__ import annotations

import torch

from tsm_jit.ops.compat import in_backward, in_reentrant_checkpoint, non_reentrant_checkpoint

saves_marks: bool
is_nested: bool
phase: str


def __getattr__(name: str) -> bool | str:
    if name == "saves_marks":
        return torch.is_grad_enabled() and non_reentrant_checkpoint() != ""
    if name == "is_nested":
        return in_backward() and non_reentrant_checkpoint() == "forward"
    if name != "phase":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if in_backward():
        return "recomputation"
    if in_reentrant_checkpoint():
        return "reentrant forward"
    return "forward" if non_reentrant_checkpoint() else ""
