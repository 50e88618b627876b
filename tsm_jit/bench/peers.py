"""Other implementations of the temporal shift, and the number of bytes that a shift must move.

Every peer is a function ``peer(x, shift) -> Tensor`` for frames ``[N*T, C, H, W]``, written in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsm_jit import ops
from tsm_jit.plans import Shift

Peer = Callable[[Tensor, Shift], Tensor]


def stock(x: Tensor, shift: Shift) -> Tensor:
    """TSM's own implementation: allocates zeros, then assigns each channel group and the remaining channels."""
    clips = x.unflatten(0, (-1, shift.n_segment))
    out = torch.zeros_like(clips)
    end = _assign(out, clips, shift)
    out[:, :, end:] = clips[:, :, end:]
    return out.flatten(0, 1)


def clone(x: Tensor, shift: Shift) -> Tensor:
    """TSAM's own implementation: copies the input, then assigns each channel group. Other values stay."""
    clips = x.unflatten(0, (-1, shift.n_segment))
    out = clips.clone()
    _assign(out, clips, shift)
    return out.flatten(0, 1)


def _assign(out: Tensor, clips: Tensor, shift: Shift) -> int:
    begin, n = 0, shift.n_segment_shifted
    for width, offset in shift.plan:
        fold = slice(begin, begin + width)
        if offset > 0:
            out[:, : n - offset, fold] = clips[:, offset:n, fold]
        else:
            out[:, -offset:n, fold] = clips[:, : n + offset, fold]
        begin += width
    return begin


def split_cat(x: Tensor, shift: Shift) -> Tensor:
    """mmaction2's implementation: splits the channels, concatenates each part with zeros, concatenates the parts."""
    clips = x.unflatten(0, (-1, shift.n_segment))
    widths = [width for width, _ in shift.plan]
    parts = list(clips.split([*widths, x.shape[1] - sum(widths)], 2))
    for i, (_, offset) in enumerate(shift.plan):
        zeros = torch.zeros_like(parts[i][:, : abs(offset)])
        moved = parts[i][:, offset:] if offset > 0 else parts[i][:, :offset]
        parts[i] = torch.cat((moved, zeros) if offset > 0 else (zeros, moved), 1)
    return torch.cat(parts, 2).flatten(0, 1)


def compiled_stock(x: Tensor, shift: Shift) -> Tensor:
    """:func:`stock` or :func:`clone` under ``torch.compile``, with static shapes."""
    return _compiled(_by_padding(shift))(x, shift)


def eager(x: Tensor, shift: Shift) -> Tensor:
    """TSM's or TSAM's own implementation: :func:`stock` for zero padding, :func:`clone` for ``keep``."""
    return _by_padding(shift)(x, shift)


def _by_padding(shift: Shift) -> Peer:
    return {"zeros": stock, "keep": clone}[shift.padding]


_compilations: dict[Peer, Peer] = {}


def _compiled(peer: Peer) -> Peer:
    if peer not in _compilations:
        _compilations[peer] = torch.compile(peer, dynamic=False)
    return _compilations[peer]


def reset_compiler() -> None:
    """Resets the compiler, so that the next shape is compiled and no recompilation limit is reached."""
    _compilations.clear()
    torch._dynamo.reset()


def copy(x: Tensor, shift: Shift) -> Tensor:
    """Copies the tensor, the minimal work of any operation out of place."""
    return torch.empty_like(x).copy_(x)


def ours(x: Tensor, shift: Shift) -> Tensor:
    """Calls tsm_jit out of place."""
    return ops.temporal_shift(x, shift.encode())


def ours_in_place(x: Tensor, shift: Shift) -> Tensor:
    """Calls tsm_jit in place."""
    return ops.temporal_shift_(x, shift.encode())


def bytes_moved(x: Tensor, shift: Shift, in_place: bool, adjoint: bool = False) -> int:
    """Returns the minimal number of bytes that a shift reads and writes.

    Padding is not read. In place, values that do not move are neither read nor written. It supports the paddings
    ``zeros`` and ``keep``.
    """
    frame = x.numel() * x.element_size() // x.shape[shift.channel_dim]  # bytes of one channel in all frames
    moved = sum(width for width, offset in shift.plan if offset != 0)
    total = 0 if in_place else 2 * (x.shape[shift.channel_dim] - moved) * frame
    for width, offset in shift.plan:
        if offset == 0:
            continue
        n, t = shift.n_segment_shifted, shift.n_segment
        gap = min(abs(offset), n)  # frames without a source
        # For each clip: the number of frames that are read and written.
        read, written = n - gap, n
        if shift.padding == "keep" and in_place:  # some frames are not read, some do not change
            read = written = min(n, 2 * (n - gap)) if adjoint else n - gap
        elif shift.padding == "keep":  # frames without a source read their own value
            read = n if adjoint else max(gap, n - gap)
        stays = 0 if in_place else 2 * (t - n)
        total += width * frame * (read + written + stays) // t
    return total
