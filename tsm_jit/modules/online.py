"""The modules of a network for streams, which tsm_jit.online.convert makes (TSM's online form, arXiv:1811.08383)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsm_jit.modules.tsm import TemporalShift, TokenShift

State = list[Tensor]


class FrameState:
    """What the shifts of one network share while it runs a frame: the folds they read and those they leave."""

    def __init__(self, places: list[str]):
        self.places = places  # of the shifts
        self.before: Sequence[Tensor | None] | None = None  # None: no frame is being run
        self.after: list[Tensor | None] = []
        self.may_differ = False  # is `before` that of no frame at all, so that streams and sizes may be new?


class OnlineShift(nn.Module):
    """``net`` of the frames or tokens of S streams, the first fold taken from the frame before; zero at first."""

    def __init__(self, shift: TemporalShift, frame: FrameState, index: int):
        super().__init__()
        self.net = shift.net
        self.fold_div = shift.fold_div
        self.training = shift.training
        self._channel_dim = 2 if isinstance(shift, TokenShift) else 1
        self._num_prefix_tokens = shift.num_prefix_tokens if isinstance(shift, TokenShift) else 0
        self._frame = frame
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        frame, place = self._frame, self._frame.places[self._index]
        if frame.before is None:
            raise RuntimeError(
                f"the shift at {place!r} must be called by its OnlineNetwork, not again in backward, as checkpoints do"
            )
        if frame.after[self._index] is not None:
            raise ValueError(f"model must call each shift once a frame, got a second call at {place!r}")
        if x.dim() == 5:
            raise ValueError(f"frames must be [S, C, H, W], got {list(x.shape)} at {place!r}")
        moving, channels = x[:, self._num_prefix_tokens :] if self._num_prefix_tokens else x, x.shape[self._channel_dim]
        fold = channels // self.fold_div
        own, rest = moving.split([fold, channels - fold], self._channel_dim)
        before = frame.before[self._index]
        if before is not None and (before.shape, before.dtype) != (own.shape, own.dtype):
            if not frame.may_differ:
                raise ValueError(
                    f"frames must be of the streams, the size and the dtype that the state is of, got a fold of "
                    f"{list(own.shape)} {own.dtype} at {place!r}, where the state is {list(before.shape)} "
                    f"{before.dtype}; reset() begins anew"
                )
            before = None
        if before is None:
            before = torch.zeros_like(own)
        frame.after[self._index] = own.clone()
        shifted = torch.cat([before, rest], self._channel_dim)
        return self.net(
            torch.cat([x[:, : self._num_prefix_tokens], shifted], 1) if self._num_prefix_tokens else shifted
        )

    def extra_repr(self) -> str:
        return f"fold_div={self.fold_div}"


class NoStateError(ValueError, AttributeError):
    """The state was read before the first frame. Also an ``AttributeError``, so that ``hasattr`` is False."""


class OnlineNetwork(nn.Module):
    """A network for streams, made by :func:`convert`; ``net`` is the converted copy, whose keys stayed the same.

    Called with the next frame of each of S streams, ``[S, C, H, W]``, it returns the output of ``net`` for them and
    keeps the state in itself. Called with a ``state`` as well, it keeps nothing and returns ``(output, new_state)``:
    for export, and for gradients through time, which end at the frame otherwise. One thread at a time.

    The state is a list of one tensor for each shift, of the dtype of its activations: ``[S, C // n_div, H, W]``, of
    tokens ``[S, L, C // n_div]``. Once there, it stays where it is, so that a CUDA graph captured after a first frame
    goes on from it; ``reset`` and ``state = ...`` write into it.

    Raises:
        TypeError, ValueError: frames of another number of streams, size or dtype than the state is of; a ``state`` that
            is no list of as many tensors; a network that calls a shift not once a frame.
    """

    def __init__(self, net: nn.Module, frame: FrameState):
        super().__init__()
        self.net = net
        self.training = net.training
        self._frame = frame
        self._state: list[Tensor | None] = [None] * len(frame.places)
        self._is_reset = True

    def forward(self, frames: Tensor, state: Sequence[Tensor] | None = None) -> Tensor | tuple[Tensor, State]:
        if state is not None:
            return self._run(frames, self._checked(state))
        out, after = self._run(frames, self._state, may_differ=self._is_reset)
        self._keep(after)
        self._is_reset = False
        return out

    def _run(self, frames: Tensor, before: Sequence[Tensor | None], may_differ: bool = False) -> tuple[Tensor, State]:
        frame = self._frame
        frame.before, frame.after, frame.may_differ = before, [None] * len(frame.places), may_differ
        try:
            out, after = self.net(frames), frame.after
        finally:
            frame.before, frame.after = None, []
        state = []
        for place, fold in zip(frame.places, after, strict=True):
            if fold is None:
                raise ValueError(f"model must call each shift once a frame, got no call at {place!r}")
            state.append(fold)
        return out, state

    def _keep(self, state: State) -> None:
        # Never an inference tensor, which no frame outside of inference_mode could write to.
        with torch.inference_mode(False), torch.no_grad():
            for i, new in enumerate(state):
                old = self._state[i]
                if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                    old = self._state[i] = torch.empty_like(new)
                old.copy_(new)

    @property
    def state(self) -> State:
        """The state, as it is: later calls change these tensors. To set it copies.

        Raises ValueError when read before the first frame, TypeError or ValueError when set to what is no state.
        """
        state = [each for each in self._state if each is not None]
        if len(state) < len(self._state):
            raise NoStateError("state must not be read before the first frame: initial_state() makes one")
        return state

    @state.setter
    def state(self, state: Sequence[Tensor]) -> None:
        self._keep(self._checked(state))
        self._is_reset = False

    def initial_state(self, frames: Tensor) -> State:
        """The state before the first frame of streams like ``frames``: zeros. The network runs once to see them."""
        with torch.no_grad():
            _, after = self._run(frames, [None] * len(self._state))
        return [torch.zeros_like(each) for each in after]

    def reset(self, mask: Tensor | None = None) -> None:
        """The next frame is the first of its stream; with ``mask``, ``[S]`` of bool, of the streams where it is true.

        Without a mask, the next frame may be of other streams and of another size.

        Raises TypeError or ValueError for a mask of another type, dtype or length, or before the first frame.
        """
        if mask is None:
            self._is_reset = True
            for kept in self._state:
                if kept is not None:
                    kept.zero_()
            return
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        state = self.state
        streams = {each.shape[0] for each in state}
        if mask.dtype != torch.bool or mask.dim() != 1 or streams != {len(mask)}:
            got = f"{mask.dtype} of {list(mask.shape)}"
            raise ValueError(f"mask must be of torch.bool, one for each of {max(streams)} streams, got {got}")
        for kept in state:
            kept.masked_fill_(mask.to(kept.device).view(-1, *[1] * (kept.dim() - 1)), 0)

    def __getattr__(self, name: str) -> Any:
        if name == "state" and "_state" in self.__dict__:  # the property raised
            raise NoStateError("state must not be read before the first frame: initial_state() makes one")
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> OnlineNetwork:
        with torch.inference_mode(False):
            self._state = [None if kept is None else fn(kept) for kept in self._state]
        return super()._apply(fn, *args, **kwargs)

    def _checked(self, state: Sequence[Tensor]) -> list[Tensor]:
        if not isinstance(state, Sequence) or not all(isinstance(each, Tensor) for each in state):
            raise TypeError(f"state must be a list of tensors, got {state!r:.80}")
        if len(state) != len(self._state):
            raise ValueError(f"state must hold a tensor for each of {len(self._state)} shifts, got {len(state)}")
        return list(state)
