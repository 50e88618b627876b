"""The example that learns the arrow of time: its split, a run with all its files, resuming, both networks, refusals."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import launch
from support import EXAMPLES

import tsm_jit

for needed in ("av", "matplotlib", "torchvision", "tqdm"):
    pytest.importorskip(needed, reason="needs the demo extra")

import arrow_of_time as arrow  # noqa: E402  (after the check for what it imports)

from tsm_jit import video_io  # noqa: E402

SCRIPT = EXAMPLES / "arrow_of_time.py"
TINY = ["--setting", "small", "--clips", "8"]
pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "ink.mp4", 80)


def write_video(path: Path, frames: int) -> Path:
    video_io.write_video(path, arrow.ink(48, torch.Generator().manual_seed(0), frames))
    return path


def command(*arguments) -> subprocess.CompletedProcess:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(tsm_jit.__file__).parent.parent), *sys.path]))
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(SCRIPT), *TINY, *map(str, arguments)]
    return subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("span", [8, 15, 22])
def test_no_frame_in_training_and_validation(span):
    usable = 0
    for frames in range(400):
        training, validation = arrow.split(frames, span)
        if not training:
            assert not usable, "a video that is longer is usable too"
            continue
        usable += 1
        clips = [[range(f, f + span) for f in arrow.first_frames(blocks, span)] for blocks in (training, validation)]
        seen, held = ({frame for clip in some for frame in clip} for some in clips)
        assert seen
        assert held
        assert max(seen | held) < frames
        assert seen.isdisjoint({frame + near for frame in held for near in range(-arrow.GAP, arrow.GAP + 1)})


def test_clips_of_either_part_stay_in_it():
    setting = arrow.SETTINGS["small"]
    stamped = torch.arange(150, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, setting.shorter, 60)
    clips = arrow.Clips([stamped, stamped[:90]], setting)
    training, validation = ({(v, int(f)) for v, first in part for f in clips.cut(v, first)[:, 0, 0, 0]}
                            for part in (clips.training, clips.validation))  # fmt: skip
    assert {v for v, _ in training} == {v for v, _ in validation} == {0, 1}
    assert training.isdisjoint(validation)


def test_generated_videos_know_a_direction():
    video = arrow.ink(40, torch.Generator().manual_seed(3))
    assert (video.shape, video.dtype) == ((96, 3, 40, 40), torch.uint8)
    assert torch.equal(video, arrow.ink(40, torch.Generator().manual_seed(3)))
    for seed in range(3):
        drop = arrow.ink(40, torch.Generator().manual_seed(seed), drops=1).float()
        darkness = drop.amax((1, 2, 3)) - drop.amin((1, 2, 3))
        assert (darkness[darkness.argmax() :].diff() <= 0).all()  # it never gathers again
        assert darkness.max() > 5


def test_only_the_shift_sees_the_order():
    torch.manual_seed(0)
    nets = arrow.Twins().eval()
    clips = torch.randint(256, (3, arrow.N_SEGMENT, 3, 32, 32), dtype=torch.uint8)
    x, labels = arrow.both_directions(clips, torch.ones(3), torch.device("cpu"))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    with torch.inference_mode():
        shift, no_shift = nets(x)
    torch.testing.assert_close(no_shift[:3], no_shift[3:], rtol=1e-4, atol=1e-5)  # a sum in another order
    assert ((shift[:3] - shift[3:]).abs().amax(1) > 1e-3 * shift.abs().max()).all()


def test_command_line_writes_log_curve_and_checkpoint(video, tmp_path):
    done = command("--video", video, "--epochs", 2, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    log = rows(tmp_path)
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert all(0 <= float(row["shift_validation"]) <= 1 for row in log)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]) == 2
    assert {each.name for each in tmp_path.iterdir()} == {"log.csv", "curve.png", "checkpoint.pt"}
    assert "ink.mp4: " in done.stdout


def test_resumed_is_as_uninterrupted(video, tmp_path, monkeypatch, capsys):
    def run(folder, *more):
        return arrow.main([*TINY, "--video", str(video), "--epochs", "2", "--output", str(tmp_path / folder), *more])

    assert run("whole") == 0
    save = arrow.Training.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arrow.Training, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    assert len(rows(tmp_path / "parts")) == 1
    assert run("parts", "--resume", "--seed", "1") == 2
    assert "is of another run: its seed is 0, not 1" in capsys.readouterr().err
    assert run("parts", "--resume") == 0
    whole, parts = (torch.load(tmp_path / each / "checkpoint.pt", weights_only=True) for each in ("whole", "parts"))
    assert all(torch.equal(value, parts["nets"][name]) for name, value in whole["nets"].items())
    for one, other in zip(whole["history"], parts["history"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_two_processes(video, tmp_path):
    output = tmp_path / "output"
    printed = launch(arrow.main, [*TINY, "--video", video, "--epochs", 1, "--output", output], tmp_path)
    assert len(rows(output)) == 1
    assert printed.count("epoch 1:") == 1  # only the first process prints


def test_unusable_input_raises(video, tmp_path, capsys):
    broken = tmp_path / "checkpoint.pt"
    broken.write_text("no checkpoint")
    for arguments, message in {
        ("--video", str(tmp_path / "nothing.mp4")): "nothing.mp4 does not exist",
        ("--video", str(SCRIPT)): "cannot be read as a video",
        ("--video", str(write_video(tmp_path / "short.mp4", 30))): "is too short: 30 frames, 58 are needed",
        ("--video", str(video), "--resume", "--output", str(tmp_path / "new")): "nothing to resume",
        ("--video", str(video), "--resume", "--output", str(tmp_path)): "is no checkpoint of this example",
        ("--video", str(video), "--output", str(broken)): "exists",
    }.items():
        assert arrow.main([*TINY, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_missing_package_is_reported():
    code = f"import sys, runpy; sys.modules['tqdm'] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(tsm_jit.__file__).parent.parent), *sys.path]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (2, "this example needs tqdm: pip install 'tsm-jit[demo]'\n")
