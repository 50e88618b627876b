"""Trains a TSM network on your own videos, evaluates it and exports it to ONNX.

    python examples/finetune.py videos                         # videos/<class>/*.mp4; holds out a fifth for validation
    python examples/finetune.py train.txt --val val.txt        # lists of TSM or mmaction2: path [num_frames] label
    python examples/finetune.py videos --no-flip               # if a mirror image has another class: left and right
    python examples/finetune.py videos --weights tsm.pth       # start from a checkpoint of TSM, mmaction2, torchvision
    python examples/finetune.py videos --resume                # continue an interrupted run, bit for bit on a CPU
    torchrun --nproc-per-node 4 examples/finetune.py videos    # several GPUs, or processes on a CPU

A clip has one frame from each of 8 equal parts of a video: a random one in training, the middle one in evaluation. The
scores of its frames are averaged. See TSN (arXiv:1608.00859) and TSM (arXiv:1811.08383).

Videos that are too short or cannot be read are skipped with one line each, and counted. Every clip and every dropout
mask depends only on the seed and the step, so a resumed run continues as if nothing had happened.

The output folder gets ``checkpoint.pt`` to resume, ``log.csv`` and ``curve.png`` after each epoch, and ``best.pt``, the
network of the epoch with the best validation accuracy. At the end, it gets ``predictions.csv``, ``confusion.png`` and
``model.onnx`` of that network.
"""

import argparse
import copy
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import tsm_jit

try:
    import onnxruntime
    import onnxscript  # noqa: F401  (the exporter needs it, after hours of training)
    from matplotlib.figure import Figure
    from networks import FromBytes, Recipe, load_trained, make, normalize, save_trained, start_from
    from tqdm import tqdm
    from videos import (
        Batches,
        EvaluationClips,
        TrainingClips,
        Video,
        collate,
        frame_interval,
        hold_out,
        read_lines,
        read_videos,
    )
except ImportError as error:
    sys.stderr.write(f"this example needs {error.name}: pip install 'tsm-jit[finetune]'\n")
    raise SystemExit(2)

from training import Processes, WrongInputError, autocast, exit_code, load, number, positive, save, write_csv

STEPS_PER_CHECKPOINT = 500  # besides the one at the end of an epoch
WAITING = 0.1  # share of the time; workers decode in advance, so a network that waits for more is not the slower part
ONNX_TOLERANCE = 1e-3  # relative to the largest score; both round in other places


def to_device(clips: Tensor, device: torch.device) -> Tensor:
    """The network's input, normalized, in the memory format that is fastest on the device."""
    x = normalize(clips.to(device, non_blocking=True))
    if device.type == "cuda":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, clips.shape[:2])
    return x


class Skipped:
    """The videos that could not be read. Each is reported once, by the first process that meets it."""

    def __init__(self):
        self.reasons: dict[str, str] = {}  # by the path: the reason may differ between the frames of a damaged video

    def add(self, failures: Sequence[tuple[str, str]]) -> None:
        for path, reason in failures:
            if path not in self.reasons:
                tqdm.write(f"skipped: {reason}", file=sys.stderr)
                self.reasons[path] = reason

    def share(self, processes: Processes) -> None:
        for reasons in processes.gather(self.reasons):
            self.reasons |= reasons


# --- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The results of some videos: their numbers, labels ``[N]`` and probabilities ``[N, K]``."""

    videos: list[int]
    labels: Tensor
    probabilities: Tensor

    @cached_property
    def loss(self) -> float:
        own = self.probabilities.gather(1, self.labels[:, None])
        return -own.clamp(min=1e-12).log().mean().item()

    def top(self, k: int) -> float:
        """The share of videos with their label among the ``k`` most probable classes."""
        best = self.probabilities.topk(min(k, self.probabilities.shape[1])).indices
        return (best == self.labels[:, None]).any(1).double().mean().item()

    def confusion(self) -> Tensor:
        """The number of videos of each class (row) that got each class (column), ``[K, K]``."""
        classes = self.probabilities.shape[1]
        pairs = self.labels * classes + self.probabilities.argmax(1)
        return pairs.bincount(minlength=classes**2).view(classes, classes)


