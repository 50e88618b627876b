"""Fine-tuning on labelled videos: a run with all its files, resuming, processes, lists, sampling, crops, refusals."""

import csv
import io
import math
import runpy
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import mmaction2_package
import pytest
import torch
from processes import launch
from support import EXAMPLES, assert_same_bits

import tsm_jit

for needed in ("av", "matplotlib", "onnxscript", "timm", "torchvision", "tqdm"):
    pytest.importorskip(needed, reason="needs the finetune extra, and timm for a tiny network")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the finetune extra")

import finetune  # noqa: E402  (after the check for what it imports)
import moving_shapes  # noqa: E402
import networks  # noqa: E402
import torchvision  # noqa: E402
import videos  # noqa: E402
from torchvision.transforms.v2.functional import to_pil_image  # noqa: E402
from training import WrongInputError  # noqa: E402

from tsm_jit.video_io import UnusableVideoError, write_video  # noqa: E402

SEGMENTS, SIDE, EPOCHS = 4, 32, 6
TINY = f"--network timm/test_resnet --weights none --segments {SEGMENTS} --side {SIDE} --no-flip".split()
RUN = [*TINY, "--epochs", str(EPOCHS), "--batch", "4", "--accumulate", "2", "--lr", "0.005", "--fuse"]
pytestmark = pytest.mark.usefixtures("without_gpu")


