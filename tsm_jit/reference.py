"""Reference implementations in PyTorch. Tests compare with them, and devices without compiled kernels use them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from tsm_jit.plans import Shift


def has_clip_dim(dim: int, channel_dim: int) -> bool:
    """Whether a tensor of ``dim`` dimensions is ``[N, T, C, H, W]``; otherwise it is ``[N*T, ...]``.

    With ``channel_dim=1`` a five-dimensional tensor is ``[N*T, C, D, H, W]``.
    """
    return dim == 5 and channel_dim >= 2


def temporal_shift(x: Tensor, shift: Shift) -> Tensor:
    """Computes ``out[n, t, c] = x[n, t + offset(c), c]``, or the padding if that frame does not exist."""
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
                assert shift.padding == "keep"  # `out` already has the frame's own value
    return out


def temporal_shift_backward(grad: Tensor, shift: Shift) -> Tensor:
    """The adjoint of :func:`temporal_shift`: each frame receives the sum of the gradients of the frames that read it.

    The order of addition is fixed: first the frame that moved, then the padding frames from the first to the last. 8-
    and 16-bit floats are added in float32 and rounded once.
    """
    out = torch.empty_like(grad).copy_(grad)
    n = shift.n_segment_shifted
    for source, target, offset in groups(grad, out, shift):
        consumers: list[list[int]] = [[] for _ in range(n)]
        padded = []
        for t in range(n):
            s = t + offset
            if 0 <= s < n:
                consumers[s].append(t)
            elif shift.padding == "circular":
                consumers[s % n].append(t)
            else:
                padded.append(t)
        for t in padded:
            if shift.padding == "keep":
                consumers[t].append(t)
            elif shift.padding == "replicate":
                consumers[0 if offset < 0 else n - 1].append(t)
        for s, frames in enumerate(consumers):
            target[:, s] = _sum([source[:, t] for t in frames], like=target[:, s])
    return out


def sliced(x: Tensor, shift: Shift, has_unflatten: bool = True) -> Tensor:
    """:func:`temporal_shift` by slicing and concatenation only, without in-place writes, for ONNX and TorchScript.

    ``has_unflatten=False`` is for ONNX before opset 13, which has no operator for ``unflatten``.
    """
    shift = shift.canonical()
    frames_dim = 2 if has_clip_dim(x.dim(), shift.channel_dim) else 1
    order = list(range(x.dim()))
    if not x.is_contiguous():  # concatenate in memory order, so that the output has the layout of the input
        order[frames_dim:] = sorted(order[frames_dim:], key=x.stride, reverse=True)
    clips, channel_dim = x.permute(order), order.index(shift.channel_dim)
    if frames_dim == 1:
        if has_unflatten:
            clips = clips.unflatten(0, (-1, shift.n_segment))
        else:
            clips = clips.reshape(-1, shift.n_segment, *clips.shape[1:])
        channel_dim += 1
    parts, begin = [], 0
    for width, offset in shift.plan:
        if width > 0:
            parts.append(_moved(clips.narrow(channel_dim, begin, width), offset, shift))
        begin += width
    if begin < clips.shape[channel_dim]:
        parts.append(clips.narrow(channel_dim, begin, clips.shape[channel_dim] - begin))
    if not parts:  # no channels
        return x.clone()
    out = torch.cat(parts, channel_dim)
    if frames_dim == 1:
        out = out.flatten(0, 1)
    return out.permute(sorted(range(len(order)), key=order.__getitem__))


def _moved(frames: Tensor, offset: int, shift: Shift) -> Tensor:
    """Shifts one channel group ``[N, T, ...]`` by ``offset``."""
    n, distance, ahead = shift.n_segment_shifted, abs(offset), offset > 0
    if distance == 0:
        return frames
    first, last = slice(0, distance), slice(n - distance, n)  # frames at both ends of the clip
    moved = frames[:, distance:n] if ahead else frames[:, : n - distance]
    if shift.padding == "zeros":
        parts = [pad(moved, [0, 0] * (frames.dim() - 2) + ([0, distance] if ahead else [distance, 0]))]
    else:
        if shift.padding == "keep":
            padding = frames[:, last if ahead else first]
        elif shift.padding == "replicate":
            padding = torch.cat([frames[:, n - 1 : n] if ahead else frames[:, :1]] * distance, 1)
        else:
            padding = frames[:, first if ahead else last]
        parts = [moved, padding] if ahead else [padding, moved]
    if n < shift.n_segment:
        parts.append(frames[:, n:])
    return torch.cat(parts, 1)


def boundary_frames(x: Tensor, shift: Shift) -> Tensor:
    """The boundary frames ``[N, K, H, W]`` of ``x`` ``[N*T, C, H, W]``: the frames that ``shift`` does not read.

    For each channel group these are the first ``|offset|`` frames if ``offset > 0``, otherwise the last ones. They are
    concatenated as channels.
    """
    parts = [x[:0].reshape(len(x) // shift.n_segment, 0, *x.shape[2:])]
    parts += [frames.flatten(1, 2) for frames in boundary_views(x, shift)]
    return torch.cat(parts, 1)


def unshifted(shifted: Tensor, boundary: Tensor, shift: Shift) -> Tensor:
    """Restores ``x`` from ``shifted = temporal_shift(x)`` and its boundary frames."""
    x = temporal_shift(shifted, shift.inverse())
    for frames, values in _boundary_pairs(x, boundary, shift):
        frames.copy_(values)
    return x


def _boundary_pairs(x: Tensor, boundary: Tensor, shift: Shift) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each of :func:`boundary_views` of ``x`` with the same frames in ``boundary``."""
    begin = 0
    for frames in boundary_views(x, shift):
        width = frames.shape[1] * frames.shape[2]
        yield frames, boundary.narrow(1, begin, width).unflatten(1, frames.shape[1:3])
        begin += width


