"""The operators ``torch.ops.tsm_jit.*``: schemas, PyTorch implementation, fakes, autograd. A file for each family."""

from tsm_jit.ops.compat import eager, transforms_are_active
from tsm_jit.ops.temporal_shift import (
    elements_are_apart,
    recomputing_shift,
    shifted_in_place,
    temporal_shift,
    temporal_shift_,
    temporal_shift_backward,
    temporal_shift_backward_,
    temporal_shift_for_reader,
)

__all__ = [
    "eager",
    "elements_are_apart",
    "recomputing_shift",
    "shifted_in_place",
    "temporal_shift",
    "temporal_shift_",
    "temporal_shift_backward",
    "temporal_shift_backward_",
    "temporal_shift_for_reader",
    "transforms_are_active",
]
