"""Every way to call wrongly: the type, the argument, the rule and the value it got; and nothing half-written."""

import pytest
import torch
from support import assert_same_bits

import tsm_jit

FRAMES = (8, 16, 3, 3)

TEMPORAL = [
    # arguments for x [8, 16, 3, 3], exception, message
    ({"n_segment": 3}, ValueError, "n_segment must divide the 8 frames of x, got 3"),
    ({"n_segment": 16}, ValueError, "n_segment must divide the 8 frames of x, got 16"),
    ({"n_segment": 0}, ValueError, "n_segment must be at least 1, got 0"),
    ({"n_segment": -4}, ValueError, "n_segment must be at least 1, got -4"),
    ({"n_segment": 4.0}, TypeError, "n_segment must be an integer, got 4.0"),
    ({"n_segment": True}, TypeError, "n_segment must be an integer, got True"),
    ({"n_segment": "4"}, TypeError, "n_segment must be an integer, got '4'"),
    ({"n_segment": [4]}, TypeError, r"n_segment must be an integer, got \[4\]"),
    ({"n_segment": None}, ValueError, r"n_segment must be given unless x is \[N, T, C, H, W\], got None"),
    ({"n_segment": 4, "fold_div": 0}, ValueError, "fold_div must be at least 1, got 0"),
    ({"n_segment": 4, "fold_div": 8.0}, TypeError, "fold_div must be an integer, got 8.0"),
    (
        {"n_segment": 4, "fold_div": 1},
        ValueError,
        "must fit into the 16 channels of x, but fold_div=1, shift_depth=1 and direction='both' moves 32 channels",
    ),
    ({"n_segment": 4, "shift_depth": 0}, ValueError, "shift_depth must be at least 1, got 0"),
    ({"n_segment": 4, "shift_depth": None}, TypeError, "shift_depth must be an integer, got None"),
    ({"n_segment": 4, "n_segment_shifted": 5}, ValueError, "n_segment_shifted must be at most n_segment=4, got 5"),
    ({"n_segment": 4, "n_segment_shifted": 0}, ValueError, "n_segment_shifted must be at least 1, got 0"),
    ({"n_segment": 4, "n_segment_shifted": 2.5}, TypeError, "n_segment_shifted must be an integer, got 2.5"),
    ({"n_segment": 4, "padding": "reflect"}, ValueError, "padding must be one of 'zeros', 'keep', 'replicate', 'circ"),
    ({"n_segment": 4, "padding": None}, ValueError, "padding must be one of .*, got None"),
    ({"n_segment": 4, "padding": ["zeros"]}, ValueError, r"padding must be one of .*, got \['zeros'\]"),
    ({"n_segment": 4, "direction": "up"}, ValueError, "direction must be one of 'both', 'past', 'future', got 'up'"),
    ({"n_segment": 4, "channel_dim": 0}, ValueError, r"channel_dim must be one of the dimensions 1..3 of x, got 0"),
    ({"n_segment": 4, "channel_dim": -4}, ValueError, r"channel_dim must be one of the dimensions 1..3 of x, got -4"),
    ({"n_segment": 4, "channel_dim": 4}, ValueError, r"channel_dim must be one of the dimensions 1..3 of x, got 4"),
    ({"n_segment": 4, "channel_dim": 1.0}, TypeError, "channel_dim must be an integer, got 1.0"),
]

GROUPS = [
    ([(17, 1)], ValueError, r"must fit into the 16 channels of x, but groups=\[\(17, 1\)\] moves 17 channels"),
    ([(8, 1), (9, 0)], ValueError, "moves 17 channels"),
    ([(-1, 1)], ValueError, "groups: a width must be at least 0, got -1"),
    ([(1.5, 1)], TypeError, "groups: a width must be an integer, got 1.5"),
    ([(1, 0.5)], TypeError, "groups: an offset must be an integer, got 0.5"),
    ([(1, True)], TypeError, "groups: an offset must be an integer, got True"),
    ([(1, 2, 3)], TypeError, r"groups must be a sequence of \(width, offset\) pairs, got \[\(1, 2, 3\)\]"),
    ([1, 2], TypeError, "groups must be a sequence of"),
    (7, TypeError, "groups must be a sequence of .* got 7"),
    (None, TypeError, "groups must be a sequence of .* got None"),
]

