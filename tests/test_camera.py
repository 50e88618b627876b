"""The camera example without a display: what it draws, when the network runs, delays, refusals."""

import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from support import rotated_video
from torch import nn

import tsm_jit

for needed in ("av", "timm", "torchvision", "PIL"):
    pytest.importorskip(needed, reason="needs the finetune extra, and timm for a tiny network")

import av  # noqa: E402  (after the check for what is there)
import camera  # noqa: E402
import networks  # noqa: E402
from moving_shapes import moving_square  # noqa: E402
from PIL import Image  # noqa: E402
from training import WrongInputError  # noqa: E402

from tsm_jit.video_io import read_frames, write_video  # noqa: E402

SIDE, SEGMENTS, FRAMES, RATE = 32, 3, 20, 10
pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture
def network(tmp_path):
    recipe = networks.Recipe("timm/test_resnet", ["left", "right"], SEGMENTS, SIDE, "past", 0.2)
    networks.save_trained(networks.make(recipe), recipe, tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "video.mp4", moving_square("left", torch.Generator(), FRAMES, 121), RATE)
    return tmp_path / "video.mp4"


def pictures(count: int) -> list[camera.Picture]:
    noise = torch.randint(0, 256, (count, 45, 60, 3), dtype=torch.uint8)
    return [camera.Picture(Image.fromarray(x.numpy()), i / RATE, time.perf_counter()) for i, x in enumerate(noise)]


def test_a_picture_is_turned_as_the_file_asks(tmp_path):
    if not hasattr(av.VideoFrame, "rotation"):
        pytest.skip("this PyAV does not read rotations")
    first, *_ = camera.pictures_of_file(rotated_video(tmp_path, 3))
    assert first.image.size == (48, 64)
    assert min(first.image.getpixel((42, 5))) > 200
    assert max(first.image.getpixel((5, 5))) < 50


