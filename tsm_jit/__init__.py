"""Temporal shift for PyTorch, in place and exact: the operator behind TSM and TSAM as compiled CUDA and CPU kernels."""

__version__ = "0.1.0"

import importlib
from types import ModuleType

from tsm_jit import _command_line, _jit, plans
from tsm_jit._jit.info import info
from tsm_jit.convert.surgery import n_segment, remove_temporal_shift, shift_before
from tsm_jit.convert.tsm import make_temporal_pool, make_temporal_shift
from tsm_jit.functional import shift_groups, temporal_shift
from tsm_jit.modules.tsm import TemporalPool, TemporalShift, TokenShift
from tsm_jit.modules.video import VideoModel

__all__ = [
    "TemporalPool",
    "TemporalShift",
    "TokenShift",
    "VideoModel",
    "audio",
    "checkpoints",
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
    "shift_groups",
    "temporal_shift",
    "tsam",
]

_ON_FIRST_USE = ("audio", "checkpoints", "non_local", "online", "residual", "tsam")  # for a quick import


def __getattr__(name: str) -> ModuleType:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"tsm_jit.{name}")
    raise AttributeError(f"module 'tsm_jit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})


if not _command_line.is_command_line():  # its commands load what they need
    _jit.load()
