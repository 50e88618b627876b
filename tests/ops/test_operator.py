"""The kernels against the oracle, bit by bit: plans x paddings x layouts x dtypes x odd shapes, in place and not."""

import mmap
import re
from pathlib import Path

import numpy
import pytest
import torch
from support import DTYPES, FLOATING, assert_same_bits, layouts, poison, random_bits, random_values
from torch._subclasses.fake_tensor import FakeTensorMode

import tsm_jit
from tsm_jit import ops, reference
from tsm_jit.plans import PADDINGS, Shift

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
PLANS = {
    "TSM": ((2, 1), (2, -1)),
    "uni-directional": ((2, -1),),
    "TSAM, depth 3": ((1, 1), (1, -1), (1, 2), (1, -2), (1, 3), (1, -3)),
    "gaps": ((1, 0), (1, 2), (2, 0), (3, -1)),
    "all channels": ((4, 2), (4, -3)),
    "past the clip": ((3, 100), (3, -100)),
    "fold 0": ((0, 1), (0, -1)),
    "empty": (),
}
# n, t, c, h, w: T = 1, one pixel, 7x7, odd everything, more frames than a batch of loads, empty ones
SHAPES = [
    (2, 8, 16, 7, 7),
    (3, 1, 8, 2, 3),
    (1, 5, 9, 3, 1),
    (2, 3, 8, 1, 1),
    (1, 16, 24, 5, 4),
    (1, 32, 8, 2, 2),
    (2, 33, 8, 3, 1),
    (0, 4, 8, 2, 2),
    (2, 4, 8, 0, 3),
]


def check(x, shift: Shift, adjoint_of=None) -> None:
    """Forward, adjoint, and both in place, of ``x``; the adjoint also of other values, where it adds."""
    encoded = shift.encode()
    original = x.clone()
    expected = reference.temporal_shift(x, shift)
    poison(x)
    actual = ops.temporal_shift(x, encoded)
    assert_same_bits(actual, expected)
    assert_same_bits(x, original)
    assert actual.stride() == torch.empty_like(x).stride()

    grad = x if adjoint_of is None else adjoint_of
    expected_grad = reference.temporal_shift_backward(grad, shift)
    poison(grad)
    assert_same_bits(ops.temporal_shift_backward(grad, encoded), expected_grad)

    strides = x.stride()
    assert ops.temporal_shift_(x, encoded) is x
    assert_same_bits(x, expected)
    assert x.stride() == strides
    x.copy_(original)
    if adjoint_of is None:
        grad = x
    torch.ops.tsm_jit.temporal_shift_backward_(grad, encoded)
    assert_same_bits(grad, expected_grad)


@pytest.mark.feature("any plan; zeros, keep, replicate, circular")
@pytest.mark.feature("NCHW, channels_last, 5-D clips, tokens, any strides")
@pytest.mark.feature("storage offsets, empty tensors")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plans_paddings_shapes_layouts(device, name, padding, shape):
    plan = PLANS[name] if shape[2] >= 8 else ()
    for shifted in {shape[1], max(1, shape[1] - 2)}:
        make = random_bits if padding in ("zeros", "circular") else random_values
        for channel_dim, x in layouts(*shape, torch.float32, device, make).values():
            check(x, Shift(shape[1], shifted, channel_dim, padding, plan))


