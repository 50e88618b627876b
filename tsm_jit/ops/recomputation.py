"""Tells compiled code whether activation checkpointing computes, or will compute, a forward again.

Compiled code holds what was true when ``torch.compile`` traced it. But before each call, its guards read again what
the traced code has read. So reading an attribute of this module, which :func:`__getattr__` computes, gives a version of
the code for each value, and each call runs the version for the value at that time.

- ``saves_marks``: whether a checkpoint compares what this forward saves for its backward with what the recomputation
  saves, and so the mark of the clip length. It is the same in both.
- ``is_nested``: whether this forward is in such a checkpoint for the first time, but in another for the second time.
- ``phase``: see :func:`current_phase`. It is ``"forward"`` in all non-reentrant checkpoints, and only there.
"""

from __future__ import annotations

import torch

from tsm_jit.ops.compat import (
    checkpoint_compares,
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
        return torch.is_grad_enabled() and checkpoint_compares() and compiled_code_saves_marks()
    if name == "is_nested":
        return in_backward() and non_reentrant_checkpoint() == "forward"
    if name == "phase":
        if in_backward() or not torch.is_grad_enabled():
            return current_phase()
        # Never "unchecked": such a checkpoint stops a recomputation early, before compiled code could forget lengths.
        return "forward" if non_reentrant_checkpoint() else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def current_phase() -> str:
    """Returns what runs this forward.

    - ``"recomputation"``: a backward.
    - ``"unchecked forward"``: a checkpoint that will not compare the recomputation with this forward.
    - ``"forward"``: other hooks for saved tensors, such as those of a checkpoint that compares.
    - ``""``: nothing that will compute it again.
    """
    if in_backward():
        return "recomputation"
    if not torch.is_grad_enabled():
        return "unchecked forward" if in_reentrant_checkpoint() else ""
    if not has_saved_tensor_hooks():
        return ""
    return "unchecked forward" if non_reentrant_checkpoint() and not checkpoint_compares() else "forward"
