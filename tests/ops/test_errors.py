"""Every way to call wrongly: the exact type and message, on every device; and nothing half-written."""

import random
import re
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support import assert_same_bits

import tsm_jit
from tsm_jit.ops.compat import direct

FRAMES = (8, 16, 3, 3)
PADDING = "padding must be one of 'zeros', 'keep', 'replicate', 'circular', got "
PAIRS = "groups must be a sequence of (width, offset) pairs, got "
DENSE = "x must be a dense tensor (torch.strided, not quantized), got "
CHANNEL_DIM = "channel_dim must be one of the dimensions 1..3 of x, got "


def n_segment(value, error, message):
    return {"n_segment": value}, error, message


def option(error, message, **arguments):
    return {"n_segment": 4, **arguments}, error, message


TEMPORAL = [
    # arguments for x [8, 16, 3, 3], exception, message
    n_segment(3, ValueError, "n_segment must divide the 8 frames of x, got 3"),
    n_segment(16, ValueError, "n_segment must divide the 8 frames of x, got 16"),
    n_segment(0, ValueError, "n_segment must be at least 1, got 0"),
    n_segment(-4, ValueError, "n_segment must be at least 1, got -4"),
    n_segment(4.0, TypeError, "n_segment must be an integer, got 4.0"),
    n_segment(True, TypeError, "n_segment must be an integer, got True"),
    n_segment("4", TypeError, "n_segment must be an integer, got '4'"),
    n_segment([4], TypeError, "n_segment must be an integer, got [4]"),
    n_segment(None, ValueError, "n_segment must be given unless x is [N, T, C, H, W], got None for x [8, 16, 3, 3]"),
    option(ValueError, "fold_div must be at least 1, got 0", fold_div=0),
    option(ValueError, "fold_div must be at least 1, got -8", fold_div=-8),
    option(TypeError, "fold_div must be an integer, got 8.0", fold_div=8.0),
    option(
        ValueError,
        "fold_div must give a shift that fits into the 16 channels of x, got 1 with shift_depth=1 and "
        "direction='both': 32 channels",
        fold_div=1,
    ),
    option(ValueError, "shift_depth must be at least 1, got 0", shift_depth=0),
    option(TypeError, "shift_depth must be an integer, got None", shift_depth=None),
    option(ValueError, "n_segment_shifted must be at most n_segment=4, got 5", n_segment_shifted=5),
    option(ValueError, "n_segment_shifted must be at least 1, got 0", n_segment_shifted=0),
    option(ValueError, "n_segment_shifted must be at least 1, got -1", n_segment_shifted=-1),
    option(TypeError, "n_segment_shifted must be an integer, got 2.5", n_segment_shifted=2.5),
    option(ValueError, PADDING + "'reflect'", padding="reflect"),
    option(ValueError, PADDING + "None", padding=None),
    option(ValueError, PADDING + "['zeros']", padding=["zeros"]),
    option(ValueError, "direction must be one of 'both', 'past', 'future', got 'up'", direction="up"),
    option(ValueError, CHANNEL_DIM + "0", channel_dim=0),
    option(ValueError, CHANNEL_DIM + "-4", channel_dim=-4),
    option(ValueError, CHANNEL_DIM + "4", channel_dim=4),
    option(TypeError, "channel_dim must be an integer, got 1.0", channel_dim=1.0),
]

GROUPS = [
    (
        [(17, 1)],
        ValueError,
        "groups must give a shift that fits into the 16 channels of x, got [(17, 1)]: 17 channels",
    ),
    (
        [(8, 1), (9, 0)],
        ValueError,
        "groups must give a shift that fits into the 16 channels of x, got [(8, 1), (9, 0)]: 17 channels",
    ),
    ([(-1, 1)], ValueError, "groups: a width must be at least 0, got -1"),
    ([(1.5, 1)], TypeError, "groups: a width must be an integer, got 1.5"),
    ([(1, 0.5)], TypeError, "groups: an offset must be an integer, got 0.5"),
    ([(1, True)], TypeError, "groups: an offset must be an integer, got True"),
    ([(1, 2, 3)], TypeError, PAIRS + "[(1, 2, 3)]"),
    ([1, 2], TypeError, PAIRS + "[1, 2]"),
    (7, TypeError, PAIRS + "7"),
    (None, TypeError, PAIRS + "None"),
]

