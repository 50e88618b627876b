"""torch.compile: the operator and its gradients in one graph, for every dtype and layout, whatever the batch size."""

import pytest
import torch
from functorch.compile import make_boxed_func
from support import DTYPES, PLAN, assert_same_bits, layouts, random_bits, random_values, shifted
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tsm_jit
from tsm_jit import reference
from tsm_jit.plans import PADDINGS, Shift


@pytest.fixture(autouse=True)
def forget():
    yield
    torch._dynamo.reset()


def compiled(function, backend="inductor", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.feature("every dtype, complex and float8 included", column="compiled")
@pytest.mark.feature("any plan; zeros, keep, replicate, circular", column="compiled")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_paddings(device, dtype, padding):
    for inplace in (False, True):
        x = random_bits((10, 6, 3, 3), dtype, device)
        expected = reference.temporal_shift(x, Shift(5, 4, 1, padding, PLAN))
        torch._dynamo.reset()
        out = compiled(lambda x: shifted(x, padding, inplace), "aot_eager")(x)
        assert_same_bits(out, expected)
        if inplace:
            assert_same_bits(x, expected)


@pytest.mark.feature("NCHW, channels_last, 5-D clips, tokens, any strides", column="compiled")
@pytest.mark.feature("storage offsets, empty tensors", column="compiled")
@pytest.mark.parametrize("shape", [(2, 5, 6, 3, 3), (0, 5, 6, 2, 2), (2, 5, 6, 0, 2)], ids=str)
def test_layouts(device, shape):
    """Strides come out as in eager mode: losing channels_last would cost a network a third of its speed."""
    for name, (channel_dim, x) in layouts(*shape, torch.float32, device).items():
        torch._dynamo.reset()
        out = compiled(lambda x: shifted(x, channel_dim=channel_dim))(x)
        assert_same_bits(out, reference.temporal_shift(x, Shift(5, 4, channel_dim, "keep", PLAN)))
        assert out.stride() == torch.empty_like(x).stride(), name


@pytest.mark.feature("in place, by autograd's rules", column="compiled")
@pytest.mark.feature("one graph for every batch size", column="compiled")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("inplace", [False, True])
def test_values_gradients_and_the_argument(device, padding, inplace, backend):
    shift = Shift(5, 4, 1, padding, PLAN)
    counter = CompileCounterWithBackend(backend)
    function = compiled(lambda x: shifted(x, padding, inplace) * 2, counter, dynamic=True)
    for clips in (2, 3, 4):
        x = torch.randn(5 * clips, 6, 4, 4, device=device).to(memory_format=torch.channels_last)
        leaf = x.clone().requires_grad_()
        argument = leaf * 1.0 if inplace else leaf
        weight = torch.randn_like(x)
        out = function(argument)
        (out * weight).sum().backward()
        moved = reference.temporal_shift(x, shift)
        assert_same_bits(out, moved * 2)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_same_bits(leaf.grad, reference.temporal_shift_backward(weight * 2, shift))
        assert_same_bits(argument, moved if inplace else x)
    assert counter.frame_count == 1


@pytest.mark.feature("gradients, from any incoming layout", column="compiled")
@pytest.mark.parametrize("padding", PADDINGS)
def test_incoming_gradients_of_any_layout(device, padding):
    leaf = torch.randn(10, 6, 4, 4, device=device, requires_grad=True)
    function = compiled(lambda x: shifted(x * 1.0, padding, inplace=True))
    for grad in (
        torch.ones((), device=device).expand(10, 6, 4, 4),
        torch.randn(6, 1, 1, device=device).expand(10, 6, 4, 4),
        torch.randn(10, 6, 4, 4, device=device).transpose(2, 3),
        torch.randn(10, 6, 4, 4, device=device).to(memory_format=torch.channels_last),
        torch.randn(10, 12, 4, 8, device=device)[:, ::2, :, ::2],
    ):
        before = grad.clone()
        (result,) = torch.autograd.grad(function(leaf), leaf, grad)
        assert_same_bits(result, reference.temporal_shift_backward(before, Shift(5, 4, 1, padding, PLAN)))
        assert_same_bits(grad, before)


def test_graphs_hold_what_python_does_not_differentiate(device):
    """In them autograd is done with, and what Python taught an operator only takes time."""
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)

    function = compiled(shifted, aot_autograd(fw_compiler=keep, bw_compiler=keep))
    leaf = torch.randn(10, 6, 4, 4, device=device, requires_grad=True)
    weight = torch.randn(10, 6, 4, 4, device=device)
    (result,) = torch.autograd.grad(function(leaf), leaf, weight)
    shift = Shift(5, 4, 1, "keep", PLAN)
    assert_same_bits(result, reference.temporal_shift_backward(weight, shift))
    with torch.no_grad():
        assert_same_bits(function(leaf), reference.temporal_shift(leaf, shift))
    held = [[name for name in graph if "tsm_jit" in name] for graph in graphs]
    assert held == [["tsm_jit.temporal_shift.kernel"], ["tsm_jit.temporal_shift_backward.kernel"], held[0]]


