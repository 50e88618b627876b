"""Shows what a network of finetune.py sees in a live camera or a video file.

    python examples/camera.py finetune/best.pt --device /dev/video0              # in a window
    python examples/camera.py finetune/best.pt --device /dev/video0 --output a.mp4   # without a display, until Ctrl-C
    python examples/camera.py finetune/best.pt --file video.mp4 --output a.mp4

The network runs on a stream: each frame is computed once. It gets frames at the interval of its training clips, and its
scores are averaged over as many frames as a clip has.

Drawn over the picture are the most probable classes, the pictures per second, and the delay, which is the time from the
arrival of a picture to its scores. It includes the latency of shifts in both directions, which wait for later frames.
A network trained with ``--direction past`` has none.
"""

import argparse
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

import tsm_jit

try:
    import av
    from networks import Recipe, load_trained, normalize
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.v2 import functional as transforms
    from videos import MARGIN, evaluation_crops

    from tsm_jit.video_io import UnusableVideoError, add_video_stream, open_video
except ImportError as error:
    sys.stderr.write(f"this example needs {error.name}: pip install 'tsm-jit[finetune]'\n")
    raise SystemExit(2)

from training import WrongInputError, exit_code, number

DEVICE_FORMATS = {"darwin": "avfoundation", "win32": "dshow"}  # of FFmpeg's cameras; elsewhere v4l2
SHOWN = 3  # classes drawn over the picture


# --- pictures in -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture of the camera or file."""

    image: Image.Image
    time: float  # seconds since the first picture, by the clock of the camera or file
    arrival: float  # time.perf_counter() when it was decoded


def pictures_of(container, stop: threading.Event | None = None) -> Iterator[Picture]:
    """Decodes the pictures of an open file or camera."""
    first, last = None, 0.0
    for frame in container.decode(video=0):
        if stop is not None and stop.is_set():
            return
        seconds = last + 0.04 if frame.time is None else frame.time
        first, last = seconds if first is None else first, seconds
        upright = frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)  # of phones; PyAV 14 reads it
        yield Picture(upright, seconds - first, time.perf_counter())


def pictures_of_file(path: Path) -> Iterator[Picture]:
    with open_video(path) as container:
        yield from pictures_of(container)


class Newest:
    """Reads a camera in a thread and yields the newest picture, so that a slow network skips pictures."""

    def __init__(self, container):
        self.changed, self.stop = threading.Condition(), threading.Event()
        self.picture: Picture | None = None
        self.error: Exception | None = None
        self.ended = False
        self.thread = threading.Thread(target=self._read, args=(container,), daemon=True)
        self.thread.start()

    def _read(self, container) -> None:
        try:
            for picture in pictures_of(container, self.stop):
                with self.changed:
                    self.picture = picture
                    self.changed.notify()
        except Exception as error:  # raised again in the main thread
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify()

    def __iter__(self) -> Iterator[Picture]:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.picture is not None or self.ended)
                picture, self.picture = self.picture, None
            if picture is None:
                if isinstance(self.error, (av.FFmpegError, OSError)):
                    reason = self.error.strerror or self.error
                    raise WrongInputError(f"the camera cannot be read any more: {reason}") from self.error
                if self.error is not None:
                    raise self.error
                return
            yield picture

    def close(self) -> None:
        self.stop.set()
        self.thread.join(timeout=2)


# --- scores ----------------------------------------------------------------------------------------------------------


