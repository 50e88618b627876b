"""The modules of TSM (Lin, Gan, Han: Temporal Shift Module, arXiv:1811.08383).

They have the names, constructors and state-dict keys of https://github.com/mit-han-lab/temporal-shift-module. Its users
only change an import, and their checkpoints still load.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from tsm_jit import ops
from tsm_jit._checks import integer
from tsm_jit.functional import encode_temporal, temporal_shift
from tsm_jit.modules.base import ClipModule, ShiftedModule
from tsm_jit.plans import Direction


class TemporalShift(ShiftedModule):
    """Shifts its input, then calls ``net``: drop-in for TSM's class (arXiv:1811.08383).

    The input is frames ``[N*T, C, *]`` of any dtype, where ``T = n_segment``. The output is the output of ``net``. The
    shift is :func:`tsm_jit.temporal_shift` with ``fold_div=n_div`` and zero padding.

    Args:
        net: the module that receives the shifted frames, usually the first convolution of a residual block.
        n_segment: the clip length in frames.
        n_div: a fold has ``C // n_div`` channels.
        inplace: store no second activation, see below.
        vect: ignored, for compatibility with TSM. The kernels choose the vector width from the alignment of the tensor.
        direction: ``"both"``; ``"past"``, TSM's uni-directional form for streaming (:mod:`tsm_jit.online`), where one
            fold reads the previous frame; or ``"future"``, where one fold reads the next frame.

    Raises:
        TypeError, ValueError: in ``forward``, as :func:`tsm_jit.temporal_shift`.

    The input is never written, so a skip branch, another thread or another CUDA stream may read it. TSM's own in-place
    flag changes the skip branch of a residual block, this one does not. With gradients and ``inplace=True``, no shifted
    activation is stored: the backward shifts the input again.

    On a GPU, ``nn.Linear`` and 1x1 convolutions read the shifted frames themselves, under the conditions of
    :func:`tsm_jit.shift_conv1x1`. Then there is no shifted copy, and ``inplace`` changes nothing. Results equal those
    of a copy up to the order of sums. As for any layer, the input must not change before the
    backward, which reads it. Modules with hooks, parametrizations or an unknown class get a copy. After
    ``torch.use_deterministic_algorithms(True)`` all modules get one, and outputs and gradients have the same bits as
    with :func:`tsm_jit.temporal_shift`.

    Example::

        block = torchvision.models.resnet50().layer1[0]
        block.conv1 = tsm_jit.TemporalShift(block.conv1, n_segment=8, n_div=8, inplace=True)
        y = block(torch.randn(2 * 8, 64, 56, 56))
    """

    direction: Direction = "both"  # in the class, for modules that were saved without it

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
        return encode_temporal(x, self.checked_n_segment(x), self.fold_div, direction=self.direction)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            self.refuse_split(x)
            return self.net(temporal_shift(x, self.n_segment, self.fold_div, direction=self.direction))
        return self.call_shifted(x, self.shift_of(self.whole_clips(x)))

    @staticmethod
    def shift(x: Tensor, n_segment: int, fold_div: int = 3, inplace: bool = False, vect: Any = None) -> Tensor:
        """Calls :func:`tsm_jit.temporal_shift`. With ``inplace`` it shifts ``x`` itself and returns it."""
        return temporal_shift(x, n_segment, fold_div, inplace=inplace)

    def extra_repr(self) -> str:
        direction = "" if self.direction == "both" else f", direction={self.direction!r}"
        return f"n_segment={self.n_segment}, fold_div={self.fold_div}, inplace={self.inplace}{direction}"


class TokenShift(TemporalShift):
    """Shifts the tokens of a vision transformer, then calls ``net`` (TSM, arXiv:1811.08383).

    The input is tokens ``[N*T, L, C]`` of any dtype, where ``T = n_segment``. The output is the output of ``net``.

    Args:
        net: the module that receives the tokens, usually the ``nn.Linear`` before an attention.
        n_segment, n_div, inplace, direction: as in :class:`TemporalShift`.
        num_prefix_tokens: the number of leading tokens, such as the class token, that are not shifted.

    Raises:
        TypeError: ``num_prefix_tokens`` is not an integer.
        ValueError: ``num_prefix_tokens`` is negative. In ``forward``: the input is not three-dimensional.
        TypeError, ValueError: in ``forward``, as :func:`tsm_jit.temporal_shift`.

    Example::

        qkv = tsm_jit.TokenShift(torch.nn.Linear(192, 576), n_segment=8)
        y = qkv(torch.randn(2 * 8, 197, 192))  # [16, 197, 576]
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

    def shift_of(self, x: Tensor) -> str:
        length = self.checked_n_segment(x)
        return encode_temporal(x, length, self.fold_div, direction=self.direction, channel_dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        still = self.num_prefix_tokens
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            self.refuse_split(x)
            tokens, length = x[:, still:] if still else x, self.n_segment
            shifted = temporal_shift(tokens, length, self.fold_div, direction=self.direction, channel_dim=-1)
            return self.net(torch.cat([x[:, :still], shifted], 1) if still else shifted)
        if x.dim() != 3:
            raise ValueError(f"x must be tokens [N*T, L, C], got {list(x.shape)}")
        return self.call_shifted(x, self.shift_of(self.whole_clips(x[:, still:])), still)


class TemporalPool(ClipModule):
    """Halves the clip length, then calls ``net``: TSM's temporal pooling (arXiv:1811.08383).

    It max-pools over time with kernel 3, stride 2 and padding 1: ``[N*T, C, H, W]`` to ``[N*(T/2), C, H, W]``.

    Args:
        net: the module that receives the pooled frames.
        n_segment: the clip length ``T`` in frames, an even number.

    Raises:
        TypeError, ValueError: in ``forward``: ``n_segment`` is not an even integer or does not divide ``N*T``.

    Example::

        pool = tsm_jit.TemporalPool(torch.nn.Identity(), n_segment=8)
        y = pool(torch.randn(2 * 8, 64, 56, 56))  # [2 * 4, 64, 56, 56]
    """

    halves_clip = True

    def __init__(self, net: nn.Module, n_segment: int):
        super().__init__()
        self.net = net
        self.n_segment = n_segment

    def forward(self, x: Tensor) -> Tensor:
        length = self.checked_n_segment(x)
        return ops.save_clip_length_mark(self.net(temporal_pool(x, length)), length)

    @staticmethod
    def temporal_pool(x: Tensor, n_segment: int) -> Tensor:
        """Pools without calling a module. Raises ValueError if ``n_segment`` is odd or does not divide ``N*T``."""
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
    # It pools over time and pixels, two dimensions: ExecuTorch has no pooling over three.
    _, channels, height, width = x.shape
    clips = x.reshape(-1, n_segment, channels, height * width).transpose(1, 2)
    pooled = F.max_pool2d(clips, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0))
    return pooled.transpose(1, 2).reshape(-1, channels, height, width)


def halved(n_segment: Any) -> int:
    """Returns half of an even clip length. Raises ValueError for an odd one."""
    n_segment = integer("n_segment", n_segment)
    if n_segment < 2 or n_segment % 2 != 0:
        raise ValueError(f"n_segment must be even to be halved, got {n_segment}")
    return n_segment // 2
