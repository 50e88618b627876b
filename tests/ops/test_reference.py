"""The oracle against tables written by hand."""

import pytest
import torch

from tsm_jit import reference
from tsm_jit.plans import Shift

# One clip of four frames and four channels: 10 * (frame + 1) + channel.
FRAMES = [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, 43]]

# plan, padding, n_segment_shifted, what becomes of FRAMES
FORWARD = [
    # TSM: the first fold reads the next frame, the second the previous one
    (((1, 1), (1, -1)), "zeros", 4, [[20, 0, 12, 13], [30, 11, 22, 23], [40, 21, 32, 33], [0, 31, 42, 43]]),
    # TSM, uni-directional
    (((1, -1),), "zeros", 4, [[0, 11, 12, 13], [10, 21, 22, 23], [20, 31, 32, 33], [30, 41, 42, 43]]),
    # Paddle: the other way round
    (((1, -1), (1, 1)), "zeros", 4, [[0, 21, 12, 13], [10, 31, 22, 23], [20, 41, 32, 33], [30, 0, 42, 43]]),
    # TSAM of depth 2, the last frame being sound
    (
        ((1, 1), (1, -1), (1, 2), (1, -2)),
        "keep",
        3,
        [[20, 11, 32, 13], [30, 11, 22, 23], [30, 21, 32, 13], [40, 41, 42, 43]],
    ),
    (((1, 2), (1, -2)), "zeros", 4, [[30, 0, 12, 13], [40, 0, 22, 23], [0, 11, 32, 33], [0, 21, 42, 43]]),
    (((1, 2), (1, -2)), "keep", 4, [[30, 11, 12, 13], [40, 21, 22, 23], [30, 11, 32, 33], [40, 21, 42, 43]]),
    (((1, 2), (1, -2)), "replicate", 4, [[30, 11, 12, 13], [40, 11, 22, 23], [40, 11, 32, 33], [40, 21, 42, 43]]),
    (((1, 2), (1, -2)), "circular", 4, [[30, 31, 12, 13], [40, 41, 22, 23], [10, 11, 32, 33], [20, 21, 42, 43]]),
    # a gap of channels that do not move, then three at once
    (((1, 0), (3, 1)), "circular", 2, [[10, 21, 22, 23], [20, 11, 12, 13], FRAMES[2], FRAMES[3]]),
    # offsets past the clip: all padding
    (((1, 4), (1, -9)), "zeros", 4, [[0, 0, 12, 13], [0, 0, 22, 23], [0, 0, 32, 33], [0, 0, 42, 43]]),
    (((1, 4), (1, -9)), "keep", 4, FRAMES),
    (((1, 4), (1, -9)), "replicate", 4, [[40, 11, 12, 13], [40, 11, 22, 23], [40, 11, 32, 33], [40, 11, 42, 43]]),
    (((1, 4), (1, -9)), "circular", 4, [[10, 41, 12, 13], [20, 11, 22, 23], [30, 21, 32, 33], [40, 31, 42, 43]]),
    # nothing to do
    ((), "zeros", 4, FRAMES),
    (((0, 1), (0, -1)), "zeros", 4, FRAMES),
]

# One channel; the gradients of its four output frames are 1, 2, 4, 8, so that every sum tells its terms.
# offset, padding, n_segment_shifted, gradient of the input
ADJOINT = [
    (+1, "zeros", 4, [0, 1, 2, 4]),
    (-1, "zeros", 4, [2, 4, 8, 0]),
    (+1, "keep", 4, [0, 1, 2, 12]),
    (-1, "keep", 4, [3, 4, 8, 0]),
    (+2, "keep", 4, [0, 0, 5, 10]),
    (+1, "keep", 3, [0, 1, 6, 8]),
    (+3, "keep", 4, [0, 2, 4, 9]),
    (+1, "replicate", 4, [0, 1, 2, 12]),
    (+2, "replicate", 4, [0, 0, 1, 14]),
    (-2, "replicate", 4, [7, 8, 0, 0]),
    (-1, "replicate", 2, [3, 0, 4, 8]),
    (+1, "circular", 4, [8, 1, 2, 4]),
    (-3, "circular", 4, [8, 1, 2, 4]),
    (+4, "zeros", 4, [0, 0, 0, 0]),
    (+4, "keep", 4, [1, 2, 4, 8]),
    (-7, "replicate", 4, [15, 0, 0, 0]),
    (+4, "circular", 4, [1, 2, 4, 8]),
]


@pytest.mark.parametrize(("plan", "padding", "shifted", "expected"), FORWARD)
def test_forward_table(plan, padding, shifted, expected):
    x = torch.tensor(FRAMES)
    out = reference.temporal_shift(x, Shift(4, shifted, 1, padding, plan))
    assert out.tolist() == expected
    assert x.tolist() == FRAMES


@pytest.mark.parametrize(("offset", "padding", "shifted", "expected"), ADJOINT)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_adjoint_table(offset, padding, shifted, expected, dtype):
    grad = torch.tensor([[1], [2], [4], [8]], dtype=dtype)
    out = reference.temporal_shift_backward(grad, Shift(4, shifted, 1, padding, ((1, offset),)))
    assert out.flatten().tolist() == expected


@pytest.mark.parametrize("padding", ["zeros", "keep", "replicate", "circular"])
def test_adjoint_is_the_transpose(padding):
    """<shift(x), g> = <x, adjoint(g)> for every pair of unit vectors: the two matrices are each other's transpose."""
    shift = Shift(5, 4, 1, padding, ((1, 1), (1, -2), (1, 3)))
    units = torch.eye(5 * 4, dtype=torch.float64).view(-1, 5, 4)
    forward = torch.stack([reference.temporal_shift(u, shift).flatten() for u in units])
    adjoint = torch.stack([reference.temporal_shift_backward(u, shift).flatten() for u in units])
    assert torch.equal(forward.T, adjoint)


@pytest.mark.parametrize(("shape", "channel_dim"), [((8, 1, 4), 2), ((8, 4, 1), 1), ((2, 4, 4, 1, 1), 2)])
def test_layouts_of_the_table(shape, channel_dim):
    """Tokens, frames in a row, clips apart: each is the table twice."""
    x = torch.tensor([FRAMES, FRAMES])
    shift = Shift(4, 4, channel_dim, "zeros", FORWARD[0][0])
    out = reference.temporal_shift(x.reshape(shape), shift)
    assert out.reshape(2, 4, 4).tolist() == [FORWARD[0][3]] * 2


def test_sums_are_rounded_once():
    """Added one by one in bfloat16 each of the small terms is rounded away; together they reach the next number."""
    small = 2.0**-9
    grad = torch.tensor([[1.0], [small], [small], [small]], dtype=torch.bfloat16)
    out = reference.temporal_shift_backward(grad, Shift(4, 4, 1, "replicate", ((1, -3),)))
    assert out[0].item() == 1.0078125


def test_negative_zero_and_nan_survive():
    x = torch.tensor([[-0.0], [float("nan")], [float("-inf")]])
    out = reference.temporal_shift(x, Shift(3, 3, 1, "circular", ((1, 1),)))
    assert torch.equal(out.view(torch.int32), x.view(torch.int32).roll(-1, 0))
