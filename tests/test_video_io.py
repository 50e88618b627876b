"""Reading and writing videos: which frames are read from which container, scaling, rotation."""

import random

import pytest
import torch
from support import assert_same_bits, rotated_video

av = pytest.importorskip("av", reason="needs the demo extra")

from tsm_jit import video_io  # noqa: E402  (after the check for what it imports)

FRAMES = 53


def grey(step: int = 4, height: int = 48, width: int = 64) -> torch.Tensor:
    """A video whose frames differ in brightness."""
    return (step * torch.arange(FRAMES, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, 3, height, width)


def numbers(frames: torch.Tensor) -> list[int]:
    return (frames.float().mean((1, 2, 3)) / 4).round().int().tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".ts", ".avi"])
def test_frames_have_the_chosen_numbers(suffix, tmp_path):
    path = tmp_path / f"grey{suffix}"
    video_io.write_video(path, grey())
    totals = []
    frames = video_io.read_frames(path, lambda total: totals.append(total) or range(total))
    assert totals == [FRAMES]
    assert (frames.shape, frames.dtype) == ((FRAMES, 3, 48, 64), torch.uint8)
    assert numbers(frames) == list(range(FRAMES))
    chosen = random.choices(range(FRAMES), k=6)  # with repeats, in any order
    assert_same_bits(video_io.read_frames(path, lambda _: chosen), frames[chosen])


@pytest.mark.parametrize("options", [{"g": "5", "bf": "0"}, {"g": "7", "bf": "2"}, {"g": "1"}], ids=str)
def test_skipping_to_keyframes_reads_the_same_frames(options, tmp_path):
    path = tmp_path / "grey.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in grey().permute(0, 2, 3, 1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")))
        container.mux(stream.encode())
    frames = video_io.read_frames(path, range)
    for _ in range(4):
        chosen = sorted(random.sample(range(FRAMES), k=random.randint(1, 9)))
        assert_same_bits(video_io.read_frames(path, lambda _, chosen=chosen: chosen), frames[chosen])


@pytest.mark.parametrize(("height", "width", "scaled"), [(48, 64, (30, 40)), (90, 60, (45, 30)), (20, 20, (30, 30))])
def test_the_shorter_side_is_scaled(height, width, scaled, tmp_path):
    video_io.write_video(tmp_path / "grey.mp4", grey(height=height, width=width))
    frames = video_io.read_frames(tmp_path / "grey.mp4", lambda total: [0, total - 1], shorter=30)
    assert frames.shape == (2, 3, *scaled)


def test_a_rotation_that_the_file_asks_for_is_applied(tmp_path):
    if not hasattr(av.VideoFrame, "rotation"):
        pytest.skip("this PyAV does not read rotations")
    (frame,) = video_io.read_frames(rotated_video(tmp_path, FRAMES), lambda _: [0])
    assert frame.shape == (3, 64, 48)
    bright = frame.float().mean(0)
    assert bright[:16, -12:].mean() > 200  # top right
    assert bright.sum() < 1.3 * bright[:16, -12:].sum()


def test_an_odd_row_and_column_are_dropped(tmp_path):
    video_io.write_video(tmp_path / "grey.mp4", grey(height=35, width=51))
    assert video_io.read_frames(tmp_path / "grey.mp4", range).shape == (FRAMES, 3, 34, 50)


def test_a_file_of_subtitles_has_neither_video_nor_sound(tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    with pytest.raises(video_io.UnusableVideoError, match=r"a\.srt has no video stream$"):
        video_io.read_frames(tmp_path / "a.srt", range)


def test_duration(tmp_path):
    video_io.write_video(tmp_path / "grey.mp4", grey(), rate=10)
    assert video_io.duration(tmp_path / "grey.mp4") == pytest.approx(FRAMES / 10, rel=0.05)


def test_frames_of_different_sizes_raise(tmp_path):
    parts = []
    for i, height in enumerate((32, 48)):
        video_io.write_video(tmp_path / f"{i}.ts", grey(height=height))
        parts.append((tmp_path / f"{i}.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(video_io.UnusableVideoError, match=r"both\.ts has frames of different sizes"):
        video_io.read_frames(tmp_path / "both.ts", range)


def test_packets_before_the_first_keyframe_are_no_frames(tmp_path):
    """Of a stream that was recorded from its middle."""
    video_io.write_video(tmp_path / "whole.ts", torch.cat([grey()] * 4))
    data = (tmp_path / "whole.ts").read_bytes()
    with video_io.open_video(tmp_path / "whole.ts") as container:
        first = [packet for packet in container.demux(video=0) if packet.size][1]
    start = first.pos // 188 * 188
    (tmp_path / "cut.ts").write_bytes(data[: 2 * 188] + data[start:])
    assert 0 < len(video_io.read_frames(tmp_path / "cut.ts", range)) < 4 * FRAMES


def test_a_video_without_its_end_raises(tmp_path):
    video_io.write_video(tmp_path / "whole.mp4", grey())
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(video_io.UnusableVideoError, match=r"half\.mp4 cannot be read as a video: "):
        video_io.read_frames(tmp_path / "half.mp4", range)