@torch.inference_mode()
def evaluate(model: nn.Module, clips: EvaluationClips, options, processes: Processes, skipped: Skipped) -> Evaluation:
    """Averages the probabilities of all views of each video. The processes share the videos and all get the result."""
    model.eval()
    processes.broadcast(model.buffers())  # running averages: each process has seen other clips
    mine = range(processes.rank, len(clips), processes.count)
    views = clips.clips * clips.crops
    loader = DataLoader(
        Subset(clips, mine),
        max(1, options.batch // processes.count // options.accumulate // views),
        num_workers=min(options.workers, len(mine)),
        collate_fn=collate,
        pin_memory=processes.device.type == "cuda",
    )
    results: list[tuple[Tensor, Tensor]] = []
    failures: list[tuple[str, str]] = []
    for x, labels, failed in tqdm(loader, "evaluation", leave=False, disable=processes.rank > 0 or None):
        with autocast(processes.device, options.precision):
            scores = model(to_device(x.flatten(0, 1), processes.device)).float()
        results += zip(labels, scores.softmax(1).unflatten(0, (-1, views)).mean(1).cpu(), strict=True)
        failures += failed
    skipped.add(failures)
    own = [(number, label, each) for number, (label, each) in zip(mine, results, strict=True) if label >= 0]
    rows = sorted((row for rows in processes.gather(own) for row in rows), key=lambda row: row[0])
    if not rows:
        raise WrongInputError(f"none of the {len(clips)} videos for validation can be read")
    numbers, labels, probabilities = zip(*rows, strict=True)
    return Evaluation(list(numbers), torch.stack(labels), torch.stack(probabilities))


# --- training --------------------------------------------------------------------------------------------------------


class Training:
    """Network, optimizer, schedule, position and history of a run."""

    def __init__(self, model: tsm_jit.VideoModel, clips: TrainingClips, options, processes: Processes):
        self.options, self.processes, device = options, processes, processes.device
        self.model = model.to(
            device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format
        )
        self.batches = Batches(
            len(clips),
            options.batch,
            options.accumulate,
            options.epochs,
            options.seed,
            processes.rank,
            processes.count,
        )
        self.loader = DataLoader(
            clips,
            batch_sampler=self.batches,
            num_workers=options.workers,
            collate_fn=collate,
            pin_memory=device.type == "cuda",
        )
        self.decoded: Iterator | None = None  # from the first step on, to the end of the run
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]  # of norms, and biases: not decayed
        groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, options.lr)
        total = options.epochs * self.batches.steps
        warm_up = max(1, total // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / total)) / 2
        )
        self.wrapped = DistributedDataParallel(self.model) if processes.count > 1 else self.model
        self.forward = torch.compile(self.wrapped) if options.compile else self.wrapped
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)  # of this epoch: losses, correct clips
        self.history: list[dict[str, float]] = []
        self.skipped = Skipped()

    def batch(self, clips: Tensor, labels: Tensor, part: int) -> None:
        """Forward and backward of one of the batches of a step."""
        options, processes = self.options, self.processes
        step = (self.batches.epoch * self.batches.steps + self.batches.first) * options.accumulate + part
        torch.manual_seed((options.seed * 1_000_003 + step) * processes.count + processes.rank)  # of dropout
        last = part == options.accumulate - 1
        labels = labels.to(processes.device, non_blocking=True)
        with self.wrapped.no_sync() if processes.count > 1 and not last else nullcontext():
            with autocast(processes.device, options.precision):
                scores = self.forward(to_device(clips, processes.device)).float()
            loss = F.cross_entropy(scores, labels)
            (loss / options.accumulate).backward()
        correct = (scores.argmax(1) == labels).sum()
        self.totals += torch.stack([loss.detach() * len(labels), correct])

    def epoch(self, bar: tqdm, checkpoint: Path, run: dict) -> dict[str, float]:
        """Trains to the end of the epoch. Returns its row of the history, without validation."""
        begin, waiting, done = time.perf_counter(), 0.0, 0
        self.model.train()
        clock = Clock(self.processes.device)
        if self.decoded is None:
            self.decoded = iter(self.loader)
        for step in range(self.batches.first, self.batches.steps):
            self.optimizer.zero_grad(set_to_none=True)
            for part in range(self.options.accumulate):
                before = time.perf_counter()
                clips, labels, failures = next(self.decoded)
                waiting += time.perf_counter() - before
                self.skipped.add(failures)
                if (labels < 0).any():
                    raise WrongInputError(f"too many videos in a row cannot be read, such as: {failures[-1][1]}")
                self.batch(clips, labels, part)
            self.optimizer.step()
            self.schedule.step()
            clock.wait()
            bar.update()
            done += self.options.batch
            self.batches.first = step + 1
            if (step + 1) % STEPS_PER_CHECKPOINT == 0 and step + 1 < self.batches.steps:
                self.save(checkpoint, run)
        loss, correct = (self.processes.sum(self.totals) / (self.batches.steps * self.options.batch)).tolist()
        seconds = time.perf_counter() - begin
        self.totals.zero_()
        self.batches.epoch, self.batches.first = self.batches.epoch + 1, 0
        measured = {"epoch": self.batches.epoch, "learning_rate": self.schedule.get_last_lr()[0]}
        measured |= {"training_loss": loss, "training_top1": correct}
        return measured | {"clips_per_second": done / seconds, "waiting": waiting / seconds, "seconds": seconds}

    def save(self, path: Path, run: dict) -> None:
        """Writes everything that the next step depends on. All processes must call it."""
        self.processes.sum(self.totals)
        if self.processes.rank:
            self.totals.zero_()  # the first process has the sum
            return
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        position = {"epoch": self.batches.epoch, "first": self.batches.first, "totals": self.totals}
        rest = {"history": self.history, "skipped": self.skipped.reasons, "run": run}
        save(parts | position | rest, path)

    def load(self, path: Path, run: dict) -> None:
        """Continues the run of :meth:`save`, if it is the same ``run``."""
        state = load(path, run)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.batches.epoch, self.batches.first = state["epoch"], state["first"]
        self.history, self.skipped.reasons = state["history"], state["skipped"]
        if self.processes.rank == 0:  # the sum over all processes
            self.totals.copy_(state["totals"])


