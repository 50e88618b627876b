"""Fused residual networks: the operators against the reference, networks against what they were before."""

import collections
import copy
import functools
import io
import itertools
import random
import re
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from support import assert_same_bits, poison, random_values
from test_distributed import gradients, train
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import tsm_jit
from tsm_jit import reference, residual
from tsm_jit.fused import block, execute
from tsm_jit.fused.autograd import norm_add_relu, norm_add_relu_both_layouts, norm_relu, norm_relu_max_pool
from tsm_jit.ops import residual as residual_ops
from tsm_jit.ops import residual_block
from tsm_jit.ops.residual import NO_SHIFT, Norm, has_channel_sums, has_pixel_index
from tsm_jit.plans import PADDINGS, Shift

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- the operators ---------------------------------------------------------------------------------------------------


def random_case(dtype, layout, device, padding, largest=9):
    """A shift that may leave frames or channels alone, and a function that makes activations for it."""
    t = random.randint(1, largest)
    shifted = random.randint(1, t)
    unit = random.choice((1, 1, 8)) if largest == 9 else 1  # groups that 16 bytes do not divide, and that they do
    plan = tuple((unit * random.randint(0, 3), random.randint(-shifted, shifted)) for _ in range(random.randint(0, 4)))
    channels = sum(width for width, _ in plan) + unit * random.randint(1, 3)
    shape = (random.randint(1, 3) * t, channels, random.randint(1, largest), random.randint(1, (largest + 1) // 2))

    def make(*of) -> Tensor:
        return random_values(of or shape, dtype, device).contiguous(memory_format=FORMATS[layout])

    return Shift(t, shifted, 1, padding, plan).canonical(), make


def random_norm(channels, dtype, device) -> list[Tensor]:
    return [(torch.rand(channels, device=device) + 0.5).to(dtype) for _ in range(4)]


CASES = [
    pytest.param(*case, id="-".join(map(str, case)).replace("torch.", ""))
    for case in itertools.product(DTYPES, FORMATS, PADDINGS)
]


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
        out, boundary_out = residual_ops._norm_add_relu(
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
def test_the_result_may_take_the_place_of_what_it_is_made_of(device, dtype, layout, padding):
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
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for norm_dtype in {wide, dtype}:
        z_norm, identity_norm = (random_norm(z.shape[1], norm_dtype, device) for _ in range(2))
        out, _ = residual_ops._norm_add_relu(z, z_norm, 1e-3, identity, identity_norm, 1e-5, None, shift.encode(), True)
        normed = [
            F.batch_norm(x.double(), *(part.double() for part in parts), eps=epsilon)
            for x, parts, epsilon in ((z, z_norm, 1e-3), (identity, identity_norm, 1e-5))
        ]
        expected = reference.temporal_shift(torch.relu(sum(normed)), shift)
        # Computed in `wide` from numbers around 1 and rounded once.
        close = 4 * torch.finfo(wide).eps * 16 + torch.finfo(dtype).eps
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


@pytest.mark.parametrize(("dtype", "padding"), list(itertools.product(DTYPES, PADDINGS)), ids=str)
def test_pool_of_relu_of_norm(device, dtype, padding):
    for given, plain in ((True, True), (True, False), (False, True)):
        shift, make = random_case(dtype, "channels_last", device, padding)
        z = make()
        z = torch.cat([z, z]).reshape(len(z), -1, *z.shape[2:]).contiguous(memory_format=torch.channels_last)
        z_before, wide = z.clone(), torch.float64 if dtype is torch.float64 else torch.float32
        norm = Norm(*random_norm(z.shape[1], random.choice((wide, dtype)), device), 1e-3)
        poison(z)
        x, shifted, boundary = norm_relu_max_pool(z, norm, shift.encode() if given else None, plain)
        whole = x if plain else norm_relu_max_pool(z, norm, None, True)[0]
        normed = F.batch_norm(z.double(), *(part.double() for part in norm[:4]), eps=1e-3)
        # Computed in `wide` from numbers around 1 and rounded once.
        close = 4 * torch.finfo(wide).eps * 16 + torch.finfo(dtype).eps
        torch.testing.assert_close(whole.double(), F.max_pool2d(normed.relu(), 3, 2, 1), rtol=close, atol=close)
        assert whole.is_contiguous(memory_format=torch.channels_last)
        assert (x is not None, shifted is not None, boundary is not None) == (plain, given, given)
        if given:
            assert_same_bits(shifted, reference.temporal_shift(whole, shift))
            assert_same_bits(boundary, reference.boundary_frames(whole, shift))
        assert_same_bits(z, z_before)


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
        given = [each for each in grads if each is not None]
        expected = reference.add_relu_backward(given, grad_boundary, out, boundary_out, shift)
        # Up to eighteen numbers, added in another order, which may cancel; 16-bit ones rounded once, to either side.
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        torch.testing.assert_close(
            grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=64 * torch.finfo(wide).eps + torch.finfo(dtype).tiny
        )
        if to_shifted:
            without_padding = shift if padding == "circular" else shift._replace(padding="zeros")
            assert_same_bits(grad_shifted, reference.temporal_shift(grad, without_padding))
            assert_same_bits(grad_boundary_in, reference.boundary_frames(grad, shift))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_norms(cuda, dtype):
    shape = (random.randint(1, 40), random.choice((3, 8, 64, 300)), random.randint(1, 9), random.randint(1, 9))
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def make():
        return random_values(shape, dtype, cuda).contiguous(memory_format=torch.channels_last) + 3

    out, grad, z, identity = torch.relu(make() - 3), make(), make(), make()
    # Mean, variance and weight; each epsilon another.
    norms = [[torch.rand(shape[1], dtype=wide, cuda=cuda) + k for k in (2.5, 0.5, -0.5)] for _ in range(2)]
    none = (None, [], 0.0)
    for first, second in itertools.product(((z, norms[0], 0.1), none), ((identity, norms[1], 0.2), none)):
        masked, *_, made = residual_ops.add_relu_backward(grad, None, None, out, None, *first, *second, NO_SHIFT, False)
        masked, count = masked.double(), masked.numel() / masked.shape[1]
        # Sums of `count` numbers around 10, of which kernels do not round each to 16 bits before they add it.
        close = 10 * count**0.5 * max(torch.finfo(wide).eps * count**0.5, torch.finfo(dtype).eps)
        assert made.shape == ((9, shape[1]) if first[1] or second[1] else (0,))
        assert not made[:1].any()
        for k, (values, norm, epsilon) in enumerate((first, second)):
            if values is None:
                continue
            mean, variance, weight = (part.double() for part in norm)
            deviation = (variance + epsilon).rsqrt()
            normalized = (values.double() - mean[:, None, None]) * deviation[:, None, None]
            expected = [(masked * normalized).sum((0, 2, 3)), masked.sum((0, 2, 3))]
            expected += [each * weight * deviation / -count for each in expected]
            for actual, gradient in zip(made[1 + 4 * k : 5 + 4 * k], expected, strict=True):
                torch.testing.assert_close(actual.double(), gradient, rtol=0, atol=2 * close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_batch", [False, True], ids=["of before", "of the batch"])
def test_gradients_of_relu_of_norm(device, dtype, of_batch):
    shape = (random.randint(2, 40), random.choice((3, 8, 64, 300)), random.randint(1, 9), random.randint(1, 9))
    wide, count = residual_ops.acc_dtype(dtype), shape[0] * shape[2] * shape[3]
    z, grad = (
        random_values(shape, dtype, device).contiguous(memory_format=torch.channels_last).requires_grad_(needed)
        for needed in (True, False)
    )
    mean, variance, weight, bias = random_norm(shape[1], wide, device)
    # As small as not even half of the least number of 16 bits: such a ReLU is 0 although the norm is positive.
    weight[: shape[1] // 2] *= 1e-8
    bias[: shape[1] // 2] *= 1e-8
    if of_batch:
        variance, mean = torch.var_mean(z.detach().to(wide), (0, 2, 3), correction=0)
    weight.requires_grad_()
    bias.requires_grad_()
    z_before, grad_before = z.detach().clone(), grad.clone()
    poison(z.detach())
    x = norm_relu(z, Norm(mean, variance, weight, bias, 1e-3, of_batch))
    made, _ = norm_add_relu(
        z.detach(), Norm(mean, variance, weight, bias, 1e-3), torch.zeros_like(z), None, None, NO_SHIFT, False
    )
    assert_same_bits(x, made[0].detach())
    gradients = torch.autograd.grad(x, (z, weight, bias), grad)
    assert_same_bits(z.detach(), z_before)
    assert_same_bits(grad, grad_before)

    parts = [each.detach().double().requires_grad_(each.requires_grad) for each in (z, weight, bias)]
    running = (None, None) if of_batch else (mean.double(), variance.double())
    normed = F.batch_norm(parts[0], *running, *parts[1:], training=of_batch, eps=1e-3)
    expected = torch.autograd.grad(normed, parts, torch.where(x > 0, grad, 0).double())
    # Of values around 1, rounded once; of sums of `count` of them.
    scale = (weight.abs() * (variance + 1e-3).rsqrt()).detach().double()[:, None, None]
    close = 16 * torch.finfo(wide).eps * count + torch.finfo(dtype).eps
    assert ((gradients[0] - expected[0]).abs() <= scale * close * 8 + torch.finfo(dtype).smallest_normal).all()
    for ours, theirs in zip(gradients[1:], expected[1:], strict=True):
        assert ours.dtype is wide
        # Where no kernel sums up, PyTorch adds products of this type.
        exact = torch.finfo(wide if has_channel_sums(z) else dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=50 * count**0.5 * exact * count**0.5)
    if not of_batch:
        assert_same_bits(gradients[0] != 0, (x > 0) & (grad.to(wide) * scale.to(wide)).to(dtype).ne(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_statistics(device, dtype):
    shape = (random.randint(1, 40), random.choice((3, 8, 64, 300)), random.randint(1, 9), random.randint(2, 9))
    x = random_values(shape, dtype, device).contiguous(memory_format=torch.channels_last) + 100
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    expected, actual = (nn.BatchNorm2d(shape[1], momentum=0.3, dtype=wide, device=device) for _ in range(2))
    expected(x.to(wide))
    running = actual.running_mean, actual.running_var, actual.num_batches_tracked
    mean, variance = residual_ops.batch_norm_stats_(x, *running, actual.momentum)
    # A variance around 1 of numbers around 100 whose sums are of their distances from the first.
    close = 1e-4 if wide is torch.float32 else 1e-9
    torch.testing.assert_close(mean, x.to(wide).mean((0, 2, 3)), rtol=close, atol=0)
    torch.testing.assert_close(variance, x.to(wide).var((0, 2, 3), correction=0), rtol=close, atol=close)
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


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("of_batch", [False, True], ids=["of before", "of the batch"])
def test_gradients_of_relu_of_norm_are_those_of_differences(device, layout, of_batch):
    _, make = random_case(torch.float64, layout, device, "zeros", largest=3)
    z = make().requires_grad_()
    weights = [(torch.rand(z.shape[1], dtype=torch.float64, device=device) + 0.5).requires_grad_() for _ in range(2)]

    def of(z, *weights):
        variance, mean = torch.var_mean(z.detach(), (0, 2, 3), correction=0)
        if not of_batch:
            mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
        return norm_relu(z, Norm(mean, variance, *weights, 0.1, of_batch))

    torch.autograd.gradcheck(of, (z, *weights))
    for wanted in itertools.product((False, True), repeat=3):
        given = [each.detach().requires_grad_(needed) for each, needed in zip((z, *weights), wanted, strict=True)]
        if any(wanted):
            of(*given).sum().backward()
        assert tuple(each.grad is not None for each in given) == wanted


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

    if shift.padding in ("keep", "replicate"):  # what pads is a copy that no difference may tell apart
        shift = shift._replace(padding="zeros")
        identity = reference.temporal_shift(x, shift).requires_grad_()
    # Padding is 0 in any shifted form, and stays so: its own gradient is nobody's.
    held = reference.temporal_shift(torch.ones_like(x), shift)
    torch.autograd.gradcheck(lambda z, identity, boundary: of(z, identity * held, boundary), (z, identity, boundary))


# --- networks --------------------------------------------------------------------------------------------------------


def tsm(net: nn.Module, **kwargs) -> nn.Module:
    tsm_jit.make_temporal_shift(net, 4, **kwargs)
    return net


def tsam(net: nn.Module, **kwargs) -> nn.Module:
    tsm_jit.tsam.make_Shift(net, 4, 3, **({"f_div": 4, "shift_depth": 2, "n_insert": 1, "m_insert": 0} | kwargs))
    return net


def small(block=Bottleneck, layers=(2, 3, 2, 2), **kwargs) -> nn.Module:
    return ResNet(block, list(layers), num_classes=5, **kwargs)


NETWORKS = {
    "ResNet, basic blocks": lambda: tsm(small(BasicBlock)),
    "ResNet, bottlenecks": lambda: tsm(small()),
    "every second block": lambda: tsm(small(BasicBlock, (1, 2, 23, 1))),
    "chosen blocks": lambda: tsm(small(BasicBlock, (3, 3, 3, 3)), blocks=[1]),
    "ResNeXt": lambda: tsm(small(groups=2, width_per_group=32)),
    "Wide": lambda: tsm(small(width_per_group=128)),
    "one direction": lambda: tsm(small(BasicBlock), direction="past"),
    "other folds": lambda: tsm(small(BasicBlock), n_div=3),
    "pooled": lambda: pooled(small()),
    "TSAM": lambda: tsam(small()),
    "TSAM, every second": lambda: tsam(small(BasicBlock), n_insert=2, m_insert=1, shift_depth=3, f_div=3),
    "timm ResNet": lambda: tsm(timm.create_model("resnet26", num_classes=5)),
    "timm ResNet-D": lambda: tsm(timm.create_model("resnet26d", num_classes=5)),
    "timm, basic blocks": lambda: tsm(timm.create_model("resnet18", num_classes=5)),
}


def pooled(net: nn.Module) -> nn.Module:
    tsm_jit.make_temporal_shift(net, 4, temporal_pool=True)
    tsm_jit.make_temporal_pool(net, 4)
    return net


def pair(make, device, layout="channels_last", dtype=torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network with statistics and weights as after some training, the same fused, and clips for both."""
    net = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    net = net.to(device, dtype).to(memory_format=FORMATS[layout])
    if device.type == "cuda" and layout == "channels_last":  # float64 leaves convolutions there in NCHW
        stem = net.conv1[-1] if isinstance(net.conv1, nn.Sequential) else net.conv1
        stem.register_forward_hook(in_channels_last)
    fused = copy.deepcopy(net)
    residual.fuse(fused)
    x = torch.randn(8, 3, 32, 32, device=device).to(dtype).contiguous(memory_format=FORMATS[layout])
    return net, fused, x


def in_channels_last(module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
    return out.contiguous(memory_format=torch.channels_last)


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    scores = net(x)
    gradients = torch.autograd.grad(scores.square().sum(), [each for each in net.parameters() if each.requires_grad])
    return scores, list(gradients), {name.removeprefix("_orig_mod."): buffer for name, buffer in net.named_buffers()}


def assert_same_step(net: nn.Module, fused: nn.Module, x: Tensor, close: float = 1e-9) -> None:
    expected, actual = step(net, x), step(fused, x)
    assert (actual[0] - expected[0]).norm() <= close * expected[0].norm()
    for a, b in zip(actual[1], expected[1], strict=True):
        assert (a - b).norm() <= close * b.norm() + 1e-12
    assert actual[2].keys() == expected[2].keys()
    for name, buffer in actual[2].items():
        torch.testing.assert_close(buffer, expected[2][name], rtol=close, atol=close)


def assert_same_gradients_to_rounding(net: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """Of x and other inputs in float32, in which a sum in another order may turn a ReLU near zero. One changes all
    gradients before it by some hundredths, for the inputs that have it. So all inputs are that close, and one is as
    close as sums are. Each is given twice: what is right for the first call alone is not the same again."""

    def in_a_row(of: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in step(of, x)[1]])

    apart = []
    for each in (x, *(torch.randn_like(x) for _ in range(7))):
        (actual, expected), (again, _) = [(in_a_row(fused, each), in_a_row(net, each)) for _ in range(2)]
        assert (again - actual).norm() <= 1e-3 * actual.norm()
        apart.append(((actual - expected).norm() / expected.norm()).item())
    assert max(apart) <= 0.2, apart
    assert min(apart) <= 1e-2, apart


@pytest.fixture(params=[False, True], ids=["as on the CPU", "as on a GPU"])
def merged(request, monkeypatch, device):
    """Norms are differentiated together with the block's end where kernels make sums by channel: here, also where not,
    and not where they do."""
    if request.param != (device.type == "cuda"):
        monkeypatch.setattr(execute, "has_channel_sums", lambda x: request.param)
    return request.param


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("layout", "merged"), [("NCHW", False), ("channels_last", True)], indirect=["merged"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_outputs_gradients_and_statistics(device, merged, name, layout, training):
    net, fused, x = pair(NETWORKS[name], device, layout)
    assert_same_step(net.train(training), fused.train(training), x)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_same_scores_without_gradients(device, name, layout):
    net, fused, x = pair(NETWORKS[name], device, layout)
    x_before = x.clone()
    for training in (False, True):
        with torch.no_grad():
            expected, actual = net.train(training)(x), fused.train(training)(x)
        assert (actual - expected).norm() <= 1e-11 * expected.norm()
    assert_same_bits(x, x_before)


def counted(monkeypatch, module, name: str) -> list:
    """A list that grows with each call of this function of a module."""
    calls, function = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("name", ["ResNet, bottlenecks", "timm ResNet"])
def test_without_gradients_the_stream_is_shifted_between_stages_too(device, monkeypatch, name):
    pools, ends = (counted(monkeypatch, execute, name) for name in ("norm_relu_max_pool", "norm_add_relu_both_layouts"))
    _, fused, x = pair(NETWORKS[name], device, dtype=torch.float32)
    with torch.no_grad():
        fused.eval()(x)
    assert len(pools) == 1
    assert [args[6] for args in ends] == [2, 2, 2]  # every second pixel is what the next stage's downsample reads


def test_blocks_are_recorded_as_one_function_each(device, merged, monkeypatch):
    blocks = counted(monkeypatch, execute, "residual_block")
    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    fused.train()(x)
    assert len(blocks) == (9 if merged else 0)
    assert sum(args[2] is not None for args in blocks) == (4 if merged else 0)  # shift at the start of each stage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("of_batch", [(True, True, True), (False, True, False), (True,)], ids=str)
def test_a_block_as_one_operator_is_what_it_is_in_parts(cuda, of_batch, downsample, dtype):
    """To the bit: its parts are the same operators, called from Python."""
    wide, t = residual_ops.acc_dtype(dtype), random.randint(1, 8)

    def values(*sizes) -> Tensor:
        return random_values(sizes, dtype, cuda).contiguous(memory_format=torch.channels_last)

    weights, convolutions, norms, batches, factors = [], [], [], [], []

    def add_layer(before: int, after: int, stride: int, of_batch: bool) -> None:
        size, dilation, groups = (random.choice(choice) for choice in ((1, 3), (1, 2), (1, 2)))
        weight = values(after, before // groups, size, size)
        weights.append(random.choice((weight, weight.contiguous())))
        padding = size // 2 * dilation
        convolutions.extend([stride, stride, padding, padding, dilation, dilation, groups, of_batch])
        norms.extend(random_norm(after, wide, cuda))
        factors.extend([1e-3, 0.1])
        batches.extend([torch.tensor(41, device=cuda)] if of_batch else [])

    shift = Shift(t, t, 1, random.choice(PADDINGS), ((1, 1), (1, -1))).canonical().encode()
    widths = [2 * random.randint(1, 40) for _ in range(len(of_batch) + 1)]
    height, width = 9, 7
    x = values(2 * t, widths[0], height, width)
    for k, channels in enumerate(itertools.pairwise(widths)):
        stride = random.choice((1, 2))
        add_layer(*channels, stride, of_batch[k])
        height, width = -(-height // stride), -(-width // stride)
    identity = values(2 * t, widths[-1], height, width)
    if downsample:
        identity = values(2 * t, widths[0], 2 * height, 2 * width)
        of_batch = (*of_batch, of_batch[0])
        add_layer(widths[0], widths[-1], 2, of_batch[0])
    layers = len(of_batch) - downsample
    wanted = [random.random() < 0.7 for _ in range(1 + 2 * layers)]
    first_is_made_again = random.randint(0, 1)
    found = []
    with torch.backends.cudnn.flags(deterministic=True):
        for forward, backward in (
            (residual_block.block_forward, residual_block.block_backward),
            (residual_block.reference_block, residual_block.reference_block_backward),
        ):
            changed = copy.deepcopy((norms, batches))
            rest = factors, identity, downsample, None, shift, True
            out, boundary, made = forward(x, shift, weights, convolutions, *changed, *rest)
            parts, made = list(made), iter(made)
            kept, relus, of_last = [], [], None
            for k, is_of_batch in enumerate(of_batch):
                z = next(made)
                statistics = [next(made), next(made)] if is_of_batch else norms[4 * k : 4 * k + 2]
                if k < layers - 1:
                    kept += [z, *statistics, *norms[4 * k + 2 : 4 * k + 4]]
                    relus.append(next(made))
                elif k == layers - 1:
                    of_last = z.cos()
            assert not list(made)
            kept += relus[first_is_made_again:]
            rest = convolutions[: 8 * layers], kept, factors[: 2 * layers : 2], wanted
            grads = backward(of_last, x, shift, weights[:layers], *rest)
            grads = [x.new_empty(0) if each is None else each for each in grads]  # not wanted
            found.append([out, boundary, *parts, *grads, *changed[0], *changed[1]])
    assert [int(each) for each in changed[1]] == [42] * sum(of_batch)
    for ours, of_parts in zip(*found, strict=True):
        assert_same_bits(ours, of_parts)


def test_a_network_with_a_forward_of_its_own_is_fused_stage_by_stage(device, monkeypatch):
    class Other(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
            seen.append(x.clone())
            return self.layer4(self.layer3(self.layer2(x.neg_()))).mean((2, 3))

    ends = counted(monkeypatch, execute, "norm_add_relu_both_layouts")
    net, fused, x = pair(lambda: tsm(Other(BasicBlock, [2, 2, 2, 2])), device)
    seen: list[Tensor] = []
    with torch.no_grad():
        expected, actual = net.eval()(x), fused.eval()(x)
    assert not ends
    for a, b in ((actual, expected), seen):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_timm_checkpoints_gradients_of_stages(device):
    net, fused, x = pair(NETWORKS["timm ResNet"], device)
    fused.set_grad_checkpointing()
    assert_same_step(net.eval(), fused.eval(), x)


class OtherNorm(nn.BatchNorm2d):
    """One that is called, and not folded."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_inference_without_folding_is_the_same_to_the_bit(device, layout, dtype):
    net, fused, x = pair(lambda: tsm(small(norm_layer=OtherNorm)), device, layout, dtype)
    with torch.no_grad():
        assert_same_bits(fused.eval()(x), net.eval()(x))


def test_training_in_float32_is_the_same_to_rounding(cuda):
    """On the CPU norms are called, so it is the same to the bit there, as float64 shows above."""
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], cuda, dtype=torch.float32)
    with torch.backends.cudnn.flags(allow_tf32=False, deterministic=True):
        torch.testing.assert_close(fused(x), net(x), rtol=1e-3, atol=1e-3)
        assert_same_gradients_to_rounding(net, fused, x)


def test_frozen_statistics_in_training(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        each.train()
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert_same_step(net, fused, x)


@pytest.mark.parametrize("merged", [True], indirect=True)
def test_running_statistics_may_change_before_the_backward(device, merged):
    """As where a step has a forward in eval mode, then one in training. PyTorch's own norms take the new ones."""
    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    parameters = list(fused.parameters())
    expected = torch.autograd.grad(fused.eval()(x).sum(), parameters)
    scores = fused(x).sum()
    fused.train()(x)
    for ours, before in zip(torch.autograd.grad(scores, parameters), expected, strict=True):
        assert (ours - before).norm() <= 1e-9 * before.norm() + 1e-12


def test_of_nothing_no_block_is_differentiated(cuda):
    x = torch.empty(0, 8, 1, 1, device=cuda).contiguous(memory_format=torch.channels_last)
    weights, norm = [torch.randn(8, 8, 1, 1, device=cuda)] * 2, random_norm(8, torch.float32, cuda)
    convolutions, kept = [1, 1, 0, 0, 1, 1, 1, 1] * 2, [x, *norm, x]
    with pytest.raises(RuntimeError, match="z must have values, to be differentiated"):
        residual_block.block_backward(x, x, "", weights, convolutions, kept, [1e-5] * 2, [1] * 5)


def test_frozen_weights(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_("layer3" in name and "bn" not in name)
        scores = each(x)
        each.zero_grad()
        scores.sum().backward()
    for (name, a), b in zip(net.named_parameters(), fused.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == ("layer3" not in name or "bn" in name)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_norms_that_average_over_all_batches(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    for module in (*net.modules(), *fused.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    assert_same_step(net.train(), fused.train(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    if device.type == "cpu" and dtype is torch.float16:
        pytest.skip("no autocast to float16 on the CPU")
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device, dtype=torch.float32)
    with torch.autocast(device.type, dtype), torch.no_grad():
        expected, actual = net.eval()(x), fused.eval()(x)
    assert actual.dtype == expected.dtype == dtype
    # Some eighteen layers, each rounded to 16 bits.
    assert (actual - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()
    with torch.autocast(device.type, dtype):
        loss = fused.train()(x).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in fused.parameters())


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_weights_are_cast_together(device, before, after):
    weights = [random_values(size, before, device) for size in ((8, 4, 3, 3), (8, 8, 1, 1), (4, 1, 3, 2), (2, 3, 1, 5))]
    weights = [random.choice((weight, weight.to(memory_format=torch.channels_last))) for weight in weights]
    weights += [weights[0][::2, :, 1:], weights[0].expand(3, 8, 4, 3, 3)[1:], weights[0][:0]]
    for cast in (residual_block.cast_all, residual_block._reference_cast):
        for weight, made in zip(weights, cast(weights, after), strict=True):
            assert_same_bits(made, weight.to(after))
        assert cast([], after) == []
    assert [made.stride() for made in cast(weights[:4], after)] == [weight.stride() for weight in weights[:4]]


def test_checkpointing(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for name in ("layer1", "layer2"):
        stage = getattr(fused, name)
        stage.forward = functools.partial(checkpoint, stage.forward, use_reentrant=False)
    assert_same_step(net.eval(), fused.eval(), x)


@pytest.mark.parametrize("saved", ["cast copy", "empty", "convolution residual"])
def test_selective_checkpointing(device, merged, saved):
    """Whatever a policy saves or computes again."""

    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        chosen = any(name in str(operator) for name in saved.split())
        return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE

    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device, dtype=torch.float32)
    found = []
    for more in ({}, {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}):
        each = copy.deepcopy(fused).train()
        for stage in (each.layer1, each.layer2):
            stage.forward = functools.partial(checkpoint, stage.forward, use_reentrant=False, **more)
        with torch.autocast(device.type, torch.bfloat16), torch.backends.cudnn.flags(deterministic=True):
            found.append(step(each, x)[1])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()  # the stem's pooling adds in any order on a GPU


@pytest.mark.parametrize("hooks", ["save_on_cpu", "save_on_cpu, pinned", "in NCHW"])
def test_offloading(device, merged, hooks, monkeypatch):
    if hooks == "save_on_cpu, pinned" and device.type == "cpu":
        pytest.skip("needs a CUDA GPU to pin memory for")
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    if hooks == "in NCHW":
        offloading = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.contiguous(), lambda saved: saved)
    else:
        offloading = torch.autograd.graph.save_on_cpu(pin_memory="pinned" in hooks)
    backwards = counted(monkeypatch, block, "block_backward")
    with offloading:
        actual = step(fused.train(), F.interpolate(x, scale_factor=2))
    assert len(backwards) == (9 if merged else 0)
    assert all(args[1].is_contiguous(memory_format=torch.channels_last) for args in backwards)
    for a, b in zip(actual[1], step(net.train(), F.interpolate(x, scale_factor=2))[1], strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12


def test_a_second_derivative_is_refused(device):
    _, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    (gradient,) = torch.autograd.grad(fused(x).square().sum(), fused.conv1.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", ["nothing", r"conv1|bn1|layer1|.*\.downsample"])
@pytest.mark.parametrize("name", ["ResNet, bottlenecks", "timm ResNet-D"])
def test_no_more_is_saved_than_without_shift(device, merged, name, frozen):
    """But for the boundary frames: 1/T of the channels that move, of the blocks within a stage."""
    net, fused, x = pair(NETWORKS[name], device)
    for key, parameter in (*net.named_parameters(), *fused.named_parameters()):
        parameter.requires_grad_(re.match(frozen, key) is None)
    plain = copy.deepcopy(net)
    tsm_jit.remove_temporal_shift(plain)

    held = {}
    for name, each in (("plain", plain), ("fused", fused)):
        held[name] = _graph_bytes(each.train()(x)) - sum(p.numel() * p.element_size() for p in each.parameters())
    assert held["fused"] <= 1.05 * held["plain"]


def test_a_block_frees_its_activations_before_downsample_is_differentiated(device, monkeypatch):
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: True)
    kept, alive = [], []
    of_branch, of_convolution = block.block_backward, block.convolve_backward

    def branch_backward(*args):
        kept[:] = [None]  # convolutions within are not meant
        found = of_branch(*args)
        kept[:] = [weakref.ref(each) for each in args[5]]
        return found

    def convolved_backward(*args):
        if kept[0] is not None:
            alive.append(sum(of_block() is not None for of_block in kept[::5]))  # what each layer convolved
        return of_convolution(*args)

    monkeypatch.setattr(block, "block_backward", branch_backward)
    monkeypatch.setattr(block, "convolve_backward", convolved_backward)
    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    fused.train()(x).sum().backward()
    assert alive == [0] * 4


def test_the_gradient_of_the_mean_over_pixels_is_one_value_for_all(device, merged, monkeypatch):
    ends = counted(monkeypatch, block if merged else residual_ops, "norm_add_relu_backward")
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    assert_same_step(net, fused, F.interpolate(x, scale_factor=3))
    of_last = ends[0][0][0]
    assert of_last.shape[2:].numel() > 1
    assert of_last.untyped_storage().nbytes() == of_last[:, :, 0, 0].numel() * of_last.element_size()


def _graph_bytes(output: Tensor, counts=torch.is_tensor) -> int:
    """Of all storages that the graph of ``output`` has saved, of tensors that count."""
    storages, seen, todo = {}, set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [name for name in dir(node) if name.startswith("_raw_saved")]
        raw = [each for name in names for each in _listed(getattr(node, name))]
        raw += _listed(getattr(node, "saved_tensors", ())) if not names else []
        for each in raw:
            tensor = getattr(each, "data", each)
            if isinstance(tensor, Tensor) and tensor.numel() and counts(tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        todo += [function for function, _ in node.next_functions]
    return sum(storages.values())


def _listed(value) -> list:
    return list(value) if isinstance(value, (tuple, list)) else [value]


# --- compilers and exporters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["ResNet, basic blocks", "ResNet, bottlenecks"])
def test_one_graph(device, merged, name, training):
    net, fused, x = pair(NETWORKS[name], device)
    torch._dynamo.reset()
    compiled = torch.compile(fused.train(training), backend="aot_eager", fullgraph=True)
    assert_same_step(net.train(training), compiled, x)
    with torch.no_grad():
        expected = net.eval()(x)
        fused.eval()
        assert (compiled(x) - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.parametrize("merged", [True], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph_of_blocks_in_parts(device, merged, training):
    """Under autocast: the weights of a block are cast together, and norms are ours."""
    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device, dtype=torch.float32)
    fused.conv1._forward_hooks.clear()
    for frozen in (fused.layer1, fused.layer2[1].conv2):
        frozen.requires_grad_(False)
    twin, graphs = copy.deepcopy(fused.train(training)), []

    def keep(graph, _):
        graphs.append(collections.Counter(node.target for node in graph.graph.nodes))
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(fused, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
    with torch.autocast(device.type, torch.bfloat16):
        (_, actual, _), (_, expected, _) = (step(each, F.interpolate(x, scale_factor=3)) for each in (compiled, twin))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype is torch.float32
        # Roundings to bfloat16 that differ; in training statistics of few values make them as large as some gradients.
        assert training or (ours - theirs).norm() <= 0.5 * theirs.norm()
    forward, backward = graphs
    ops, blocks = torch.ops.tsm_jit, 9
    assert forward[ops.cast.default] == backward[ops.cast.default] == blocks - 2
    assert forward[ops.norm_add_relu.default] == 3 * blocks
    assert forward[ops.temporal_shift.kernel] == 4  # at the start of each stage
    assert backward[ops.temporal_shift.recompute] == 3  # for weights that are not frozen
    assert forward[torch.ops.aten._native_batch_norm_legit_functional.default] == training  # before the first block
    assert backward[ops.norm_add_relu.recompute] == 3
    assert backward[ops.norm_add_relu_backward.default] == blocks
    assert backward[ops.norm_relu_backward.default] == 2 * blocks


def as_on_a_gpu(monkeypatch, device) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(execute, "has_channel_sums", lambda x: x.shape[1] > 1)


@pytest.mark.parametrize("normed", [(True, False), (True, True), (False, True)], ids=str)
def test_what_compilers_are_told_of_the_gradients_of_an_end(device, normed):
    """Which results there are and how they lie in memory; where they are given the operator, apart and aligned."""
    dtype, t, channels = random.choice(DTYPES[1:]), random.randint(1, 5), random.randint(2, 36)
    shift = Shift(t, t, 1, "zeros", ((1, 1), (1, -1))).canonical().encode()
    shifted = not normed[1] and random.random() < 0.5  # a norm's values are plain

    def values() -> Tensor:
        return random_values((2 * t, channels, 3, 5), dtype, device).contiguous(memory_format=torch.channels_last)

    def operand(norm: bool) -> tuple:
        parts = random_norm(channels, residual_ops.acc_dtype(dtype), device)[:3]
        how = [random.randint(0, 1) for _ in range(3)]
        return (values(), parts, 1e-5, how) if norm else (None, [], 0.0, [0, how[1], 0])

    for _ in range(8):
        given = values(), None, None, values(), None, *operand(normed[0]), *operand(normed[1]), shift, shifted
        assert_as_told(torch.ops.tsm_jit.norm_add_relu_backward.default, given)


def test_what_compilers_are_told_of_the_gradients_of_a_relu(device):
    dtype, shape = random.choice(DTYPES[1:]), (random.randint(1, 5), random.randint(2, 36), 3, 5)
    grad, z = (random_values(shape, dtype, device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    norm = random_norm(shape[1], residual_ops.acc_dtype(dtype), device)
    for how in itertools.product((0, 1), repeat=3):
        assert_as_told(torch.ops.tsm_jit.norm_relu_backward.default, (grad, z, norm, 1e-5, list(how)))


def assert_as_told(operator, given: tuple) -> None:
    made = operator(*given)
    with FakeTensorMode() as mode:
        told = operator(*tree_map_only(Tensor, mode.from_tensor, given))
    assert [each is None for each in made] == [each is None for each in told]
    there = [(ours, fake) for ours, fake in zip(made, told, strict=True) if ours is not None and ours.numel()]
    for ours, fake in there:
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert ours.data_ptr() % 16 == 0
    assert len({ours.data_ptr() for ours, _ in there}) == len(there)


def test_inductor_trains_what_has_other_norms(device, monkeypatch):
    """They are called, and so the end of a block has one gradient for both that it adds."""
    as_on_a_gpu(monkeypatch, device)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, fused, x = pair(lambda: tsm(small(BasicBlock, norm_layer=OtherNorm)), device, dtype=torch.float32)
    torch._dynamo.reset()
    assert_same_gradients_to_rounding(net, torch.compile(fused, fullgraph=True), F.interpolate(x, scale_factor=2))


def test_inductor_trains_in_place(cuda, monkeypatch):
    """It copies nothing of what our operators write into: the statistics of norms, and the gradients of shifts."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], cuda, dtype=torch.float32)
    x = F.interpolate(x, scale_factor=3)
    torch._dynamo.reset()
    _, codes = run_and_get_code(assert_same_gradients_to_rounding, net, torch.compile(fused, fullgraph=True), x)
    for (name, ours), theirs in zip(fused.named_buffers(), net.buffers(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max(), name
    written = re.findall(r"batch_norm_stats_\.default\(\w+, (\w+), (\w+), (\w+), ", "".join(codes))
    assert len(written) == 3 * 9 + 4
    assert all(name.startswith("primals") for names in written for name in names)
    assert len(re.findall(r"temporal_shift_backward_\.default\(buf", "".join(codes))) == 4
    assert "clone" not in "".join(codes)


def test_one_graph_for_every_batch_size(device):
    net, fused, _ = pair(NETWORKS["ResNet, basic blocks"], device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for frames, stance in ((8, "default"), (12, "default"), (20, "fail_on_recompile")):
        x = torch.randn(frames, 3, 32, 32, dtype=torch.float64, device=device)
        with torch.compiler.set_stance(stance):
            assert_same_step(net, compiled, x.contiguous(memory_format=torch.channels_last))


def test_compilers_write_nothing_before_we_do():
    """What they fill is written twice."""
    shift = Shift(4, 4, 1, "zeros", ((4, 1), (4, -1))).encode()

    def both(z: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
        return norm_add_relu_both_layouts(z, None, identity, None, None, shift, 2, may_overwrite_identity=False)

    torch._dynamo.reset()
    z, identity = (torch.randn(8, 16, 6, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
    with torch.inference_mode():
        made, (code,) = run_and_get_code(torch.compile(both, fullgraph=True), z, identity)
        for ours, expected in zip(made, both(z, identity), strict=True):
            assert_same_bits(ours, expected)
    assert "norm_add_relu_" in code
    assert "cpp_fused" not in code


def test_compiled_inference_norms_in_place(device, monkeypatch):
    """Where nothing is recorded, norms and ReLUs are ours in compiled networks as well; nothing is copied for them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which would be off by a thousandth
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device, dtype=torch.float32)
    torch._dynamo.reset()
    with torch.inference_mode():
        made, (code,) = run_and_get_code(torch.compile(fused.eval(), fullgraph=True), x)
        expected = net.eval()(x)
    assert (made - expected).norm() <= 1e-3 * expected.norm()
    in_place = re.findall(r"norm_add_relu_\.default\((\w+), None, None, 1, \1, \[[^]]*\], [^,]*, None, ", code)
    assert len(in_place) == 2 * sum(isinstance(module, Bottleneck) for module in fused.modules())
    assert not re.findall(r"fused\w*(?:batch_norm|copy)|\.copy_\(", code)


@pytest.mark.parametrize("in_parts", [False, True])
def test_compiled_training_keeps_no_second_input_of_a_stage(monkeypatch, in_parts):
    """A graph saves for the backward what the network without shift saves, and the boundary frames."""
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: in_parts)
    kept = {}

    def keeps(name: str):
        def count(graph, _):
            (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
            made = [node.meta["val"] for node in results if node is not None and node.op != "placeholder"]
            kept[name] = sum(each.nbytes for each in made if isinstance(each, Tensor))
            assert ("norm_add_relu" in graph.code) == (name == "fused")
            return make_boxed_func(graph)

        return aot_autograd(
            fw_compiler=count,
            bw_compiler=lambda graph, _: make_boxed_func(graph),
            partition_fn=min_cut_rematerialization_partition,
        )

    net, fused, x = without_shift_and_fused(torch.device("cpu"))
    for name, each in (("without shift", net), ("fused", fused)):
        torch._dynamo.reset()
        torch.compile(each, backend=keeps(name), fullgraph=True)(x).sum().backward()
    # The second block of each stage gets a shifted stream: the boundary has 1 of 4 frames of a quarter of its channels.
    # And the ReLU of each first block, as large as what the block returns, is made again.
    assert kept["fused"] <= kept["without shift"] + OF_STAGES // 16 - in_parts * OF_STAGES


def test_recorded_blocks_keep_less_than_those_without_shift(monkeypatch, device):
    """But for the boundary frames; and the ReLU of each first block is made again."""
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: True)
    *networks, x = without_shift_and_fused(device)

    def is_activation(saved: Tensor) -> bool:
        return saved.dim() == 4 and saved.shape[0] <= len(x)

    kept = []
    for each in networks:
        loss = each(x).sum()
        kept.append(_graph_bytes(loss, is_activation))
        loss.backward()
    assert kept[1] == kept[0] + OF_STAGES // 16 - OF_STAGES


def without_shift_and_fused(device) -> tuple[nn.Module, nn.Module, Tensor]:
    net = torchvision.models.resnet18(num_classes=5).to(device, memory_format=torch.channels_last)
    fused = copy.deepcopy(net)
    tsm_jit.make_temporal_shift(fused, 4)
    residual.fuse(fused)
    return net, fused, torch.randn(8, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)


OF_STAGES = sum(4 * 8 * 64 * 16 * 16 // 2**stage for stage in range(4))  # bytes of what a block of each returns


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_export_holds_the_network_before(strict, training):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], torch.device("cpu"), dtype=torch.float32)
    exported = torch.export.export(fused.train(training), (x,), strict=strict)
    assert "norm_add_relu" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), net.train(training)(x))


def test_traces_hold_the_network_before():
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], torch.device("cpu"), dtype=torch.float32)
    expected = net.eval()(x)
    fused.eval()
    traced = torch.jit.trace(fused, (x,))
    assert "tsm_jit::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)


def test_under_transforms_it_is_the_network_before():
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], torch.device("cpu"))

    def tangent(net: nn.Module) -> Tensor:
        return torch.func.jvp(net.eval(), (x,), (torch.ones_like(x),))[1]

    torch.testing.assert_close(tangent(fused), tangent(net))


# --- surgery ---------------------------------------------------------------------------------------------------------


def test_keys_stay_in_both_directions():
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], torch.device("cpu"))
    assert list(fused.state_dict()) == list(net.state_dict())
    other = NETWORKS["ResNet, bottlenecks"]().double()
    residual.fuse(other)
    other.load_state_dict(net.state_dict())
    net.load_state_dict(other.state_dict())
    stages = [fused.layer1, fused.layer4]
    residual.unfuse(fused)
    assert [fused.layer1, fused.layer4] == stages
    assert not any(isinstance(module, residual.Stage) for module in fused.modules())
    assert_same_bits(fused.eval()(x), net.eval()(x))


def test_copies_and_pickles_are_fused():
    _, fused, x = pair(NETWORKS["ResNet, basic blocks"], torch.device("cpu"))
    file = io.BytesIO()
    torch.save(fused.eval(), file)
    file.seek(0)
    for each in (copy.deepcopy(fused), torch.load(file, weights_only=False)):
        assert isinstance(each.layer2, residual.Stage)
        assert type(each) is type(fused)
        assert isinstance(each, residual.FusedNetwork)
        assert isinstance(each, ResNet)
        assert_same_bits(each(x), fused(x))
        residual.unfuse(each)
        assert type(each) is ResNet


def test_clip_lengths_and_removal_after_fusing(device):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        tsm_jit.n_segment(each, 8)
    assert_same_step(net, fused, x)
    for each in (net, fused):
        tsm_jit.remove_temporal_shift(each)
    assert_same_step(net, fused, x)


def test_plans_that_differ_from_block_to_block(device):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        each.layer2[1].conv1.fold_div = 4
        each.layer2[2].conv1.n_segment = 2
    assert_same_step(net, fused, x)


def test_a_plan_of_more_groups_than_the_kernels_take(device):
    net, fused, x = pair(lambda: tsam(small(BasicBlock), f_div=2, shift_depth=16), device)
    assert_same_step(net, fused, x)


def test_statistics_of_one_value_are_an_error_as_before(device, merged):
    _, fused, x = pair(lambda: tsm(small(BasicBlock)), device)
    tsm_jit.n_segment(fused, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused.train()(x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last))


def test_a_forward_set_on_a_module_is_called(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    for each in (net, fused):
        for module in (each.layer1[1].bn2, each.layer2[1].conv1, each.layer3[1].relu):
            module.forward = lambda x, module=module: 2 * type(module).forward(module, x)
    assert_same_step(net, fused, x)


def test_a_shift_before_another_convolution_of_a_block(device, merged):
    def make() -> nn.Module:
        net, shift = tsm(small()), functools.partial(tsm_jit.TemporalShift, n_segment=4)
        tsm_jit.shift_before(net, {"layer1.1.conv2": shift, "layer2.0.conv3": shift})
        return net

    net, fused, x = pair(make, device)
    assert_same_step(net, fused, x)


def test_parameters_that_are_plain_attributes(device, merged, monkeypatch):
    """As those of the replicas of DataParallel."""
    blocks = counted(monkeypatch, execute, "residual_block")
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for module in fused.modules():
        for name in [*module._parameters]:
            value = module._parameters.pop(name)
            setattr(module, name, None if value is None else value.detach().requires_grad_())
    expected, actual = net(x), fused(x)
    assert (actual - expected).norm() <= 1e-9 * expected.norm()  # float64, sums in another order
    assert len(blocks) == (9 if merged else 0)


def test_convolutions_and_norms_that_were_changed_by_hand(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        each.layer1[1].conv2.stride = 1
        each.layer2[1].conv2.padding = [1, 1]
        counter = each.layer3[1].bn1.num_batches_tracked
        each.layer3[1].bn1.num_batches_tracked = counter.float()
    assert_same_step(net, fused, x)


def with_bias(downsample: nn.Sequential) -> None:
    downsample[0].bias = nn.Parameter(downsample[0].weight.detach().sum((1, 2, 3)))


def shifted(downsample: nn.Sequential) -> None:
    downsample[0] = tsm_jit.TemporalShift(downsample[0], 4)


def without_norm(downsample: nn.Sequential) -> None:
    del downsample[1]


def with_more_between(downsample: nn.Sequential) -> None:
    downsample.insert(1, nn.Softsign())


def hooked(downsample: nn.Sequential) -> None:
    downsample[-1].register_forward_hook(lambda module, given, out: out * 2)


def of_frozen_statistics(downsample: nn.Sequential) -> None:
    downsample[1].eval()


def of_frozen_weights(downsample: nn.Sequential) -> None:
    downsample[1].weight.requires_grad_(False)
    downsample[0].weight.requires_grad_(False)


CHANGES = (with_bias, shifted, without_norm, with_more_between, hooked, of_frozen_statistics, of_frozen_weights)


@pytest.mark.parametrize("change", CHANGES)
def test_a_downsample_that_was_changed(device, merged, change, monkeypatch):
    blocks = counted(monkeypatch, execute, "residual_block")
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        each.train()
        change(each.layer2[0].downsample)
        change(each.layer3[0].downsample)
    assert_same_step(net, fused, x)
    recorded = [args[4] is not None for args in blocks]
    kept = change in (of_frozen_statistics, of_frozen_weights)
    assert sum(recorded) == (0 if not merged else 4 if kept else 2)


@pytest.mark.parametrize("names", ["conv1 bn1 conv2 bn2 conv3 bn3", "downsample", "stem"])
def test_parts_of_blocks_that_are_not_trained(device, merged, names):
    """Up to the first block of the second stage everything is frozen, but for the other part of that block."""
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        frozen = [each.conv1, each.bn1, each.layer1]
        frozen += [each.layer2[0]._modules[name] for name in names.split() if name != "stem"]
        for module in frozen:
            module.requires_grad_(False)
    assert_same_step(net, fused, x)


def test_a_hook_on_the_last_block_may_change_its_gradient(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)

    def hook(module: nn.Module, given: tuple, out: Tensor) -> None:
        out.register_hook(lambda grad: grad.mul_(2))

    for each in (net, fused):
        each.layer4[-1].register_forward_hook(hook)
    assert_same_step(net, fused, F.interpolate(x, scale_factor=3))


def test_that_memory_is_short_is_an_error_as_before(device, monkeypatch):
    def forward(*_):
        raise RuntimeError("tsm_jit: PyTorch could not convolve: CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(execute, "has_channel_sums", lambda x: True)
    monkeypatch.setattr(block, "block_forward", forward)
    _, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        fused(x)


def test_global_hooks_see_every_module():
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], torch.device("cpu"))
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(out)), torch.no_grad():
        for each in (net, fused):
            each.eval()(x)
    half = len(seen) // 2
    for theirs, ours in zip(seen[:half], seen[half:], strict=True):
        assert_same_bits(ours, theirs)


def test_statistics_that_are_not_tracked(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    for each in (net, fused):
        each.layer1[1].bn2.track_running_stats = False
        each.layer2[1].bn2.num_batches_tracked = None
    assert_same_step(net.train(), fused.train(), x)


def test_the_type_of_the_branch_is_that_of_the_sum(device):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device, dtype=torch.float32)
    frames = x.new_ones(8, 64, 8, 8)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), torch.autocast(device.type, torch.bfloat16):
            assert fused.layer1(frames).dtype == net.layer1(frames).dtype == torch.bfloat16


@pytest.mark.parametrize("argument", ["channel_dim", "boundary", "norm"])
def test_operators_check_what_memory_safety_rests_on(argument):
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


def test_operators_refuse_to_shift_in_place_of_z_what_they_cannot(device):
    circular = device.type == "cuda"  # else: the CPU never can
    shift = Shift(2, 2, 1, "circular" if circular else "zeros", ((4, 1),))
    z, boundary = torch.randn(4, 8, 2, 2, device=device), torch.randn(2, 0 if circular else 4, 2, 2, device=device)
    before = z.clone()
    with pytest.raises(RuntimeError, match="out must not be z"):
        residual_ops.norm_add_relu_(z, boundary, None, 1, z, [], 0.0, before, [], 0.0, None, shift.encode(), True)
    assert_same_bits(z, before)


class SqueezeExcite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block, "relu", nn.GELU()), "ends in GELU, not in a ReLU"),
        (lambda block: block.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda block: setattr(block, "forward", functools.partial(BasicBlock.forward, block)), "its own forward"),
        (lambda block: setattr(block, "downsample", nn.Sequential()), "its downsample is not"),
        (lambda block: block.relu.register_forward_hook(lambda *_: None), "not in a ReLU without hooks"),
        (lambda block: setattr(block, "se", SqueezeExcite()), "has an attention"),
        (lambda block: setattr(block, "drop_path", nn.Dropout()), "has stochastic depth"),
        (lambda block: setattr(block, "__class__", type("Other", (BasicBlock,), {})), "is not a supported block"),
    ],
)
def test_a_block_that_is_not_understood_is_named_and_called(change, reason):
    net = tsm(small(BasicBlock, (3, 2, 2, 2))).double().eval()
    change(net.layer1[1])
    fused = copy.deepcopy(net)
    with pytest.warns(UserWarning, match=rf"layer1\.1: .*{reason}"):
        residual.fuse(fused)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    assert_same_step(net, fused, x)


def test_timm_blocks_with_attention_or_stochastic_depth_are_called(device):
    for more, reason in (
        ({"drop_path_rate": 0.2}, "stochastic depth"),
        ({"block_args": {"attn_layer": "se"}}, "attention"),
    ):
        net = tsm(timm.create_model("resnet18", num_classes=5, **more)).double().to(device)
        fused = copy.deepcopy(net)
        with (
            pytest.warns(UserWarning, match=reason)
            if reason == "stochastic depth"
            else pytest.raises(ValueError, match=reason)
        ):
            residual.fuse(fused)
        x = torch.randn(8, 3, 32, 32, dtype=torch.float64, device=device)
        assert_same_step(net.train(), fused.train(), x)


@pytest.mark.parametrize(
    "places",
    [
        ("layer1.1.conv1", "layer3.1.conv1.net", "layer2.2.bn3", "layer2.1.conv3"),
        ("layer2",),
        ("conv1", "bn1"),
        ("relu", "layer1.0.downsample.0"),
        ("maxpool", "layer2.0.downsample.0"),
        ("layer1.0.conv1", "layer2.0.conv1.net", "avgpool"),
    ],
    ids=lambda places: places[0],
)
def test_hooks_see_what_they_saw_before(places):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], torch.device("cpu"))
    seen: dict[str, list[Tensor]] = {"net": [], "fused": []}
    for name, each in (("net", net), ("fused", fused)):
        each.eval()
        for place in places:
            each.get_submodule(place).register_forward_hook(
                lambda module, inputs, out, name=name: seen[name].extend([inputs[0].clone(), out.clone()])
            )
        with torch.no_grad():
            each(x)
    for ours, theirs in zip(seen["fused"], seen["net"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: 3, TypeError, "net must be a ResNet"),
        (lambda: torchvision.models.vgg11(), TypeError, "net must be a ResNet"),
        (lambda: small(BasicBlock), ValueError, "net must have temporal shifts to be fused"),
        (lambda: tsm(small(BasicBlock), place="block"), ValueError, "is not a supported block"),
    ],
)
def test_what_cannot_be_fused_is_refused_and_unchanged(make, error, says):
    net = make()
    kinds = [type(module) for module in net.modules()] if isinstance(net, nn.Module) else []
    with pytest.raises(error, match=says):
        residual.fuse(net)
    assert kinds == ([type(module) for module in net.modules()] if kinds else [])


