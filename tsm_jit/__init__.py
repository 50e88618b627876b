"""Temporal shift for PyTorch, the operator of TSM and TSAM: bit-exact, in place, with CUDA and CPU kernels.

Papers: TSM, arXiv:1811.08383; TSAM, https://github.com/aav-antonov/TSAM.

Example::

    import torch, torchvision, tsm_jit

    y = tsm_jit.temporal_shift(torch.randn(2 * 8, 64, 56, 56), n_segment=8)

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
"""

import importlib
from types import ModuleType

from tsm_jit import _command_line, _jit, plans
from tsm_jit._jit.info import info
from tsm_jit._version import __version__ as __version__
from tsm_jit.convert.surgery import n_segment, remove_temporal_shift, shift_before
from tsm_jit.convert.tsm import make_temporal_pool, make_temporal_shift
from tsm_jit.functional import shift_conv1x1, shift_groups, shift_linear, temporal_shift
from tsm_jit.modules.tsm import TemporalPool, TemporalShift, TokenShift
from tsm_jit.modules.video import VideoModel

__all__ = [
    "TemporalPool",
    "TemporalShift",
    "TokenShift",
    "VideoModel",
    "audio",
    "checkpoints",
    "distributed",
    "info",
    "make_temporal_pool",
    "make_temporal_shift",
    "n_segment",
    "non_local",
    "online",
    "plans",
    "remove_temporal_shift",
    "residual",
    "shift_before",
    "shift_conv1x1",
    "shift_groups",
    "shift_linear",
    "temporal_shift",
    "tsam",
]

# Their import takes time. `tsm_jit.mmaction2` is not among them: it changes mmaction2, so it needs an import statement.
_LAZY_MODULES = ("audio", "checkpoints", "distributed", "non_local", "online", "residual", "tsam")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"tsm_jit.{name}")
    raise AttributeError(f"module 'tsm_jit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_MODULES})


if not _command_line.is_command_line():  # each command loads the kernels itself if it needs them
    _jit.load()
