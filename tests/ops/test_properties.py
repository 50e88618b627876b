"""Random cases without end: any plan, padding, dtype, strides and storage offset; kernels equal the oracle bit by bit.

TSM_JIT_EXAMPLES sets how many cases each device gets; without it, what CI has time for.
"""

import math
import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import DTYPES, FLOATING, assert_same_bits, random_bits, random_values

import tsm_jit
from tsm_jit import ops, reference
from tsm_jit.plans import PADDINGS, Shift

EXAMPLES = int(os.environ.get("TSM_JIT_EXAMPLES", "400"))
PLANES = [(), (1,), (5,), (1, 1), (3, 4), (7, 7), (14, 14), (0, 2), (2, 1, 3)]


@st.composite
def plans(draw, channels: int, n_segment: int) -> tuple:
    near = st.integers(-4, 4)
    offsets = near | st.integers(-n_segment - 1, n_segment + 1) | st.sampled_from([-1000, 1000])
    groups = []
    while channels > 0 and len(groups) < 40 and draw(st.integers(0, 5)) > 0:
        width = draw(st.integers(0, channels))
        groups.append((width, draw(offsets)))
        channels -= width
    return tuple(groups)


@st.composite
def memory(draw, shape: tuple[int, ...], channel_dim: int) -> tuple:
    """Where the elements lie: the order of the dimensions, each with a step and a margin, and a storage offset."""
    dims = list(range(len(shape)))
    channels_last = [d for d in dims if d != channel_dim] + [channel_dim]
    order = draw(st.sampled_from([dims, channels_last]) | st.permutations(dims))
    dense = draw(st.booleans())
    steps = [1 if dense else draw(st.integers(1, 2)) for _ in dims]
    margins = [0 if dense else draw(st.integers(0, 3)) for _ in dims]
    return order, steps, margins, draw(st.sampled_from([0, 0, 1, 2, 3, 8]))


@st.composite
def cases(draw) -> tuple:
    n_segment = draw(st.integers(1, 9) | st.integers(1, 64))
    clips = draw(st.integers(0, 3) if n_segment > 9 else st.integers(0, 6))
    channels = draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 24, 64, 72]))
    plane = draw(st.sampled_from(PLANES))
    layout = draw(st.sampled_from(["frames", "clips", "tokens"]))
    if layout == "clips" and len(plane) == 2:
        shape, channel_dim = (clips, n_segment, channels, *plane), 2
    elif layout == "tokens" and len(plane) == 1:
        shape, channel_dim = (clips * n_segment, *plane, channels), 2
    else:
        shape, channel_dim = (clips * n_segment, channels, *plane), 1
    shift = Shift(
        n_segment,
        draw(st.just(n_segment) | st.integers(1, n_segment)),
        channel_dim,
        draw(st.sampled_from(PADDINGS)),
        draw(plans(channels, n_segment)),
    )
    return shift, shape, draw(st.sampled_from(DTYPES)), draw(memory(shape, channel_dim)), draw(st.integers(0, 2**31))


def lay_out(values: torch.Tensor, where: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` in other memory, and all of that memory, in which random bits surround them."""
    order, steps, margins, offset = where
    room = [values.shape[d] * steps[d] + margins[d] for d in order]
    storage = random_bits((math.prod(room) + offset,), values.dtype, values.device)
    x = storage[offset:].view(room)
    for position, d in enumerate(order):
        end = margins[d] + values.shape[d] * steps[d]
        x = x[(slice(None),) * position + (slice(margins[d], end, steps[d]),)]
    x = x.permute([order.index(d) for d in range(len(order))])
    return x.copy_(values), storage


@settings(max_examples=EXAMPLES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_kernels_equal_the_oracle(device, case):
    shift, shape, dtype, where, seed = case
    torch.manual_seed(seed)
    adds = shift.padding in ("keep", "replicate")
    values = random_bits(shape, dtype, device)
    x, _ = lay_out(values, where)
    arguments = (shift.n_segment, shift.plan)
    options = {"n_segment_shifted": shift.n_segment_shifted, "padding": shift.padding, "channel_dim": shift.channel_dim}

    expected = reference.temporal_shift(values, shift)
    out = tsm_jit.shift_groups(x, *arguments, **options)
    assert_same_bits(out, expected)
    assert_same_bits(x, values)
    assert out.stride() == torch.empty_like(x).stride()
    assert_same_bits(reference.sliced(x, shift), expected)
    shifted_in_place(lambda x: tsm_jit.shift_groups(x, *arguments, **options, inplace=True), values, expected, where)

    if adds and dtype not in FLOATING:
        return  # nothing adds these
    grad = random_values(shape, dtype, device) if adds else values
    expected = reference.temporal_shift_backward(grad, shift)
    assert_same_bits(ops.temporal_shift_backward(lay_out(grad, where)[0], shift.encode()), expected)
    adjoint_ = torch.ops.tsm_jit.temporal_shift_backward_
    shifted_in_place(lambda grad: adjoint_(grad, shift.encode()), grad, expected, where)


def shifted_in_place(shift_, values: torch.Tensor, expected: torch.Tensor, where: tuple) -> None:
    """Checks that the view has the result, and that the memory around it is unchanged."""
    x, storage = lay_out(values, where)
    before = storage.clone()
    shift_(x)
    assert_same_bits(x, expected)
    x.copy_(values)
    assert_same_bits(storage, before)