def test_what_is_not_fused_cannot_be_unfused():
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got int"):
        residual.unfuse(3)
    with pytest.raises(ValueError, match="net must be fused to be unfused, got ResNet"):
        residual.unfuse(small())
    net = tsm(small(BasicBlock))
    residual.fuse(net)
    residual.fuse(net)  # already is
    residual.unfuse(net)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def test_a_cuda_graph(cuda):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], cuda)
    with torch.inference_mode():
        expected = net.eval()(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fused.eval()(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(x)
        out.zero_()
        graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_synchronized_batch_norm(cuda):
    """On one process; that the statistics are those of all is SyncBatchNorm's own, which is called."""
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        net, fused, x = pair(NETWORKS["ResNet, basic blocks"], cuda)
        net, fused = (nn.SyncBatchNorm.convert_sync_batchnorm(each) for each in (net, fused))
        assert_same_step(net.train(), fused.train(), x)
    finally:
        dist.destroy_process_group()


def test_data_parallel(device):
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
        wrapped = nn.parallel.DistributedDataParallel(fused.train())
        expected = step(net.train(), x)[1]
        wrapped(x).square().sum().backward()
        for parameter, gradient in zip(fused.parameters(), expected, strict=True):
            assert (parameter.grad - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12
    finally:
        dist.destroy_process_group()


def test_data_parallel_in_several_processes(device, tmp_path):
    """On GPUs the statistics are those of all frames, on the CPU they are frozen."""
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    if device.type == "cuda":
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    else:
        net, fused = net.eval(), fused.eval()
    expected = {name: gradient.cpu() for name, gradient in gradients(net, x).items()}
    train("DDP", device, fused.cpu(), x.cpu(), expected, tmp_path)
