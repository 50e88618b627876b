"""Labelled videos for training: folders and lists, segment sampling, crops, data sets for a DataLoader. Not a script.

Sampling and augmentation follow TSN (arXiv:1608.00859) and TSM (arXiv:1811.08383). Every random number of a training
clip depends only on the seed in its key, so a run can continue at any batch with any number of workers.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms
from training import WrongInputError

from tsm_jit.video_io import UnusableVideoError, duration, read_frames

VIDEO_SUFFIXES = {".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
VIDEO_SUFFIXES |= {".ogv", ".ts", ".webm", ".wmv"}
PICTURE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
SCALES = (1, 0.875, 0.75, 0.66)  # of TSM's crops, relative to the shorter side
MARGIN = 8 / 7  # the shorter side relative to the crop: 256 to 224 pixels in the papers
ATTEMPTS = 20  # so many unreadable videos in a row are a wrong path
MOST_CLASSES = 10_000  # of a list without names; a larger label is a mistake, as each class takes memory

Failure = tuple[str, str]  # the path of a video, and why it cannot be read
Item = tuple[Tensor, int, list[Failure]]  # of a data set


@dataclass(frozen=True)
class Video:
    """A labelled video: a video file, or a folder with its frames as pictures."""

    path: Path
    label: int
    frames: int | None = None  # only the first frames of a folder, as TSM's lists say


# --- folders and lists -----------------------------------------------------------------------------------------------


def read_videos(source: Path, root: Path | None = None, classes: Sequence[str] | None = None):
    """Finds labelled videos.

    Args:
        source: a folder with one folder for each class, or a list file. A line of a list file is ``path label`` as in
            mmaction2, or ``path num_frames label`` as in TSM. The suffix of a video file may be left out. In
            ``clip 7 0``, 7 is the number of frames, unless there is ``clip 7`` and no ``clip``.
        root: the folder that paths in a list are relative to, by default the folder of the list.
        classes: the names of the classes. By default they are the names of the folders, or the numbers in the list.

    Returns:
        The videos and the names of the classes.

    Raises:
        WrongInputError: there are no videos, or a line or a label is wrong.
    """
    if source.is_dir():
        videos, classes = _read_folder(source, classes)
    elif source.is_file():
        videos = [_read_line(line, f"{source}:{n}", root or source.parent) for n, line in read_lines(source)]
        if classes is None:
            largest = max(videos, key=lambda video: video.label, default=None)
            if largest and largest.label >= MOST_CLASSES:
                raise WrongInputError(
                    f"{source}: without --classes, labels must be below {MOST_CLASSES}, "
                    f"got {largest.label} ({largest.path})"
                )
            classes = [str(i) for i in range(largest.label + 1 if largest else 0)]
    else:
        raise WrongInputError(f"{source} does not exist: a folder of class folders or a list file is needed")
    if not videos:
        raise WrongInputError(f"{source} has no videos")
    wrong = [video for video in videos if not 0 <= video.label < len(classes)]
    if wrong:
        raise WrongInputError(f"{source}: labels must be below {len(classes)}, got {wrong[0].label} ({wrong[0].path})")
    return videos, list(classes)


def _read_folder(folder: Path, classes: Sequence[str] | None) -> tuple[list[Video], Sequence[str]]:
    folders = sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    names = [each.name for each in folders]
    unknown = sorted(set(names) - set(names if classes is None else classes))
    if unknown:
        raise WrongInputError(f"{folder} has a folder for a class that is not known from training: {unknown[0]}")
    classes = names if classes is None else classes
    videos = [
        Video(path, classes.index(each.name))
        for each in folders
        for path in sorted(each.iterdir())
        if not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES)
    ]
    return videos, classes


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Reads the lines of a text file in UTF-8 that are not blank, each with its number.

    Raises:
        WrongInputError: it is no text file.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # programs of Windows write a mark at the beginning
    except UnicodeDecodeError:
        raise WrongInputError(f"{file} must be a list in UTF-8, got other bytes") from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_line(line: str, place: str, root: Path) -> Video:
    match = re.fullmatch(r"(.+?)(?:\s+(\d+))?\s+(\d+)", line)
    if not match:
        raise WrongInputError(f"{place}: a line must be 'path label' or 'path num_frames label', got {line!r}")
    path, frames, label = match.groups()
    if frames is not None and not locate(root / path).exists():
        with_number = root / line[: match.end(2)]  # a name that ends with a number
        if locate(with_number).exists():
            return Video(with_number, int(label))
    return Video(root / path, int(label), None if frames is None else int(frames))


def hold_out(videos: Sequence[Video], seed: int, share: float = 0.2) -> tuple[list[Video], list[Video]]:
    """Splits videos into training and validation, at random but with a share of each class that has two or more."""
    held: set[int] = set()
    for label in sorted({video.label for video in videos}):
        of_label = [i for i, video in enumerate(videos) if video.label == label]
        random.Random(f"{seed} {label}").shuffle(of_label)
        held.update(of_label[: max(1, round(share * len(of_label)))] if len(of_label) > 1 else [])
    if not held:
        raise WrongInputError("each class has only one video, so none can be held out for validation: set --val")
    return [v for i, v in enumerate(videos) if i not in held], [videos[i] for i in sorted(held)]


# --- frames ----------------------------------------------------------------------------------------------------------


def segment_frames(total: int, positions: Sequence[float]) -> list[int]:
    """Splits ``total`` frames into equal segments and chooses one frame of each: 0 is its first, nearly 1 its last."""
    return [min(int((i + p) * total / len(positions)), total - 1) for i, p in enumerate(positions)]


def read(video: Video, choose: Callable[[int], Sequence[int]], shorter: int, least: int) -> Tensor:
    """Reads frames of a video file or a folder of pictures, as :func:`tsm_jit.video_io.read_frames`.

    Raises:
        UnusableVideoError: also if there are fewer than ``least`` frames.
    """
    path = locate(video.path)

    def choose_of_enough(total: int) -> Sequence[int]:
        if total < least:
            raise UnusableVideoError(f"{path} is too short: it must have at least {least} frames, got {total}")
        return choose(total)

    if path.is_dir():
        return _read_pictures(path, choose_of_enough, shorter, video.frames)
    return read_frames(path, choose_of_enough, shorter)


def locate(path: Path) -> Path:
    """Finds the video file of a path without a suffix, as in lists of names."""
    if path.exists() or not path.parent.exists():
        return path
    # Not by a search of the folder, which may have a million videos.
    suffixes = (each for suffix in sorted(VIDEO_SUFFIXES) for each in (suffix, suffix.upper()))
    named = (path.parent / f"{path.name}{suffix}" for suffix in suffixes)
    return next((each for each in named if each.exists()), path)


def frame_interval(videos: Sequence[Video], n_segment: int) -> float | None:
    """The median time between the frames of a clip, in seconds, from some of the videos; None if none tells it."""
    seconds = []
    for video in videos[:: -(-len(videos) // 32)]:
        try:
            seconds.append(duration(locate(video.path)))
        except UnusableVideoError:
            continue
    known = sorted(each for each in seconds if each is not None)
    return known[len(known) // 2] / n_segment if known else None


def _read_pictures(folder: Path, choose: Callable[[int], Sequence[int]], shorter: int, frames: int | None) -> Tensor:
    paths = [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
    paths.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
    paths = paths[:frames]
    if not paths:
        raise UnusableVideoError(f"{folder} has no pictures")
    pictures = []
    for number in choose(len(paths)):
        try:
            picture = transforms.pil_to_tensor(Image.open(paths[number]).convert("RGB"))
        except OSError as error:
            raise UnusableVideoError(f"{paths[number]} cannot be read as a picture: {error}") from None
        pictures.append(transforms.resize(picture, [shorter], antialias=True))
    if len({picture.shape for picture in pictures}) > 1:
        raise UnusableVideoError(f"{folder} has pictures of different sizes")
    return torch.stack(pictures)


# --- crops -----------------------------------------------------------------------------------------------------------


def scale_jitter_crop(frames: Tensor, side: int) -> Tensor:
    """TSM's multi-scale crop, the same for all frames: uint8 ``[T, 3, H, W]`` to ``[T, 3, side, side]``.

    Height and width of the crop are two neighbours of ``SCALES``. It lies at one of 13 places: the points of a 5x5 grid
    whose coordinates are both even or both odd. It draws from torch's global random numbers.
    """
    height, width = frames.shape[-2:]
    sizes = [round(min(height, width) * scale) for scale in SCALES]
    pairs = [(h, w) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1]
    places = [(i, j) for i in range(5) for j in range(5) if i % 2 == j % 2]
    h, w = pairs[int(torch.randint(len(pairs), ()))]
    down, right = places[int(torch.randint(len(places), ()))]
    top, left = (height - h) * down // 4, (width - w) * right // 4
    return transforms.resized_crop(frames, top, left, h, w, [side, side], antialias=True)


def evaluation_crops(frames: Tensor, side: int, count: int = 1) -> Tensor:
    """Square crops along the longer side: the middle one, or several from one end to the other.

    Args:
        frames: uint8 ``[F, 3, H, W]``, the shorter side about ``MARGIN * side`` pixels.
        side: of the crops, in pixels.
        count: the number of crops.

    Returns:
        uint8 ``[count, F, 3, side, side]``.
    """
    down, right = (length - side for length in frames.shape[-2:])
    steps = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    places = [(round(down * p), right // 2) if down > right else (down // 2, round(right * p)) for p in steps]
    return torch.stack([transforms.crop(frames, top, left, side, side) for top, left in places])


# --- data sets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingClips(Dataset):
    """Random clips of videos. An item is ``(clip, label, failures)``; its key is ``(video, seed)``.

    A failure is the path of a video that is too short or cannot be read, and the reason in one line.

    The clip is uint8 ``[T, 3, side, side]``: a random frame of each segment, a scale-jitter crop and, with ``flip``,
    a mirror image half of the time. In place of an unreadable video, the next readable one is taken. If there is none
    nearby, the label is -1.
    """

    videos: Sequence[Video]
    n_segment: int
    side: int
    flip: bool

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        index, seed = key
        failures: list[Failure] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for attempt in range(min(ATTEMPTS, len(self.videos))):
                video = self.videos[(index + attempt) % len(self.videos)]
                choose = partial(segment_frames, positions=torch.rand(self.n_segment).tolist())
                try:
                    frames = read(video, choose, round(MARGIN * self.side), self.n_segment)
                except UnusableVideoError as error:
                    failures.append((str(video.path), str(error)))
                    continue
                clip = scale_jitter_crop(frames, self.side)
                if self.flip and torch.rand(()) < 0.5:
                    clip = clip.flip(-1)
                return clip.contiguous(), video.label, failures
        return torch.zeros(self.n_segment, 3, self.side, self.side, dtype=torch.uint8), -1, failures


@dataclass(frozen=True)
class EvaluationClips(Dataset):
    """Views of videos: ``clips`` times in each segment times ``crops`` places. The key is the number of the video.

    An item is ``(views, label, failures)``, with views uint8 ``[clips * crops, T, 3, side, side]``. An unreadable video
    gives zeros and the label -1.
    """

    videos: Sequence[Video]
    n_segment: int
    side: int
    clips: int = 1
    crops: int = 1

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Item:
        video = self.videos[index]

        def choose(total: int) -> list[int]:
            times = [(clip + 0.5) / self.clips for clip in range(self.clips)]
            return [frame for time in times for frame in segment_frames(total, [time] * self.n_segment)]

        try:
            frames = read(video, choose, round(MARGIN * self.side), self.n_segment)
        except UnusableVideoError as error:
            views = torch.zeros(self.clips * self.crops, self.n_segment, 3, self.side, self.side, dtype=torch.uint8)
            return views, -1, [(str(video.path), str(error))]
        crops = evaluation_crops(frames, self.side, self.crops)  # [crops, clips * T, 3, side, side]
        return crops.unflatten(1, (self.clips, self.n_segment)).flatten(0, 1), video.label, []


def collate(items: Sequence[Item]) -> tuple[Tensor, Tensor, list[Failure]]:
    """Joins items of a data set to a batch."""
    clips, labels, failures = zip(*items, strict=True)
    return torch.stack(clips), torch.tensor(labels), [each for some in failures for each in some]


class Batches:
    """The keys of the training clips of this process: a batch sampler for :class:`TrainingClips`.

    It yields those of all epochs from its position on, so that workers decode the next epoch during the validation. An
    epoch has each video once, in a random order; the last step is filled up from the beginning of that order. A step
    of ``batch`` clips is shared out to the processes, and its share is split into ``accumulate`` batches.
    """

    def __init__(
        self, videos: int, batch: int, accumulate: int, epochs: int, seed: int, rank: int = 0, processes: int = 1
    ):
        self.videos, self.batch, self.accumulate, self.epochs = videos, batch, accumulate, epochs
        self.seed, self.rank, self.processes = seed, rank, processes
        self.steps = -(-videos // batch)  # per epoch
        self.epoch = self.first = 0  # the position: the next epoch, and its first step

    def __len__(self) -> int:
        return ((self.epochs - self.epoch) * self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.first
        for epoch in range(self.epoch, self.epochs):
            yield from self._of_epoch(epoch, first)
            first = 0

    def _of_epoch(self, epoch: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.videos, generator=generator)
        count = self.steps * self.batch
        order = order.repeat(-(-count // self.videos))[:count]
        seeds = torch.randint(2**62, (count,), generator=generator)
        keys = list(zip(order.tolist(), seeds.tolist(), strict=True))
        mine = self.batch // self.processes
        for step in range(first_step, self.steps):
            first = step * self.batch + self.rank * mine
            for i in range(self.accumulate):
                part = mine // self.accumulate
                yield keys[first + i * part : first + (i + 1) * part]
