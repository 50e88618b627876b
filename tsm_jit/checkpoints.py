"""Checkpoints of TSM, TSAM, mmaction2 and torchvision for one another's networks: weights are renamed, never changed.

Every name is taken apart into what it is called in the network without temporal modules, and where those are. From
there it is put together again in the layout of the target.

Example::

    weights = tsm_jit.checkpoints.load("TSM_kinetics_RGB_resnet50_shift8_blockres_avg_segment8_e50.pth")
    net = torchvision.models.resnet50(num_classes=400)
    tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
    converted = tsm_jit.checkpoints.convert(weights, target=net)
    net.load_state_dict(converted.state_dict)  # strict=False if converted.missing may be
"""

from tsm_jit.convert.checkpoints import Conversion, Layout, convert, load

__all__ = ["Conversion", "Layout", "convert", "load"]
