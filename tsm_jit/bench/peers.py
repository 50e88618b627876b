"""How others write a temporal shift, in plain torch from their formulas; and what each has to move at least.

Every peer is ``peer(x, shift) -> Tensor`` for frames ``[N*T, C, H, W]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsm_jit import ops
from tsm_jit.plans import Shift

Peer = Callable[[Tensor, Shift], Tensor]


def stock(x: Tensor, shift: Shift) -> Tensor:
    """TSM's own: a tensor of zeros, and one assignment for each group and for the rest."""
    clips = x.unflatten(0, (-1, shift.n_segment))
    out = torch.zeros_like(clips)
    end = _assign(out, clips, shift)
    out[:, :, end:] = clips[:, :, end:]
    return out.flatten(0, 1)


def clone(x: Tensor, shift: Shift) -> Tensor:
    """TSAM's own: a copy, into which each group is assigned; what has no source keeps its value."""
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
    """mmaction2's way: split the channels, concatenate each part with zeros along time, concatenate the parts."""
    clips = x.unflatten(0, (-1, shift.n_segment))
    widths = [width for width, _ in shift.plan]
    parts = list(clips.split([*widths, x.shape[1] - sum(widths)], 2))
    for i, (_, offset) in enumerate(shift.plan):
        zeros = torch.zeros_like(parts[i][:, : abs(offset)])
        kept = parts[i][:, offset:] if offset > 0 else parts[i][:, :offset]
        parts[i] = torch.cat((kept, zeros) if offset > 0 else (zeros, kept), 1)
    return torch.cat(parts, 2).flatten(0, 1)


def compiled_stock(x: Tensor, shift: Shift) -> Tensor:
    """``torch.compile`` of :func:`stock` or :func:`clone`, for one shape at a time."""
    return _compiled(_by_padding(shift))(x, shift)


def eager(x: Tensor, shift: Shift) -> Tensor:
    """The family's own implementation: :func:`stock` for zeros, :func:`clone` for keep."""
    return _by_padding(shift)(x, shift)


def _by_padding(shift: Shift) -> Peer:
    return {"zeros": stock, "keep": clone}[shift.padding]


_compilations: dict[Peer, Peer] = {}


def _compiled(peer: Peer) -> Peer:
    if peer not in _compilations:
        _compilations[peer] = torch.compile(peer, dynamic=False)
    return _compilations[peer]


def forget_compilations() -> None:
    """So that the next shape is compiled for itself and no limit of recompilations is hit."""
    _compilations.clear()
    torch._dynamo.reset()


def copy(x: Tensor, shift: Shift) -> Tensor:
    """No shift at all: a copy of the tensor, the least that anything out of place does."""
    return torch.empty_like(x).copy_(x)


def ours(x: Tensor, shift: Shift) -> Tensor:
    """tsm_jit out of place."""
    return ops.temporal_shift(x, shift.encode())


def ours_in_place(x: Tensor, shift: Shift) -> Tensor:
    """tsm_jit in place."""
    return ops.temporal_shift_(x, shift.encode())


def bytes_moved(x: Tensor, shift: Shift, in_place: bool, adjoint: bool = False) -> int:
    """What must be read and written at least, in bytes: padding is not read, and in place what stays is not touched.

    For the paddings of the two families, ``zeros`` and ``keep``.
    """
    frame = x.numel() * x.element_size() // x.shape[shift.channel_dim]  # of one channel, all frames
    moved = sum(width for width, offset in shift.plan if offset != 0)
    total = 0 if in_place else 2 * (x.shape[shift.channel_dim] - moved) * frame
    for width, offset in shift.plan:
        if offset == 0:
            continue
        n, t = shift.n_segment_shifted, shift.n_segment
        gap = min(abs(offset), n)  # frames without a source
        # Of each clip: the frames that anything reads, and those that it writes.
        read, written = n - gap, n
        if shift.padding == "keep" and in_place:  # some are no one's source, some keep what they have
            read = written = min(n, 2 * (n - gap)) if adjoint else n - gap
        elif shift.padding == "keep":  # its own value is a source as well
            read = n if adjoint else max(gap, n - gap)
        stays = 0 if in_place else 2 * (t - n)
        total += width * frame * (read + written + stays) // t
    return total