def boundary_views(x: Tensor, shift: Shift) -> Iterator[Tensor]:
    """Yields, for each channel group that moves, the frames ``[N, count, ...]`` of ``x`` that it does not read."""
    if shift.padding == "circular":
        return  # every frame is read
    n = shift.n_segment_shifted
    for frames, _, offset in groups(x, x, shift):
        count = min(abs(offset), n)
        yield frames.narrow(1, 0 if offset > 0 else n - count, count)


def add_relu(z: Tensor, identity: Tensor | None, boundary: Tensor | None, shift: Shift) -> Tensor:
    """``relu(z + identity)``, without rounding between addition and ReLU.

    An ``identity`` with ``boundary`` frames is in the shifted layout: see ``ops/residual.py``.
    """
    if identity is not None:
        z = z + (identity if boundary is None else unshifted(identity, boundary, shift))
    return torch.relu(z)


def add_relu_backward(
    grads: list[Tensor], grad_boundary: Tensor | None, out: Tensor, boundary_out: Tensor | None, shift: Shift
) -> Tensor:
    """The gradient of ``z + identity`` in :func:`add_relu`, unshifted: the sum of ``grads``, masked by ``out > 0``."""
    acc_dtype = _acc_dtype(out)
    grad = sum([each.to(acc_dtype) for each in grads], torch.zeros_like(out, dtype=acc_dtype))
    if boundary_out is not None:
        grad = temporal_shift_backward(grad, shift)
        if grad_boundary is not None:
            for frames, values in _boundary_pairs(grad, grad_boundary, shift):
                frames += values.to(acc_dtype)
        out = unshifted(out, boundary_out, shift)
    return torch.where(out <= 0, 0, grad).to(out.dtype)


def groups(x: Tensor, out: Tensor, shift: Shift) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yields, for each channel group that moves, its clips ``[N, T, ...]`` in ``x`` and in ``out``, and its offset."""
    channel_dim = shift.channel_dim
    if not has_clip_dim(x.dim(), channel_dim):
        clips = (x.shape[0] // shift.n_segment, shift.n_segment)
        x, out, channel_dim = x.unflatten(0, clips), out.unflatten(0, clips), channel_dim + 1
    begin = 0
    for width, offset in shift.plan:
        if offset != 0 and width > 0:
            yield x.narrow(channel_dim, begin, width), out.narrow(channel_dim, begin, width), offset
        begin += width


def _acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which values like ``x`` are added."""
    return torch.float32 if x.is_floating_point() and x.element_size() <= 2 else x.dtype


def _sum(terms: list[Tensor], like: Tensor) -> Tensor:
    if not terms:
        return torch.zeros_like(like)
    if len(terms) == 1:
        return terms[0]
    acc_dtype = _acc_dtype(like)
    total = terms[0].to(acc_dtype)
    for term in terms[1:]:
        total = total + term.to(acc_dtype)
    return total.to(like.dtype)
