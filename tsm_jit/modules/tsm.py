"""The modules of TSM (Lin, Gan, Han: Temporal Shift Module, arXiv:1811.08383), under its names.

Names, constructors and state-dict keys are those of https://github.com/mit-han-lab/temporal-shift-module, so that its
users change an import and keep their checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from tsm_jit._checks import integer
from tsm_jit.functional import encode_temporal, temporal_shift
from tsm_jit.modules.base import ClipModule, ShiftedModule
from tsm_jit.plans import Direction


class TemporalShift(ShiftedModule):
    """Shift, then ``net``: the drop-in for TSM's class of this name (arXiv:1811.08383).

    The input is frames ``[N*T, C, *]``, ``T = n_segment``, of any dtype; the output is that of ``net``. The shift is
    :func:`tsm_jit.temporal_shift` with ``fold_div=n_div`` and zero padding.

    Args:
        net: the module that receives the shifted frames, typically a block's first convolution.
        n_segment: the clip length in frames.
        n_div: a fold is ``C // n_div`` channels.
        inplace: keep no second activation. Unlike TSM's flag of this name it never changes what any other reader of
            the input sees, such as the skip branch of a residual block: the input holds the same bits afterwards, and
            outputs and gradients are exact. While autograd records, ``net`` sees a shifted copy that dies with the
            call; the backward shifts the input again. Otherwise the input is shifted in place, ``net`` runs, and the
            shift is undone; until then no other thread or CUDA stream may use the input. A ``net`` that might write
            into its input or return it (all but ``nn.Conv1d/2d/3d`` and ``nn.Linear`` without hooks) gets a copy.
        vect: accepted for compatibility and ignored: the vector width follows from the alignment of the tensor.
        direction: ``"both"``; or ``"past"``, TSM's uni-directional form, where one fold reads the previous frame and
            none the next one, for streams (:mod:`tsm_jit.online`); or ``"future"``.

    Raises:
        TypeError, ValueError: on a call, as :func:`tsm_jit.temporal_shift`.

    Example::

        block.conv1 = TemporalShift(block.conv1, n_segment=8, n_div=8, inplace=True)
    """

    direction: Direction = "both"  # also of modules that were made by other code

    def __init__(
        self,
        net: nn.Module,
        n_segment: int = 3,
        n_div: int = 8,
        inplace: bool = False,
        vect: Any = None,
        *,
        direction: Direction = "both",
    ):
        super().__init__()
        self.net = net
        self.n_segment = n_segment
        self.fold_div = n_div
        self.inplace = inplace
        self.direction = direction

    def shift_of(self, x: Tensor) -> str:
        return encode_temporal(x, self.checked_n_segment(), self.fold_div, direction=self.direction)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            return self.net(temporal_shift(x, self.n_segment, self.fold_div, direction=self.direction))
        return self.call_shifted(x, self.shift_of(x))

    @staticmethod
    def shift(x: Tensor, n_segment: int, fold_div: int = 3, inplace: bool = False, vect: Any = None) -> Tensor:
        """:func:`tsm_jit.temporal_shift`. ``inplace`` here is PyTorch's: ``x`` itself is shifted and returned."""
        return temporal_shift(x, n_segment, fold_div, inplace=inplace)

    def extra_repr(self) -> str:
        direction = "" if self.direction == "both" else f", direction={self.direction!r}"
        return f"n_segment={self.n_segment}, fold_div={self.fold_div}, inplace={self.inplace}{direction}"


class TokenShift(TemporalShift):
    """Shift of the tokens of a vision transformer, then ``net``: TSM (arXiv:1811.08383) along another dimension.

    The input is ``[N*T, L, C]``, ``T = n_segment``, of any dtype; the output is that of ``net``. The first
    ``num_prefix_tokens`` of the L tokens, such as the class token, stay.

    Args:
        net: the module that receives the tokens, typically the ``nn.Linear`` before an attention.
        num_prefix_tokens: 0 or more.
        n_segment, n_div, inplace, direction: as in :class:`TemporalShift`.

    Raises:
        TypeError, ValueError: ``num_prefix_tokens`` is no integer from 0 up; on a call, an input that is not
            three-dimensional; and as :func:`tsm_jit.temporal_shift`.
    """

    num_prefix_tokens: int = 1

    def __init__(
        self,
        net: nn.Module,
        n_segment: int,
        n_div: int = 8,
        inplace: bool = False,
        *,
        direction: Direction = "both",
        num_prefix_tokens: int = 1,
    ):
        super().__init__(net, n_segment, n_div, inplace, direction=direction)
        self.num_prefix_tokens = integer("num_prefix_tokens", num_prefix_tokens, 0)

    def forward(self, x: Tensor) -> Tensor:
        still = self.num_prefix_tokens
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            tokens, length = x[:, still:] if still else x, self.n_segment
            shifted = temporal_shift(tokens, length, self.fold_div, direction=self.direction, channel_dim=-1)
            return self.net(torch.cat([x[:, :still], shifted], 1) if still else shifted)
        if x.dim() != 3:
            raise ValueError(f"x must be tokens [N*T, L, C], got {list(x.shape)}")
        shift = encode_temporal(
            x[:, still:], self.checked_n_segment(), self.fold_div, direction=self.direction, channel_dim=-1
        )
        return self.call_shifted(x, shift, still=still)


class TemporalPool(ClipModule):
    """Halves the clip length, then ``net``: TSM's temporal pooling (arXiv:1811.08383).

    Max pooling over time with kernel 3, stride 2 and padding 1: ``[N*T, C, H, W]`` to ``[N*(T/2), C, H, W]``, with
    ``T = n_segment`` even.
    """

    halves = True

    def __init__(self, net: nn.Module, n_segment: int):
        super().__init__()
        self.net = net
        self.n_segment = n_segment

    def forward(self, x: Tensor) -> Tensor:
        return self.net(temporal_pool(x, self.checked_n_segment()))

    @staticmethod
    def temporal_pool(x: Tensor, n_segment: int) -> Tensor:
        """The pooling alone. Raises ``ValueError`` if ``n_segment`` is odd or does not divide ``N*T``."""
        return temporal_pool(x, n_segment)

    def extra_repr(self) -> str:
        return f"n_segment={self.n_segment}"


def temporal_pool(x: Tensor, n_segment: int) -> Tensor:
    """The pooling of :class:`TemporalPool`."""
    if not isinstance(x, Tensor) and has_torch_function((x,)):  # a proxy of torch.fx
        return handle_torch_function(temporal_pool, (x,), x, n_segment)
    halved(n_segment)
    if x.dim() != 4 or x.shape[0] % n_segment != 0:
        raise ValueError(f"n_segment must divide the frames of x [N*T, C, H, W], got {n_segment} for {list(x.shape)}")
    clips = x.unflatten(0, (-1, n_segment)).transpose(1, 2)
    pooled = F.max_pool3d(clips, kernel_size=(3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))
    return pooled.transpose(1, 2).flatten(0, 1)


def halved(n_segment: Any) -> int:
    """Half of an even clip length; ``ValueError`` for an odd one."""
    n_segment = integer("n_segment", n_segment)
    if n_segment < 2 or n_segment % 2 != 0:
        raise ValueError(f"n_segment must be even to be halved, got {n_segment}")
    return n_segment // 2
