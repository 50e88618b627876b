"""Converts a network for streams (TSM's online form, arXiv:1811.08383, section 4.2)."""

from __future__ import annotations

import copy

from torch import nn

from tsm_jit.modules.base import ClipModule
from tsm_jit.modules.online import FrameState, OnlineNetwork, OnlineShift
from tsm_jit.modules.tsm import TemporalShift
from tsm_jit.modules.video import VideoModel


def convert(model: nn.Module) -> OnlineNetwork:
    """A copy of ``model`` for streams; ``model`` stays as it is.

    Args:
        model: a network with :class:`tsm_jit.TemporalShift` or :class:`tsm_jit.TokenShift` modules of
            ``direction="past"``, in any place, and nothing else that looks at other frames; in ``eval`` mode if it has
            batch normalisation.

    Raises:
        TypeError: ``model`` is no module. ValueError: it holds no shift; one that reads frames still to come; a
        temporal pool, which halves the frames, or TSAM's shift; a :class:`tsm_jit.VideoModel`, which takes clips.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, VideoModel):
            raise ValueError(f"model must be a network of frames, got a VideoModel at {name!r}: convert its backbone")
        if not isinstance(module, ClipModule):
            continue
        if not isinstance(module, TemporalShift):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(
                f"model must hold no other temporal module than TemporalShift and TokenShift, got {kind} at {name!r}"
            )
        if module.direction != "past":
            raise ValueError(
                f"model must shift from the past alone, since the next frame of a stream is still to come; got "
                f"direction={module.direction!r} at {name!r}: convert and train with direction='past'"
            )
    root = nn.ModuleList([copy.deepcopy(model)])  # the model may be a shift itself
    places = [
        (f"{prefix}.{name}".lstrip(".")[2:], parent, name)
        for prefix, parent in root.named_modules()
        for name, child in parent._modules.items()
        if isinstance(child, TemporalShift)
    ]
    if not places:
        raise ValueError(f"model must hold temporal shifts, got {type(model).__name__}")
    frame = FrameState([place for place, _, _ in places])
    for index, (_, parent, name) in reversed(list(enumerate(places))):  # a shift in a shift comes first
        parent._modules[name] = OnlineShift(parent._modules[name], frame, index)
    return OnlineNetwork(root[0], frame)