def test_a_file_without_a_display(network, video, tmp_path, capsys):
    output = tmp_path / "out.mp4"
    assert camera.main([str(network), "--file", str(video), "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{FRAMES} pictures, latency 0 frames; the last scores: ")
    drawn, original = (read_frames(path, range).int() for path in (output, video))
    assert drawn.shape == original.shape == (FRAMES, 3, 120, 120)
    changed = (drawn - original).abs().amax((0, 1)) > 60
    assert changed[:20, :60].any()  # the scores
    assert changed[-12:].any()  # frame rate and delay
    assert not changed[40:-20].any()
    with av.open(str(output)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([i / RATE for i in range(FRAMES)], abs=2e-3)


def test_scores_are_those_of_the_network_on_the_pictures_of_its_interval(network):
    model, recipe = networks.load_trained(network)
    watcher, shown = camera.Watcher(model, recipe, 0.2, torch.device("cpu")), pictures(9)
    assert watcher.best() == []
    for picture in shown:
        watcher.see(picture)
    assert len(watcher.scores) == SEGMENTS  # of pictures 0, 2, 4, 6 and 8
    offline = whole_clip(model, shown[::2])
    torch.testing.assert_close(torch.stack(list(watcher.scores)), offline[-SEGMENTS:])
    expected = offline[-SEGMENTS:].mean(0).softmax(0)
    assert dict(watcher.best()) == pytest.approx(dict(zip(recipe.classes, expected.tolist(), strict=True)), abs=1e-4)


@pytest.mark.parametrize(
    ("times", "seen"),
    [
        ([0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2, 1.3], [0, 0.2, 1.0, 1.2]),  # pictures are missing for a while
        ([0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9], [0, 0.3, 0.45, 0.6, 0.9]),  # 0.2 s on average
        ([0, 0.5, 1.0], [0, 0.5, 1.0]),
    ],
)
def test_which_pictures_the_network_gets(times, seen, network, monkeypatch):
    monkeypatch.setattr(camera, "normalize", lambda frame: got.append(picture.time) or frame / 255)
    got: list[float] = []
    watcher = camera.Watcher(*networks.load_trained(network), 0.2, torch.device("cpu"))
    for picture, when in zip(pictures(len(times)), times, strict=True):
        picture = replace(picture, time=when)
        watcher.see(picture)
    assert got == seen


def whole_clip(model: nn.Module, shown: list[camera.Picture]) -> torch.Tensor:
    """The scores of each picture in one clip of all of them."""
    frames = torch.stack([camera.transforms.pil_to_tensor(picture.image) for picture in shown])
    frames = camera.transforms.resize(frames, [round(camera.MARGIN * SIDE)], antialias=True)
    (frames,) = camera.evaluation_crops(frames, SIDE)
    with tsm_jit.n_segment(model, len(shown)), torch.inference_mode():
        return model.backbone(networks.normalize(frames))


def test_a_network_with_shifts_in_both_directions(video, tmp_path, capsys):
    recipe = networks.Recipe("timm/test_resnet", ["left", "right"], SEGMENTS, SIDE, "both", 0.1)
    networks.save_trained(networks.make(recipe, dropout=0.5), recipe, tmp_path / "both.pt")
    watcher = camera.Watcher(*networks.load_trained(tmp_path / "both.pt"), 0.1, torch.device("cpu"))
    assert watcher.latency > 0
    shown = pictures(2 * watcher.latency + 1)
    for picture in shown:
        watcher.see(picture)
    watcher.finish()
    model, _ = networks.load_trained(tmp_path / "both.pt")
    torch.testing.assert_close(torch.stack(list(watcher.scores)), whole_clip(model, shown)[-SEGMENTS:])
    output = str(tmp_path / "out.mp4")
    assert camera.main([str(tmp_path / "both.pt"), "--file", str(video), "--output", output]) == 0
    assert capsys.readouterr().out.startswith(f"{FRAMES} pictures, latency {watcher.latency} frames; the last scores: ")


def test_a_stream_with_latency_has_no_scores_at_first(network, monkeypatch):
    """There are no scores for two pictures, and two more at the end."""

    class Late(nn.Module):
        latency, seen = 2, 0

        def forward(self, frame):
            self.seen += 1
            return None if self.seen <= self.latency else torch.tensor([[float(self.seen - self.latency), 0.0]])

        def flush(self):
            return iter([torch.tensor([[float(self.seen - self.latency + i), 0.0]]) for i in (1, 2)])

    monkeypatch.setattr(camera.tsm_jit.online, "convert", lambda net: Late())
    watcher = camera.Watcher(*networks.load_trained(network), 0.0, torch.device("cpu"))
    now = time.perf_counter()
    for i, picture in enumerate(pictures(5), 1):
        watcher.see(replace(picture, arrival=now - 1000 * (6 - i)))
        assert [scores[0].item() for scores in watcher.scores] == list(range(1, max(0, i - 2) + 1))
        assert (watcher.delay is None) == (i <= 2)
        assert camera.draw(picture.image, watcher, 9.0).size == (60, 45)
    assert round(watcher.delay, -3) == 3000  # of the third picture
    watcher.finish()
    assert [scores[0].item() for scores in watcher.scores] == [3, 4, 5]  # of the last clip


def frame(brightness: int, time: float) -> SimpleNamespace:
    return SimpleNamespace(time=time, to_image=lambda: Image.new("L", (2, 2), brightness))


def brightness(picture: camera.Picture) -> int:
    return picture.image.getpixel((0, 0))


def test_a_slow_network_skips_pictures_of_a_camera():
    released = threading.Event()

    def decode(video):
        for i in range(5):
            yield frame(i, i / 10)
        released.wait(10)
        yield frame(99, Fraction(1))

    newest = camera.Newest(SimpleNamespace(decode=decode))
    while not newest.ended and (newest.picture is None or brightness(newest.picture) < 4):
        time.sleep(0.01)
    shown = iter(newest)
    assert brightness(next(shown)) == 4  # the pictures before it are gone
    released.set()
    assert brightness(next(shown)) == 99
    assert list(shown) == []
    newest.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("unplugged"), WrongInputError),
        (av.error.InvalidDataError(1, "unplugged"), WrongInputError),
        (RuntimeError("unplugged"), RuntimeError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_camera_reaches_the_user(error, expected):
    def decode(video):
        raise error
        yield

    with pytest.raises(expected, match="unplugged"):
        list(camera.Newest(SimpleNamespace(decode=decode)))


def test_unusable_input_raises(network, video, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    output, other, content = ["--output", str(tmp_path / "out.mp4")], tmp_path / "other.pt", video.read_bytes()
    saved = torch.load(network, weights_only=True)
    torch.save(saved | {"state_dict": {}}, other)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.gif")
    for arguments, message in {
        (network, "--file", tmp_path / "dot.gif", *output): "--output must have at least 2x2 pixels, got 1x1",
        (video, "--file", video, *output): "video.mp4 is no network that finetune.py has written",
        (tmp_path / "no.pt", "--file", video, *output): "no.pt does not exist",
        (network, "--file", tmp_path / "no.mp4", *output): "no.mp4 does not exist",
        (network, "--file", network, *output): "best.pt cannot be read as a video",
        (network, "--file", video): "a window needs OpenCV: pip install opencv-python, or set --output",
        (network, "--device", tmp_path / "camera", *output): "camera",
        (network, "--file", video, "--output", tmp_path / "no" / "out.mp4"): "no/out.mp4 does not exist",
        (network, "--file", video, "--output", tmp_path / "out.unknown"): "out.unknown cannot be written as a video: ",
        (network, "--file", video, "--output", tmp_path / "out.gif"): "out.gif cannot be written as a video: ",
        (network, "--file", video, "--output", video): "--output must be another file than --file",
        (other, "--file", video, *output): "other.pt is no network that finetune.py has written",
    }.items():
        assert camera.main(list(map(str, arguments))) == 2, message
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.stem == "out"]
    assert video.read_bytes() == content


def test_a_window_needs_a_display(network, video, capsys, monkeypatch):
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems always have a display")
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace())
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert camera.main([str(network), "--file", str(video)]) == 2
    assert "a window needs a display" in capsys.readouterr().err


def test_a_window_shows_pictures_until_the_user_quits(network, video, capsys, monkeypatch):
    keys, shown = iter([-1, -1, ord("q")]), []
    cv2 = SimpleNamespace(
        imshow=lambda name, pixels: shown.append(pixels),
        waitKey=lambda milliseconds: next(keys),
        destroyAllWindows=lambda: shown.append("closed"),
    )
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    monkeypatch.setenv("DISPLAY", ":0")
    assert camera.main([str(network), "--file", str(video)]) == 0
    assert capsys.readouterr().out.startswith("3 pictures")
    assert shown.pop() == "closed"
    assert [pixels.shape for pixels in shown] == [(120, 120, 3)] * 3
    first = read_frames(video, lambda _: [0])[0].permute(1, 2, 0)
    middle = torch.from_numpy(shown[0])[50:100].flip(2)  # BGR
    assert (middle.int() - first[50:100].int()).abs().max() <= 3  # two converters round
