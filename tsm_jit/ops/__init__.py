"""The operators ``torch.ops.tsm_jit.*``: schemas, PyTorch fallback, fake implementations and autograd."""

from tsm_jit.ops.compat import eager, transforms_are_active
from tsm_jit.ops.recomputing_layer import Layer
from tsm_jit.ops.shift_conv import shift_conv1x1, shift_linear, shifted_layer
from tsm_jit.ops.temporal_shift import (
    has_no_overlap,
    recomputing_shift,
    save_clip_length_mark,
    shift_tokens,
    temporal_shift,
    temporal_shift_,
    temporal_shift_backward,
    temporal_shift_backward_,
    temporal_shift_for_single_consumer,
)

__all__ = [
    "Layer",
    "eager",
    "has_no_overlap",
    "recomputing_shift",
    "save_clip_length_mark",
    "shift_conv1x1",
    "shift_linear",
    "shift_tokens",
    "shifted_layer",
    "temporal_shift",
    "temporal_shift_",
    "temporal_shift_backward",
    "temporal_shift_backward_",
    "temporal_shift_for_single_consumer",
    "transforms_are_active",
]
