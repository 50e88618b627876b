"""The plans of TSM, TSAM and Paddle, against numbers worked out by hand; the encoding that operators take."""

import pytest

from tsm_jit import plans
from tsm_jit.plans import Shift


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((64, 8), ((8, 1), (8, -1))),
        ((64, 8, 1, "past"), ((8, -1),)),
        ((64, 8, 1, "future"), ((8, 1),)),
        ((65, 8), ((8, 1), (8, -1))),
        ((7, 8), ((0, 1), (0, -1))),
        ((256, 4, 4), ((16, 1), (16, -1), (16, 2), (16, -2), (16, 3), (16, -3), (16, 4), (16, -4))),
        ((100, 8, 5), tuple((2, sign * depth) for depth in range(1, 6) for sign in (1, -1))),  # 100 // 8 // 5 = 2
        ((64, 8, 2, "past"), ((4, -1), (4, -2))),
    ],
)
def test_temporal(arguments, expected):
    assert plans.temporal(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((64, 0.25), ((16, -1), (16, 1))),
        ((5, 0.25), ((1, -1), (1, 1))),  # int(1.25), int(2.5)
        ((7, 0.25), ((1, -1), (2, 1))),  # int(1.75), int(3.5)
        ((10, 0.3), ((3, -1), (3, 1))),  # 10 * float32(0.3) rounds to 3 exactly
        ((100, 0.29), ((29, -1), (29, 1))),  # in float64, 100 * 0.29 is 28.999999999999996
        ((3, 0.0), ((0, -1), (0, 1))),
        ((4, 0.5), ((2, -1), (2, 1))),
    ],
)
def test_paddle(arguments, expected):
    assert plans.paddle(*arguments) == expected


@pytest.mark.parametrize("padding", plans.PADDINGS)
@pytest.mark.parametrize("plan", [(), ((8, 1),), ((8, 1), (0, -12), (3, 0))])
def test_encoding_round_trip(padding, plan):
    shift = Shift(8, 7, 1, padding, plan)
    assert Shift.decode(shift.encode()) == shift


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((64, 0), ValueError, "fold_div must be at least 1, got 0"),
        ((64, 8.0), TypeError, "fold_div must be an integer, got 8.0"),
        ((64, 8, 0), ValueError, "shift_depth must be at least 1, got 0"),
        ((64, 8, 1, "up"), ValueError, "direction must be one of 'both', 'past', 'future', got 'up'"),
    ],
)
def test_temporal_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        plans.temporal(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "channels must be at least 0, got -1"),
        ((64.0,), TypeError, "channels must be an integer, got 64.0"),
        ((64, "a quarter"), TypeError, "shift_ratio must be a number, got 'a quarter'"),
        ((64, 0.6), ValueError, "shift_ratio must be from 0 to 0.5, got 0.6"),
        ((64, float("nan")), ValueError, "shift_ratio must be from 0 to 0.5, got nan"),
    ],
)
def test_paddle_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        plans.paddle(*arguments)


def test_offsets_past_the_clip_become_the_shortest_that_mean_the_same():
    plan = ((1, 10**30), (1, -(10**30)), (1, 3), (1, -9), (1, 0))
    assert Shift(8, 7, 1, "zeros", plan).canonical().plan == ((1, 7), (1, -7), (1, 3), (1, -7), (1, 0))
    assert Shift(8, 7, 1, "circular", plan).canonical().plan == ((1, 1), (1, -1), (1, 3), (1, -2), (1, 0))


def test_encoding_is_readable():
    shift = Shift(8, 8, 1, "zeros", ((8, 1), (8, -1)))
    assert shift.encode() == "n_segment=8 n_segment_shifted=8 channel_dim=1 padding=zeros plan=8:1,8:-1"


@pytest.mark.parametrize("text", ["", "n_segment=8", "n_segment=8 n_segment_shifted=8 channel_dim=1 padding=no plan="])
def test_other_encodings_raise(text):
    with pytest.raises(ValueError, match="shift must look like"):
        Shift.decode(text)
