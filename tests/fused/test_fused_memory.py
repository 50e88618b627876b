"""What training of fused networks saves, and how it may be recomputed or offloaded."""

import copy
import functools
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from fused_networks import (
    NETWORKS,
    OF_STAGES,
    assert_same_step,
    counted,
    graph_bytes,
    pair,
    step,
    without_shift_and_fused,
)
from support import limited_gpu_memory, separate_shifts
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tsm_jit
from tsm_jit import residual
from tsm_jit.fused import block, execute
from tsm_jit.ops import residual as residual_ops


@pytest.mark.parametrize("frozen", ["nothing", r"conv1|bn1|layer1|.*\.downsample"])
@pytest.mark.parametrize("name", ["ResNet, bottlenecks", "timm ResNet-D"])
def test_no_more_is_saved_than_without_shift(device, merged, name, frozen):
    """Except boundary frames: 1/T of the channels that move, in each block but the first of a stage."""
    net, fused, x = pair(NETWORKS[name], device)
    for key, parameter in (*net.named_parameters(), *fused.named_parameters()):
        parameter.requires_grad_(re.match(frozen, key) is None)
    plain = copy.deepcopy(net)
    tsm_jit.remove_temporal_shift(plain)

    held = {}
    for name, each in (("plain", plain), ("fused", fused)):
        held[name] = graph_bytes(each.train()(x)) - sum(p.numel() * p.element_size() for p in each.parameters())
    assert held["fused"] <= 1.05 * held["plain"]


def test_a_block_frees_its_activations_before_downsample_is_differentiated(device, monkeypatch):
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: True)
    saved, alive = [], []
    of_branch, of_convolution = block.block_backward, block.convolve_backward

    def branch_backward(*args):
        saved[:] = [None]  # convolutions within are not meant
        grads = of_branch(*args)
        saved[:] = [weakref.ref(each) for each in args[5]]
        return grads

    def convolved_backward(*args):
        if saved[0] is not None:
            alive.append(sum(of_block() is not None for of_block in saved[::5]))  # what each layer convolved
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


def test_block_operators_save_less_than_blocks_without_shift(monkeypatch, device):
    """They save boundary frames too, but recompute the ReLU of the first block of each stage."""
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: True)
    *networks, x = without_shift_and_fused(device)

    def is_activation(saved: Tensor) -> bool:
        return saved.dim() == 4 and saved.shape[0] <= len(x)

    saved_bytes = []
    for each in networks:
        loss = each(x).sum()
        saved_bytes.append(graph_bytes(loss, is_activation))
        loss.backward()
    assert saved_bytes[1] == saved_bytes[0] + OF_STAGES // 16 - OF_STAGES


@pytest.mark.parametrize("in_backward", [False, True])
def test_out_of_memory_raises_as_before_fusing(cuda, in_backward):
    _, fused, _ = pair(NETWORKS["ResNet, basic blocks"], cuda, dtype=torch.float32)
    channels = fused.layer1[0].conv1.net.in_channels
    x = torch.zeros(4, channels, 1024, 1024, device=cuda).contiguous(memory_format=torch.channels_last)
    out = fused.layer1(x).sum() if in_backward else None
    with limited_gpu_memory(cuda, x.nbytes // 2), pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        fused.layer1(x) if out is None else out.backward()


def test_checkpointing(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for name in ("layer1", "layer2"):
        stage = getattr(fused, name)
        stage.forward = functools.partial(checkpoint, stage.forward, use_reentrant=False)
    assert_same_step(net.eval(), fused.eval(), x)


@pytest.mark.parametrize("saved", ["cast copy", "empty", "convolution residual"])
def test_selective_checkpointing(device, merged, saved):
    """For each policy: operators whose results are saved and operators that are recomputed."""

    def policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
        chosen = any(name in str(operator) for name in saved.split())
        return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE

    _, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device, dtype=torch.float32)
    gradients = []
    for more in ({}, {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}):
        each = copy.deepcopy(fused).train()
        for stage in (each.layer1, each.layer2):
            stage.forward = functools.partial(checkpoint, stage.forward, use_reentrant=False, **more)
        # A policy sees every operator, so it keeps shifts apart from products, which would round otherwise.
        with torch.autocast(device.type, torch.bfloat16), separate_shifts():
            gradients.append(step(each, x)[1])
    for a, b in zip(*gradients, strict=True):
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
    assert len(backwards) == (6 if merged else 0)
    assert all(args[1].is_contiguous(memory_format=torch.channels_last) for args in backwards)
    for a, b in zip(actual[1], step(net.train(), F.interpolate(x, scale_factor=2))[1], strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12


@pytest.mark.parametrize("mode", ["training", "evaluation", "folded", "checkpoint"])
def test_a_second_derivative_raises(device, merged, mode):
    """However it is computed: ``torch.autograd.grad`` visits only what leads to the tensors that it is given."""
    _, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    fused.train(mode == "training")
    if mode == "folded":
        residual.fuse(fused, fold_norms=True)
    x.requires_grad_()
    call = functools.partial(checkpoint, fused, use_reentrant=False) if mode == "checkpoint" else fused
    for weight in (fused.conv1.weight, fused.layer4[0].conv2.weight):
        tensors = [tensor for tensor in (x, weight) if tensor.requires_grad]
        for tensor in tensors:
            (gradient,) = torch.autograd.grad(call(x).square().sum(), tensor, create_graph=True)
            for other in tensors:
                with pytest.raises(RuntimeError, match="must not be differentiated twice"):
                    torch.autograd.grad(gradient.square().sum(), other, retain_graph=True, allow_unused=True)
            with pytest.raises(RuntimeError, match="must not be differentiated twice"):
                gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="must not be differentiated twice"):
        torch.autograd.functional.hvp(lambda x: fused(x).square().sum(), x, torch.ones_like(x))


def test_a_graph_of_the_first_derivative_may_be_made(device, merged):
    net, fused, x = pair(NETWORKS["ResNet, basic blocks"], device)
    for ours, expected in zip(*(_gradients(each, x) for each in (fused, net)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def _gradients(net: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(net(x).square().sum(), list(net.parameters()), create_graph=True)
