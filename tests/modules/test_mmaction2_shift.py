"""mmaction2's module, without mmaction2: its formula, names, keys, pickles and errors."""

import copy
import inspect
import pickle

import mmaction2_package  # noqa: F401  (the next imports import mmaction2 if it is installed)
import pytest
import torch
from support import FLOATING, assert_same_bits, layouts, random_values
from torch import Tensor, nn

import tsm_jit
from tsm_jit.mmaction2 import TemporalShift

CLIP = 3


def formula(x: Tensor, num_segments: int, shift_div: int) -> Tensor:
    """The first fold reads the next frame, the second the previous one."""
    clips = x.unflatten(0, (-1, num_segments))
    fold, out = x.shape[1] // shift_div, torch.zeros_like(clips)
    out[:, :-1, :fold] = clips[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return out.flatten(0, 1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_the_formula(device, dtype):
    for name, (_, x) in layouts(2, CLIP, 13, 5, 3, dtype, device, random_values).items():
        if x.dim() != 4:
            continue
        for shift_div in (2, 3, 8, 20):
            expected = formula(x, CLIP, shift_div)
            assert_same_bits(TemporalShift.shift(x, CLIP, shift_div), expected)
            assert_same_bits(TemporalShift(nn.Identity(), CLIP, shift_div)(x), expected), name
    assert_same_bits(TemporalShift.shift(x, CLIP), formula(x, CLIP, 3))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_and_an_input_that_stays(device, frozen):
    """``net`` may write into its input, as a residual block does that begins with a ReLU."""
    for make in (lambda: nn.Conv2d(13, 4, 3), lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(13, 4, 3))):
        net = make().double().to(device).requires_grad_(not frozen)
        x = torch.randn(2 * CLIP, 13, 6, 5, dtype=torch.float64, device=device)
        weight = torch.randn(2 * CLIP, 4, 4, 3, dtype=torch.float64, device=device)
        results = []
        for forward in (TemporalShift(net, CLIP, 4), lambda x, net=net: net(formula(x, CLIP, 4))):
            leaf = x.clone().requires_grad_()
            net.zero_grad()
            out = forward(leaf)
            (out * weight).sum().backward()
            assert_same_bits(leaf, x)
            results.append([out, leaf.grad, *(p.grad for p in net.parameters() if not frozen)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(TemporalShift(net, CLIP, 4)(x), results[1][0], rtol=1e-12, atol=1e-12)


def test_names_keys_and_signatures():
    for function, expected in (
        (TemporalShift.__init__, {"net": inspect.Parameter.empty, "num_segments": 3, "shift_div": 8}),
        (TemporalShift.shift, {"x": inspect.Parameter.empty, "num_segments": inspect.Parameter.empty, "shift_div": 3}),
    ):
        parameters = inspect.signature(function).parameters
        assert {name: each.default for name, each in parameters.items() if name != "self"} == expected
    shift = TemporalShift(nn.Conv2d(8, 4, 1), num_segments=CLIP, shift_div=4)
    assert (shift.num_segments, shift.shift_div) == (CLIP, 4)
    assert shift.inplace  # stores no second activation
    assert list(shift.state_dict()) == ["net.weight", "net.bias"]
    assert "num_segments=3, shift_div=4" in repr(shift)
    shift.num_segments, shift.shift_div = 2, 8
    x = torch.randn(6, 8, 2, 2)
    assert_same_bits(shift(x), shift.net(formula(x, 2, 8)))


def test_tools_for_networks_work_with_it():
    net = nn.Sequential(TemporalShift(nn.Conv2d(8, 4, 1), CLIP))
    x = torch.randn(12, 8, 2, 2)
    with tsm_jit.n_segment(net, 4):
        assert net[0].num_segments == 4
        assert_same_bits(net(x), net[0].net(formula(x, 4, 8)))
    assert net[0].num_segments == CLIP
    for each in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(each[0]) is TemporalShift
        assert_same_bits(each(x), net(x))
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x), net(x))
    net[0].direction = "past"
    stream = tsm_jit.online.convert(net)
    clip = x[:CLIP]
    frames = torch.cat([stream(frame[None]) for frame in clip])
    torch.testing.assert_close(frames, net(clip))
    tsm_jit.remove_temporal_shift(net)
    assert list(net.state_dict()) == ["0.weight", "0.bias"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_segments": 0}, ValueError, "num_segments must be at least 1, got 0"),
        ({"num_segments": 2.5}, TypeError, "num_segments must be an integer, got 2.5"),
        ({"shift_div": 1}, ValueError, "shift_div must be at least 2, got 1"),
        ({"shift_div": "8"}, TypeError, "shift_div must be an integer, got '8'"),
    ],
)
def test_errors_name_its_arguments(options, error, message):
    with pytest.raises(error, match=message):
        TemporalShift(nn.Identity(), **options)
    with pytest.raises(error, match=message):
        TemporalShift.shift(torch.zeros(6, 8, 1, 1), **{"num_segments": CLIP} | options)
    with pytest.raises(ValueError, match=r"must .* got"):
        TemporalShift(nn.Identity(), 4)(torch.zeros(6, 8, 1, 1))