class Clock:
    """Keeps the CPU at most one step ahead of the GPU, so that the time spent waiting for videos is measured."""

    def __init__(self, device: torch.device):
        self.events = [torch.cuda.Event(), torch.cuda.Event()] if device.type == "cuda" else []

    def wait(self) -> None:
        if self.events:
            self.events.reverse()
            self.events[0].record()
            self.events[1].synchronize()  # of the step before; returns at once if it was never recorded


# --- files -----------------------------------------------------------------------------------------------------------


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    """Loss and accuracy of training and validation over the epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axis, names, scale, title in (
        (left, ("training_loss", "validation_loss"), 1, "loss"),
        (right, ("training_top1", "validation_top1", "validation_top5"), 100, "accuracy (%)"),
    ):
        for name in names:
            axis.plot(epochs, [scale * row[name] for row in history], ".-", label=name.replace("_", " "))
        axis.set(xlabel="epoch", ylabel=title, ylim=(0, None if scale == 1 else 103))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    figure.savefig(path, dpi=100)


def draw_confusion(results: Evaluation, classes: Sequence[str], path: Path) -> None:
    """The share of the videos of each class that got each class; with their number, if there is room."""
    counts = results.confusion()
    few = len(classes) <= 30
    size = min(16, 2.5 + 0.45 * len(classes))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axis = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure.colorbar(axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues"), label="share of the class")
    axis.set(xlabel="prediction", ylabel="class", title=f"top-1 {100 * results.top(1):.1f} %")
    if few:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour)
    figure.savefig(path, dpi=100)


def write_predictions(results: Evaluation, videos: Sequence[Video], classes: Sequence[str], path: Path) -> None:
    """One row for each video: its class, and the five most probable classes with their probabilities."""
    best = results.probabilities.topk(min(5, len(classes)))
    rows = []
    for n, label, values, places in zip(results.videos, results.labels, best.values, best.indices, strict=True):
        row: dict[str, object] = {"path": videos[n].path, "class": classes[label]}
        for i, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True), 1):
            row |= {f"top{i}": classes[place], f"probability{i}": f"{value:.4f}"}
        rows.append(row)
    write_csv(rows, path)


def export(model: nn.Module, clips: Tensor, path: Path) -> float:
    """Exports the network to ONNX: scores ``[N, K]`` of clips uint8 ``[N, T, 3, H, W]``, for every N.

    Returns:
        The largest difference of onnxruntime's scores, relative to the largest score, for the clips and for one alone.
    """
    module = FromBytes(copy.deepcopy(model).cpu()).eval()
    batch = torch.export.Dim("clips")
    torch.onnx.export(
        module,
        (clips,),
        path,
        input_names=["clips"],
        output_names=["scores"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = []
    for some in (clips, clips[:1]):
        with torch.inference_mode():
            expected = module(some)
        (scores,) = session.run(None, {"clips": some.numpy()})
        differences.append(((torch.from_numpy(scores) - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


# --- the run ---------------------------------------------------------------------------------------------------------


def data_sets(options: argparse.Namespace) -> tuple[list[Video], list[Video], list[str]]:
    """Videos for training, videos for validation, names of the classes."""
    names = [name for _, name in read_lines(options.classes)] if options.classes else None
    training, classes = read_videos(options.data, options.root, names)
    if options.val is None:
        return *hold_out(training, options.seed), classes
    return training, read_videos(options.val, options.root, classes)[0], classes


def identity(options: argparse.Namespace, recipe: Recipe, videos: Sequence[Video]) -> dict:
    """The settings that a resumed run must share, as values of a checkpoint."""
    names = ("batch", "accumulate", "epochs", "lr", "dropout", "no_flip", "seed", "precision", "fuse", "compile")
    lines = "\n".join(f"{video.path.name} {video.label}" for video in videos)
    return {**asdict(recipe), **{name: getattr(options, name) for name in names}, "videos": zlib.crc32(lines.encode())}


def line_of(row: dict[str, float]) -> str:
    """What the user sees of an epoch."""
    bound = "decode-bound" if row["waiting"] > WAITING else "compute-bound"
    return (
        f"epoch {row['epoch']}: training loss {row['training_loss']:.3f}, top-1 {100 * row['training_top1']:.1f} %; "
        f"validation loss {row['validation_loss']:.3f}, top-1 {100 * row['validation_top1']:.1f} %, "
        f"top-5 {100 * row['validation_top5']:.1f} %; {row['clips_per_second']:.1f} clips/s, "
        f"{bound}: {100 * row['waiting']:.0f} % of the time waiting for videos"
    )


def train(training: Training, recipe: Recipe, validation: EvaluationClips, run: dict) -> None:
    """Runs the epochs that are left. The first process writes and prints."""
    options, processes, history = training.options, training.processes, training.history
    steps, first = training.batches.steps, processes.rank == 0
    done = training.batches.epoch * steps + training.batches.first
    with tqdm(total=options.epochs * steps, initial=done, unit="step", disable=not first) as bar:
        for number in range(training.batches.epoch + 1, options.epochs + 1):
            bar.set_description(f"epoch {number}/{options.epochs}")
            row = training.epoch(bar, options.output / "checkpoint.pt", run)
            results = evaluate(training.model, validation, options, processes, training.skipped)
            training.skipped.share(processes)
            row |= {
                "validation_loss": results.loss,
                "validation_top1": results.top(1),
                "validation_top5": results.top(5),
            }
            history.append(row | {"skipped": len(training.skipped.reasons)})
            if first:
                bar.write(line_of(row), file=sys.stdout)
                if best(history) is history[-1]:
                    save_trained(training.model, recipe, options.output / "best.pt")
                write_csv(history, options.output / "log.csv")
                draw_curve(history, options.output / "curve.png")
            training.save(options.output / "checkpoint.pt", run)
    training.decoded = None  # ends the workers


def best(history: list[dict[str, float]]) -> dict[str, float]:
    """The epoch with the best validation accuracy, and of these the one with the least loss."""
    return max(history, key=lambda row: (row["validation_top1"], -row["validation_loss"]))


def finish(training: Training, classes: Sequence[str], clips: EvaluationClips) -> None:
    """Evaluates the best network with all views, writes the files about it and exports it."""
    options, processes = training.options, training.processes
    if processes.rank == 0:
        trained, _ = load_trained(options.output / "best.pt")
        training.model.load_state_dict(trained.state_dict())
    processes.broadcast(training.model.state_dict().values())
    results = evaluate(training.model, clips, options, processes, training.skipped)
    training.skipped.share(processes)
    if processes.rank:
        return
    print(
        f"epoch {best(training.history)['epoch']} is the best: top-1 {100 * results.top(1):.1f} %, top-5 "
        f"{100 * results.top(5):.1f} % of {len(results.videos)} videos, {clips.clips} x {clips.crops} views; "
        f"{len(training.skipped.reasons)} videos skipped"
    )
    write_predictions(results, clips.videos, classes, options.output / "predictions.csv")
    draw_confusion(results, classes, options.output / "confusion.png")
    some = [clips[n][0][:1] for n in results.videos[:2]]
    difference = export(training.model, torch.cat(some + some)[:2], options.output / "model.onnx")
    if not difference <= ONNX_TOLERANCE:
        raise WrongInputError(f"model.onnx does not agree with the network: scores differ by {difference:.1e}")
    print(f"onnxruntime agrees with the network, to {difference:.1e} of the largest score; all files: {options.output}")


def run(options: argparse.Namespace) -> None:
    """Trains, evaluates and exports. Raises WrongInputError, or OSError if a file cannot be read or written."""
    with Processes() as processes:
        if options.workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            options.workers = max(1, cores // processes.on_this_machine - 1)
        if options.batch % (processes.count * options.accumulate):
            raise WrongInputError(
                f"--batch must be a multiple of {processes.count} processes times --accumulate {options.accumulate}, "
                f"got {options.batch}"
            )
        videos, held, classes = data_sets(options)
        interval = frame_interval(videos, options.segments)
        recipe = Recipe(options.network, classes, options.segments, options.side, options.direction, interval)
        torch.manual_seed(options.seed)
        model = make(recipe, options.dropout)
        note = "random weights"
        if options.weights != "none" and not options.resume:
            note = start_from(model, recipe, options.weights)
        if options.fuse:
            try:
                tsm_jit.residual.fuse(model.backbone)
            except (TypeError, ValueError) as error:
                raise WrongInputError(f"--fuse: {error}") from None
        clips = TrainingClips(videos, options.segments, options.side, not options.no_flip)
        training = Training(model, clips, options, processes)
        settings = identity(options, recipe, [*videos, *held])
        options.output.mkdir(parents=True, exist_ok=True)
        if options.resume:
            training.load(options.output / "checkpoint.pt", settings)
            note = f"resumed after epoch {training.batches.epoch}, step {training.batches.first}"
        if processes.rank == 0:
            print(f"{len(videos)} videos for training, {len(held)} for validation, {len(classes)} classes; {note}")
        train(training, recipe, EvaluationClips(held, options.segments, options.side), settings)
        views = EvaluationClips(held, options.segments, options.side, options.eval_clips, options.eval_crops)
        finish(training, classes, views)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a folder with a folder for each class, or a list file")
    parser.add_argument("--val", type=Path, help="the same for validation; by default a fifth of data is held out")
    parser.add_argument(
        "--root", type=Path, help="the folder that paths in lists are relative to, by default the list's"
    )
    parser.add_argument("--classes", type=Path, help="a file with the name of a class on each line")
    parser.add_argument(
        "--network", default="resnet50", help="a name of torchvision or timm, timm/name or mmaction2/resnet50"
    )
    parser.add_argument("--weights", default="imagenet", help="a checkpoint, imagenet (downloads) or none")
    parser.add_argument("--segments", type=positive, default=8, help="frames of a clip")
    parser.add_argument("--side", type=positive, default=224, help="of the frames, in pixels")
    parser.add_argument(
        "--direction", choices=("both", "past"), default="both", help="of the shifts; past: camera.py has no latency"
    )
    parser.add_argument("--epochs", type=positive, default=30)
    parser.add_argument("--batch", type=positive, default=32, help="clips of a step, of all processes")
    parser.add_argument("--accumulate", type=positive, default=1, help="splits the batch of a step, to save memory")
    parser.add_argument("--lr", type=number(float, 0), default=3e-4, help="the highest learning rate")
    parser.add_argument("--dropout", type=number(float, 0, 1), default=0.5, help="before the last layer")
    parser.add_argument("--no-flip", action="store_true", help="no mirror images")
    parser.add_argument("--fuse", action="store_true", help="tsm_jit.residual.fuse, for ResNets")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--workers", type=number(int, 0), help="processes that decode, by default all cores but one")
    parser.add_argument("--eval-clips", type=positive, default=1, help="times in each video, at the end")
    parser.add_argument("--eval-crops", type=positive, default=1, help="places in each frame, at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    parser.add_argument("--output", type=Path, default=Path("finetune"), help="folder")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