INPUTS = [
    (lambda: [1, 2], TypeError, "x must be a torch.Tensor, got list"),
    (lambda: None, TypeError, "x must be a torch.Tensor, got NoneType"),
    (lambda: torch.tensor(1.0), ValueError, "x must have at least two dimensions, frames and channels, got 0"),
    (lambda: torch.randn(8), ValueError, "x must have at least two dimensions, frames and channels, got 1"),
    (lambda: torch.randn(8, 16).to_sparse(), TypeError, r"x must be a dense tensor .* got torch.sparse_coo"),
    (lambda: torch.randn(8, 16).to_sparse_csr(), TypeError, r"x must be a dense tensor .* got torch.sparse_csr"),
    (
        lambda: torch.quantize_per_tensor(torch.randn(8, 16), 0.1, 0, torch.qint8),
        TypeError,
        "x must be a dense tensor .* got quantized",
    ),
    (
        lambda: torch.randn(2, 3, 16, 3, 3),
        ValueError,
        r"n_segment must equal the clip length 3 of x \[2, 3, 16, 3, 3\], got 4",
    ),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("arguments", "error", "message"), TEMPORAL)
def test_temporal_shift(arguments, error, message, inplace):
    x = torch.randn(FRAMES)
    before = x.clone()
    for _ in range(2):  # errors are not remembered as results
        with pytest.raises(error, match=message):
            tsm_jit.temporal_shift(x, **arguments, inplace=inplace)
    assert_same_bits(x, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("groups", "error", "message"), GROUPS)
def test_shift_groups(groups, error, message, inplace):
    x = torch.randn(FRAMES)
    before = x.clone()
    with pytest.raises(error, match=message):
        tsm_jit.shift_groups(x, 4, groups, inplace=inplace)
    assert_same_bits(x, before)


@pytest.mark.parametrize(("make", "error", "message"), INPUTS)
def test_input(make, error, message):
    with pytest.raises(error, match=message):
        tsm_jit.temporal_shift(make(), 4)
    with pytest.raises(error, match=message):
        tsm_jit.shift_groups(make(), 4, [(1, 1)])


def test_a_wrong_call_is_wrong_also_after_an_equal_right_one():
    """1 == 1.0 == True with one hash: what was remembered for the integer must not answer for the others."""
    x = torch.randn(8, 16)
    tsm_jit.temporal_shift(x, 1, 8, shift_depth=1)
    for wrong in (1.0, True):
        with pytest.raises(TypeError):
            tsm_jit.temporal_shift(x, wrong, 8)
        with pytest.raises(TypeError):
            tsm_jit.temporal_shift(x, 1, 8, shift_depth=wrong)
        with pytest.raises(TypeError):
            tsm_jit.shift_groups(x, 1, [(wrong, 1)])


def test_empty_clips():
    with pytest.raises(ValueError, match=r"x must have at least one frame per clip, got the shape \[2, 0, 16, 3, 3\]"):
        tsm_jit.temporal_shift(torch.randn(2, 0, 16, 3, 3))


def test_float8_sums_go_through_plain_torch():
    """Adding is not moving: float8 has no addition of its own, so its adjoint of `keep` adds in float32."""
    grad = torch.tensor([[1.0], [2.0], [4.0], [8.0]]).to(torch.float8_e4m3fn)
    x = torch.zeros(4, 1).to(torch.float8_e4m3fn).requires_grad_()
    y = tsm_jit.shift_groups(x, 4, [(1, 1)], padding="keep")
    y.backward(grad)
    assert x.grad.float().flatten().tolist() == [0, 1, 2, 12]
