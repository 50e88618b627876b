"""The public functions. They check every argument and call the operators in :mod:`tsm_jit.ops`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from tsm_jit import ops
from tsm_jit._checks import integer, one_of, refuse_scripting
from tsm_jit.plans import PADDINGS, Direction, Padding, Plan, Shift, temporal
from tsm_jit.reference import has_clip_dim


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
    """Shifts groups of channels along time, as TSM and TSAM do. The shift has no arithmetic and no parameters.

    The channels are split into folds of ``C // fold_div // shift_depth`` channels. The first fold reads the next frame,
    the second the previous frame, the third the frame after the next, and so on. The remaining channels do not move.
    Values are copied bit by bit in every dtype.

    Papers: TSM, `arXiv:1811.08383 <https://arxiv.org/abs/1811.08383>`_; TSAM (``shift_depth``, ``n_segment_shifted``
    and ``padding="keep"``), https://github.com/aav-antonov/TSAM.

    Args:
        x: frames ``[N*T, C, *]`` such as ``[N*T, C, H, W]``, clips ``[N, T, C, H, W]``, or with ``channel_dim=-1``
            tokens ``[N*T, L, C]``. Any dtype and any strides. Kernels access NCHW and channels_last tensors directly.
            Expanded tensors are shifted before expansion. Other strides, such as a crop has, take an extra copy:
            out of place into the result, in place into a temporary tensor.
        n_segment: the clip length ``T`` in frames. Optional for clips ``[N, T, C, H, W]``.
        fold_div: the divisor of the fold width, ``n_div`` in TSM's constructors.
        inplace: shift ``x`` itself and return it. See below.
        n_segment_shifted: the number of leading frames of each clip that are shifted, ``1..T``, by default all. The
            remaining frames (the audio segment of TSAM) do not change.
        shift_depth: the largest distance in frames. TSM has 1, TSAM up to 4.
        padding: the value of a frame whose source frame does not exist: ``"zeros"`` (TSM), ``"keep"`` (its own value,
            TSAM), ``"replicate"`` (the first or last frame) or ``"circular"`` (a frame from the other end of the clip).
        direction: ``"both"``, or only the folds that read the ``"past"`` (uni-directional, for streaming) or the
            ``"future"``.
        channel_dim: the dimension of the channels, by default 2 for five dimensions, otherwise 1. With
            ``channel_dim=1`` a five-dimensional ``x`` is ``[N*T, C, D, H, W]``.

    Returns:
        The shifted tensor. It has the shape, dtype, device and memory layout of ``x``.

    Raises:
        TypeError: an argument has the wrong type, or ``x`` is sparse, quantized or nested.
        ValueError: ``n_segment`` does not divide ``N*T`` or differs from ``T``; the folds need more than ``C``
            channels; an argument is outside its range; or ``inplace=True`` and elements of ``x`` share memory. (Under
            ``torch.compile`` PyTorch reports expanded tensors itself and does not detect other overlaps.)

    With ``inplace=True`` the rules of PyTorch's in-place operators hold. The version counter of ``x`` increases, so
    autograd detects stale saved tensors. The backward never writes into ``grad_output``. Under ``no_grad``, CUDA
    allocates memory only if the strides need the extra copy.

    ``x`` may be a leaf that requires grad. The result then shares its storage (under ``torch.compile`` it is a copy),
    and ``x.grad`` is the gradient with respect to the values before the shift. In a residual block the skip branch
    reads the same tensor: use :class:`tsm_jit.TemporalShift` there.

    Example::

        x = torch.randn(2 * 8, 64, 56, 56)
        y = tsm_jit.temporal_shift(x, n_segment=8)
    """
    if not isinstance(x, Tensor) and has_torch_function((x,)):  # a proxy of torch.fx: a leaf of its graph
        return handle_torch_function(
            temporal_shift, (x,), x, n_segment, fold_div, inplace=inplace, n_segment_shifted=n_segment_shifted,
            shift_depth=shift_depth, padding=padding, direction=direction, channel_dim=channel_dim,
        )  # fmt: skip
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
    """Shifts groups of channels along time, each group by its own offset.

    This is the general form of :func:`temporal_shift` (TSM, arXiv:1811.08383).

    Args:
        x: as in :func:`temporal_shift`.
        n_segment: as in :func:`temporal_shift`; ``None`` only for clips ``[N, T, C, H, W]``.
        groups: ``(width, offset)`` pairs, in order from channel 0. The ``width`` channels of a group read the frame
            ``offset`` frames later, or earlier if ``offset`` is negative. Channels after the last group do not move.
            :mod:`tsm_jit.plans` has the groups of TSM, TSAM and Paddle.
        padding, n_segment_shifted, inplace, channel_dim: as in :func:`temporal_shift`.

    Returns:
        The shifted tensor. It has the shape, dtype, device and memory layout of ``x``.

    Raises:
        TypeError, ValueError: as :func:`temporal_shift`. ValueError also if a width is negative or the widths sum to
            more than ``C``.

    Example::

        x = torch.randn(2 * 8, 64, 56, 56)
        y = tsm_jit.shift_groups(x, 8, [(4, +1), (8, -3)], padding="circular")
    """
    if not isinstance(x, Tensor) and has_torch_function((x,)):  # a proxy of torch.fx: a leaf of its graph
        return handle_torch_function(
            shift_groups, (x,), x, n_segment, groups, padding=padding, n_segment_shifted=n_segment_shifted,
            inplace=inplace, channel_dim=channel_dim,
        )  # fmt: skip
    shift = _encode_groups(_dense_shape(x), n_segment, _as_plan(groups), n_segment_shifted, padding, channel_dim)
    return ops.temporal_shift_(x, shift) if inplace else ops.temporal_shift(x, shift)


def shift_conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n_segment: int,
    groups: Sequence[tuple[int, int]],
    *,
    stride: int = 1,
    padding: Padding = "zeros",
    n_segment_shifted: int | None = None,
) -> Tensor:
    """Computes ``conv2d(shift_groups(x), weight, bias, stride)`` for a 1x1 convolution, without a shifted copy.

    On an NVIDIA GPU with tensor cores, the loads of the matrix product read the shifted rows (``kernels/README.md``).
    This needs float16 or bfloat16 (float32 if PyTorch may use TF32), channels_last, widths in multiples of 8, and
    enough rows to fill the GPU. Elsewhere, under compilers, exporters and ``torch.func``, and if deterministic
    algorithms are required, it is the shift followed by the convolution. Both round as PyTorch's convolution does: sums
    in float32, one rounding of the result.

    Paper: TSM, arXiv:1811.08383, which shifts before the first 1x1 convolution of a residual block.

    Args:
        x: frames ``[N*T, C, H, W]``.
        weight: ``[O, C, 1, 1]`` with the dtype of ``x``.
        bias: ``[O]`` or None.
        n_segment, groups, padding, n_segment_shifted: as in :func:`shift_groups`.
        stride: 1 or 2. With 2, the convolution reads every second row and column.

    Returns:
        ``[N*T, O, H', W']`` with the dtype and memory layout that PyTorch's convolution returns.

    Raises:
        TypeError, ValueError: as :func:`shift_groups`. ValueError also if ``weight`` is not ``[O, C, 1, 1]``, ``x`` is
            not ``[N*T, C, H, W]`` or ``stride`` is neither 1 nor 2.

    Example::

        x = torch.randn(2 * 8, 64, 56, 56)
        weight = torch.randn(32, 64, 1, 1)
        y = tsm_jit.shift_conv1x1(x, weight, None, 8, tsm_jit.plans.temporal(64))  # [16, 32, 56, 56]
    """
    if _are_proxies(x, weight, bias):
        return handle_torch_function(
            shift_conv1x1, (x, weight, bias), x, weight, bias, n_segment, groups, stride=stride, padding=padding,
            n_segment_shifted=n_segment_shifted,
        )  # fmt: skip
    shape = _dense_shape(x)
    if len(shape) != 4:
        raise ValueError(f"x must be frames [N*T, C, H, W], got the shape {list(shape)}")
    if tuple(weight.shape[1:]) != (shape[1], 1, 1):
        raise ValueError(
            f"weight must be [O, {shape[1]}, 1, 1] for x {list(shape)}, got the shape {list(weight.shape)}"
        )
    stride = integer("stride", stride)
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    shift = _encode_groups(shape, n_segment, _as_plan(groups), n_segment_shifted, padding, 1)
    return ops.shift_conv1x1(x, weight, bias, shift, stride)


def shift_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n_segment: int,
    groups: Sequence[tuple[int, int]],
    *,
    num_prefix_tokens: int = 0,
    padding: Padding = "zeros",
    n_segment_shifted: int | None = None,
) -> Tensor:
    """Computes ``linear(shift_groups(x), weight, bias)`` for tokens, without a shifted copy.

    Where and how it does so, and how it rounds: see :func:`shift_conv1x1`.

    Paper: TSM, arXiv:1811.08383.

    Args:
        x: tokens ``[N*T, L, C]``.
        weight: ``[O, C]`` with the dtype of ``x``.
        bias: ``[O]`` or None.
        n_segment, groups, padding, n_segment_shifted: as in :func:`shift_groups`.
        num_prefix_tokens: the number of leading tokens of each frame, such as a class token, that are not shifted.

    Returns:
        ``[N*T, L, O]`` with the dtype of ``x``.

    Raises:
        TypeError, ValueError: as :func:`shift_groups`. ValueError also if ``weight`` is not ``[O, C]``, ``x`` is not
            ``[N*T, L, C]`` or ``num_prefix_tokens`` is not from 0 to ``L``.

    Example::

        x = torch.randn(2 * 8, 197, 192)
        weight = torch.randn(576, 192)
        y = tsm_jit.shift_linear(x, weight, None, 8, tsm_jit.plans.temporal(192), num_prefix_tokens=1)  # [16, 197, 576]
    """
    if _are_proxies(x, weight, bias):
        return handle_torch_function(
            shift_linear, (x, weight, bias), x, weight, bias, n_segment, groups, num_prefix_tokens=num_prefix_tokens,
            padding=padding, n_segment_shifted=n_segment_shifted,
        )  # fmt: skip
    shape = _dense_shape(x)
    if len(shape) != 3:
        raise ValueError(f"x must be tokens [N*T, L, C], got the shape {list(shape)}")
    if tuple(weight.shape[1:]) != (shape[2],):
        raise ValueError(f"weight must be [O, {shape[2]}] for x {list(shape)}, got the shape {list(weight.shape)}")
    num_prefix_tokens = integer("num_prefix_tokens", num_prefix_tokens, 0)
    if num_prefix_tokens > shape[1]:
        raise ValueError(f"num_prefix_tokens must be at most the {shape[1]} tokens of x, got {num_prefix_tokens}")
    shift = _encode_groups(shape, n_segment, _as_plan(groups), n_segment_shifted, padding, 2)
    return ops.shift_linear(x, weight, bias, shift, num_prefix_tokens)


_function: Any
for _function in (temporal_shift, shift_groups, shift_conv1x1, shift_linear):
    _function.__prepare_scriptable__ = refuse_scripting


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
    """Checks the arguments of :func:`temporal_shift` and encodes them as the string that the operators take."""
    shape = _dense_shape(x)
    return _encode_temporal(shape, n_segment, fold_div, n_segment_shifted, shift_depth, padding, direction, channel_dim)


def _cached(encode: Callable[..., str]) -> Callable[..., str]:
    """Caches the results of ``encode``: it takes longer than a kernel launch, and a network repeats its shapes."""
    cached = functools.lru_cache(maxsize=4096, typed=True)(encode)

    def call(*args: Any) -> str:
        if is_compiling():
            return encode(*args)
        try:
            return cached(*args)
        except TypeError:  # an unhashable argument, or an error of the checks: run the checks without the cache
            return encode(*args)

    return call


# --- checks ----------------------------------------------------------------------------------------------------------


def _are_proxies(x: Any, weight: Any, bias: Any) -> bool:
    """Whether torch.fx traces: the called function is then a leaf of its graph. Raises TypeError for other objects."""
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)):
        return False
    if has_torch_function((x, weight, bias)):
        return True
    values = {"x": x, "weight": weight, "bias": bias}
    name = next(name for name, value in values.items() if not isinstance(value, Tensor))
    raise TypeError(f"{name} must be a torch.Tensor, got {type(values[name]).__name__}")


def _dense_shape(x: Any) -> torch.Size:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_quantized:
        kind = "quantized" if x.is_quantized else str(x.layout)
        raise TypeError(f"x must be a dense tensor (torch.strided, not quantized), got {kind}")
    try:
        return x.shape
    except RuntimeError:  # a nested tensor whose parts differ in length has no shape
        raise TypeError("x must be a dense tensor (torch.strided, not quantized), got a nested tensor") from None


@_cached
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


@_cached
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
    plan = tuple([(int(width), offset) for width, offset in plan])  # under torch.export a width may be a SymInt
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
    if has_clip_dim(len(shape), channel_dim):
        if n_segment is None:
            n_segment = shape[1]
        elif integer("n_segment", n_segment, 1) != shape[1]:
            swapped = channel_dim == 2 and shape[2] == n_segment
            hint = ": x must be [N, T, C, H, W], not [N, C, T, H, W]" if swapped else ""
            raise ValueError(
                f"n_segment must equal the clip length {shape[1]} of x {list(shape)}, got {n_segment}{hint}"
            )
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
