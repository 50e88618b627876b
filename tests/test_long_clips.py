"""The example that trains on long clips: two processes, resuming on another number of them, refusals."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import launch

for needed in ("av", "torchvision", "tqdm"):
    pytest.importorskip(needed, reason="needs the demo extra")

import long_clips  # noqa: E402  (after the check for what it imports)

from tsm_jit.video_io import write_video  # noqa: E402

TINY = ["--frames", "7", "--side", "32", "--batch", "2"]
pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """A bright square that moves to the right."""
    path = tmp_path_factory.mktemp("video") / "square.mp4"
    frames = torch.full((20, 3, 48, 64), 40, dtype=torch.uint8)
    for step, frame in enumerate(frames):
        frame[:, 16:32, 2 * step : 2 * step + 16] = 220
    write_video(path, frames)
    return path


def alone(*arguments) -> int:
    return long_clips.main([*TINY, *map(str, arguments)])


def weights(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def distance(some: dict, others: dict) -> torch.Tensor:
    return torch.cat([(value - others[name]).flatten() for name, value in some.items()]).norm()


def test_clips_are_parts_of_the_video_in_either_direction():
    stamped = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 40, 50)
    for length in (5, 20, 60):
        clips = long_clips.Clips("stamped", stamped, length, 32)
        frames, corners, labels = clips.draw(40, torch.Generator().manual_seed(1))
        assert set(labels.tolist()) == {0, 1}
        steps = torch.where(labels[:, None] == 1, -frames.diff(), frames.diff())
        assert set(steps.unique().tolist()) <= {0, 1}
        assert 0 <= frames.min() <= frames.max() < 20
        x = clips.load(frames[:, 2:4].flatten(), corners, torch.device("cpu"))
        assert x.shape == (80, 3, 32, 32)
        torch.testing.assert_close(x[:, 0, 0, 0] * 0.225 + 0.45, frames[:, 2:4].flatten() / 255)


def test_two_processes_resume_what_one_began(video, tmp_path):
    """And the weights are those of a run that one process did alone."""
    assert alone("--video", video, "--steps", 3, "--output", tmp_path / "whole") == 0
    assert alone("--video", video, "--steps", 1, "--output", tmp_path / "parts") == 0
    begun = weights(tmp_path / "parts")
    arguments = [*TINY, "--video", video, "--steps", 3, "--resume", "--output", tmp_path / "parts"]
    printed = launch(long_clips.main, arguments, tmp_path)
    assert printed.count("step 3: loss ") == 1  # only the first process prints
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    # AdamW turns roundings of gradients near zero into whole steps of single weights.
    assert distance(whole, parts) <= 0.1 * distance(whole, begun)


def test_unusable_input_raises(video, tmp_path, capsys):
    broken = tmp_path / "checkpoint.pt"
    broken.write_text("no checkpoint")
    (tmp_path / "done").mkdir()
    other = shutil.copy(video, tmp_path / "other.mp4")
    run = {"net": "resnet18", "frames": 7, "side": 32, "batch": 2, "seed": 0, "learning_rate": 3e-4}
    run["video"] = "square.mp4 of 20 frames"
    torch.save({"run": run}, tmp_path / "done" / "checkpoint.pt")
    for arguments, message in {
        ("--video", tmp_path / "nothing.mp4"): "nothing.mp4 does not exist",
        ("--video", video, "--frames", 100): "is too short: 20 frames, 25 are needed",
        ("--video", video, "--time", 2): "--time must divide the number of processes, 1, got 2",
        ("--video", video, "--frames", 1): "--frames must be at least 2",
        ("--video", video, "--resume", "--output", tmp_path / "new"): "nothing to resume",
        ("--video", video, "--resume", "--output", tmp_path): "is no checkpoint of this example",
        ("--video", video, "--resume", "--seed", 1, "--output", tmp_path / "done"): "its seed is 0, not 1",
        ("--video", video, "--resume", "--learning-rate", 1, "--output", tmp_path / "done"): "is 0.0003, not 1.0",
        ("--video", other, "--resume", "--output", tmp_path / "done"): (
            "its video is square.mp4 of 20 frames, not other.mp4 of 20 frames"
        ),
    }.items():
        assert alone("--steps", 2, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
