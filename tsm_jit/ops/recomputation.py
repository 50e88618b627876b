"""Tells compiled code whether activation checkpointing computes, or will compute, a forward again.

Compiled code holds what was true when ``torch.compile`` traced it. But before each call, its guards read again what
the traced code has read. So code that reads an attribute of this module, which :func:`__getattr__` computes, has a
version for each value. A call runs the version for the value at that time.

- ``saves_marks``: whether this forward is in a non-reentrant checkpoint. For each shift, its backward then reads a
  tensor that the recomputation has saved, whose shape tells the clip length.
- ``mark_8_4__cpu``: this tensor, for a shift of 4 frames in clips of 8, on the device ``cpu``. What a module attribute
  holds is an input of the compiled graph. Compilers save inputs, but may compute any other tensor again.
- ``is_nested``: whether this forward is in such a checkpoint for the first time, but in another for the second time.
- ``phase``: see :func:`current_phase`. It is ``"forward"`` in all non-reentrant checkpoints, and only there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tsm_jit.ops.compat import (
    count_dispatch_modes,
    has_saved_tensor_hooks,
    in_backward,
    in_reentrant_checkpoint,
    is_exporting,
    non_reentrant_checkpoint,
)

saves_marks: bool
is_nested: bool
phase: str


def __getattr__(name: str) -> bool | str | Tensor:
    if name == "saves_marks":
        return torch.is_grad_enabled() and non_reentrant_checkpoint() != "" and not is_exporting()
    if name == "is_nested":
        return in_backward() and non_reentrant_checkpoint() == "forward"
    if name == "phase":
        if in_backward() or not torch.is_grad_enabled():
            return current_phase()
        return "forward" if non_reentrant_checkpoint() else ""
    if name.startswith("mark_"):
        return _mark(name, count_dispatch_modes() > 0)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache  # guards need the same tensor each time, but not the one that a mode has made
def _mark(name: str, has_modes: bool) -> Tensor:
    _, n_segment, n_segment_shifted, index, kind = name.split("_", 4)
    device = torch.device(kind, int(index)) if index else torch.device(kind)
    # Of a parameter, compilers keep the sizes constant. Its gradient is what the comparison returns.
    return nn.Parameter(torch.empty((0, int(n_segment), int(n_segment_shifted)), device=device))


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
