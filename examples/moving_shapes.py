"""Writes labelled videos to try finetune.py and camera.py with: a square that moves, grows or shrinks.

    python examples/moving_shapes.py videos   # videos/<class>/0.mp4 and so on

No single frame shows the class: places and sizes are equally likely in all classes.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from training import positive

from tsm_jit.video_io import write_video

CLASSES = ("down", "grow", "left", "right", "shrink", "up")


def moving_square(label: str, generator: torch.Generator, frames: int = 32, side: int = 64) -> Tensor:
    """A video of one class: uint8 ``[frames, 3, side, side]``. A square that leaves on one side enters on the other."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    path = torch.linspace(0, 1, frames) * uniform(0.5, 1, 1)
    right = {"left": -1, "right": 1}.get(label, 0)
    down = {"up": -1, "down": 1}.get(label, 0)
    x, y = ((uniform(0, 1, 1) + way * path) % 1 for way in (right, down))
    growth = {"grow": 1, "shrink": -1}.get(label, 0) * (path - path[-1] / 2)
    half = uniform(0.1, 0.2, 1) * torch.exp(1.2 * growth)  # of the square's side, relative to the picture's
    angle = uniform(0, math.pi / 2, 1)

    across = (torch.arange(side) + 0.5) / side
    dx, dy = (((across - centre[:, None]) + 0.5) % 1 - 0.5 for centre in (x, y))  # [frames, side], wrapped around
    u = dx[:, None, :] * angle.cos() + dy[:, :, None] * angle.sin()
    v = dy[:, :, None] * angle.cos() - dx[:, None, :] * angle.sin()
    distance = torch.maximum(u.abs(), v.abs()) - half[:, None, None]
    square = (0.5 - side * distance).clamp(0, 1)[:, None]  # [frames, 1, side, side], with smooth edges

    background = F.interpolate(uniform(0, 0.4, 1, 3, 5, 5), (side, side), mode="bicubic").clamp(0, 1)
    colour = uniform(0.5, 1, 3, 1, 1)
    return (255 * (background + square * (colour - background))).to(torch.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder, which gets a folder for each class")
    parser.add_argument("--count", type=positive, default=20, help="videos of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(options.seed)
    for label in CLASSES:
        folder = options.output / label
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(options.count):
            write_video(folder / f"{number}.mp4", moving_square(label, generator))
    print(f"{len(CLASSES)} classes with {options.count} videos each: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
