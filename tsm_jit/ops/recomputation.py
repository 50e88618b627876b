"""Tells compiled code whether activation checkpointing computes, or will compute, a forward again.

Compiled code holds what was true when ``torch.compile`` traced it. But before each call, its guards read again what
the traced code has read. So reading ``recomputation.phase``, which :func:`__getattr__` computes, gives a version of the
code for each value, and each call runs the version for the value at that time.

``phase`` is ``"non-reentrant"`` in a non-reentrant checkpoint, both in the forward and in the recomputation, whose
saved tensors must be the same. In a reentrant one it is ``"reentrant forward"``, then ``"reentrant recomputation"``.
Elsewhere it is empty.
"""

from __future__ import annotations

from tsm_jit.ops.compat import in_backward, in_non_reentrant_checkpoint, in_reentrant_checkpoint

phase: str


def __getattr__(name: str) -> str:
    if name != "phase":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if in_non_reentrant_checkpoint():
        return "non-reentrant"
    if in_backward():
        return "reentrant recomputation"
    return "reentrant forward" if in_reentrant_checkpoint() else ""
