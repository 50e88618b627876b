"""Streams: a converted network that is fed one frame at a time (TSM's online form, arXiv:1811.08383, section 4.2).

Each shift keeps, of the frame before, the fold that the next frame reads. The network then computes for every frame
what it computes offline, where all frames of a clip are there at once; nothing is computed twice.

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")  # no shift may read a frame that is still to come
    stream = tsm_jit.online.convert(net.eval())
    for frame in video:
        scores = stream(frame)  # [1, C, H, W] in, the scores of this frame out
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsm_jit._networks import ClipModule
from tsm_jit.tsm import TemporalShift

State = list[Tensor]


class _Caches:
    """The folds that the shifts of one network read and leave during a frame, in the order of its modules."""

    def __init__(self, count: int):
        self.before: list[Tensor | None] = [None] * count
        self.after: list[Tensor | None] = [None] * count


class _OnlineShift(nn.Module):
    """``net`` of the frames ``[S, C, *]`` of S streams, the first fold taken from the frame before; zero at first."""

    def __init__(self, net: nn.Module, fold_div: int, caches: _Caches, index: int):
        super().__init__()
        self.net = net
        self.fold_div = fold_div
        self._caches = caches
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        fold = x.shape[1] // self.fold_div
        own, rest = x[:, :fold], x[:, fold:]
        before = self._caches.before[self._index]
        if before is None:
            before = torch.zeros_like(own)
        elif before.shape != own.shape:
            raise ValueError(
                f"frames must be of as many streams and of the size that the state is of, got {list(own.shape)} at a "
                f"shift whose state is {list(before.shape)}; reset() begins anew"
            )
        self._caches.after[self._index] = own.clone()
        return self.net(torch.cat([before, rest], 1))

    def extra_repr(self) -> str:
        return f"fold_div={self.fold_div}"


class OnlineNetwork(nn.Module):
    """A network for streams, made by :func:`convert`; ``net`` is the converted copy, whose keys stayed the same.

    Called with the next frame of each of S streams, ``[S, C, H, W]``, it returns the output of ``net`` for them and
    keeps the state in itself. Called with a ``state`` as well, it keeps nothing and returns ``(output, new_state)``:
    for export, for CUDA graphs of one's own, and for gradients through time, which end at the frame otherwise.

    The state is a list of one tensor ``[S, C // n_div, H, W]`` for each shift, of the dtype of its activations.

    Raises:
        ValueError: frames of another number of streams or size than the state is of; a state of another length.
    """

    def __init__(self, net: nn.Module, caches: _Caches):
        super().__init__()
        self.net = net
        self.training = net.training
        self._caches = caches

    def forward(self, frames: Tensor, state: Sequence[Tensor] | None = None) -> Tensor | tuple[Tensor, State]:
        caches = self._caches
        if state is None:
            out = self.net(frames)
            for i, after in enumerate(caches.after):
                # Never an inference tensor, which no later frame outside of inference_mode could write to.
                with torch.inference_mode(False), torch.no_grad():
                    if caches.before[i] is None:
                        caches.before[i] = torch.empty_like(after)
                    caches.before[i].copy_(after)  # where it was: a CUDA graph finds it there again
            return out
        kept, caches.before = caches.before, self._checked(state)
        try:
            return self.net(frames), list(caches.after)
        finally:
            caches.before = kept

    @property
    def state(self) -> State:
        """The state, as it is: later calls change these tensors. To set it copies.

        Raises ValueError when read before the first frame, or set to a list of another length.
        """
        if None in self._caches.before:
            raise ValueError("state must not be read before the first frame: initial_state() makes one")
        return list(self._caches.before)

    @state.setter
    def state(self, state: Sequence[Tensor]) -> None:
        self._caches.before = [each.detach().clone() for each in self._checked(state)]

    def initial_state(self, frames: Tensor) -> State:
        """The state before the first frame of streams like ``frames``: zeros. The network runs once to see them."""
        kept, self._caches.before = self._caches.before, [None] * len(self._caches.before)
        try:
            with torch.no_grad():
                self.net(frames)
        finally:
            self._caches.before = kept
        return [torch.zeros_like(after) for after in self._caches.after]

    def reset(self, mask: Tensor | None = None) -> None:
        """The next frame is the first of its stream; with ``mask``, ``[S]`` of bool, of the streams where it is true.

        Raises ValueError for a mask of another dtype or length.
        """
        if mask is None:
            self._caches.before = [None] * len(self._caches.before)
            return
        for kept in self._caches.before:
            if kept is None:
                continue
            if mask.dtype != torch.bool or mask.shape != kept.shape[:1]:
                got = f"{mask.dtype} of {list(mask.shape)}"
                raise ValueError(f"mask must be of torch.bool, one for each of {kept.shape[0]} streams, got {got}")
            kept.masked_fill_(mask.to(kept.device).view(-1, *[1] * (kept.dim() - 1)), 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> OnlineNetwork:
        self._caches.before = [None if kept is None else fn(kept) for kept in self._caches.before]
        return super()._apply(fn, *args, **kwargs)

    def _checked(self, state: Sequence[Tensor]) -> list[Tensor]:
        if len(state) != len(self._caches.before):
            raise ValueError(
                f"state must hold a tensor for each of {len(self._caches.before)} shifts, got {len(state)}"
            )
        return list(state)


def convert(model: nn.Module) -> OnlineNetwork:
    """A copy of ``model`` for streams; ``model`` stays as it is.

    Args:
        model: a network with :class:`tsm_jit.TemporalShift` modules of ``direction="past"``, in any place, and nothing
            else that looks at other frames; in ``eval`` mode if it has batch normalisation.

    Raises:
        TypeError: ``model`` is no module. ValueError: it holds no shift; one that reads frames still to come; a
        temporal pool, which halves the frames, or TSAM's shift.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if not isinstance(module, ClipModule):
            continue
        if not _is_shift(module):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"model must hold no other temporal module than tsm_jit.TemporalShift, got {kind} at {name!r}"
            )
        if module.direction != "past":
            raise ValueError(
                f"model must shift from the past alone, since the next frame of a stream is still to come; got "
                f"direction={module.direction!r} at {name!r}: convert and train with direction='past'"
            )
    root = nn.Sequential(copy.deepcopy(model))  # the model may be a shift itself
    places = [
        (parent, name) for parent in root.modules() for name, child in parent.named_children() if _is_shift(child)
    ]
    if not places:
        raise ValueError(f"model must hold temporal shifts, got {type(model).__name__}")
    caches = _Caches(len(places))
    for index, (parent, name) in enumerate(places):
        shift = getattr(parent, name)
        parent.add_module(name, _OnlineShift(shift.net, shift.fold_div, caches, index))
    return OnlineNetwork(root[0], caches)


def _is_shift(module: nn.Module) -> bool:
    return isinstance(module, TemporalShift)
