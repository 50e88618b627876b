"""The modules of streaming networks, created by :func:`tsm_jit.online.convert` (TSM, arXiv:1811.08383)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsm_jit._checks import refuse_scripting
from tsm_jit.modules.base import ShiftedModule
from tsm_jit.ops.compat import version
from tsm_jit.plans import Padding, Plan

State = list[Tensor]


class FrameState:
    """What the shifts and delays of one network share while the network processes one frame."""

    def __init__(self) -> None:
        self.latency = 0  # the scores are those of the frame that arrived this number of frames ago
        # The largest distance, in frames, from the newest frame to one that a shift reads. 0 without shifts that read
        # later frames: then frames that do not exist are zeros in the state, and `exists` is not needed.
        self.reach = 0
        self.places: list[str] = []  # of each tensor of the state: the name of the module that owns it
        self.before: Sequence[Tensor | None] | None = None  # the state before this frame; None outside of a call
        self.after: list[Tensor | None] = []  # the state after this frame
        # [S, reach + 1]: column k tells for each stream whether the frame k frames before the newest one exists.
        self.exists: Tensor | None = None
        self.may_differ = False  # after a reset, the number of streams and the frame size may change
        self.is_explicit = False  # the caller holds the state: it must share no memory with other values
        self.watched: list[tuple[str, Tensor, int]] | None = None  # values that must not change, and their versions

    def add(self, place: str) -> int:
        """Adds a tensor to the state. Returns its index."""
        self.places.append(place)
        return len(self.places) - 1

    def exchange(self, index: int, value: Tensor) -> Tensor:
        """Stores ``value`` for the next frame. Returns the value that the previous frame stored, at first zeros."""
        place = self.places[index]
        if self.before is None:
            raise RuntimeError(
                f"the shift at {place!r} must be called by its OnlineNetwork, not again in backward by checkpointing"
            )
        if self.after[index] is not None:
            raise ValueError(f"model must call each shift once per frame, got a second call at {place!r}")
        before = self.before[index]
        if before is not None and (before.shape, before.dtype) != (value.shape, value.dtype):
            if not self.may_differ:
                raise ValueError(
                    f"frames must match the state in the number of streams, size and dtype, got values of "
                    f"{list(value.shape)} {value.dtype} at {place!r}, where the state is {list(before.shape)} "
                    f"{before.dtype}: reset() starts new streams"
                )
            before = None
        if before is None:
            before = torch.zeros_like(value)
        elif self.is_explicit:
            before = before.clone()
        self.after[index] = value
        return before

    def advance(self, frames: Tensor) -> None:
        """Sets ``exists`` for the new frames. Tensor 0 of the state says which earlier frames exist."""
        before = self.exchange(0, frames.new_empty(frames.shape[0], self.reach + 1, dtype=torch.bool))
        self.exists = torch.cat([~before[:, :1], before[:, 1:]], 1)
        self.after[0] = torch.cat([torch.zeros_like(before[:, :1]), self.exists[:, :-1]], 1)

    def watch(self, place: str, value: Tensor) -> None:
        if self.watched is not None:
            self.watched.append((place, value, version(value)))


class FrameShift(nn.Module):
    """Shifts the channels of single frames. The state holds the folds that later frames read.

    The input is the newest frame and, for a plan that reads ``d`` frames ahead, the ``d`` frames before it, newest
    first. The output is the shifted last one of these frames.
    """

    def __init__(
        self,
        place: str,
        frame: FrameState,
        plan: Callable[[int], Plan],
        padding: Padding,
        channel_dim: int = 1,
        num_prefix_tokens: int = 0,
    ):
        super().__init__()
        self.ahead = max(0, *(offset for _, offset in plan(0)))
        self.behind = max(0, *(-offset for _, offset in plan(0)))
        self.delay = self.ahead  # the output is for the frame that arrived this number of frames ago
        self._place = place
        self._frame = frame
        self._plan = plan
        self._padding = padding
        self._channel_dim = channel_dim
        self._num_prefix_tokens = num_prefix_tokens
        self._indices = [[frame.add(place) for _ in range(-offset)] for _, offset in plan(0)]

    def forward(self, *frames: Tensor) -> Tensor:
        x, prefix, dim = frames[-1], self._num_prefix_tokens, self._channel_dim
        if x.dim() == 5:
            raise ValueError(f"frames must be [S, C, H, W], got {list(x.shape)} at {self._place!r}")
        moving = [each[:, prefix:] for each in frames] if prefix else frames
        parts, begin, channels = [], 0, x.shape[dim]
        for (width, offset), indices in zip(self._plan(channels), self._indices, strict=True):
            folds = [each.narrow(dim, begin, width) for each in moving]
            own = folds[-1]
            if offset > 0:
                source = folds[self.ahead - offset]
            else:
                source = own.clone()  # a view would keep all channels in memory until the next frame
                for index in indices:
                    source = self._frame.exchange(index, source)
            parts.append(self._padded(source, own, offset))
            begin += width
        shifted = torch.cat([*parts, moving[-1].narrow(dim, begin, channels - begin)], dim)
        return torch.cat([x[:, :prefix], shifted], 1) if prefix else shifted

    def _padded(self, source: Tensor, own: Tensor, offset: int) -> Tensor:
        exists = self._frame.exists
        if exists is None:
            return source
        exists = exists[:, self.delay - offset].to(own.device).view(-1, *[1] * (own.dim() - 1))
        return torch.where(exists, source, own if self._padding == "keep" else 0)

    def extra_repr(self) -> str:
        offsets = ", ".join(f"{offset:+}" for _, offset in self._plan(0))
        return f"offsets={offsets}, padding={self._padding}, delay={self.delay}"


class OnlineShift(nn.Module):
    """Shifts single frames, then calls the module of a :class:`TemporalShift`. Its state-dict keys do not change."""

    def __init__(self, shifted: ShiftedModule, shift: FrameShift):
        super().__init__()
        self._name, net = next(shifted.named_children())
        self.add_module(self._name, net)
        self.shift = shift
        self.training = shifted.training

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self._name)(self.shift(x))


class Delay(nn.Module):
    """Returns its input of the previous frame."""

    def __init__(self, place: str, frame: FrameState):
        super().__init__()
        self._place = place
        self._frame = frame
        self._index = frame.add(place)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(f"model must delay only tensors, got {type(x).__name__} at {self._place!r}")
        # A stored state gets a copy of `x` at the end of the frame.
        before = self._frame.exchange(self._index, x.clone() if self._frame.is_explicit else x)
        if not self._frame.is_explicit:  # the next frame overwrites a stored state; outputs and backward may read it
            before = before.clone()
        self._frame.watch(self._place, x)
        self._frame.watch(self._place, before)
        return before


class NoStateError(ValueError, AttributeError):
    """The state was read before the first frame. Also an ``AttributeError``, so that ``hasattr`` is False."""


class OnlineNetwork(nn.Module):
    """A streaming network, created by :func:`convert` (TSM, arXiv:1811.08383, section 4.2).

    ``net`` is the converted copy of the network, with the same state-dict keys.

    ``stream(frames)`` takes the next frame of each of S streams, ``[S, C, H, W]``. It returns the output of ``net`` for
    the frames that arrived ``latency`` calls before. For the first ``latency`` calls it returns ``None``. ``flush()``
    yields the outputs of the last ``latency`` frames. With one-directional shifts ``latency`` is 0. The module stores
    the state. Gradients do not flow into earlier frames.

    ``stream(frames, state)`` returns ``(output, new_state)`` and does not change the stored state. Use it for export
    and for gradients through time. The first ``latency`` outputs are meaningless. Only one thread may call the module
    at a time.

    The state is a list of tensors. Each shift has one for each frame behind that it reads, in the dtype of its
    activations: ``[S, C // n_div, H, W]``, for tokens ``[S, L, C // n_div]``. A network with a latency also stores the
    activations of the frames that wait. Its first tensor is bool ``[S, K]``:

    - Column 0 is False. Set it to True if a stream has ended: the next call then ignores its frame, and ``latency``
      such calls give the last outputs.
    - Column ``k`` tells whether the frame ``k`` calls before the next one exists. So column ``latency + 1`` of
      ``new_state[0]`` tells which rows of the output are results.

    After the first frame the memory of the state stays in place: ``reset`` and ``state = ...`` write into it. So a CUDA
    graph remains valid if it was captured after the first output.

    Raises:
        TypeError: ``state`` is not a list of tensors.
        ValueError: the frames differ from the state in the number of streams, size or dtype; ``state`` has another
            number of tensors; the network calls a shift not exactly once per frame; or a layer changes an activation
            in place while the stream stores it for later frames.
        RuntimeError: an earlier :meth:`flush` has begun and is not finished.

    Example::

        net = torchvision.models.resnet18()
        tsm_jit.make_temporal_shift(net, n_segment=8)
        stream = tsm_jit.online.convert(net.eval())
        video = torch.randn(20, 1, 3, 224, 224)
        outputs = [stream(frames) for frames in video]  # None for the first 8 frames: stream.latency is 8
        outputs = outputs[stream.latency :] + list(stream.flush())  # 20 times [1, 1000]
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, net: nn.Module, frame: FrameState):
        super().__init__()
        self.net = net
        self.training = net.training
        self._frame = frame
        self._state: list[Tensor | None] = [None] * len(frame.places)
        self._is_reset = True
        self._open_flush: object | None = None  # identifies the flush() that has begun and is not finished
        self._num_waiting = 0  # frames whose output is still to come, at most the latency
        self._last_frames: tuple[torch.Size, torch.dtype, torch.device] | None = None

    @property
    def latency(self) -> int:
        """The number of frames between a frame and its output: the sum of the distances that the shifts look ahead."""
        return self._frame.latency

    @property
    def valid(self) -> Tensor:
        """``[S]``, bool: the streams whose row of the last output is a result.

        A row is no result for ``latency`` frames after its stream was reset by a mask.

        Raises:
            ValueError: it is read before the first frame.
        """
        first = self.state[0]
        return first[:, self.latency + 1].clone() if self._frame.reach else first.new_ones(len(first), dtype=torch.bool)

    def forward(self, frames: Tensor, state: Sequence[Tensor] | None = None) -> Any:
        if state is not None:
            return self._run(frames, self._checked(state), is_explicit=True)
        if self._open_flush is not None:
            raise RuntimeError("flush() must be iterated to its end, or reset() called, before the next frame")
        out = self._step(frames)
        self._last_frames = frames.shape, frames.dtype, frames.device
        if self._num_waiting < self.latency:
            self._num_waiting += 1
            return None
        return out

    def flush(self) -> Iterator[Tensor]:
        """Ends the videos of all streams: yields the outputs of the last ``latency`` frames, then resets.

        They are the outputs of the network on videos that end here. For each of them the network runs once.

        Raises:
            ValueError: ``state`` was assigned and no frame followed, so the frame size is unknown.
            RuntimeError: an earlier ``flush()`` has begun and is not finished.
        """
        if self._open_flush is not None:
            raise RuntimeError("flush() must be iterated to its end, or reset() called, before another flush()")
        if not self._num_waiting:
            self.reset()
            return
        if self._last_frames is None:
            raise ValueError("flush() must follow a frame, got an assigned state and no frame")
        shape, dtype, device = self._last_frames
        this = self._open_flush = object()
        try:
            for i in range(self.latency):
                if self._open_flush is not this:  # reset() has been called
                    return
                self.state[0][:, 0] = True  # the frame of the next call does not exist
                out = self._step(torch.zeros(shape, dtype=dtype, device=device))
                if i >= self.latency - self._num_waiting:
                    yield out
        finally:
            if self._open_flush is this:
                self.reset()

    def _step(self, frames: Tensor) -> Tensor:
        out, after = self._run(frames, self._state, may_differ=self._is_reset)
        self._store(after)
        self._is_reset = False
        return out

    def _run(
        self, frames: Tensor, before: Sequence[Tensor | None], may_differ: bool = False, is_explicit: bool = False
    ) -> tuple[Tensor, State]:
        frame = self._frame
        frame.before, frame.after, frame.may_differ = before, [None] * len(frame.places), may_differ
        frame.is_explicit = is_explicit
        call = self._call
        if frame.reach and before[0] is None:
            call = self._call_watched
            if torch.compiler.is_compiling():  # a compiler does not count changes in place as PyTorch does
                call = torch.compiler.disable(call)
        try:
            out = call(frames)
            after = frame.after
        finally:
            frame.before, frame.after, frame.exists = None, [], None
        state = []
        for place, value in zip(frame.places, after, strict=True):
            if value is None:
                raise ValueError(f"model must call each shift once per frame, got no call at {place!r}")
            state.append(value)
        return out, state

    def _call(self, frames: Tensor) -> Any:
        if self._frame.reach:
            self._frame.advance(frames)
        return self.net(frames)

    def _call_watched(self, frames: Tensor) -> Any:
        with _watching(self._frame):
            return self._call(frames.clone() if frames.is_inference() else frames)

    def _store(self, state: State) -> None:
        # The state must not be an inference tensor: frames outside of inference_mode could not write to it.
        with torch.inference_mode(False), torch.no_grad():
            # A tensor of a frame further back comes later in the list. Its new value is the old one of the tensor
            # before it, so it is written first.
            for i, new in reversed(list(enumerate(state))):
                old = self._state[i]
                like = (new.shape, new.dtype, new.device)
                # A copy of the module that was made in inference_mode has inference tensors.
                if old is None or old.is_inference() or (old.shape, old.dtype, old.device) != like:
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
        self._is_reset, self._open_flush = False, None
        exists = self.state[0].any(0).tolist() if self._frame.reach else []  # waits for the device
        self._num_waiting = max((k for k in range(1, self.latency + 1) if exists[k]), default=0)

    def initial_state(self, frames: Tensor) -> State:
        """Returns the state before the first frame, zeros, for streams like ``frames``. It runs the network once."""
        with torch.no_grad():
            _, after = self._run(frames, [None] * len(self._state))
        return [torch.zeros_like(each) for each in after]

    def reset(self, mask: Tensor | None = None) -> None:
        """Starts new streams. Outputs of their earlier frames that are still to come are dropped.

        Args:
            mask: ``[S]``, bool: the streams to reset. Without a mask all are reset, and the next frame may have another
                number of streams and another size. With a mask, the other streams go on: for the next ``latency``
                frames ``valid`` is False for the rows of the new streams.

        Raises:
            TypeError: ``mask`` is not a tensor.
            ValueError: ``mask`` has another dtype or length, or it is given before the first frame.
        """
        if mask is None:
            self._is_reset, self._open_flush, self._num_waiting = True, None, 0
            for value in self._state:
                if value is not None:
                    value.zero_()
            return
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor [S] of torch.bool, got {type(mask).__name__}")
        state = self.state[:1] if self._frame.reach else self.state  # no shift reads frames that do not exist
        streams = {each.shape[0] for each in state}
        if mask.dtype != torch.bool or mask.dim() != 1 or streams != {len(mask)}:
            got = f"{mask.dtype} of {list(mask.shape)}"
            raise ValueError(f"mask must be torch.bool with one value for each of {max(streams)} streams, got {got}")
        for value in state:
            value.masked_fill_(mask.to(value.device).view(-1, *[1] * (value.dim() - 1)), 0)

    def __getattr__(self, name: str) -> Any:
        if name in ("state", "valid") and "_state" in self.__dict__:  # the property raised
            raise NoStateError(f"{name} must not be read before the first frame: initial_state() creates a state")
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> OnlineNetwork:
        with torch.inference_mode(False):
            self._state = [None if value is None else fn(value) for value in self._state]
            if self._last_frames is not None:
                shape, dtype, device = self._last_frames
                like = fn(torch.empty(0, dtype=dtype, device=device))
                self._last_frames = shape, like.dtype, like.device
        return super()._apply(fn, *args, **kwargs)

    def _checked(self, state: Sequence[Tensor]) -> list[Tensor]:
        if not isinstance(state, Sequence) or not all(isinstance(each, Tensor) for each in state):
            raise TypeError(f"state must be a list of tensors, got {state!r:.80}")
        if len(state) != len(self._state):
            raise ValueError(f"state must hold {len(self._state)} tensors, as initial_state() does, got {len(state)}")
        return list(state)


@contextlib.contextmanager
def _watching(frame: FrameState) -> Iterator[None]:
    """Checks that no delayed value changes until the end of the frame. Tensors of inference_mode have no versions."""
    frame.watched = []
    try:
        with contextlib.ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
            yield
        for place, value, before in frame.watched:
            if version(value) != before:
                raise ValueError(
                    f"model must not change activations in place that later frames read, got a change of {place!r}"
                )
    finally:
        frame.watched = None