def test_automatic_dynamic_shapes_compile_twice_at_most(device):
    counter = CompileCounterWithBackend("inductor")
    function = compiled(shifted, counter)
    for clips in (2, 3, 4, 7, 2, 16):
        x = torch.randn(5 * clips, 6, 4, device=device)
        assert_same_bits(function(x), reference.temporal_shift(x, Shift(5, 4, 1, "keep", PLAN)))
    assert counter.frame_count <= 2


@pytest.mark.feature("in place on a leaf", column="compiled", text="as a copy")
def test_leaf_in_place(device):
    """The values change and the gradient is right; the result is a copy of the leaf, not an alias."""
    x = torch.randn(10, 6, 4, device=device, requires_grad=True)
    before = x.detach().clone()
    weight = torch.randn_like(before)
    out = compiled(lambda x: shifted(x, inplace=True) * 1.0)(x)
    (out * weight).sum().backward()
    shift = Shift(5, 4, 1, "keep", PLAN)
    assert_same_bits(out, reference.temporal_shift(before, shift))
    assert_same_bits(x, out)
    assert_same_bits(x.grad, reference.temporal_shift_backward(weight, shift))


@pytest.mark.feature("forward mode, `torch.func`", column="compiled")
@pytest.mark.parametrize("padding", PADDINGS)
def test_transforms_inside(device, padding):
    shift = Shift(5, 4, 1, padding, PLAN)
    x = torch.randn(3, 10, 6, 4, device=device)
    first = x[0].clone()
    weight, tangent = torch.randn_like(first), torch.randn_like(first)

    def loss(x):
        return (shifted(x, padding) * weight).sum()

    expected = torch.stack([reference.temporal_shift(sample, shift) for sample in x])
    assert_same_bits(compiled(torch.func.vmap(lambda x: shifted(x, padding)), "aot_eager")(x), expected)
    adjoint = reference.temporal_shift_backward(weight, shift)
    torch.testing.assert_close(
        compiled(torch.func.grad(loss), "aot_eager")(first), adjoint
    )  # replicate: sums in another order
    torch.testing.assert_close(compiled(torch.func.vmap(torch.func.grad(loss)), "aot_eager")(x)[2], adjoint)

    def moved_tangent(x, tangent):
        return torch.func.jvp(lambda x: shifted(x, padding), (x,), (tangent,))[1]

    assert_same_bits(compiled(moved_tangent, "aot_eager")(first, tangent), reference.temporal_shift(tangent, shift))
    module = tsm_jit.TemporalShift(torch.nn.Conv1d(6, 2, 1), 5).to(device)
    weights = {name: torch.randn_like(value) for name, value in module.named_parameters()}

    def call(weights, x):
        return torch.func.functional_call(module, weights, x)

    torch.testing.assert_close(compiled(call, "aot_eager")(weights, first), call(weights, first))


@pytest.mark.feature("`torch.utils.checkpoint`", column="compiled")
def test_checkpoint_inside(device):
    def block(x):
        return shifted(x * 2).square()

    x = torch.randn(10, 6, 4, device=device, requires_grad=True)
    weight = torch.randn(10, 6, 4, device=device)
    (expected,) = torch.autograd.grad((block(x) * weight).sum(), x)
    out = compiled(lambda x: checkpoint(block, x, use_reentrant=False))(x)
    # Inductor fuses the arithmetic around the shift, and rounds it elsewhere.
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), x)[0], expected)


@pytest.mark.feature("`autocast`, `no_grad`, `inference_mode`", column="compiled")
def test_contexts(device):
    x = torch.randn(10, 6, 4, device=device)
    expected = reference.temporal_shift(x, Shift(5, 4, 1, "keep", PLAN))
    function = compiled(shifted)
    with torch.no_grad():
        assert_same_bits(function(x), expected)
    with torch.inference_mode():
        assert_same_bits(function(x), expected)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_same_bits(function(x), expected)


@pytest.mark.feature("gradients of gradients", column="compiled", text="no: PyTorch has none")
def test_double_backward_raises_in_torch(device):
    x = torch.randn(10, 6, 4, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(shifted)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()
    assert x.grad is None


@pytest.mark.feature("CUDA graphs", column="compiled")
@pytest.mark.parametrize("inplace", [False, True])
def test_reduce_overhead(cuda, inplace):
    """With CUDA graphs under it; the shifted tensor is an intermediate one, as in a network."""
    weight = torch.randn(6, device=cuda)

    def function(x):
        y = x * weight.view(1, -1, 1, 1)
        return shifted(y, inplace=inplace).square()

    graphed = compiled(function, mode="reduce-overhead", backend="inductor")
    for _ in range(4):
        x = random_values((10, 6, 4, 4), torch.float32, cuda).to(memory_format=torch.channels_last)
        outs, grads = [], []
        for run in (function, graphed):
            leaf = x.clone().requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            out = run(leaf)
            out.sum().backward()
            outs.append(out.detach().clone())
            grads.append(leaf.grad.clone())
        # Inductor fuses the arithmetic around the shift, and rounds it elsewhere.
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*grads)
        assert outs[1].is_contiguous(memory_format=torch.channels_last)
