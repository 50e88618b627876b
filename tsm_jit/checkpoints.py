"""Renames checkpoints of TSM, TSAM, mmaction2, torchvision and timm for each other's networks.

Weights are renamed, never changed. Each key is split into a prefix, a plain name and temporal modules. The plain name
is the layer's name in a network without temporal modules. It is then written in the layout of the target.

Example::

    weights = torchvision.models.resnet18(num_classes=5).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, "checkpoint.pth")

    net = torchvision.models.resnet18(num_classes=5)
    tsm_jit.make_temporal_shift(net, n_segment=8)
    weights = tsm_jit.checkpoints.load("checkpoint.pth")
    converted = tsm_jit.checkpoints.convert(weights, target=net)
    net.load_state_dict(converted.state_dict)
"""

from tsm_jit.convert.checkpoint_files import load
from tsm_jit.convert.checkpoint_names import Layout
from tsm_jit.convert.checkpoints import Conversion, convert

__all__ = ["Conversion", "Layout", "convert", "load"]
