"""The operators of fused blocks against the reference."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from fused_networks import CASES, DTYPES, FORMATS, NETWORKS, pair, random_case, random_norm
from support import assert_same_bits, poison, random_values
from torch import Tensor, nn

from tsm_jit import reference
from tsm_jit.fused.autograd import norm_add_relu, norm_add_relu_both_layouts, norm_relu_max_pool
from tsm_jit.ops import residual as residual_ops
from tsm_jit.ops import residual_block
from tsm_jit.ops.residual import NO_SHIFT, Norm, has_pixel_index
from tsm_jit.plans import PADDINGS, Shift


@pytest.mark.parametrize(("dtype", "layout", "padding"), CASES)
def test_forward_is_the_reference_to_the_bit(device, dtype, layout, padding):
    for from_shifted, shifted in itertools.product((False, True), (False, True)):
        shift, make = random_case(dtype, layout, device, padding)
        z, x = make(), make()
        before = z.clone(), x.clone()
        identity, boundary = x, None
        if from_shifted:
            identity = reference.temporal_shift(x, shift)
            boundary = reference.boundary_frames(x, shift).contiguous(memory_format=FORMATS[layout])
        poison(z)
        out, boundary_out = torch.ops.tsm_jit.norm_add_relu(
            z, [], 0.0, identity, [], 0.0, boundary, shift.encode(), shifted
        )
        expected = torch.relu(z + x)
        if shifted:
            assert_same_bits(boundary_out, reference.boundary_frames(expected, shift))
            expected = reference.temporal_shift(expected, shift)
        assert_same_bits(out, expected)
        assert out.stride() == z.stride()
        assert_same_bits(z, before[0])
        assert_same_bits(x, before[1])


@pytest.mark.parametrize(("dtype", "layout", "padding"), CASES)
def test_the_result_may_overwrite_an_input(device, dtype, layout, padding):
    for from_shifted, shifted, may_overwrite_z, may_overwrite_identity in itertools.product((False, True), repeat=4):
        shift, make = random_case(dtype, layout, device, padding)
        z, x = make(), make()
        expected = torch.relu(z + x)
        identity, boundary = x, None
        if from_shifted:
            identity = reference.temporal_shift(x, shift)
            boundary = reference.boundary_frames(x, shift).contiguous(memory_format=FORMATS[layout])
        with torch.no_grad():
            (out, again), boundary_out = norm_add_relu(
                z,
                None,
                identity,
                None,
                boundary,
                shift.encode(),
                shifted,
                may_overwrite_z=may_overwrite_z,
                may_overwrite_identity=may_overwrite_identity,
            )
        if shifted:
            assert_same_bits(boundary_out, reference.boundary_frames(expected, shift))
            expected = reference.temporal_shift(expected, shift)
        assert_same_bits(out, expected)
        assert again.data_ptr() == out.data_ptr()
        into_identity = may_overwrite_identity and from_shifted and shifted
        into_z = may_overwrite_z and not into_identity and (not shifted or (z.is_cuda and shift.padding != "circular"))
        assert (out.data_ptr() == identity.data_ptr()) == into_identity
        assert (out.data_ptr() == z.data_ptr()) == into_z


@pytest.mark.parametrize(("dtype", "layout", "padding"), CASES)
def test_norms_on_the_way(device, dtype, layout, padding):
    shift, make = random_case(dtype, layout, device, padding)
    z, identity = make(), make()
    acc_dtype = residual_ops.acc_dtype(dtype)
    for norm_dtype in {acc_dtype, dtype}:
        z_norm, identity_norm = (random_norm(z.shape[1], norm_dtype, device) for _ in range(2))
        out, _ = torch.ops.tsm_jit.norm_add_relu(
            z, z_norm, 1e-3, identity, identity_norm, 1e-5, None, shift.encode(), True
        )
        normed = [
            F.batch_norm(x.double(), *(part.double() for part in parts), eps=epsilon)
            for x, parts, epsilon in ((z, z_norm, 1e-3), (identity, identity_norm, 1e-5))
        ]
        expected = reference.temporal_shift(torch.relu(sum(normed)), shift)
        # Computed in `acc_dtype` from numbers around 1 and rounded once.
        close = 4 * torch.finfo(acc_dtype).eps * 16 + torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize(("dtype", "layout", "padding"), CASES)
def test_both_forms_are_the_reference_to_the_bit(device, dtype, layout, padding):
    for from_shifted, may_overwrite_identity, step in itertools.product((False, True), (False, True), (1, 2, 3)):
        shift, make = random_case(dtype, layout, device, padding)
        z, x = make(), make()
        if not has_pixel_index(z):
            continue
        expected, before = torch.relu(z + x), z.clone()
        identity, boundary = x, None
        if from_shifted:
            identity = reference.temporal_shift(x, shift)
            boundary = reference.boundary_frames(x, shift).contiguous(memory_format=FORMATS[layout])
        poison(z)
        with torch.no_grad():
            out, plain = norm_add_relu_both_layouts(
                z, None, identity, None, boundary, shift.encode(), step, may_overwrite_identity=may_overwrite_identity
            )
        assert_same_bits(out, reference.temporal_shift(expected, shift))
        assert_same_bits(plain, expected[:, :, ::step, ::step])
        assert (out.data_ptr() == identity.data_ptr()) == (may_overwrite_identity and from_shifted)
        assert_same_bits(z, before)


def test_pooling_keeps_nan(device):
    z = torch.randn(2, 8, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    z[0, 3, 2, 2] = z[1, 0, 0, 0] = float("nan")
    norm = Norm(*(torch.full((8,), value, device=device) for value in (0.0, 1.0, 1.0, 0.0)), 0.0)
    x, *_ = norm_relu_max_pool(z, norm, None, True)
    assert_same_bits(x.isnan(), F.max_pool2d(z.relu(), 3, 2, 1).isnan())


@pytest.mark.parametrize(("dtype", "layout", "padding"), CASES)
def test_backward_is_the_reference(device, dtype, layout, padding):
    for to_shifted, shifted in itertools.product((False, True), (False, True)):
        shift, make = random_case(dtype, layout, device, padding)
        x, grads = torch.relu(make()), [random.choice((make, lambda: None))() for _ in range(2)]
        out, boundary_out, grad_boundary = x, None, None
        if shifted:
            out = reference.temporal_shift(x, shift)
            boundary_out = reference.boundary_frames(x, shift).contiguous(memory_format=FORMATS[layout])
            grad_boundary = random.choice((None, random_values(boundary_out.shape, dtype, device)))
            if grad_boundary is not None:
                grad_boundary = grad_boundary.contiguous(memory_format=FORMATS[layout])
        poison(out)
        grad, grad_shifted, grad_boundary_in, _ = residual_ops.add_relu_backward(
            *grads, grad_boundary, out, boundary_out, *(None, [], 0.0) * 2, shift.encode(), to_shifted
        )
        summands = [each for each in grads if each is not None]
        expected = reference.add_relu_backward(summands, grad_boundary, out, boundary_out, shift)
        # Up to eighteen numbers, added in another order, which may cancel; 16-bit ones rounded once, to either side.
        acc_dtype = residual_ops.acc_dtype(dtype)
        torch.testing.assert_close(
            grad,
            expected,
            rtol=2 * torch.finfo(dtype).eps,
            atol=64 * torch.finfo(acc_dtype).eps + torch.finfo(dtype).tiny,
        )
        if to_shifted:
            without_padding = shift if padding == "circular" else shift._replace(padding="zeros")
            assert_same_bits(grad_shifted, reference.temporal_shift(grad, without_padding))
            assert_same_bits(grad_boundary_in, reference.boundary_frames(grad, shift))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_norms(cuda, dtype):
    shape = (random.randint(1, 40), random.choice((3, 8, 64, 300)), random.randint(1, 9), random.randint(1, 9))
    acc_dtype = residual_ops.acc_dtype(dtype)

    def make():
        return random_values(shape, dtype, cuda).contiguous(memory_format=torch.channels_last) + 3

    out, grad, z, identity = torch.relu(make() - 3), make(), make(), make()
    # Mean, variance and weight; each epsilon another.
    norms = [[torch.rand(shape[1], dtype=acc_dtype, device=cuda) + k for k in (2.5, 0.5, -0.5)] for _ in range(2)]
    none = (None, [], 0.0)
    for first, second in itertools.product(((z, norms[0], 0.1), none), ((identity, norms[1], 0.2), none)):
        masked, *_, norm_grads = residual_ops.add_relu_backward(
            grad, None, None, out, None, *first, *second, NO_SHIFT, False
        )
        masked, count = masked.double(), masked.numel() / masked.shape[1]
        # Sums of `count` numbers around 10. Kernels do not round these numbers to 16 bits before the addition.
        close = 10 * count**0.5 * max(torch.finfo(acc_dtype).eps * count**0.5, torch.finfo(dtype).eps)
        assert norm_grads.shape == ((9, shape[1]) if first[1] or second[1] else (0,))
        assert not norm_grads[:1].any()
        for k, (values, norm, epsilon) in enumerate((first, second)):
            if values is None:
                continue
            mean, variance, weight = (part.double() for part in norm)
            deviation = (variance + epsilon).rsqrt()
            normalized = (values.double() - mean[:, None, None]) * deviation[:, None, None]
            expected = [(masked * normalized).sum((0, 2, 3)), masked.sum((0, 2, 3))]
            expected += [each * weight * deviation / -count for each in expected]
            for actual, gradient in zip(norm_grads[1 + 4 * k : 5 + 4 * k], expected, strict=True):
                torch.testing.assert_close(actual.double(), gradient, rtol=0, atol=2 * close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_statistics(device, dtype):
    shape = (random.randint(1, 40), random.choice((3, 8, 64, 300)), random.randint(1, 9), random.randint(2, 9))
    x = random_values(shape, dtype, device).contiguous(memory_format=torch.channels_last) + 100
    acc_dtype = residual_ops.acc_dtype(dtype)
    expected, actual = (nn.BatchNorm2d(shape[1], momentum=0.3, dtype=acc_dtype, device=device) for _ in range(2))
    expected(x.to(acc_dtype))
    running = actual.running_mean, actual.running_var, actual.num_batches_tracked
    mean, variance = residual_ops.batch_norm_stats_(x, *running, actual.momentum)
    # A variance around 1 of numbers around 100 whose sums are of their distances from the first.
    close = 1e-4 if acc_dtype is torch.float32 else 1e-9
    torch.testing.assert_close(mean, x.to(acc_dtype).mean((0, 2, 3)), rtol=close, atol=0)
    torch.testing.assert_close(variance, x.to(acc_dtype).var((0, 2, 3), correction=0), rtol=close, atol=close)
    for name, value in actual.named_buffers():
        torch.testing.assert_close(value, getattr(expected, name), rtol=close, atol=close)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("norms", ["none", "of the batch", "of before"])
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_gradients_are_those_of_differences(device, layout, norms, shifted):
    shift, make = random_case(torch.float64, layout, device, random.choice(PADDINGS), largest=3)
    z, identity = (make().requires_grad_() for _ in range(2))
    z_weights, identity_weights = (
        [(torch.rand(z.shape[1], dtype=torch.float64, device=device) + 0.5).requires_grad_() for _ in range(2)]
        for _ in range(2)
    )

    def norm(x, weights) -> Norm | None:
        if norms == "none":
            return None
        variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
        if norms == "of before":
            mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
        return Norm(mean, variance, *weights, 0.1, uses_batch_stats=norms == "of the batch")

    def of(z, identity, *weights):
        (x, again), boundary = norm_add_relu(
            z, norm(z, weights[:2]), identity, norm(identity, weights[2:]), None, shift.encode(), shifted
        )
        return x, 2 * again, *([boundary] if shifted and boundary.numel() else [])

    torch.autograd.gradcheck(of, (z, identity, *z_weights, *identity_weights))


def test_gradients_may_be_changed_in_place(device, merged):
    """As clipping does: no two parameters may have one gradient, though the biases of two norms have the same."""
    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    fused(x).square().sum().backward()
    before = [parameter.grad.clone() for parameter in fused.parameters()]
    for parameter in fused.parameters():
        parameter.grad.mul_(2)
    for parameter, gradient in zip(fused.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_gradients_of_a_shifted_identity_are_those_of_differences(device, layout, shifted):
    shift, make = random_case(torch.float64, layout, device, random.choice(PADDINGS), largest=3)
    x = make()
    boundary = reference.boundary_frames(x, shift).requires_grad_()
    identity, z = reference.temporal_shift(x, shift).requires_grad_(), make().requires_grad_()

    def of(z, identity, boundary):
        out, boundary = norm_add_relu(z, None, identity, None, boundary, shift.encode(), shifted)
        return [each for each in (*out, boundary) if each is not None and each.numel()]

    if shift.padding in ("keep", "replicate"):  # gradcheck would change only the copy of a frame
        shift = shift._replace(padding="zeros")
        identity = reference.temporal_shift(x, shift).requires_grad_()
    # Padding stays 0 in the shifted layout, so its gradient has no meaning.
    held = reference.temporal_shift(torch.ones_like(x), shift)
    torch.autograd.gradcheck(lambda z, identity, boundary: of(z, identity * held, boundary), (z, identity, boundary))


def test_the_backward_of_a_block_without_values_is_an_error(cuda):
    x = torch.empty(0, 8, 1, 1, device=cuda).contiguous(memory_format=torch.channels_last)
    weights, norm = [torch.randn(8, 8, 1, 1, device=cuda)] * 2, random_norm(8, torch.float32, cuda)
    conv_params, saved = [1, 1, 0, 0, 1, 1, 1, 1] * 2, [x, *norm, x]
    with pytest.raises(RuntimeError, match="z must have values, to be differentiated"):
        residual_block.block_backward(x, x, "", weights, conv_params, saved, [1e-5] * 2, [1] * 5)


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_weights_are_cast_together(device, before, after):
    weights = [random_values(size, before, device) for size in ((8, 4, 3, 3), (8, 8, 1, 1), (4, 1, 3, 2), (2, 3, 1, 5))]
    weights = [random.choice((weight, weight.to(memory_format=torch.channels_last))) for weight in weights]
    weights += [weights[0][::2, :, 1:], weights[0].expand(3, 8, 4, 3, 3)[1:], weights[0][:0]]
    for cast in (residual_block.cast_all, residual_block.reference_cast):
        for weight, copied in zip(weights, cast(weights, after), strict=True):
            assert_same_bits(copied, weight.to(after))
        assert cast([], after) == []
    assert [copied.stride() for copied in cast(weights[:4], after)] == [weight.stride() for weight in weights[:4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("uses_batch_stats", [(True, True, True), (False, True, False), (True,)], ids=str)
def test_block_operators_equal_the_reference(cuda, uses_batch_stats, downsample, dtype):
    """Up to rounding: the reference consists of PyTorch's convolutions and norms."""
    acc_dtype, t = residual_ops.acc_dtype(dtype), random.randint(1, 8)

    def values(*sizes) -> Tensor:
        return random_values(sizes, dtype, cuda).contiguous(memory_format=torch.channels_last)

    weights, conv_params, affine, running, norm_params = [], [], [], [], []

    def add_layer(before: int, after: int, stride: int, uses_batch_stats: bool) -> None:
        size, dilation, groups = (random.choice(choice) for choice in ((1, 3), (1, 2), (1, 2)))
        weight = values(after, before // groups, size, size)
        weights.append(random.choice((weight, weight.contiguous())))
        padding = size // 2 * dilation
        conv_params.extend([stride, stride, padding, padding, dilation, dilation, groups, uses_batch_stats])
        mean, variance, *weight_and_bias = random_norm(after, acc_dtype, cuda)
        affine.extend(weight_and_bias)
        running.append([mean, variance, *([torch.tensor(41, device=cuda)] if uses_batch_stats else [])])
        norm_params.extend([1e-3, 0.1])

    shift = Shift(t, t, 1, random.choice(PADDINGS), ((1, 1), (1, -1))).canonical().encode()
    widths = [2 * random.randint(1, 40) for _ in range(len(uses_batch_stats) + 1)]
    height, width = 9, 7
    x = values(2 * t, widths[0], height, width)
    for k, channels in enumerate(itertools.pairwise(widths)):
        stride = random.choice((1, 2))
        add_layer(*channels, stride, uses_batch_stats[k])
        height, width = -(-height // stride), -(-width // stride)
    identity = values(2 * t, widths[-1], height, width)
    if downsample:
        identity = values(2 * t, widths[0], 2 * height, 2 * width)
        uses_batch_stats = (*uses_batch_stats, uses_batch_stats[0])
        add_layer(widths[0], widths[-1], 2, uses_batch_stats[0])
    layers = len(uses_batch_stats) - downsample
    needs_grad = [random.random() < 0.7 for _ in range(1 + 2 * layers)]
    recomputes_first_relu = random.randint(0, 1)
    results = []
    with torch.backends.cudnn.flags(deterministic=True):
        for forward, backward in (
            (residual_block.block_forward, residual_block.block_backward),
            (residual_block.reference_block, residual_block.reference_block_backward),
        ):
            state = [each.clone() for layer in running for each in layer]
            rest = norm_params, identity, downsample, None, shift, True
            out, boundary, outputs = forward(x, shift, weights, conv_params, affine, state, *rest)
            layer_outputs, outputs = list(outputs), iter(outputs)
            saved, relus, grad = [], [], None
            for k, from_batch in enumerate(uses_batch_stats):
                z = next(outputs)
                statistics = [next(outputs), next(outputs)] if from_batch else running[k][:2]
                if k < layers - 1:
                    saved += [z, *statistics, *affine[2 * k : 2 * k + 2]]
                    relus.append(next(outputs))
                elif k == layers - 1:
                    grad = z.cos()
            assert not list(outputs)
            saved += relus[recomputes_first_relu:]
            rest = conv_params[: 8 * layers], saved, norm_params[: 2 * layers : 2], needs_grad
            grads = backward(grad, x, shift, weights[:layers], *rest)
            grads = [x.new_empty(0) if each is None else each for each in grads]  # not needed
            results.append([out, boundary, *layer_outputs, *grads, *state])
    assert [int(each) for each in state if each.dtype is torch.int64] == [42] * sum(uses_batch_stats)
    # Where a sum is nearly 0, rounding decides on which side of the ReLU it is: of few values in float32.
    tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-2, torch.float64: 1e-10}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


@pytest.mark.parametrize("argument", ["channel_dim", "boundary", "norm"])
def test_operators_check_arguments_for_memory_safety(argument):
    z = torch.randn(4, 8, 2, 2)
    shift = Shift(2, 2, 1, "zeros", ((4, 1),))
    boundary, norm = torch.randn(2, 4, 2, 2), [torch.ones(8)] * 4
    if argument == "channel_dim":
        z, shift = torch.randn(1, 2, 8, 2, 2), shift._replace(channel_dim=2)
    if argument == "boundary":
        boundary = boundary[:, :3]
    if argument == "norm":
        norm = [torch.ones(7)] * 4
    with pytest.raises(RuntimeError, match=argument):
        residual_ops.norm_add_relu_(
            torch.empty_like(z), None, None, 1, z, norm, 0.0, z, [], 0.0, boundary, shift.encode(), True
        )


def test_shifts_that_cannot_overwrite_z_are_an_error(device):
    circular = device.type == "cuda"  # else: the CPU never can
    shift = Shift(2, 2, 1, "circular" if circular else "zeros", ((4, 1),))
    z, boundary = torch.randn(4, 8, 2, 2, device=device), torch.randn(2, 0 if circular else 4, 2, 2, device=device)
    before = z.clone()
    with pytest.raises(RuntimeError, match="out must not be z"):
        residual_ops.norm_add_relu_(z, boundary, None, 1, z, [], 0.0, before, [], 0.0, None, shift.encode(), True)
    assert_same_bits(z, before)
