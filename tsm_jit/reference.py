"""What temporal shift computes, in plain torch: the oracle of every test, and the last fallback."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tsm_jit.plans import Shift


def clips_apart(dim: int, channel_dim: int) -> bool:
    """True where ``x`` is ``[N, T, ...]``, false where it is ``[N*T, ...]``.

    Five dimensions are clips unless dimension 1, which would be time, holds the channels.
    """
    return dim == 5 and channel_dim >= 2


def temporal_shift(x: Tensor, shift: Shift) -> Tensor:
    """``out[n, t, c] = x[n, t + offset(c), c]``, or the padding where that frame does not exist."""
    out = torch.empty_like(x).copy_(x)
    n = shift.n_segment_shifted
    for source, target, offset in groups(x, out, shift):
        for t in range(n):
            s = t + offset
            if 0 <= s < n:
                target[:, t] = source[:, s]
            elif shift.padding == "zeros":
                target[:, t] = torch.zeros_like(target[:, t])
            elif shift.padding == "replicate":
                target[:, t] = source[:, 0 if s < 0 else n - 1]
            elif shift.padding == "circular":
                target[:, t] = source[:, s % n]
            else:
                assert shift.padding == "keep"  # the frame holds its own value already
    return out


def temporal_shift_backward(grad: Tensor, shift: Shift) -> Tensor:
    """The adjoint: every frame receives the sum of the gradients of the frames that read it.

    The frame that moved comes first, then the padding in the order of time. 8- and 16-bit floats are added in float32
    and rounded once.
    """
    out = torch.empty_like(grad).copy_(grad)
    n = shift.n_segment_shifted
    for source, target, offset in groups(grad, out, shift):
        readers: list[list[int]] = [[] for _ in range(n)]
        padded = []
        for t in range(n):
            s = t + offset
            if 0 <= s < n:
                readers[s].append(t)
            elif shift.padding == "circular":
                readers[s % n].append(t)
            else:
                padded.append(t)
        for t in padded:
            if shift.padding == "keep":
                readers[t].append(t)
            elif shift.padding == "replicate":
                readers[0 if offset < 0 else n - 1].append(t)
        for s, frames in enumerate(readers):
            target[:, s] = _sum([source[:, t] for t in frames], like=target[:, s])
    return out


def groups(x: Tensor, out: Tensor, shift: Shift) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For each channel group that moves: its clips ``[N, T, ...]`` in ``x`` and in ``out``, and its offset."""
    channel_dim = shift.channel_dim
    if not clips_apart(x.dim(), channel_dim):
        clips = (x.shape[0] // shift.n_segment, shift.n_segment)
        x, out, channel_dim = x.unflatten(0, clips), out.unflatten(0, clips), channel_dim + 1
    begin = 0
    for width, offset in shift.plan:
        if offset != 0 and width > 0:
            yield x.narrow(channel_dim, begin, width), out.narrow(channel_dim, begin, width), offset
        begin += width


def _sum(terms: list[Tensor], like: Tensor) -> Tensor:
    if not terms:
        return torch.zeros_like(like)
    if len(terms) == 1:
        return terms[0]
    wide = torch.float32 if like.is_floating_point() and like.element_size() <= 2 else like.dtype
    total = terms[0].to(wide)
    for term in terms[1:]:
        total = total + term.to(wide)
    return total.to(like.dtype)