INPUTS = [
    (lambda device: [1, 2], TypeError, "x must be a torch.Tensor, got list"),
    (lambda device: None, TypeError, "x must be a torch.Tensor, got NoneType"),
    (
        lambda device: torch.tensor(1.0, device=device),
        ValueError,
        "x must have at least two dimensions, frames and channels, got 0",
    ),
    (
        lambda device: torch.randn(8, device=device),
        ValueError,
        "x must have at least two dimensions, frames and channels, got 1",
    ),
    (lambda device: torch.randn(8, 16, device=device).to_sparse(), TypeError, DENSE + "torch.sparse_coo"),
    (lambda device: torch.randn(8, 16, device=device).to_sparse_csr(), TypeError, DENSE + "torch.sparse_csr"),
    (
        lambda device: torch.quantize_per_tensor(torch.randn(8, 16, device=device), 0.1, 0, torch.qint8),
        TypeError,
        DENSE + "quantized",
    ),
    (
        lambda device: torch.nested.nested_tensor([torch.randn(8, 16), torch.randn(4, 16)], device=device),
        TypeError,
        DENSE + "a nested tensor",
    ),
    (
        lambda device: torch.randn(2, 3, 16, 3, 3, device=device),
        ValueError,
        "n_segment must equal the clip length 3 of x [2, 3, 16, 3, 3], got 4",
    ),
    (
        lambda device: torch.randn(2, 16, 4, 3, 3, device=device),
        ValueError,
        "n_segment must equal the clip length 16 of x [2, 16, 4, 3, 3], got 4: "
        "x must be [N, T, C, H, W], not [N, C, T, H, W]",
    ),
    (
        lambda device: torch.randn(2, 0, 16, 3, 3, device=device),
        ValueError,
        "n_segment must equal the clip length 0 of x [2, 0, 16, 3, 3], got 4",
    ),
]


@contextmanager
def raises(error: type, message: str):
    with pytest.raises(error) as raised:
        yield
    assert type(raised.value) is error
    assert str(raised.value) == message


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("arguments", "error", "message"), TEMPORAL)
def test_temporal_shift(device, arguments, error, message, inplace):
    x = torch.randn(FRAMES, device=device)
    before = x.clone()
    for _ in range(2):  # errors are not remembered as results
        with raises(error, message):
            tsm_jit.temporal_shift(x, **arguments, inplace=inplace)
    assert_same_bits(x, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("groups", "error", "message"), GROUPS)
def test_shift_groups(device, groups, error, message, inplace):
    x = torch.randn(FRAMES, device=device)
    before = x.clone()
    with raises(error, message):
        tsm_jit.shift_groups(x, 4, groups, inplace=inplace)
    assert_same_bits(x, before)


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors)")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("make", "error", "message"), INPUTS)
def test_input(device, make, error, message, inplace):
    with raises(error, message):
        tsm_jit.temporal_shift(make(device), 4, inplace=inplace)
    with raises(error, message):
        tsm_jit.shift_groups(make(device), 4, [(1, 1)], inplace=inplace)


@pytest.mark.parametrize(
    ("shape", "strides"), [((8, 16, 3, 3), (0, 9, 3, 1)), ((8, 16, 3, 3), (9, 0, 3, 1)), ((8, 16), (4, 1))], ids=str
)
def test_overlapping_memory(device, shape, strides):
    storage = torch.randn(400, device=device)
    before = storage.clone()
    message = f"x must not overlap itself to be shifted in place, got sizes {list(shape)} with strides {tuple(strides)}"

    def shift_(x):
        return tsm_jit.temporal_shift(x, 4, inplace=True)

    x = storage.as_strided(shape, strides)
    with raises(ValueError, message):
        shift_(x)
    with torch.autograd.forward_ad.dual_level(), raises(ValueError, message):
        shift_(x)
    with raises(ValueError, message):
        torch.jit.trace(shift_, x, check_trace=False)
    if 0 in strides:
        with pytest.raises(RuntimeError):
            torch.compile(shift_, backend="aot_eager")(x)
    assert_same_bits(storage, before)


