"""Fused networks compute what they computed before."""

import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from fused_networks import (
    DTYPES,
    FORMATS,
    NETWORKS,
    OtherNorm,
    assert_same_gradients_to_rounding,
    assert_same_step,
    counted,
    pair,
    random_case,
    random_norm,
    small,
    step,
    tsm,
)
from processes import gradients, train
from support import assert_same_bits, poison, random_values, separate_shifts
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import tsm_jit
from tsm_jit import reference
from tsm_jit.fused import execute
from tsm_jit.fused.autograd import norm_add_relu, norm_relu, norm_relu_max_pool
from tsm_jit.ops import residual as residual_ops
from tsm_jit.ops.residual import NO_SHIFT, Norm, has_channel_sums
from tsm_jit.plans import PADDINGS


@pytest.mark.parametrize(("dtype", "padding"), list(itertools.product(DTYPES, PADDINGS)), ids=str)
def test_norm_relu_max_pool(device, dtype, padding):
    for shifts, unshifted in ((True, True), (True, False), (False, True)):
        shift, make = random_case(dtype, "channels_last", device, padding)
        z = make()
        z = torch.cat([z, z]).reshape(len(z), -1, *z.shape[2:]).contiguous(memory_format=torch.channels_last)
        z_before, acc_dtype = z.clone(), residual_ops.acc_dtype(dtype)
        norm = Norm(*random_norm(z.shape[1], random.choice((acc_dtype, dtype)), device), 1e-3)
        poison(z)
        x, shifted, boundary = norm_relu_max_pool(z, norm, shift.encode() if shifts else None, unshifted)
        whole = x if unshifted else norm_relu_max_pool(z, norm, None, True)[0]
        normed = F.batch_norm(z.double(), *(part.double() for part in norm[:4]), eps=1e-3)
        # Computed in `acc_dtype` from numbers around 1 and rounded once.
        close = 4 * torch.finfo(acc_dtype).eps * 16 + torch.finfo(dtype).eps
        torch.testing.assert_close(whole.double(), F.max_pool2d(normed.relu(), 3, 2, 1), rtol=close, atol=close)
        assert whole.is_contiguous(memory_format=torch.channels_last)
        assert (x is not None, shifted is not None, boundary is not None) == (unshifted, shifts, shifts)
        if shifts:
            assert_same_bits(shifted, reference.temporal_shift(whole, shift))
            assert_same_bits(boundary, reference.boundary_frames(whole, shift))
        assert_same_bits(z, z_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_batch", [False, True], ids=["of before", "of the batch"])
def test_norm_relu_gradients(device, dtype, of_batch):
    shape = (random.randint(2, 40), random.choice((3, 8, 64, 300)), random.randint(1, 9), random.randint(1, 9))
    acc_dtype, count = residual_ops.acc_dtype(dtype), shape[0] * shape[2] * shape[3]
    z, grad = (
        random_values(shape, dtype, device).contiguous(memory_format=torch.channels_last).requires_grad_(needed)
        for needed in (True, False)
    )
    mean, variance, weight, bias = random_norm(shape[1], acc_dtype, device)
    # As small as not even half of the least number of 16 bits: such a ReLU is 0 although the norm is positive.
    weight[: shape[1] // 2] *= 1e-8
    bias[: shape[1] // 2] *= 1e-8
    if of_batch:
        variance, mean = torch.var_mean(z.detach().to(acc_dtype), (0, 2, 3), correction=0)
    weight.requires_grad_()
    bias.requires_grad_()
    z_before, grad_before = z.detach().clone(), grad.clone()
    poison(z.detach())
    x = norm_relu(z, Norm(mean, variance, weight, bias, 1e-3, of_batch))
    expected, _ = norm_add_relu(
        z.detach(), Norm(mean, variance, weight, bias, 1e-3), torch.zeros_like(z), None, None, NO_SHIFT, False
    )
    assert_same_bits(x, expected[0].detach())
    gradients = torch.autograd.grad(x, (z, weight, bias), grad)
    assert_same_bits(z.detach(), z_before)
    assert_same_bits(grad, grad_before)

    parts = [each.detach().double().requires_grad_(each.requires_grad) for each in (z, weight, bias)]
    running = (None, None) if of_batch else (mean.double(), variance.double())
    normed = F.batch_norm(parts[0], *running, *parts[1:], training=of_batch, eps=1e-3)
    expected = torch.autograd.grad(normed, parts, torch.where(x > 0, grad, 0).double())
    # Of values around 1, rounded once; of sums of `count` of them.
    scale = (weight.abs() * (variance + 1e-3).rsqrt()).detach().double()[:, None, None]
    close = 16 * torch.finfo(acc_dtype).eps * count + torch.finfo(dtype).eps
    assert ((gradients[0] - expected[0]).abs() <= scale * close * 8 + torch.finfo(dtype).smallest_normal).all()
    for ours, theirs in zip(gradients[1:], expected[1:], strict=True):
        assert ours.dtype is acc_dtype
        # Where no kernel sums up, PyTorch adds products of this type.
        exact = torch.finfo(acc_dtype if has_channel_sums(z) else dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=50 * count**0.5 * exact * count**0.5)
    if not of_batch:
        assert_same_bits(gradients[0] != 0, (x > 0) & (grad.to(acc_dtype) * scale.to(acc_dtype)).to(dtype).ne(0))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("of_batch", [False, True], ids=["of before", "of the batch"])
def test_norm_relu_passes_gradcheck(device, layout, of_batch):
    _, make = random_case(torch.float64, layout, device, "zeros", largest=3)
    z = make().requires_grad_()
    weights = [(torch.rand(z.shape[1], dtype=torch.float64, device=device) + 0.5).requires_grad_() for _ in range(2)]

    def of(z, *weights):
        variance, mean = torch.var_mean(z.detach(), (0, 2, 3), correction=0)
        if not of_batch:
            mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
        return norm_relu(z, Norm(mean, variance, *weights, 0.1, of_batch))

    torch.autograd.gradcheck(of, (z, *weights))
    for needs_grad in itertools.product((False, True), repeat=3):
        inputs = [each.detach().requires_grad_(needed) for each, needed in zip((z, *weights), needs_grad, strict=True)]
        if any(needs_grad):
            of(*inputs).sum().backward()
        assert tuple(each.grad is not None for each in inputs) == needs_grad


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


@pytest.mark.parametrize("name", ["ResNet, bottlenecks", "timm ResNet"])
def test_without_gradients_the_stream_is_shifted_between_stages_too(device, monkeypatch, name):
    pools, ends = (counted(monkeypatch, execute, name) for name in ("norm_relu_max_pool", "norm_add_relu_both_layouts"))
    _, fused, x = pair(NETWORKS[name], device, dtype=torch.float32)
    with torch.no_grad():
        fused.eval()(x)
    assert len(pools) == 1
    assert [args[6] for args in ends] == [2, 2, 2]  # every second pixel is what the next stage's downsample reads


def test_a_block_is_one_autograd_function(device, merged, monkeypatch):
    blocks = counted(monkeypatch, execute, "residual_block")
    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    fused.train()(x)
    assert len(blocks) == (6 if merged else 0)
    assert sum(args[2] is not None for args in blocks) == (4 if merged else 0)  # shift at the start of each stage


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_inference_without_folding_is_the_same_to_the_bit(device, layout, dtype):
    net, fused, x = pair(lambda: tsm(small(norm_layer=OtherNorm)), device, layout, dtype)
    with torch.no_grad(), separate_shifts():
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
    # Some fourteen layers, each rounded to 16 bits.
    assert (actual - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()
    with torch.autocast(device.type, dtype):
        loss = fused.train()(x).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in fused.parameters())


def test_statistics_of_one_value_are_an_error_as_before(device, merged):
    net, fused, x = pair(lambda: tsm(small(BasicBlock)), device)
    x = x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last)
    messages = []
    for each in (net, fused):
        tsm_jit.n_segment(each, 1)
        try:
            each.train()(x)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) == 2
    assert messages[0] == messages[1]


def test_a_shift_before_another_convolution_of_a_block(device, merged):
    def make() -> nn.Module:
        net, shift = tsm(small()), functools.partial(tsm_jit.TemporalShift, n_segment=4)
        tsm_jit.shift_before(net, {"layer2.1.conv2": shift, "layer2.0.conv3": shift})
        return net

    net, fused, x = pair(make, device)
    assert_same_step(net, fused, x)


def test_parameters_that_are_plain_attributes(device, merged, monkeypatch):
    """The replicas of DataParallel have such parameters."""
    blocks = counted(monkeypatch, execute, "residual_block")
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for module in fused.modules():
        for name in [*module._parameters]:
            value = module._parameters.pop(name)
            setattr(module, name, None if value is None else value.detach().requires_grad_())
    expected, actual = net(x), fused(x)
    assert (actual - expected).norm() <= 1e-9 * expected.norm()  # float64, sums in another order
    assert len(blocks) == (6 if merged else 0)


def test_convolutions_and_norms_that_were_changed_by_hand(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        each.layer1[0].conv2.stride = 1
        each.layer2[1].conv2.padding = [1, 1]
        counter = each.layer2[2].bn1.num_batches_tracked
        each.layer2[2].bn1.num_batches_tracked = counter.float()
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
    downsample[-1].register_forward_hook(lambda module, inputs, out: out * 2)


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
    in_operator = [args[4] is not None for args in blocks]  # the layer of downsample
    unchanged = change in (of_frozen_statistics, of_frozen_weights)
    assert sum(in_operator) == (0 if not merged else 4 if unchanged else 2)


@pytest.mark.parametrize("names", ["conv1 bn1 conv2 bn2 conv3 bn3", "downsample", "stem"])
def test_parts_of_blocks_that_are_not_trained(device, merged, names):
    """All layers before the second stage are frozen, and the named parts of its first block."""
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        frozen = [each.conv1, each.bn1, each.layer1]
        frozen += [each.layer2[0]._modules[name] for name in names.split() if name != "stem"]
        for module in frozen:
            module.requires_grad_(False)
    assert_same_step(net, fused, x)


def test_statistics_that_are_not_tracked(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    for each in (net, fused):
        each.layer2[2].bn2.track_running_stats = False
        each.layer2[1].bn2.num_batches_tracked = None
    assert_same_step(net.train(), fused.train(), x)


def test_the_type_of_the_branch_is_that_of_the_sum(device):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device, dtype=torch.float32)
    frames = x.new_ones(8, 64, 8, 8)
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled), torch.autocast(device.type, torch.bfloat16):
            assert fused.layer1(frames).dtype == net.layer1(frames).dtype == torch.bfloat16


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
    """In one process. SyncBatchNorm itself is called, so statistics of several processes need no test here."""
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
    """On GPUs the statistics cover the frames of all processes, on the CPU they are frozen."""
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    if device.type == "cuda":
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    else:
        net, fused = net.eval(), fused.eval()
    expected = {name: gradient.cpu() for name, gradient in gradients(net, x).items()}
    train("DDP", device, fused.cpu(), x.cpu(), expected, tmp_path)