@pytest.mark.feature("every dtype, complex and float8 included")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, dtype, padding):
    for shape in [(2, 5, 8, 7, 7), (1, 8, 16, 4, 4), (1, 40, 8, 1, 3)]:
        shift = Shift(shape[1], shape[1], 1, padding, PLANS["TSAM, depth 3"])
        adds = padding in ("keep", "replicate")
        if adds and dtype not in FLOATING:
            x = random_bits((shape[0] * shape[1], *shape[2:]), dtype, device)
            assert_same_bits(ops.temporal_shift(x, shift.encode()), reference.temporal_shift(x, shift))
            continue
        for channel_dim, x in layouts(*shape, dtype, device).values():
            other = shift._replace(channel_dim=channel_dim)
            values = torch.empty_like(x).copy_(random_values(x.shape, dtype, device)) if adds else None
            check(x, other, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_sums_over_the_whole_range(device, dtype):
    """Subnormal, huge and infinite sums: rounded like torch rounds them."""
    bits = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    bits = bits[torch.isfinite(bits)]
    x = torch.stack([bits[torch.randperm(len(bits), device=device)] for _ in range(12)])
    for padding, offset in (("keep", 1), ("keep", -2), ("replicate", 3), ("replicate", -1)):
        shift = Shift(4, 4, 1, padding, ((len(bits), offset),))
        expected = reference.temporal_shift_backward(x, shift)
        assert_same_bits(ops.temporal_shift_backward(x, shift.encode()), expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_more_groups_than_a_launch_takes(device, padding):
    plan = tuple((1, offset % 11 - 5) for offset in range(100))
    for channel_dim, x in layouts(1, 9, 101, 3, 2, torch.bfloat16, device, random_values).values():
        check(x, Shift(9, 8, channel_dim, padding, plan))


@pytest.mark.parametrize("padding", PADDINGS)
def test_long_clips(device, padding):
    """More frames than a block has, than shared memory has room for, and offsets as long as a clip."""
    for n, offsets in ((19, (1, -2)), (40, (40, -13)), (150, (4, -4)), (200, (1, -3)), (1024, (7, -500))):
        plan = tuple((3, offset) for offset in offsets)
        check(random_values((n, 8, 2, 3), torch.float32, device), Shift(n, n - 5, 1, padding, plan))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_groups_that_end_within_16_bytes(device, dtype, padding):
    """What one thread writes belongs to several groups, to several pixels, or to some of each."""
    narrow = tuple((width, offset) for offset in (1, -1, 2, -2, 0, 3) for width in (1, 2, 3))
    for channels, plan in ((72, ((9, 1), (9, -1))), (65, ((8, 1), (8, -1))), (41, narrow), (3, ((1, 1), (1, -1)))):
        for shape in ((2, 8, channels, 4, 4), (1, 11, channels, 7, 3)):
            for channel_dim, x in layouts(*shape, dtype, device, random_values).values():
                check(x, Shift(shape[1], shape[1] - 1, channel_dim, padding, plan))


def test_large_enough_to_be_cut_into_tiles(device):
    """Runs longer than a CPU tile or a CUDA block, and rows that no tile divides evenly."""
    for shape in [(2, 4, 16, 61, 67), (1, 4, 2048, 17, 3)]:
        for channel_dim, x in layouts(*shape, torch.float32, device).values():
            check(x, Shift(4, 4, channel_dim, "zeros", ((5, 1), (7, -1))))


def test_expanded_input_out_of_place(device):
    shift = Shift(4, 4, 1, "zeros", ((3, 1), (3, -1)))
    for x in (
        random_values((1, 8, 3, 3), torch.float32, device).expand(8, 8, 3, 3),
        random_values((8, 1, 1, 1), torch.float32, device).expand(8, 8, 3, 3),
        random_values((1, 1, 1, 1), torch.float32, device).expand(8, 8, 3, 3),
    ):
        assert_same_bits(ops.temporal_shift(x, shift.encode()), reference.temporal_shift(x, shift))


def test_public_functions_choose_the_plan(device):
    x = random_values((2 * 6, 32, 3, 3), torch.float32, device)
    for arguments, shift in [
        ({}, Shift(6, 6, 1, "zeros", ((4, 1), (4, -1)))),
        ({"direction": "past"}, Shift(6, 6, 1, "zeros", ((4, -1),))),
        ({"fold_div": 4, "padding": "circular"}, Shift(6, 6, 1, "circular", ((8, 1), (8, -1)))),
        (
            {"fold_div": 4, "shift_depth": 2, "padding": "keep", "n_segment_shifted": 5},
            Shift(6, 5, 1, "keep", ((4, 1), (4, -1), (4, 2), (4, -2))),
        ),
    ]:
        assert_same_bits(tsm_jit.temporal_shift(x, 6, **arguments), reference.temporal_shift(x, shift))
    groups = [(3, 2), (1, 0), (4, -1)]
    expected = reference.temporal_shift(x, Shift(6, 6, 1, "keep", tuple(groups)))
    assert_same_bits(tsm_jit.shift_groups(x, 6, groups, padding="keep"), expected)


def test_ranks_and_channel_dim():
    """The dimensions of channels and frames, by default and as arguments."""
    for shape, arguments, n_segment, channel_dim in [
        ((8, 16), {}, 4, 1),
        ((8, 16, 5), {}, 4, 1),
        ((8, 5, 16), {"channel_dim": -1}, 4, 2),
        ((2, 4, 16, 3, 3), {}, None, 2),
        ((2, 4, 16, 3, 3), {}, 4, 2),
        ((2, 4, 3, 3, 16), {"channel_dim": 4}, None, 4),
        ((8, 16, 2, 3, 3), {"channel_dim": 1}, 4, 1),
        ((8, 16, 2, 3, 3, 1), {}, 4, 1),
    ]:
        x = torch.randn(shape)
        expected = reference.temporal_shift(x, Shift(4, 4, channel_dim, "zeros", ((2, 1), (2, -1))))
        assert_same_bits(tsm_jit.temporal_shift(x, n_segment, **arguments), expected)


def test_devices_without_kernels_take_plain_torch():
    """A device for which nothing was compiled runs the plain-torch implementation: here, `meta` shapes and the call."""
    x = torch.empty(8, 16, 3, 3, device="meta")
    assert tsm_jit.temporal_shift(x, 4).shape == x.shape
    from torch._C import DispatchKey, _dispatch_has_kernel_for_dispatch_key

    for name in ("temporal_shift", "temporal_shift_", "temporal_shift_backward", "temporal_shift_backward_"):
        assert _dispatch_has_kernel_for_dispatch_key(f"tsm_jit::{name}", DispatchKey.CompositeExplicitAutograd)


@pytest.mark.parametrize("name", ["temporal_shift", "temporal_shift_backward"])
def test_fake_operators_have_the_strides_of_real_ones(device, name):
    """Of dimensions of size 1, too, whose strides PyTorch reads to choose the memory format of a convolution."""
    operator, shift = getattr(torch.ops.tsm_jit, name).kernel, Shift(4, 4, 1, "zeros", ((1, 1),)).encode()
    rng = numpy.random.default_rng()
    for _ in range(100):
        order = rng.permutation(4)
        sizes = numpy.array([4, *rng.choice([1, 2, 5], 3)])
        x = torch.empty([int(n) for n in sizes[order] * rng.choice([1, 2], 4)], device=device)
        x = x.permute([int(i) for i in order.argsort()])[tuple(slice(0, int(n)) for n in sizes)]
        with FakeTensorMode() as mode:
            fake = operator(mode.from_tensor(x), shift)
        assert fake.stride() == operator(x, shift).stride(), (x.shape, x.stride())


@pytest.mark.parametrize("name", ["temporal_shift", "temporal_shift_backward"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_opcheck(device, name, padding):
    shift = Shift(4, 3, 1, padding, ((4, 1), (4, -2))).encode()
    for x in (torch.randn(8, 16, 3, 3, device=device), torch.randn(8, 3, 3, 16, device=device).permute(0, 3, 1, 2)):
        out_of_place = getattr(torch.ops.tsm_jit, name).default
        torch.library.opcheck(out_of_place, (x.detach().clone().requires_grad_(), shift))
        torch.library.opcheck(getattr(torch.ops.tsm_jit, name + "_").default, (x.clone(), shift))


def test_unsafe_arguments_of_operators_raise(device):
    """The checks of torch.ops itself, for callers that bypass the public functions."""
    if tsm_jit.info()["devices"][device.type].startswith("plain"):
        pytest.skip("plain torch checks for itself")
    x = torch.randn(8, 16, 3, 3, device=device)
    good = "n_segment=4 n_segment_shifted=4 channel_dim=1 padding=zeros plan=4:1"
    for old, new in [
        ("n_segment=4 ", "n_segment=3 "),
        ("n_segment=4 ", "n_segment=0 "),
        ("_shifted=4", "_shifted=5"),
        ("_shifted=4", "_shifted=0"),
        ("channel_dim=1", "channel_dim=0"),
        ("channel_dim=1", "channel_dim=4"),
        ("padding=zeros", "padding=ones"),
        ("4:1", "17:1"),
        ("4:1", "16:1,1:1"),
        ("4:1", "-4:1"),
        ("4:1", "4:"),
        ("4:1", "4:1 and more"),
    ]:
        with pytest.raises(RuntimeError):
            torch.ops.tsm_jit.temporal_shift(x, good.replace(old, new))


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="needs a system that has huge pages")
def test_a_large_result_is_of_huge_pages():
    """Of the C library's own mapping; its first write would take longer than the shift."""
    if tsm_jit.info()["devices"]["cpu"] != "compiled kernels":
        pytest.skip("needs compiled kernels")
    shift = Shift(8, 8, 1, "zeros", ((8, 1), (8, -1)))
    x = random_bits((3 * 8, 64, 151, 153), torch.uint8)
    # A mapping of its own. The C library may place a tensor where an earlier result was, which keeps its huge pages.
    x = torch.frombuffer(mmap.mmap(-1, x.numel()), dtype=x.dtype).view(x.shape).copy_(x)
    actual = ops.temporal_shift(x, shift.encode())
    assert_same_bits(actual, reference.temporal_shift(x, shift))
    advised = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            mapping = range(int(match[1], 16), int(match[2], 16))
        elif line.startswith("VmFlags:"):
            advised[mapping] = "hg" in line.split()
    if not advised:
        pytest.skip("needs a system that tells what memory was asked for")
    for tensor, expected in ((actual, True), (x, False)):
        middle = tensor.data_ptr() + tensor.numel() // 2
        assert [flag for mapping, flag in advised.items() if middle in mapping] == [expected]
