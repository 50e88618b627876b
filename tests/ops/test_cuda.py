"""What only a GPU can show: streams, other GPUs, graphs, memory, failed launches."""

import subprocess
import sys

import pytest
import torch
from support import assert_same_bits, layouts, limited_gpu_memory, peak_of, random_values

import tsm_jit
from tsm_jit import reference
from tsm_jit.plans import PADDINGS, Shift

TSM = ((8, 1), (8, -1))


@pytest.mark.feature("CUDA streams, several GPUs")
def test_current_stream(cuda):
    x = random_values((8 * 8, 64, 28, 28), torch.float32, cuda)
    expected = reference.temporal_shift(x, Shift(8, 8, 1, "zeros", TSM))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)  # a launch on another stream would overtake this
        late.copy_(x)
        out = tsm_jit.temporal_shift(late, 8)
        tsm_jit.temporal_shift(late, 8, inplace=True)
    stream.synchronize()
    assert_same_bits(out, expected)
    assert_same_bits(late, expected)


@pytest.mark.feature("CUDA streams, several GPUs")
def test_another_gpu_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs")
    x = random_values((8 * 8, 64, 28, 28), torch.float32, "cuda:1")
    expected = reference.temporal_shift(x, Shift(8, 8, 1, "zeros", TSM))
    with torch.cuda.device(0):
        leaf = (x * 1).requires_grad_()
        out = tsm_jit.temporal_shift(leaf, 8)
        out.sum().backward()
        tsm_jit.temporal_shift(x, 8, inplace=True)
        assert torch.cuda.current_device() == 0
    assert out.device == leaf.grad.device == torch.device("cuda:1")
    assert_same_bits(out, expected)
    assert_same_bits(x, expected)


@pytest.mark.feature("CUDA graphs")
@pytest.mark.parametrize("padding", PADDINGS)
def test_graphs_of_everything(cuda, padding):
    """Captured once and replayed on other values. A capture fails where anything waits for the device."""
    shift = Shift(4, 4, 1, padding, ((2, 1), (2, -1)))
    x, y = torch.zeros(8, 16, 5, 5, device=cuda), torch.zeros(8, 16, 5, 5, device=cuda)
    leaf, weight = torch.zeros_like(x).requires_grad_(), torch.zeros_like(x)

    def work():
        out = tsm_jit.temporal_shift(x, 4, padding=padding)
        tsm_jit.temporal_shift(y, 4, padding=padding, inplace=True)
        (grad,) = torch.autograd.grad(tsm_jit.temporal_shift(leaf, 4, padding=padding), leaf, weight)
        return out, grad

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, grad = work()
    for _ in range(3):
        for tensor in (x, y, weight):
            tensor.copy_(torch.randn_like(tensor))
        expected = reference.temporal_shift(y, shift)
        graph.replay()
        assert_same_bits(out, reference.temporal_shift(x, shift))
        assert_same_bits(y, expected)
        assert_same_bits(grad, reference.temporal_shift_backward(weight, shift))


# The channels of these layouts lie in no equal runs, so an in-place shift makes a contiguous copy. The second set also
# copies out of place, since the result has the same layout.
COPIED, COPIED_ALWAYS = {"cropped", "channels outermost"}, {"channels outermost"}


def test_memory(cuda):
    """In any layout, a shift allocates nothing in place, its result out of place, and one gradient in the backward."""
    for name, (channel_dim, x) in layouts(8, 8, 64, 14, 14, torch.float32, cuda, random_values).items():
        arguments = {"n_segment": 8, "channel_dim": channel_dim, "padding": "keep"}
        one = x.numel() * x.element_size()
        if name not in COPIED:
            assert peak_of(lambda: tsm_jit.temporal_shift(x, **arguments, inplace=True)) == 0, name
            with torch.inference_mode():
                assert peak_of(lambda: tsm_jit.temporal_shift(x, **arguments, inplace=True)) == 0, name
        if name in COPIED_ALWAYS:
            continue
        assert peak_of(lambda: tsm_jit.temporal_shift(x, **arguments)) == one, name
        leaf = x.detach().requires_grad_()
        out, grad = tsm_jit.temporal_shift(leaf, **arguments), torch.ones_like(x)
        assert peak_of(lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)) == one, name
        grad = grad.new_ones(()).expand(grad.shape)  # shifted before it is
        few = 2 * 8 * 8 * 64 * 4
        assert one <= peak_of(lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)) <= one + few, name


def test_out_of_memory(cuda):
    """``torch.OutOfMemoryError`` in forward and backward, also the second time."""
    x = torch.zeros(8, 16, 1024, 1024, device=cuda, requires_grad=True)
    out, cropped = tsm_jit.temporal_shift(x, 8), x.detach()[..., 1:]
    grads = torch.ones_like(x), x.detach().new_ones(()).expand_as(x)
    with limited_gpu_memory(cuda, x.nbytes // 2):
        for _ in range(2):
            for each in (x, cropped):
                with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                    tsm_jit.temporal_shift(each, 8)
            for grad in grads:
                with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
                    torch.autograd.grad(out, x, grad, retain_graph=True)


def test_a_failed_launch_is_an_error(cuda):
    """After a device-side assertion no launch can succeed. Then the shift raises an error."""
    code = """
import torch, tsm_jit
x = torch.randn(8, 16, 3, 3, device="cuda")
tsm_jit.temporal_shift(x, 4, inplace=True)
try:
    torch.zeros(3, device="cuda")[torch.tensor([7], device="cuda")]
    torch.cuda.synchronize()
except Exception:
    pass
try:
    tsm_jit.temporal_shift(x, 4, inplace=True)
except RuntimeError as e:
    assert "the launch of a kernel failed" in str(e), e
    print("an error")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "an error", run.stderr
