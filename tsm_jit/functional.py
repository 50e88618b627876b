"""The public functions: every argument checked once, then on to :mod:`tsm_jit.ops`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tsm_jit import ops
from tsm_jit._checks import integer, one_of
from tsm_jit.plans import PADDINGS, Direction, Padding, Plan, Shift, temporal
from tsm_jit.reference import clips_apart


def temporal_shift(
    x: Tensor,
    n_segment: int | None = None,
    fold_div: int = 8,
    *,
    inplace: bool = False,
    n_segment_shifted: int | None = None,
    shift_depth: int = 1,
    padding: Padding = "zeros",
    direction: Direction = "both",
    channel_dim: int | None = None,
) -> Tensor:
    """Shift folds of channels along time, as TSM and TSAM do: no arithmetic, no parameters.

    With ``f = C // fold_div // shift_depth``, the first fold of ``f`` channels reads the next frame, the second the
    previous one, the third the frame after the next, and so on up to ``shift_depth`` frames either way; the remaining
    channels stay. Values are moved bit by bit in every dtype.

    Papers: TSM, `arXiv:1811.08383 <https://arxiv.org/abs/1811.08383>`_; TSAM (``shift_depth``, ``n_segment_shifted``
    and ``padding="keep"``), https://github.com/aav-antonov/TSAM.

    Args:
        x: frames ``[N*T, C, *]`` (``[N*T, C, H, W]``, say), clips ``[N, T, C, H, W]``, or with ``channel_dim=-1``
            tokens ``[N*T, L, C]``; any dtype, any strides. NCHW, channels_last and every other layout in which the
            channels of one frame lie in equal runs are read and written natively; what is expanded is shifted before it
            is; others (cropped, say) are copied into the result and shifted there, or in place go through one
            contiguous copy.
        n_segment: the clip length ``T`` in frames. May be left out for clips of five dimensions.
        fold_div: a fold is this part of the channels: ``C // fold_div``, the ``n_div`` of TSM's constructors.
        inplace: shift ``x`` itself and return it. See below.
        n_segment_shifted: the leading frames of a clip that take part, ``1..T``, all by default. The others (the audio
            segment of TSAM) are left as they are.
        shift_depth: how many frames away the farthest fold reads; TSM has 1, TSAM up to 4.
        padding: what a frame reads where the source frame does not exist: ``"zeros"`` (TSM), ``"keep"`` (TSAM: its own
            value), ``"replicate"`` (the first or last frame), ``"circular"`` (from the other end).
        direction: ``"both"``, or only the folds that read the ``"past"`` (uni-directional, for streaming) or the
            ``"future"``.
        channel_dim: the dimension of the channels: by default 2 for five dimensions, else 1. With ``channel_dim=1``
            five dimensions are ``[N*T, C, D, H, W]``.

    Returns:
        The shifted tensor, of the shape, dtype, device and memory layout of ``x``.

    Raises:
        TypeError: an argument is of the wrong type; ``x`` is sparse or quantized.
        ValueError: ``n_segment`` does not divide ``N*T`` or differs from ``T``; the plan needs more than ``C``
            channels; any argument is outside its range; ``inplace`` on a tensor whose elements share memory (under
            ``torch.compile`` PyTorch itself refuses expanded tensors, and does not see other overlaps).

    In place, PyTorch's rules hold: the version counter of ``x`` is bumped, its history rebased, tensors that other
    operations saved for their backward are reported as stale, ``grad_output`` is never written, and without autograd
    nothing is allocated on CUDA but for strides that need the contiguous copy. A leaf that requires grad may be shifted
    too: the result shares its storage (under ``torch.compile`` it is a copy), and ``x.grad`` is the gradient with
    respect to the values before the shift. Beware that in a residual block the skip branch reads the same tensor;
    :class:`tsm_jit.TemporalShift` takes care of that.

    Example::

        x = torch.randn(2 * 8, 64, 56, 56)
        y = tsm_jit.temporal_shift(x, n_segment=8)
    """
    shift = encode_temporal(x, n_segment, fold_div, n_segment_shifted, shift_depth, padding, direction, channel_dim)
    return ops.temporal_shift_(x, shift) if inplace else ops.temporal_shift(x, shift)


def shift_groups(
    x: Tensor,
    n_segment: int | None,
    groups: Sequence[tuple[int, int]],
    *,
    padding: Padding = "zeros",
    n_segment_shifted: int | None = None,
    inplace: bool = False,
    channel_dim: int | None = None,
) -> Tensor:
    """The general shift: groups of channels, each read from its own distance in time.

    Args:
        x: as in :func:`temporal_shift`.
        n_segment: as in :func:`temporal_shift`; ``None`` only for clips of five dimensions.
        groups: ``(width, offset)`` pairs laid from channel 0 upward. The ``width`` channels of a group read the frame
            ``offset`` later, earlier if negative; 0 leaves them. Channels past the last group do not move. The plans of
            TSM, TSAM and Paddle are in :mod:`tsm_jit.plans`.
        padding, n_segment_shifted, inplace, channel_dim: as in :func:`temporal_shift`.

    Returns:
        The shifted tensor, of the shape, dtype, device and memory layout of ``x``.

    Raises:
        TypeError, ValueError: as :func:`temporal_shift`; also a negative width, widths that sum to more than ``C``.

    Example::

        y = tsm_jit.shift_groups(x, 8, [(4, +1), (8, -3)], padding="circular")
    """
    shift = _encode_groups(_dense_shape(x), n_segment, _as_plan(groups), n_segment_shifted, padding, channel_dim)
    return ops.temporal_shift_(x, shift) if inplace else ops.temporal_shift(x, shift)


def encode_temporal(
    x: Tensor,
    n_segment: int | None,
    fold_div: int,
    n_segment_shifted: int | None = None,
    shift_depth: int = 1,
    padding: Padding = "zeros",
    direction: Direction = "both",
    channel_dim: int | None = None,
) -> str:
    """The arguments of :func:`temporal_shift`, checked, as the operators take them."""
    shape = _dense_shape(x)
    return _encode_temporal(shape, n_segment, fold_div, n_segment_shifted, shift_depth, padding, direction, channel_dim)


def _remembered(encode: Callable[..., str]) -> Callable[..., str]:
    """``encode``, whose results are remembered: it costs more than a launch, and a network repeats its shapes."""
    remembered = functools.lru_cache(maxsize=4096, typed=True)(encode)

    def call(*args: Any) -> str:
        if is_compiling():
            return encode(*args)
        try:
            return remembered(*args)
        except TypeError:  # an argument without a hash, or a wrong one: let the checks name it
            return encode(*args)

    return call


# --- checks ----------------------------------------------------------------------------------------------------------


def _dense_shape(x: Any) -> torch.Size:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized:
        kind = "quantized" if x.is_quantized else str(x.layout)
        raise TypeError(f"x must be a dense tensor (torch.strided, not quantized), got {kind}")
    try:
        return x.shape
    except RuntimeError:  # of different lengths
        raise TypeError("x must be a dense tensor (torch.strided, not quantized), got a nested tensor") from None


@_remembered
def _encode_temporal(
    shape: torch.Size,
    n_segment: Any,
    fold_div: Any,
    n_segment_shifted: Any,
    shift_depth: Any,
    padding: Any,
    direction: Any,
    channel_dim: Any,
) -> str:
    channel_dim = _channel_dim(len(shape), channel_dim)
    plan = temporal(shape[channel_dim], fold_div, shift_depth, direction)
    got = f"{fold_div} with shift_depth={shift_depth} and direction={direction!r}"
    return _encode(shape, n_segment, plan, "fold_div", got, n_segment_shifted, padding, channel_dim)


@_remembered
def _encode_groups(
    shape: torch.Size, n_segment: Any, plan: Plan, n_segment_shifted: Any, padding: Any, channel_dim: Any
) -> str:
    channel_dim = _channel_dim(len(shape), channel_dim)
    return _encode(shape, n_segment, plan, "groups", list(plan), n_segment_shifted, padding, channel_dim)


def _encode(
    shape: torch.Size,
    n_segment: Any,
    plan: Plan,
    plan_argument: str,
    got: Any,
    n_segment_shifted: Any,
    padding: Any,
    channel_dim: int,
) -> str:
    plan = tuple([(int(width), offset) for width, offset in plan])  # torch.export may count channels in symbols
    n_segment = _n_segment(shape, n_segment, channel_dim)
    if n_segment_shifted is None:
        n_segment_shifted = n_segment
    n_segment_shifted = integer("n_segment_shifted", n_segment_shifted, 1)
    if n_segment_shifted > n_segment:
        raise ValueError(f"n_segment_shifted must be at most n_segment={n_segment}, got {n_segment_shifted}")
    one_of("padding", padding, PADDINGS)
    width = sum([group[0] for group in plan])
    if width > shape[channel_dim]:
        raise ValueError(
            f"{plan_argument} must give a shift that fits into the {shape[channel_dim]} channels of x, "
            f"got {got}: {width} channels"
        )
    return Shift(n_segment, n_segment_shifted, channel_dim, padding, plan).canonical().encode()


def _n_segment(shape: torch.Size, n_segment: Any, channel_dim: int) -> int:
    if clips_apart(len(shape), channel_dim):
        if n_segment is None:
            n_segment = shape[1]
        elif integer("n_segment", n_segment, 1) != shape[1]:
            raise ValueError(f"n_segment must equal the clip length {shape[1]} of x {list(shape)}, got {n_segment}")
        if shape[1] == 0:
            raise ValueError(f"x must have at least one frame per clip, got the shape {list(shape)}")
        return int(n_segment)
    if n_segment is None:
        raise ValueError(f"n_segment must be given unless x is [N, T, C, H, W], got None for x {list(shape)}")
    n_segment = integer("n_segment", n_segment, 1)
    if shape[0] % n_segment != 0:
        raise ValueError(f"n_segment must divide the {shape[0]} frames of x, got {n_segment}")
    return n_segment


def _channel_dim(dim: int, channel_dim: Any) -> int:
    if dim < 2:
        raise ValueError(f"x must have at least two dimensions, frames and channels, got {dim}")
    if channel_dim is None:
        return 2 if dim == 5 else 1
    channel_dim = integer("channel_dim", channel_dim)
    if not -dim <= channel_dim < dim or channel_dim % dim == 0:
        raise ValueError(f"channel_dim must be one of the dimensions 1..{dim - 1} of x, got {channel_dim}")
    return channel_dim % dim


def _as_plan(groups: Any) -> Plan:
    try:
        pairs = [(width, offset) for width, offset in groups]
    except (TypeError, ValueError):
        raise TypeError(f"groups must be a sequence of (width, offset) pairs, got {groups!r}") from None
    return tuple([(integer("groups: a width", w, 0), integer("groups: an offset", o)) for w, o in pairs])
