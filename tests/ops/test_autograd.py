"""Derivatives: against the oracle, numerically, of any order and by every means PyTorch has."""

import pytest
import torch
from support import PLAN, UndefinedGradient, assert_same_bits, layouts, random_values, shifted
from torch.autograd import gradcheck, gradgradcheck

import tsm_jit
from tsm_jit import reference
from tsm_jit.plans import PADDINGS, Shift


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradient_is_the_adjoint(device, padding, inplace):
    for channel_dim, x in layouts(2, 5, 6, 3, 3, torch.float32, device, random_values).values():
        leaf = x.detach().clone().requires_grad_()
        weight = torch.randn_like(leaf)
        out = shifted(leaf * 1.0, padding, inplace, channel_dim)
        (out * weight).sum().backward()
        shift = Shift(5, 4, channel_dim, padding, PLAN)
        assert_same_bits(out, reference.temporal_shift(leaf, shift))
        assert_same_bits(leaf.grad, reference.temporal_shift_backward(weight, shift))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_numerically_to_second_order(device, padding, dtype, inplace):
    x = torch.randn(5, 6, 1, dtype=dtype, device=device, requires_grad=True)  # few: quadratic in their number

    def function(x):
        return shifted(x * 1, padding, inplace) ** 2 if inplace else shifted(x, padding) ** 2

    assert gradcheck(function, x, check_forward_ad=not inplace)
    assert gradgradcheck(function, x)


@pytest.mark.feature("gradients of gradients")
@pytest.mark.parametrize("padding", PADDINGS)
def test_third_order(device, padding):
    x = torch.randn(5, 6, 2, dtype=torch.float64, device=device, requires_grad=True)

    def third(shift):
        value = shift(x).pow(4).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.pow(2).sum()
        return grad

    shift = Shift(5, 4, 1, padding, PLAN)
    expected = third(lambda x: reference.temporal_shift(x, shift))
    torch.testing.assert_close(third(lambda x: shifted(x, padding)), expected)  # sums in another order


@pytest.mark.feature("gradients, from any incoming layout")
@pytest.mark.parametrize("padding", PADDINGS)
def test_incoming_gradients_of_any_layout(device, padding):
    """Expanded (as from sum()), broadcast, transposed, strided gradients; and none of them is written."""
    leaf = torch.randn(10, 6, 4, 4, device=device, requires_grad=True)
    shift = Shift(5, 4, 1, padding, PLAN)
    for grad in (
        torch.ones((), device=device).expand(10, 6, 4, 4),
        torch.randn(10, 1, 1, 1, device=device).expand(10, 6, 4, 4),
        torch.randn(6, 1, 1, device=device).expand(10, 6, 4, 4),
        torch.randn(10, 6, 1, 1, device=device).expand(10, 6, 4, 4),
        torch.randn(10, 6, 4, 1, device=device).expand(10, 6, 4, 4),
        torch.randn(10, 6, 4, 4, device=device).transpose(2, 3),
        torch.randn(4, 4, 6, 10, device=device).permute(3, 2, 1, 0),
        torch.randn(10, 12, 4, 8, device=device)[:, ::2, :, ::2],
    ):
        before = grad.clone()
        for inplace in (False, True):
            (result,) = torch.autograd.grad(shifted(leaf * 1.0, padding, inplace), leaf, grad)
            assert_same_bits(result, reference.temporal_shift_backward(before, shift))
            assert_same_bits(grad, before)


def test_sparse_and_undefined_incoming_gradients(device):
    shift = Shift(5, 4, 1, "keep", PLAN)
    for inplace in (False, True):
        leaf = torch.randn(10, 6, device=device, requires_grad=True)
        grad = torch.randn(10, 6, device=device).relu()
        (result,) = torch.autograd.grad(shifted(leaf * 1.0, inplace=inplace), leaf, grad.to_sparse())
        assert_same_bits(result, reference.temporal_shift_backward(grad, shift))
        y = shifted(leaf * 1.0, inplace=inplace)
        (result,) = torch.autograd.grad(UndefinedGradient.apply(y).sum(), leaf, allow_unused=True)
        assert result is None or not result.any()


