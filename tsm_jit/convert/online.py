"""Converts networks for streaming (TSM's online form, arXiv:1811.08383, section 4.2)."""

from __future__ import annotations

import copy

from torch import nn

from tsm_jit.modules.base import ClipModule
from tsm_jit.modules.online import FrameState, OnlineNetwork, OnlineShift
from tsm_jit.modules.tsm import TemporalShift
from tsm_jit.modules.video import VideoModel


def convert(model: nn.Module) -> OnlineNetwork:
    """Returns a copy of ``model`` that processes streams frame by frame. ``model`` does not change.

    It computes the outputs of ``model`` on a clip that starts with the stream. Paper: TSM, arXiv:1811.08383.

    Args:
        model: a network with :class:`tsm_jit.TemporalShift` or :class:`tsm_jit.TokenShift` modules with
            ``direction="past"``. No other layer may combine frames, so batch normalization must be in ``eval`` mode.

    Returns:
        The streaming network. It takes frames ``[S, C, H, W]`` of S streams.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no temporal shift, or one that reads later frames; it has other temporal modules, such
            as TSAM's shift; or it is a :class:`tsm_jit.VideoModel`, which takes clips.

    Example::

        net = torchvision.models.resnet18()
        tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")
        stream = tsm_jit.online.convert(net.eval())
        scores = stream(torch.randn(1, 3, 224, 224))  # [1, 1000]
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
                f"model must have no temporal modules except TemporalShift and TokenShift, got {kind} at {name!r}"
            )
        if module.direction != "past":
            raise ValueError(
                f"model must have shifts with direction='past', since a stream has no next frame yet, got "
                f"direction={module.direction!r} at {name!r}: convert and train with direction='past'"
            )
    root = nn.ModuleList([copy.deepcopy(model)])  # a parent, in case the model itself is a shift
    places = [
        (f"{prefix}.{name}".lstrip(".")[2:], parent, name)
        for prefix, parent in root.named_modules()
        for name, child in parent._modules.items()
        if isinstance(child, TemporalShift)
    ]
    if not places:
        raise ValueError(f"model must have temporal shifts, got {type(model).__name__}")
    frame = FrameState([place for place, _, _ in places])
    for index, (_, parent, name) in reversed(list(enumerate(places))):  # inner shifts first
        parent._modules[name] = OnlineShift(parent._modules[name], frame, index)
    return OnlineNetwork(root[0], frame)
