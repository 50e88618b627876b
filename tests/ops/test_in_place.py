"""In place, by PyTorch's rules: version counter, history, stale tensors, leaves, views, overlapping memory."""

import pytest
import torch
from support import assert_same_bits, random_values

import tsm_jit
from tsm_jit import reference
from tsm_jit.plans import Shift

SHIFT = Shift(4, 4, 1, "zeros", ((2, 1), (2, -1)))


def shift_(x):
    return tsm_jit.temporal_shift(x, 4, 8, inplace=True)


def values(device, *shape):
    return random_values(shape or (8, 16, 3, 3), torch.float32, device)


def test_returns_its_argument_and_bumps_the_version(device):
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            x = values(device)
            pointer, version = x.data_ptr(), x._version
            assert shift_(x) is x
            assert x.data_ptr() == pointer
            assert x._version > version


@pytest.mark.feature("in place, by autograd's rules")
def test_history_is_rebased(device):
    leaf = values(device).requires_grad_()
    x = leaf * 2
    before = x.grad_fn
    shift_(x)
    assert x.grad_fn is not before
    weight = torch.randn_like(x)
    (x * weight).sum().backward()
    assert_same_bits(leaf.grad, reference.temporal_shift_backward(weight, SHIFT) * 2)


@pytest.mark.feature("in place, by autograd's rules")
def test_stale_saved_tensors_raise(device):
    leaf = values(device).requires_grad_()
    x = torch.relu(leaf)  # relu saves its output
    shift_(x)
    with pytest.raises(RuntimeError):
        x.sum().backward()
    assert leaf.grad is None


@pytest.mark.feature("in place on a leaf")
def test_leaf_that_requires_grad(device):
    """The usage of the system that started the project: a leaf, shifted in place, n_segment=16, fold_div=4."""
    x = values(device, 2 * 16, 64, 8, 8).requires_grad_()
    before = x.detach().clone()
    y = tsm_jit.TemporalShift.shift(x, n_segment=16, fold_div=4, inplace=True)
    shift = Shift(16, 16, 1, "zeros", ((16, 1), (16, -1)))
    assert_same_bits(y, reference.temporal_shift(before, shift))
    assert y.data_ptr() == x.data_ptr()
    assert_same_bits(x, y)
    assert y.grad_fn is not None
    assert x.is_leaf
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    assert_same_bits(x.grad, reference.temporal_shift_backward(weight, shift))


def test_the_result_of_a_shifted_leaf_can_be_changed_in_place(device):
    x = values(device).requires_grad_()
    before = x.detach().clone()
    y = shift_(x)
    y.mul_(3)
    y.sum().backward()
    assert_same_bits(x.grad, reference.temporal_shift_backward(torch.full_like(before, 3), SHIFT))


def test_a_leaf_that_was_saved_before_raises_in_the_backward(device):
    x = values(device).requires_grad_()
    product = x * x
    shift_(x)
    with pytest.raises(RuntimeError):
        product.sum().backward()
    assert x.grad is None


def test_leaf_without_recording(device):
    x = values(device).requires_grad_()
    expected = reference.temporal_shift(x, SHIFT)
    with torch.no_grad():
        assert shift_(x) is x
    assert_same_bits(x, expected)
    assert x.requires_grad
    assert x.is_leaf


def test_inference_tensors(device):
    with torch.inference_mode():
        x = values(device)
        expected = reference.temporal_shift(x, SHIFT)
        assert shift_(x) is x
        assert_same_bits(x, expected)


def test_views_change_their_base_there_and_nowhere_else(device):
    views = {
        "rows": lambda b: b[2:6],
        "every second frame": lambda b: b[::2],
        "channels": lambda b: b[:, 1:-1],
        "every second channel": lambda b: b[:, ::2],
        "cropped": lambda b: b[:, :, 1:, :-1],
        "transposed": lambda b: b.transpose(2, 3),
        "channels innermost": lambda b: b.permute(0, 3, 1, 2),
        "diagonal": lambda b: b[:, :, :5, :5].diagonal(dim1=2, dim2=3),
    }
    for name, view in views.items():
        base = values(device, 8, 18, 6, 7)
        expected = base.clone()
        view(expected).copy_(reference.temporal_shift(view(expected), SHIFT._replace(plan=_plan(view(base)))))
        shift_(view(base))
        assert torch.equal(base, expected), name


def _plan(x):
    fold = x.shape[1] // 8
    return ((fold, 1), (fold, -1))


def test_gradient_through_a_shifted_view(device):
    leaf = values(device, 3, 4, 16).requires_grad_()
    base = leaf * 1.0
    shift_(base[1:].flatten(0, 1))
    weight = torch.randn_like(base)
    (base * weight).sum().backward()
    expected = weight.clone()
    expected[1:] = reference.temporal_shift_backward(weight[1:].flatten(0, 1), SHIFT).view(2, 4, 16)
    assert_same_bits(leaf.grad, expected)


def test_a_view_of_a_leaf_raises_as_in_every_in_place_operation(device):
    leaf = values(device).requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError):
        shift_(leaf[:4])
    assert_same_bits(leaf, before)


def test_views_that_autograd_cannot_rebase_raise(device):
    base = values(device, 2, 8, 16).requires_grad_() * 1
    before = base.detach().clone()
    with pytest.raises(RuntimeError):
        shift_(base.unbind(0)[0])
    assert_same_bits(base, before)


def test_memory_shared_between_elements_raises(device):
    for x in (
        values(device, 1, 16, 3, 3).expand(8, 16, 3, 3),
        values(device, 8, 1, 3, 3).expand(8, 16, 3, 3),
        values(device, 200).as_strided((8, 16), (4, 1)),
    ):
        before = x.clone()
        with pytest.raises(ValueError, match="x must not overlap itself"):
            shift_(x)
        assert_same_bits(x, before)


def test_expanded_along_one_is_not_shared(device):
    x = values(device, 8, 16, 1).as_strided((8, 16, 1), (16, 1, 0))
    expected = reference.temporal_shift(x, SHIFT)
    assert_same_bits(shift_(x), expected)
