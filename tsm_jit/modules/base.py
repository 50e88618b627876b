"""The base classes of all modules here: a module around another one that sees shifted frames or clips."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from tsm_jit import ops
from tsm_jit.ops.compat import in_backward

# Modules that read their input and neither change nor return it: before these a shift may be made in place and undone.
_READ_ONLY_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class ClipModule(nn.Module):
    """A module around another one that takes its frames for clips of ``n_segment``."""

    n_segment: int
    halves = False  # the clip, before its module

    def checked_n_segment(self) -> int:
        """``n_segment``, for a forward.

        Raises:
            RuntimeError: activation checkpointing computes a forward again, which had another clip length. Its
                gradients would be wrong.
        """
        length = self.n_segment
        if not ops.eager():  # a compiler traces a forward and its recomputation once
            return length
        own = self.__dict__
        if in_backward():
            # Reentrant checkpoints run their forward under no_grad. Which of several is computed again is unknown.
            lengths = {own.get("_forward_length", length), *own.pop("_no_grad_lengths", ())}
            if lengths != {length}:
                raise RuntimeError(
                    f"n_segment must be the clip length of the forward when checkpointing computes it again, got "
                    f"{length} after a forward with {' and '.join(map(str, sorted(lengths - {length})))}: call "
                    "backward() before changing n_segment"
                )
            return length
        own["_forward_length"] = length
        if self.training and not torch.is_grad_enabled():
            own.setdefault("_no_grad_lengths", set()).add(length)
        return length


class ShiftedModule(ClipModule):
    """One that lets its module see the input shifted; with ``inplace``, without a second activation."""

    inplace: bool = False  # also of modules that were made by other code

    def shifted_module(self) -> nn.Module:
        """The one that sees the shifted input. No property: compiled code would look it up in the class each time."""
        return next(self.children())

    def shift_of(self, x: Tensor) -> str:
        """The encoded shift of an input like ``x``, of which only shape and type matter."""
        raise NotImplementedError

    def call_shifted(self, x: Tensor, shift: str, still: int = 0, *, inplace: bool | None = None) -> Tensor:
        """The module of the shifted ``x``, which holds the same bits afterwards; its first ``still`` tokens stay."""
        net = self.shifted_module()
        eager = ops.eager()
        only_reads = eager and only_reads_its_input(net)
        temporal_shift = ops.temporal_shift_for_reader if only_reads else ops.temporal_shift

        def shifted(x: Tensor) -> Tensor:
            moved = temporal_shift(x[:, still:] if still else x, shift)
            return torch.cat([x[:, :still], moved], 1) if still else moved

        if not (self.inplace if inplace is None else inplace) or not eager:
            return net(shifted(x))
        if torch.is_grad_enabled():
            with ops.recomputing_shift(x, shifted) as copy:
                return net(copy)
        if only_reads and ops.elements_are_apart(x) and not x.is_conj() and not x.is_neg():
            with ops.shifted_in_place(x[:, still:] if still else x, shift):
                return net(x)
        return net(shifted(x))


def only_reads_its_input(net: nn.Module) -> bool:
    """Nor does anyone see what it reads, or the gradient of that: a hook that keeps either would find it changed."""
    return type(net) in _READ_ONLY_MODULES and not has_hooks(net) and not has_global_hooks()


def has_hooks(module: nn.Module) -> bool:
    """Or a ``forward`` set on this one module, as what wraps or offloads modules does."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def has_global_hooks() -> bool:
    """Those of all modules."""
    return any(
        (
            all_modules._global_forward_hooks,
            all_modules._global_forward_pre_hooks,
            all_modules._global_backward_hooks,
            all_modules._global_backward_pre_hooks,
        )
    )


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """The module inside a :class:`ClipModule`; any other is itself."""
    return next(module.children()) if isinstance(module, ClipModule) else module
