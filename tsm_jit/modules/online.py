"""The modules of streaming networks, created by :func:`tsm_jit.online.convert` (TSM, arXiv:1811.08383)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsm_jit.modules.tsm import TemporalShift, TokenShift

State = list[Tensor]


class FrameState:
    """The state that all shifts of one network share while the network processes one frame."""

    def __init__(self, places: list[str]):
        self.places = places  # the module names of the shifts
        self.before: Sequence[Tensor | None] | None = None  # folds of the previous frame; None outside of a call
        self.after: list[Tensor | None] = []  # folds of this frame
        self.may_differ = False  # after a reset, the number of streams and the frame size may change


class OnlineShift(nn.Module):
    """Replaces the first fold of each frame by that fold of the previous frame (at first zeros), then calls ``net``."""

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
                f"the shift at {place!r} must be called by its OnlineNetwork, not again in backward by checkpointing"
            )
        if frame.after[self._index] is not None:
            raise ValueError(f"model must call each shift once per frame, got a second call at {place!r}")
        if x.dim() == 5:
            raise ValueError(f"frames must be [S, C, H, W], got {list(x.shape)} at {place!r}")
        moving, channels = x[:, self._num_prefix_tokens :] if self._num_prefix_tokens else x, x.shape[self._channel_dim]
        fold = channels // self.fold_div
        own, rest = moving.split([fold, channels - fold], self._channel_dim)
        before = frame.before[self._index]
        if before is not None and (before.shape, before.dtype) != (own.shape, own.dtype):
            if not frame.may_differ:
                raise ValueError(
                    f"frames must match the state in the number of streams, size and dtype, got a fold of "
                    f"{list(own.shape)} {own.dtype} at {place!r}, where the state is {list(before.shape)} "
                    f"{before.dtype}: reset() starts new streams"
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
    """A streaming network, created by :func:`convert` (TSM, arXiv:1811.08383, section 4.2).

    ``net`` is the converted copy of the network, with the same state-dict keys.

    ``stream(frames)`` takes the next frame of each of S streams, ``[S, C, H, W]``, and returns the output of ``net``.
    The module stores the state. Gradients do not flow into earlier frames.

    ``stream(frames, state)`` returns ``(output, new_state)`` and does not change the stored state. Use it for export
    and for gradients through time. Only one thread may call the module at a time.

    The state is a list with one tensor for each shift, in the dtype of its activations: ``[S, C // n_div, H, W]``, for
    tokens ``[S, L, C // n_div]``. After the first frame its memory stays in place: ``reset`` and ``state = ...`` write
    into it. So a CUDA graph captured after the first frame remains valid.

    Raises:
        TypeError: ``state`` is not a list of tensors.
        ValueError: the frames differ from the state in the number of streams, size or dtype; ``state`` has another
            number of tensors; or the network calls a shift not exactly once per frame.

    Example::

        net = torchvision.models.resnet18()
        tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")
        stream = tsm_jit.online.convert(net.eval())
        scores = stream(torch.randn(1, 3, 224, 224))  # [1, 1000]
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
        self._store(after)
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
                raise ValueError(f"model must call each shift once per frame, got no call at {place!r}")
            state.append(fold)
        return out, state

    def _store(self, state: State) -> None:
        # The state must not be an inference tensor: frames outside of inference_mode could not write to it.
        with torch.inference_mode(False), torch.no_grad():
            for i, new in enumerate(state):
                old = self._state[i]
                if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                    old = self._state[i] = torch.empty_like(new)
                old.copy_(new)

    @property
    def state(self) -> State:
        """The stored state. Later calls change these tensors. Assignment copies the new values.

        Raises:
            TypeError: the assigned value is not a list of tensors.
            ValueError: it is read before the first frame, or the assigned list has another number of tensors.
        """
        state = [each for each in self._state if each is not None]
        if len(state) < len(self._state):
            raise NoStateError("state must not be read before the first frame: initial_state() creates one")
        return state

    @state.setter
    def state(self, state: Sequence[Tensor]) -> None:
        self._store(self._checked(state))
        self._is_reset = False

    def initial_state(self, frames: Tensor) -> State:
        """Returns the state before the first frame, zeros, for streams like ``frames``. It runs the network once."""
        with torch.no_grad():
            _, after = self._run(frames, [None] * len(self._state))
        return [torch.zeros_like(each) for each in after]

    def reset(self, mask: Tensor | None = None) -> None:
        """Starts new streams: sets the state to zeros.

        Args:
            mask: ``[S]``, bool: the streams to reset. Without a mask all are reset, and the next frame may have another
                number of streams and another size.

        Raises:
            TypeError: ``mask`` is not a tensor.
            ValueError: ``mask`` has another dtype or length, or it is given before the first frame.
        """
        if mask is None:
            self._is_reset = True
            for fold in self._state:
                if fold is not None:
                    fold.zero_()
            return
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        state = self.state
        streams = {each.shape[0] for each in state}
        if mask.dtype != torch.bool or mask.dim() != 1 or streams != {len(mask)}:
            got = f"{mask.dtype} of {list(mask.shape)}"
            raise ValueError(f"mask must be torch.bool with one value for each of {max(streams)} streams, got {got}")
        for fold in state:
            fold.masked_fill_(mask.to(fold.device).view(-1, *[1] * (fold.dim() - 1)), 0)

    def __getattr__(self, name: str) -> Any:
        if name == "state" and "_state" in self.__dict__:  # the property raised
            raise NoStateError("state must not be read before the first frame: initial_state() makes one")
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> OnlineNetwork:
        with torch.inference_mode(False):
            self._state = [None if fold is None else fn(fold) for fold in self._state]
        return super()._apply(fn, *args, **kwargs)

    def _checked(self, state: Sequence[Tensor]) -> list[Tensor]:
        if not isinstance(state, Sequence) or not all(isinstance(each, Tensor) for each in state):
            raise TypeError(f"state must be a list of tensors, got {state!r:.80}")
        if len(state) != len(self._state):
            raise ValueError(f"state must hold a tensor for each of {len(self._state)} shifts, got {len(state)}")
        return list(state)