def test_gradient_shared_with_another_branch(device):
    """y + z hands one tensor to both branches; a backward that wrote into it would corrupt the other."""
    for inplace in (False, True):
        a = torch.randn(10, 6, 4, device=device, requires_grad=True)
        b = torch.randn(10, 6, 4, device=device, requires_grad=True)
        weight = torch.randn(10, 6, 4, device=device)
        out = shifted(a * 1.0, inplace=inplace) + b * 1.0
        (out * weight).sum().backward()
        assert_same_bits(b.grad, weight)
        assert_same_bits(a.grad, reference.temporal_shift_backward(weight, Shift(5, 4, 1, "keep", PLAN)))


def test_retain_graph_and_hooks(device):
    x = torch.randn(10, 6, 4, device=device, requires_grad=True)
    y = shifted(x)
    seen = []
    y.register_hook(seen.append)
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(inputs[0]))
    weight = torch.randn_like(y)
    first = torch.autograd.grad(y, x, weight, retain_graph=True)[0]
    second = torch.autograd.grad(y, x, weight)[0]
    assert_same_bits(first, second)
    assert [t.shape for t in seen] == [y.shape] * 4


@pytest.mark.feature("forward mode, `torch.func`")
def test_functions_of_torch_func(device):
    shift = Shift(5, 4, 1, "keep", PLAN)
    x = torch.randn(10, 6, 4, device=device)
    weight, tangent = torch.randn_like(x), torch.randn_like(x)

    def loss(x):
        return (shifted(x) * weight).sum()

    assert_same_bits(torch.func.grad(loss)(x), reference.temporal_shift_backward(weight, shift))
    value, moved = torch.func.jvp(shifted, (x,), (tangent,))
    assert_same_bits(value, reference.temporal_shift(x, shift))
    assert_same_bits(moved, reference.temporal_shift(tangent, shift))
    batch = torch.randn(3, 10, 6, 4, device=device)
    expected = torch.stack([reference.temporal_shift(b, shift) for b in batch])
    assert_same_bits(torch.func.vmap(shifted)(batch), expected)
    inner = torch.func.vmap(shifted, in_dims=2, out_dims=1)(batch.permute(1, 2, 0, 3))
    assert_same_bits(inner, expected.transpose(0, 1))
    clips = torch.randn(3, 2, 5, 6, 2, 2, device=device)
    per_clip = torch.func.vmap(lambda x: shifted(x, channel_dim=2))(clips)
    assert_same_bits(per_clip, torch.stack([reference.temporal_shift(c, shift._replace(channel_dim=2)) for c in clips]))
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=0)(batch)
    assert_same_bits(per_sample[1], reference.temporal_shift_backward(weight, shift))
    module = tsm_jit.TemporalShift(torch.nn.Conv1d(6, 6, 1), 5, inplace=True).to(device)
    weights = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    out = torch.func.functional_call(module, weights, x)
    expected = torch.nn.functional.conv1d(tsm_jit.temporal_shift(x, 5, 8), weights["net.weight"], weights["net.bias"])
    assert_same_bits(out, expected)
    hessian = torch.func.hessian(lambda x: shifted(x).pow(2).sum())(torch.randn(5, 6, device=device))
    assert hessian.shape == (5, 6, 5, 6)


@pytest.mark.feature("`autocast`, `no_grad`, `inference_mode`")
def test_without_recording(device):
    x = torch.randn(10, 6, 4, device=device, requires_grad=True)
    expected = reference.temporal_shift(x, Shift(5, 4, 1, "keep", PLAN))
    with torch.no_grad():
        y = shifted(x)
    assert not y.requires_grad
    assert_same_bits(y, expected)
    with torch.inference_mode():
        z = shifted(x)
        assert z.is_inference()
        shifted(z, inplace=True)
    assert not shifted(x.detach()).requires_grad


@pytest.mark.feature("`torch.utils.checkpoint`")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(device, reentrant):
    from torch.utils.checkpoint import checkpoint

    leaf = torch.randn(10, 6, 4, device=device)
    weight = torch.randn_like(leaf)
    grads = []
    for run in (
        lambda f, x: f(x),
        lambda f, x: checkpoint(f, x, use_reentrant=reentrant),
    ):
        x = leaf.clone().requires_grad_()
        (run(lambda x: torch.tanh(shifted(x * 2, inplace=True)), x) * weight).sum().backward()
        grads.append(x.grad)
    assert_same_bits(*grads)


@pytest.mark.feature("`autocast`, `no_grad`, `inference_mode`")
def test_autocast_passes_the_dtype_through(device):
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert shifted(torch.randn(10, 6, 4, device=device)).dtype == torch.float32
        assert shifted(torch.randn(10, 6, 4, device=device).half()).dtype == torch.float16
