"""Converts networks for streaming (TSM's online form, arXiv:1811.08383, section 4.2)."""

from __future__ import annotations

import copy
import functools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsm_jit import plans
from tsm_jit.convert.delays import insert_delays
from tsm_jit.modules import tsam
from tsm_jit.modules.base import ClipModule, class_name
from tsm_jit.modules.online import FrameShift, FrameState, OnlineNetwork, OnlineShift
from tsm_jit.modules.tsm import TemporalShift, TokenShift
from tsm_jit.modules.video import VideoModel


def convert(model: nn.Module) -> OnlineNetwork:
    """Returns a copy of ``model`` that processes streams frame by frame. ``model`` does not change.

    Its outputs are those of ``model`` on a clip that is the whole video. Each layer computes each frame once. Shifts
    that read later frames cause a latency: the output of a frame comes ``stream.latency`` frames later, and
    ``stream.flush()`` yields the last outputs of a video. Paper: TSM, arXiv:1811.08383.

    Args:
        model: a network with :class:`tsm_jit.TemporalShift`, :class:`tsm_jit.TokenShift` or
            :class:`tsm_jit.tsam.TemporalShift` modules. A TSAM stream has video segments only. No other layer may
            combine frames, so batch normalization must be in ``eval`` mode. If shifts read later frames, torch.fx must
            be able to trace the modules that contain the shifts. It traces all networks of
            :func:`tsm_jit.make_temporal_shift`, timm's ViT with ``dynamic_img_size=False``. Traced modules must
            be in ``eval`` mode, and their forward keeps it after ``stream.train()``. In their forward, tests such
            as ``isinstance(x, Tensor)`` or ``x.dtype is torch.float32`` are False for activations.

    Returns:
        The streaming network. It takes frames ``[S, C, H, W]`` of S streams.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no temporal shift, or it normalizes by the statistics of a batch. It has other
            temporal modules, such as a temporal pool or non-local blocks. It is a :class:`tsm_jit.VideoModel`, which
            takes clips.
        ValueError: its shifts read later frames, and it is in training mode or torch.fx cannot trace it. Or it then
            writes frames into a tensor that does not depend on frames, uses ``x.data`` or assigns attributes of ``x``.

    Example::

        net = torchvision.models.resnet18()
        tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")
        stream = tsm_jit.online.convert(net.eval())
        scores = stream(torch.randn(1, 3, 224, 224))  # [1, 1000], without latency
    """
    _check_temporal_modules(model)
    root = nn.ModuleList([copy.deepcopy(model)])  # a parent, in case the model itself is a shift
    places = [
        (f"{prefix}.{name}".lstrip(".")[2:], parent, name)
        for prefix, parent in root.named_modules()
        for name, child in parent._modules.items()
        if isinstance(child, (TemporalShift, tsam.TemporalShift))
    ]
    if not places:
        raise ValueError(f"model must have temporal shifts, got {type(model).__name__}")
    _check_norms(model)
    frame = FrameState()
    if any(getattr(parent._modules[name], "direction", "both") != "past" for _, parent, name in places):
        frame.add("exists")  # the first tensor of the state: which frames exist
    shifts = [_frame_shift(place, parent._modules[name], frame) for place, parent, name in places]
    for (_, parent, name), shift in reversed(list(zip(places, shifts, strict=True))):  # inner shifts first
        parent._modules[name] = OnlineShift(parent._modules[name], shift)
    net = root[0]
    return OnlineNetwork(insert_delays(net, frame) if any(shift.ahead for shift in shifts) else net, frame)


def _check_temporal_modules(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, VideoModel):
            raise ValueError(f"model must be a network of frames, got a VideoModel at {name!r}: convert its backbone")
        if isinstance(module, ClipModule) and not isinstance(module, (TemporalShift, tsam.TemporalShift)):
            raise ValueError(
                "model must have no temporal modules except TemporalShift, TokenShift and tsam.TemporalShift, since "
                f"others need the whole clip, got {class_name(type(module))} at {name!r}"
            )


def _check_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                "model must normalize by running statistics, since a stream has no batch of frames, got "
                f"{type(module).__name__} at {name!r} in training mode or without running_mean: call model.eval()"
            )


def _frame_shift(place: str, shift: TemporalShift | tsam.TemporalShift, frame: FrameState) -> FrameShift:
    if isinstance(shift, tsam.TemporalShift):
        plan = functools.partial(plans.temporal, fold_div=shift.f_div, shift_depth=shift.shift_depth)
        return FrameShift(place, frame, plan, "keep")
    plan = functools.partial(plans.temporal, fold_div=shift.fold_div, direction=shift.direction)
    if isinstance(shift, TokenShift):
        return FrameShift(place, frame, plan, "zeros", 2, shift.num_prefix_tokens)
    return FrameShift(place, frame, plan, "zeros")
