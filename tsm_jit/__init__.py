"""Temporal shift for PyTorch, in place and exact: the operator behind TSM and TSAM as compiled CUDA and CPU kernels."""

__version__ = "0.1.0"

from tsm_jit import _loader, online, plans, tsam
from tsm_jit._info import info
from tsm_jit._networks import n_segment, remove_temporal_shift
from tsm_jit.functional import shift_groups, temporal_shift
from tsm_jit.tsm import TemporalPool, TemporalShift, make_temporal_pool, make_temporal_shift
from tsm_jit.video import VideoModel

__all__ = [
    "TemporalPool",
    "TemporalShift",
    "VideoModel",
    "info",
    "make_temporal_pool",
    "make_temporal_shift",
    "n_segment",
    "online",
    "plans",
    "remove_temporal_shift",
    "shift_groups",
    "temporal_shift",
    "tsam",
]

if not _loader.asked_to_clean():
    _loader.load()