class Watcher:
    """Gives pictures to the streaming network and keeps the probabilities of the last clip."""

    def __init__(self, model: tsm_jit.VideoModel, recipe: Recipe, interval: float, device: torch.device):
        try:
            self.stream = tsm_jit.online.convert(model.backbone.to(device))
        except ValueError as error:
            raise WrongInputError(f"the network cannot run on a stream: {error}") from None
        self.recipe, self.interval, self.device = recipe, interval, device
        self.scores: deque[Tensor] = deque(maxlen=recipe.n_segment)
        self.next = 0.0  # the time of the next picture for the network
        self.waiting: deque[float] = deque()  # arrivals of the pictures whose scores are not known yet
        self.delay: float | None = None  # seconds from the arrival of a picture to its scores

    @property
    def latency(self) -> int:
        """Frames of delay, since the network reads later frames."""
        return self.stream.latency

    @torch.inference_mode()
    def see(self, picture: Picture) -> None:
        """Runs the network if it is time for its next picture."""
        if picture.time < self.next - 1e-3:  # clocks round
            return
        on_time = picture.time < self.next + self.interval  # else pictures are missing
        self.next = (self.next if on_time else picture.time) + self.interval
        frame = transforms.pil_to_tensor(picture.image)[None]
        frame = transforms.resize(frame, [round(MARGIN * self.recipe.side)], antialias=True)
        (frame,) = evaluation_crops(frame, self.recipe.side)
        self.waiting.append(picture.arrival)
        self._add(self.stream(normalize(frame.to(self.device))))

    @torch.inference_mode()
    def finish(self) -> None:
        """Takes the scores of the last pictures, which no later picture follows."""
        if self.latency:
            for scores in self.stream.flush():
                self._add(scores)

    def _add(self, scores: Tensor | None) -> None:
        if scores is None:  # the first frames of a stream with latency
            return
        self.scores.append(scores[0].float().cpu())  # waits for the result
        self.delay = time.perf_counter() - self.waiting.popleft()

    def best(self) -> list[tuple[str, float]]:
        """The most probable classes, of the mean scores of the last frames."""
        if not self.scores:
            return []
        probabilities = torch.stack(list(self.scores)).mean(0).softmax(0)
        top = probabilities.topk(min(SHOWN, len(self.recipe.classes)))
        return [(self.recipe.classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


# --- pictures out ----------------------------------------------------------------------------------------------------


def draw(picture: Image.Image, watcher: Watcher, rate: float | None) -> Image.Image:
    """A copy of the picture with a bar for each of the best classes, the frame rate and the delay."""
    drawn = picture.convert("RGB")
    canvas = ImageDraw.Draw(drawn, "RGBA")
    size = max(10, drawn.height // 20)
    font = ImageFont.load_default(size)
    lines = [(f"{100 * p:3.0f} %  {name}", p) for name, p in watcher.best()] or [("waiting for the first scores", 0)]
    for i, (text, probability) in enumerate(lines):
        top = size // 2 + i * 3 * size // 2
        width = drawn.width // 2
        canvas.rectangle((0, top, width, top + 5 * size // 4), fill=(0, 0, 0, 128))
        canvas.rectangle((0, top, round(width * probability), top + 5 * size // 4), fill=(40, 120, 220, 160))
        canvas.text((size // 2, top), text, font=font, fill="white")
    status = [] if rate is None else [f"{rate:.1f} pictures/s"]
    if watcher.delay is not None:
        behind = f" ({watcher.latency} frames)" if watcher.latency else ""
        status.append(f"delay {1000 * watcher.delay:.0f} ms{behind}")
    canvas.rectangle((0, drawn.height - 3 * size // 2, drawn.width, drawn.height), fill=(0, 0, 0, 128))
    canvas.text((size // 2, drawn.height - 3 * size // 2), ", ".join(status), font=font, fill="white")
    return drawn


class Rate:
    """Pictures per second, over the last second or two."""

    def __init__(self):
        self.times: deque[float] = deque(maxlen=30)

    def tick(self) -> float | None:
        self.times.append(time.perf_counter())
        seconds = self.times[-1] - self.times[0]
        return (len(self.times) - 1) / seconds if seconds > 0 else None


class VideoFile:
    """Writes pictures to a video file, with the times that they have. The stack closes the file."""

    def __init__(self, path: Path, stack: ExitStack):
        self.path, self.stack, self.last = path, stack, -1
        self.container = self.stream = None

    def show(self, picture: Image.Image, seconds: float) -> bool:
        width, height = (length // 2 * 2 for length in picture.size)
        if not (width and height):
            raise WrongInputError(
                f"the video for --output must have at least 2x2 pixels, got {picture.width}x{picture.height}"
            )
        if self.container is None:  # only now, so that a wrong input leaves no empty file
            try:
                self.container = self.stack.enter_context(av.open(str(self.path), "w"))
                self.stream = add_video_stream(self.container, width, height, 30)
            except (ValueError, av.FFmpegError) as error:  # such as an unknown suffix
                raise WrongInputError(f"{self.path} cannot be written as a video: {error}") from None
            self.stream.codec_context.time_base = Fraction(1, 1000)
            self.stack.callback(lambda: self.container.mux(self.stream.encode()))
        frame = av.VideoFrame.from_image(picture.crop((0, 0, width, height)))
        frame.time_base, frame.pts = self.stream.codec_context.time_base, max(self.last + 1, round(1000 * seconds))
        self.last = frame.pts
        self.container.mux(self.stream.encode(frame))
        return True


class Window:
    """Shows pictures in a window of OpenCV, a file at its own speed."""

    def __init__(self, is_file: bool, stack: ExitStack):
        try:
            import cv2
        except ImportError:
            raise WrongInputError("a window needs OpenCV: pip install opencv-python, or set --output") from None
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise WrongInputError("a window needs a display, and DISPLAY is not set: set --output")
        self.cv2, self.is_file, self.begin = cv2, is_file, time.perf_counter()
        stack.callback(cv2.destroyAllWindows)

    def show(self, picture: Image.Image, seconds: float) -> bool:
        """Returns False when the user has pressed q or Escape."""
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3)
        self.cv2.imshow("tsm_jit (q: quit)", pixels.flip(2).numpy())
        ahead = seconds - (time.perf_counter() - self.begin) if self.is_file else 0
        return self.cv2.waitKey(max(1, round(1000 * ahead))) & 0xFF not in (ord("q"), 27)


def open_camera(name: str, stack: ExitStack):
    """Opens a camera with FFmpeg: ``/dev/video0`` on Linux, ``0`` on macOS, ``video=NAME`` on Windows."""
    kind = DEVICE_FORMATS.get(sys.platform, "v4l2")
    try:
        return stack.enter_context(av.open(name, format=kind))
    except ValueError:
        raise WrongInputError(f"this PyAV was built without cameras ({kind}): use --file") from None
    except (av.FFmpegError, OSError) as error:
        raise WrongInputError(f"camera {name} cannot be opened: {error.strerror or error}") from None


def run(options: argparse.Namespace) -> None:
    """Shows pictures until the file ends or the user stops it."""
    if options.output and not options.output.parent.is_dir():
        raise WrongInputError(f"the folder of {options.output} does not exist")
    if options.output and options.file and options.output.exists() and options.output.samefile(options.file):
        raise WrongInputError(f"--output must be another file than --file, got {options.output} for both")
    model, recipe = load_trained(options.network)
    interval = options.interval if options.interval is not None else recipe.interval or 0.0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watcher, rate, count = Watcher(model, recipe, interval, device), Rate(), 0
    with ExitStack() as stack:
        if options.file is not None:
            pictures = pictures_of_file(options.file)
        else:
            pictures = Newest(open_camera(options.device, stack))
            stack.callback(pictures.close)
        out = VideoFile(options.output, stack) if options.output else Window(options.file is not None, stack)
        try:
            for picture in pictures:
                watcher.see(picture)
                count += 1
                if not out.show(draw(picture.image, watcher, rate.tick()), picture.time):
                    break
        except KeyboardInterrupt:
            pass  # how the user stops a camera without a window
        watcher.finish()
    scores = ", ".join(f"{name} {100 * p:.0f} %" for name, p in watcher.best())
    print(f"{count} pictures, latency {watcher.latency} frames; the last scores: {scores or 'none'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", type=Path, help="best.pt of finetune.py")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--device", help="a camera: /dev/video0 on Linux, 0 on macOS, video=NAME on Windows")
    source.add_argument("--file", type=Path, help="a video file")
    parser.add_argument("--output", type=Path, help="writes a video file, instead of showing a window")
    parser.add_argument(
        "--interval", type=number(float, 0), help="seconds between frames of the network (default: as in training)"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options), UnusableVideoError)


if __name__ == "__main__":
    sys.exit(main())