def stripes(vertical: bool, frames: int = 12, height: int = 40, width: int = 56) -> torch.Tensor:
    """A video with vertical or horizontal stripes. A frame shows its class, whatever else its batch holds."""
    wave = 80 * torch.sin(torch.arange(width if vertical else height) * 0.8 + 2 * math.pi * torch.rand(1))
    noise = torch.randint(-20, 20, (frames, 3, height, width))
    return (128 + (wave if vertical else wave[:, None]) + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two classes of videos that are easy to tell apart; among them a short and a damaged one."""
    folder = tmp_path_factory.mktemp("data") / "data"
    for label in ("horizontal", "vertical"):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            write_video(folder / label / f"{i}.mp4", stripes(label == "vertical", frames=12))
    write_video(folder / "vertical" / "short.mp4", stripes(True, frames=SEGMENTS - 1))
    whole = (folder / "vertical" / "0.mp4").read_bytes()
    (folder / "vertical" / "damaged.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "vertical" / "notes.txt").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory) -> tuple[Path, str, str]:
    """The output folder of an uninterrupted run, and what it printed."""
    output = tmp_path_factory.mktemp("whole") / "output"
    views = ["--eval-clips", "2", "--eval-crops", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        arguments = [str(data), "--val", str(data), *RUN, *views, "--workers", "1", "--output", str(output)]
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
            assert finetune.main(arguments) == 0
    return output, out.getvalue(), errors.getvalue()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_writes_its_files(whole_run, data):
    output, lines, errors = whole_run
    names = {"best.pt", "checkpoint.pt", "confusion.png", "curve.png", "log.csv", "model.onnx", "predictions.csv"}
    assert {path.name for path in output.iterdir()} == names
    log = rows(output / "log.csv")
    assert [row["epoch"] for row in log] == [str(i + 1) for i in range(EPOCHS)]
    for picture in ("confusion.png", "curve.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    predictions = rows(output / "predictions.csv")
    assert [Path(row["path"]) for row in predictions] == sorted(p for p in data.glob("*/?.mp4"))
    right = sum(row["class"] == row["top1"] for row in predictions)
    assert len(predictions) == 12
    assert right >= 10  # 12 in nearly all runs; an untrained network gets 6
    assert "12 videos, 2 x 3 views; 2 videos skipped" in lines
    assert "clips/s" in lines
    assert errors.count("damaged.mp4 cannot be read as a video: ") == 1
    assert errors.count(f"short.mp4 is too short: it must have at least {SEGMENTS} frames, got {SEGMENTS - 1}") == 1
    assert errors.count("skipped: ") == 2


def test_the_onnx_file_has_the_scores_of_the_network(whole_run):
    output, *_ = whole_run
    model, recipe = networks.load_trained(output / "best.pt")
    assert (recipe.classes, recipe.interval) == (["horizontal", "vertical"], pytest.approx(12 / 25 / SEGMENTS, rel=0.2))
    session = onnxruntime.InferenceSession(output / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        clips = torch.randint(0, 256, (count, SEGMENTS, 3, SIDE, SIDE), dtype=torch.uint8)
        (scores,) = session.run(None, {"clips": clips.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(scores), networks.FromBytes(model)(clips), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("saves", [4, 7], ids=["after epoch 1", "amid epoch 2"])
def test_resumed_is_as_uninterrupted(saves, whole_run, data, tmp_path, monkeypatch, capsys):
    def run(*more):
        return finetune.main([str(data), "--val", str(data), *RUN, "--workers", "0", "--output", str(tmp_path), *more])

    save, count = finetune.Training.save, []

    def save_and_stop(*arguments):
        save(*arguments)
        count.append(1)
        if len(count) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "export", lambda *_: 0.0)
    monkeypatch.setattr(finetune, "STEPS_PER_CHECKPOINT", 1)  # also in the middle of epochs
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Training, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    if saves == 4:
        assert run("--resume", "--seed", "1") == 2
        (tmp_path / "val.txt").write_text(f"{data / 'vertical' / '0.mp4'} 1\n")
        assert run("--resume", "--val", str(tmp_path / "val.txt")) == 2
        assert run("--resume", "--compile") == 2
        errors = capsys.readouterr().err
        for message in ("its seed is 0, not 1", "its videos is ", "its compile is False, not True"):
            assert f"is of another run: {message}" in errors
    assert run("--resume") == 0
    whole, parts = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole_run[0], tmp_path))
    for name, value in whole["model"].items():
        assert_same_bits(parts["model"][name], value)
    for name, state in whole["optimizer"]["state"].items():
        for key, value in state.items():
            assert_same_bits(parts["optimizer"]["state"][name][key], value)
    measured = {"clips_per_second": 0, "waiting": 0, "seconds": 0}
    assert [row | measured for row in whole["history"]] == [row | measured for row in parts["history"]]


def test_two_processes_with_skipped_videos(data, tmp_path):
    """The videos that are skipped must not let one process wait for the other."""
    arguments = [data, *TINY, "--epochs", 1, "--batch", 4, "--workers", 0, "--output", tmp_path / "output"]
    printed = launch(main_without_export, arguments, tmp_path)
    assert printed.count("epoch 1: ") == 1  # only the first process prints
    assert "2 videos skipped" in printed


def main_without_export(arguments: list[str]) -> int:
    finetune.export = lambda *_: 0.0
    return finetune.main(arguments)


# --- lists and frames ------------------------------------------------------------------------------------------------


def test_lists_of_tsm_and_mmaction2_and_folders_of_pictures(tmp_path):
    video = stripes(True, frames=11)
    write_video(tmp_path / "a clip 7.mp4", video)
    (tmp_path / "frames").mkdir()
    for i, picture in enumerate(video, 5):  # unpadded numbers: 10 comes after 9
        to_pil_image(picture).save(tmp_path / "frames" / f"img_{i}.png")
    (tmp_path / "list.txt").write_text("a clip 7.mp4 2\na clip 7 11 0\n\nframes 9 1\n")
    listed, classes = videos.read_videos(tmp_path / "list.txt")
    assert classes == ["0", "1", "2"]
    assert [(v.path.name, v.frames, v.label) for v in listed] == [
        ("a clip 7.mp4", None, 2),
        ("a clip 7", 11, 0),
        ("frames", 9, 1),
    ]
    decoded = videos.read(listed[0], range, 40, 11)
    assert_same_bits(videos.read(listed[1], range, 40, 11), decoded)  # the suffix is found
    totals = []
    pictures = videos.read(listed[2], lambda total: totals.append(total) or [0, total - 1, 4], 40, 9)
    assert totals == [9]  # as the list says
    assert_same_bits(pictures, video[[0, 8, 4]])
    with pytest.raises(UnusableVideoError, match=r"frames is too short: it must have at least 10 frames, got 9"):
        videos.read(listed[2], range, 40, 10)
    assert videos.read_videos(tmp_path / "list.txt", root=Path("/elsewhere"))[0][2].path == Path("/elsewhere/frames")


def test_a_number_before_the_label_may_end_a_name(tmp_path):
    for name in ("clip 07.MP4", "both 3.mp4", "both.mkv", "[a] 1.avi"):
        (tmp_path / name).touch()
    (tmp_path / "pictures 5").mkdir()
    (tmp_path / "list.txt").write_text("clip 07 0\npictures 5 1\nboth 3 0\ngone 4 1\n[a] 1 0\n")
    listed, _ = videos.read_videos(tmp_path / "list.txt")
    assert [(videos.locate(v.path).name, v.frames, v.label) for v in listed] == [
        ("clip 07.MP4", None, 0),
        ("pictures 5", None, 1),
        ("both.mkv", 3, 0),
        ("gone", 4, 1),
        ("[a] 1.avi", None, 0),
    ]


def test_lists_of_other_systems(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeff für.mp4 1\r\n\r\nb\u2028c.mp4\t9\t0 \r\n".encode())
    (tmp_path / "names.txt").write_bytes("\ufeffüben\r\nlaufen\r\n".encode())
    listed, _ = videos.read_videos(tmp_path / "list.txt")
    assert [(v.path.name, v.frames, v.label) for v in listed] == [("für.mp4", None, 1), ("b\u2028c.mp4", 9, 0)]
    assert [name for _, name in videos.read_lines(tmp_path / "names.txt")] == ["üben", "laufen"]


@pytest.mark.parametrize("total", [1, 3, 8, 50])
def test_each_segment_gives_one_frame(total):
    middle = videos.segment_frames(total, [0.5] * 8)
    assert middle == [(2 * i + 1) * total // 16 for i in range(8)]
    drawn = videos.segment_frames(total, torch.rand(8).tolist())
    assert all(int(i * total / 8) <= frame <= (i + 1) * total / 8 for i, frame in enumerate(drawn))
    assert max(drawn) < total


def test_training_clips_depend_only_on_their_key(data):
    listed, _ = videos.read_videos(data)
    clips = videos.TrainingClips(listed, SEGMENTS, SIDE, flip=True)
    state = torch.random.get_rng_state()
    clip, label, failures = clips[(2, 11)]
    assert_same_bits(torch.random.get_rng_state(), state)
    assert (clip.shape, clip.dtype, label, failures) == ((SEGMENTS, 3, SIDE, SIDE), torch.uint8, 0, [])
    assert_same_bits(clips[(2, 11)][0], clip)
    assert not all(torch.equal(clips[(2, seed)][0], clip) for seed in range(4))
    *readable, damaged, short = range(len(listed))
    assert [clips[(n, 0)][1:] for n in readable] == [(listed[n].label, []) for n in readable]
    for n, count in ((damaged, 2), (short, 1)):
        _, label, failures = clips[(n, 0)]  # the next readable one in its place
        assert label == listed[0].label
        assert len(failures) == count


def test_crops_lie_inside_and_are_the_same_for_all_frames():
    height, width = 40, 67
    rows, columns = torch.arange(height)[:, None].expand(height, width), torch.arange(width).expand(height, width)
    frames = torch.stack([rows, columns, columns]).to(torch.uint8).expand(3, -1, -1, -1)
    sizes = set()
    for _ in range(40):
        crop = videos.scale_jitter_crop(frames, 24)
        assert crop.shape == (3, 3, 24, 24)
        assert_same_bits(crop[0], crop[2])
        spans = [(crop[0, i].max() - crop[0, i].min()).item() for i in (0, 1)]
        assert all(0.55 * height < span < height for span in spans)
        sizes.add(tuple(spans))
    assert len(sizes) > 5
    first, middle, last = videos.evaluation_crops(frames, 36, 3)
    assert (first[0, 1].min(), last[0, 1].max()) == (0, width - 1)
    assert_same_bits(middle, videos.evaluation_crops(frames, 36)[0])
    assert first[0, 0].min() == 2  # in the middle of the shorter side


@pytest.mark.parametrize("count", [1, 5, 8, 9])
def test_each_epoch_has_every_video_shared_out(count):
    batch, processes, accumulate, epochs = 8, 2, 2, 3
    shares = [videos.Batches(count, batch, accumulate, epochs, 3, rank, processes) for rank in range(processes)]
    parts = [list(share) for share in shares]
    of_epoch = -(-count // batch) * accumulate
    assert [len(part) for part in parts] == [len(share) for share in shares] == [epochs * of_epoch] * processes
    seen = []
    for epoch in range(epochs):
        of_this = [part[epoch * of_epoch : (epoch + 1) * of_epoch] for part in parts]
        keys = [key for part in of_this for keys in part for key in keys]
        assert {video for video, _ in keys} == set(range(count))
        assert len(keys) == len(set(keys)) == -(-count // batch) * batch
        assert keys not in seen
        seen.append(keys)
    shares[0].epoch, shares[0].first = 1, shares[0].steps - 1
    assert list(shares[0]) == parts[0][2 * of_epoch - accumulate :]


def test_a_share_of_every_class_is_held_out():
    listed = [videos.Video(Path(str(i)), label) for i, label in enumerate([0] * 10 + [1] * 3 + [2])]
    training, held = videos.hold_out(listed, seed=4)
    assert sorted(video.label for video in held) == [0, 0, 1]
    assert {*training, *held} == set(listed)
    assert videos.hold_out(listed, seed=4) == (training, held)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torchvision", "tsm", "mmaction2"])
def test_starts_from_checkpoints(layout, tmp_path):
    source = torchvision.models.resnet18(num_classes=7)
    weights = tsm_jit.checkpoints.convert(source.state_dict(), target=layout).state_dict
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    recipe = networks.Recipe("resnet18", ["a", "b"], SEGMENTS, SIDE, "both")
    model = networks.make(recipe)
    note = networks.start_from(model, recipe, str(tmp_path / "weights.pth"))
    assert "random: backbone.fc.weight, backbone.fc.bias" in note
    assert_same_bits(model.backbone.layer3[1].conv1.net.weight, source.layer3[1].conv1.weight)


@pytest.mark.parametrize("layout", ["torchvision", "mmaction2"])
def test_a_resnet_of_mmaction2_from_checkpoints(layout, tmp_path):
    mmaction2_package.models()
    source = torchvision.models.resnet18(num_classes=2)
    weights = tsm_jit.checkpoints.convert(source.state_dict(), target=layout).state_dict
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    recipe = networks.Recipe("mmaction2/resnet18", ["a", "b"], SEGMENTS, SIDE, "both")
    model = networks.make(recipe, dropout=0.5)
    assert "random" not in networks.start_from(model, recipe, str(tmp_path / "weights.pth"))
    tsm_jit.make_temporal_shift(source, SEGMENTS)
    clips = torch.randn(2, SEGMENTS, 3, SIDE, SIDE)
    expected = tsm_jit.VideoModel(source).eval()(clips)
    torch.testing.assert_close(model.eval()(clips), expected)
    tsm_jit.residual.fuse(model.backbone)
    torch.testing.assert_close(model(clips), expected)
    networks.save_trained(model, recipe, tmp_path / "best.pt")
    torch.testing.assert_close(networks.load_trained(tmp_path / "best.pt")[0](clips), expected)


FAMILIES = ["resnet18", "regnet_y_400mf", "convnext_tiny", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"]
FAMILIES += ["mnasnet0_5", "timm/resnet14t", "timm/regnetx_002", "timm/convnext_atto", "timm/mobilenetv2_035"]
FAMILIES += ["timm/test_vit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_scores_of_the_classes(name):
    """On the meta device, which computes no values."""
    side = 160 if name == "timm/test_vit" else 64
    model = networks.make(networks.Recipe(name, ["a", "b", "c"], SEGMENTS, side, "both"), dropout=0.5).to("meta")
    clips = torch.empty(2, SEGMENTS, 3, side, side, device="meta")
    assert model(clips).shape == (2, 3)
    hooked = [module for module in model.modules() if module._forward_pre_hooks]
    assert [module.out_features for module in hooked] == [3]  # dropout is before the last layer


def test_dropout_is_before_the_last_layer_in_training():
    model = networks.make(networks.Recipe("timm/test_resnet", ["a", "b"], SEGMENTS, SIDE, "both"), dropout=1.0)
    clips = torch.randn(1, SEGMENTS, 3, SIDE, SIDE)
    bias = model.backbone.fc.bias
    torch.testing.assert_close(model.train()(clips)[0], bias)
    assert not torch.allclose(model.eval()(clips)[0], bias)


def test_unusable_input_raises(data, tmp_path, capsys):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "one" / "class").mkdir(parents=True)
    write_video(tmp_path / "one" / "class" / "a.mp4", stripes(True))
    (tmp_path / "line.txt").write_text("a.mp4 0\nb.mp4\n")
    (tmp_path / "gone.txt").write_text("".join(f"{i}.mp4 {i % 2}\n" for i in range(30)))
    (tmp_path / "names.txt").write_text("only one\n")
    (tmp_path / "label.txt").write_text("a.mp4 0\nb.mp4 99999999\n")
    for arguments, message in {
        (tmp_path / "nothing",): "nothing does not exist: a folder of class folders or a list file is needed",
        (tmp_path / "empty",): "has no videos",
        (tmp_path / "one",): "set --val",
        (tmp_path / "line.txt",): "line.txt:2: a line must be 'path label' or 'path num_frames label', got 'b.mp4'",
        (data / "vertical" / "0.mp4",): "0.mp4 must be a list in UTF-8, got other bytes",
        (tmp_path / "label.txt",): "without --classes, labels must be below 10000, got 99999999",
        (tmp_path / "gone.txt",): "too many videos in a row cannot be read, such as: ",
        (tmp_path / "gone.txt", "--classes", tmp_path / "names.txt"): "labels must be below 1, got 1",
        (data, "--val", tmp_path / "one"): "a folder for a class that is not known from training: class",
        (data, "--batch", 4, "--accumulate", 3): "--batch must be a multiple of",
        (data, "--network", "nonet"): "nonet is neither a network of torchvision nor of timm",
        (data, "--network", "timm/test_vit"): "the side of frames must be 160 for timm/test_vit, got 32",
        (data, "--network", "alexnet"): "alexnet cannot be converted: net must have a supported architecture",
        (data, "--network", "mobilenet_v2", "--fuse"): "--fuse: net must be a ResNet",
        (data, "--weights", data / "vertical" / "0.mp4"): "0.mp4 cannot be used: path must be a file",
        (data, "--resume"): "nothing to resume",
    }.items():
        assert finetune.main([*TINY, "--workers", "0", "--output", str(tmp_path / "o"), *map(str, arguments)]) == 2, (
            message
        )
        error = capsys.readouterr().err.rpartition("skipped: ")[2]
        assert message in error.splitlines()[-1]


@pytest.mark.parametrize(("waiting", "bound"), [(0.04, "compute"), (0.3, "decode"), (0.9, "decode")])
def test_an_epoch_tells_what_limits_its_speed(waiting, bound):
    names = ("training_loss", "training_top1", "validation_loss", "validation_top1", "validation_top5")
    row = dict.fromkeys(names, 0.5) | {"epoch": 3, "clips_per_second": 12.34, "waiting": waiting}
    message = f"; 12.3 clips/s, {bound}-bound: {100 * waiting:.0f} % of the time waiting for videos"
    assert finetune.line_of(row).endswith(message)


def test_a_run_stops_if_no_video_can_be_read():
    clips = videos.EvaluationClips([videos.Video(Path("a.mp4"), 0), videos.Video(Path("b.mp4"), 1)], SEGMENTS, SIDE)
    options = Namespace(batch=2, accumulate=1, workers=0, precision="float32")
    with pytest.raises(WrongInputError, match=r"none of the 2 videos for validation can be read"):
        finetune.evaluate(torch.nn.Identity(), clips, options, finetune.Processes(), finetune.Skipped())


def test_a_video_is_skipped_once_whatever_the_reason(monkeypatch, capsys):
    """Which frames of a damaged video can be decoded differs from clip to clip."""

    def read(video, choose, shorter, least):
        raise UnusableVideoError(f"{video.path}: {choose(1000)} cannot be decoded")

    monkeypatch.setattr(videos, "read", read)
    listed = [videos.Video(Path("a.mp4"), 0), videos.Video(Path("b.mp4"), 1)]
    training, skipped = videos.TrainingClips(listed, SEGMENTS, SIDE, flip=True), finetune.Skipped()
    reasons = set()
    for seed in range(5):
        _, _, failures = training[(0, seed)]
        skipped.add(failures)
        reasons.update(reason for _, reason in failures)
    skipped.add(videos.EvaluationClips(listed, SEGMENTS, SIDE)[1][2])
    skipped.share(finetune.Processes())
    assert len(reasons) > 2
    assert len(skipped.reasons) == capsys.readouterr().err.count("skipped: ") == 2


def test_a_missing_package_is_reported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "finetune.py"), run_name="__main__")
    assert capsys.readouterr().err == "this example needs onnxruntime: pip install 'tsm-jit[finetune]'\n"


def test_generated_videos_show_their_class_only_in_time(tmp_path):
    assert moving_shapes.main([str(tmp_path), "--count", "1"]) == 0
    assert sorted(path.parent.name for path in tmp_path.glob("*/0.mp4")) == sorted(moving_shapes.CLASSES)
    seed = int(torch.randint(1000, ()))
    forth, back = (
        moving_shapes.moving_square(label, torch.Generator().manual_seed(seed)) for label in ("left", "right")
    )
    assert forth.shape == (32, 3, 64, 64)
    assert_same_bits(forth[0], back[0])
    assert not torch.equal(forth[8], back[8])