def test_meta_tensors():
    """A meta tensor has no data, and a shift needs none. Reading values is an error."""
    x = torch.empty(FRAMES, device="meta")
    y = tsm_jit.temporal_shift(x, 4)
    assert (y.shape, y.device.type) == (x.shape, "meta")
    assert tsm_jit.temporal_shift(x, 4, inplace=True) is x
    with raises(ValueError, "n_segment must divide the 8 frames of x, got 3"):
        tsm_jit.temporal_shift(x, 3)
    with pytest.raises(NotImplementedError):
        y.cpu()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("record", [False, True])
def test_mixed_devices(cuda, inplace, record):
    """The network of a module lies elsewhere: PyTorch's error, and the input as it was."""
    for there, here in (("cpu", cuda), (cuda, "cpu")):
        module = tsm_jit.TemporalShift(torch.nn.Conv2d(16, 4, 1, device=there), 4, inplace=inplace)
        x = torch.randn(FRAMES, device=here)
        before = x.clone()
        with torch.set_grad_enabled(record), pytest.raises(RuntimeError):
            module(x)
        assert_same_bits(x, before)


def test_a_wrong_call_is_wrong_also_after_an_equal_right_one():
    """1, 1.0 and True are equal and have one hash, so a cache could return the result of 1 for the others."""
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
    """float8 has no addition, so the adjoint of `keep` adds in float32."""
    grad = torch.tensor([[1.0], [2.0], [4.0], [8.0]]).to(torch.float8_e4m3fn)
    x = torch.zeros(4, 1).to(torch.float8_e4m3fn).requires_grad_()
    y = tsm_jit.shift_groups(x, 4, [(1, 1)], padding="keep")
    y.backward(grad)
    assert x.grad.float().flatten().tolist() == [0, 1, 2, 12]


def test_which_errors_of_kernels_mean_out_of_memory(monkeypatch):
    """A stand-in for a GPU fails as kernels do on the versions of PyTorch. ``test_cuda.py`` fills a real one."""
    no_reason, other = [f"tsm_jit: PyTorch could not {action}" for action in ("make a tensor", "run an operator")]
    failed = [random.randint(2, 1000)]  # allocations, as PyTorch counts them
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": failed[0]})

    def error_of(message: str) -> type[BaseException]:
        def kernel(*_):
            raise RuntimeError(message)

        with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
            direct(SimpleNamespace(namespace="tsm_jit", _op=kernel))()
        return caught.type

    error_of(no_reason)  # the count until now is known after it
    assert error_of(no_reason) is RuntimeError
    for message in (no_reason, other):
        failed[0] += 1
        assert error_of("tsm_jit: grad must be of a floating point type") is RuntimeError
        assert error_of("tsm_jit: PyTorch could not convolve: weight of size [8, 3]") is RuntimeError
        assert error_of(message) is torch.OutOfMemoryError
        assert error_of(message) is RuntimeError  # no other allocation has failed
    failed[0] = 1  # the count was reset
    assert error_of(no_reason) is torch.OutOfMemoryError
    assert error_of(f"{no_reason}: CUDA out of memory. Tried to allocate 1 GiB") is torch.OutOfMemoryError
    failed[0] = 0
    assert error_of(no_reason) is RuntimeError

    def without_statistics(device):
        raise RuntimeError("this allocator counts nothing")

    monkeypatch.setattr(torch.cuda, "memory_stats", without_statistics)
    assert error_of(no_reason) is RuntimeError


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="before 2.13 kernels do not learn what PyTorch said")
def test_out_of_memory_is_reported_in_the_words_of_pytorch():
    code = """
import resource, torch, tsm_jit
x = torch.ones(8, 64, 512, 512)
with open("/proc/self/status") as lines:
    (used,) = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize")]
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
tsm_jit.temporal_shift(x, 8)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "RuntimeError" in run.stderr
    assert "you tried to allocate 536870912 bytes" in run.stderr
