"""The demo: runs a real clip through TSM-ResNet-50 with TSM's own shift and with tsm_jit, and compares them."""

from __future__ import annotations

import copy
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import tsm_jit
from tsm_jit import _jit
from tsm_jit.bench.timing import Cost, measure
from tsm_jit.video_io import UnusableVideoError, default_clip, network_input, read_segments

N_SEGMENT = 8
FOLD_DIV = 8
N_CLASSES = 400  # of Kinetics-400, the data set of the paper
_TOLERANCE = 1e-5  # relative to the largest value; convolutions may round differently, the shift does not


# --- the networks ----------------------------------------------------------------------------------------------------


class StockShift(nn.Module):
    """TSM's own shift before a convolution, in PyTorch (arXiv:1811.08383)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        clips = x.unflatten(0, (-1, N_SEGMENT))
        fold = x.shape[1] // FOLD_DIV
        out = torch.zeros_like(clips)
        out[:, :-1, :fold] = clips[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
        return self.net(out.flatten(0, 1))


def networks() -> dict[str, nn.Module]:
    """Returns two TSM-ResNet-50 with the same random weights: ``stock`` with TSM's own shift, and ``tsm_jit``."""
    stock = torchvision.models.resnet50(weights=None, num_classes=N_CLASSES)
    ours = copy.deepcopy(stock)
    for stage in (stock.layer1, stock.layer2, stock.layer3, stock.layer4):
        for block in stage:
            block.conv1 = StockShift(block.conv1)
    tsm_jit.make_temporal_shift(ours, N_SEGMENT, FOLD_DIV, inplace=True)
    return {"stock": stock, "tsm_jit": ours}


def step(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Runs forward and backward of one clip. Returns its class scores, the mean over the segments."""
    net.zero_grad(set_to_none=True)
    scores = net(x).mean(0, keepdim=True)
    F.cross_entropy(scores, label).backward()
    return scores.detach()


# --- comparing -------------------------------------------------------------------------------------------------------


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference relative to the largest value of ``a``, 0 if all values are equal."""
    if torch.equal(a, b):
        return 0.0
    difference = ((a - b).abs().max() / a.abs().max()).item()
    return math.inf if math.isnan(difference) else difference


# --- output ----------------------------------------------------------------------------------------------------------


def draw(frames: Tensor, output: Path) -> None:
    """Saves a picture: the frames, and below them the frames with red from the next and green from the previous one."""
    shifted = tsm_jit.shift_groups(frames.contiguous(), N_SEGMENT, [(1, +1), (1, -1)])
    height, width = frames.shape[-2:]
    figure = Figure(figsize=(2 * N_SEGMENT, 4.6 * height / width + 1.1), layout="constrained")
    rows = figure.subplots(2, N_SEGMENT)
    for row, images in zip(rows, (frames, shifted), strict=True):
        for t, (axis, image) in enumerate(zip(row, images, strict=True)):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[], title=f"frame {t}")
    rows[0, 0].set_ylabel("input")
    rows[1, 0].set_ylabel("shifted")
    figure.suptitle(
        "Temporal shift: the first fold (red) reads the next frame, the second (green) the previous one, "
        "the rest (blue) does not move; frames that do not exist are zeros"
    )
    try:
        figure.savefig(output, dpi=100)
    except OSError as error:
        raise UnusableVideoError(f"the picture cannot be saved as {output}: {error.strerror or error}") from None


def table(costs: dict[str, Cost]) -> str:
    """Formats time and peak memory of a step, for TSM's own shift and for tsm_jit."""
    stock, ours = costs["stock"], costs["tsm_jit"]
    lines = [f"{'forward + backward':<20}{'stock':>12}{'tsm_jit':>12}{'ratio':>9}"]

    def line(name: str, a: float | None, b: float | None) -> None:
        if a is None or b is None:
            lines.append(f"{name:<20}{'-':>12}{'-':>12}{'-':>9}")
        else:
            lines.append(f"{name:<20}{a:>12.1f}{b:>12.1f}{b / a:>9.2f}")

    line("time (ms)", stock.seconds * 1e3, ours.seconds * 1e3)
    line("peak memory (MiB)", *(None if c.peak is None else c.peak / 2**20 for c in (stock, ours)))
    return "\n".join(lines)


def run(video: Path | None = None, output: Path = Path("tsm_jit_demo.png")) -> int:
    """Runs the demo. Returns 0 if outputs and gradients agree, otherwise 1. Raises UnusableVideoError."""
    path = video or default_clip()
    frames = read_segments(path, N_SEGMENT)
    _jit.load()  # after the check of the video, as it may compile
    draw(frames, output)

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(0)
    x, label = network_input(frames).to(device), torch.tensor([0], device=device)
    nets = {name: net.to(device).train() for name, net in networks().items()}
    repeats = 20 if cuda else 3

    title, total = f"TSM-ResNet-50 on {path.name}", len(nets) * (repeats + 1)
    sys.stderr.write(f"timing {total} training steps on {device} ...\n")
    with tqdm(total=total, desc=title, unit="step", leave=False, disable=None) as bar:  # None: only on a terminal
        scores = {}
        for name, net in nets.items():  # also the warm-up
            scores[name] = step(net, x, label)
            bar.update()
        gradients = zip(_gradients(nets["stock"]), _gradients(nets["tsm_jit"]), strict=True)
        forward = largest_difference(scores["stock"], scores["tsm_jit"])
        backward = max(largest_difference(a, b) for a, b in gradients)
        steps = {name: functools.partial(step, net, x, label) for name, net in nets.items()}
        costs = measure(steps, device, repeats, bar.update)

    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    agree = max(forward, backward) <= _TOLERANCE
    report = [
        f"{path.name}: {N_SEGMENT} frames of {frames.shape[-1]}x{frames.shape[-2]}, TSM-ResNet-50, float32, on {where}",
        f"{device.type.upper()} tensors use: {tsm_jit.info()['devices'][device.type]}",
        "",
        table(costs),
        "",
        f"outputs {_verdict(forward)}, gradients {_verdict(backward)}" + ("" if agree else ": THEY DO NOT AGREE"),
        f"picture: {output}",
    ]
    sys.stdout.write("\n".join(report) + "\n")
    return 0 if agree else 1


def _gradients(net: nn.Module) -> list[Tensor]:
    return [each.grad for each in net.parameters() if each.grad is not None]


def _verdict(difference: float) -> str:
    return "identical bit for bit" if difference == 0 else f"differ by {difference:.1e} of the largest value"
