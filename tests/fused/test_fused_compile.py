"""Fused networks under compilers, exporters and tracers."""

import collections
import copy
import itertools
import random
import re
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from fused_networks import (
    DTYPES,
    NETWORKS,
    OF_STAGES,
    OtherNorm,
    assert_same_gradients_to_rounding,
    assert_same_step,
    pair,
    random_norm,
    small,
    step,
    tsm,
    without_shift_and_fused,
)
from support import assert_same_bits, random_values
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torchvision.models.resnet import BasicBlock, Bottleneck

from tsm_jit.fused import execute
from tsm_jit.fused.autograd import norm_add_relu_both_layouts
from tsm_jit.ops import residual as residual_ops
from tsm_jit.plans import Shift


def as_on_a_gpu(monkeypatch, device) -> None:
    if device.type == "cpu":
        monkeypatch.setattr(execute, "has_channel_sums", lambda x: x.shape[1] > 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "merged"), [("ResNet, basic blocks", False), ("ResNet, bottlenecks", True)], indirect=["merged"]
)
def test_one_graph(device, merged, name, training):
    net, fused, x = pair(NETWORKS[name], device)
    torch._dynamo.reset()
    compiled = torch.compile(fused.train(training), backend="aot_eager", fullgraph=True)
    assert_same_step(net.train(training), compiled, x)
    with torch.no_grad():
        expected = net.eval()(x)
        fused.eval()
        assert (compiled(x) - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True], indirect=True)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_graph_of_whole_blocks(device, merged, training, monkeypatch):
    """Under autocast: the weights of a block are cast together, and its layers have one operator in the backward."""
    as_on_a_gpu(monkeypatch, device)
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
    ops, blocks = torch.ops.tsm_jit, 6
    assert forward[ops.cast.default] == blocks
    assert backward[ops.cast.default] == blocks - 1  # the first block is frozen
    assert forward[ops.norm_add_relu.default] == 3 * blocks
    assert forward[ops.temporal_shift.kernel] == 4  # at the start of each stage
    assert forward[torch.ops.aten._native_batch_norm_legit_functional.default] == training  # before the first block
    assert backward[ops.norm_add_relu_backward.default] == backward[ops.residual_block_backward.default] == blocks
    assert backward[ops.norm_relu_backward.default] == 0


@pytest.mark.parametrize("normed", [(True, False), (True, True), (False, True)], ids=str)
def test_fake_norm_add_relu_backward(device, normed):
    """The fake returns the same outputs with the same strides. The outputs share no memory and are aligned."""
    dtype, t, channels = random.choice(DTYPES[1:]), random.randint(1, 5), random.randint(2, 36)
    shift = Shift(t, t, 1, "zeros", ((1, 1), (1, -1))).canonical().encode()
    shifted = not normed[1] and random.random() < 0.5  # a norm's values are unshifted

    def values() -> Tensor:
        return random_values((2 * t, channels, 3, 5), dtype, device).contiguous(memory_format=torch.channels_last)

    def operand(norm: bool) -> tuple:
        parts = random_norm(channels, residual_ops.acc_dtype(dtype), device)[:3]
        flags = [random.randint(0, 1) for _ in range(3)]
        return (values(), parts, 1e-5, flags) if norm else (None, [], 0.0, [0, flags[1], 0])

    for _ in range(8):
        arguments = values(), None, None, values(), None, *operand(normed[0]), *operand(normed[1]), shift, shifted
        assert_fake_matches(torch.ops.tsm_jit.norm_add_relu_backward.default, arguments)


def test_fake_norm_relu_backward(device):
    dtype, shape = random.choice(DTYPES[1:]), (random.randint(1, 5), random.randint(2, 36), 3, 5)
    grad, z = (random_values(shape, dtype, device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    norm = random_norm(shape[1], residual_ops.acc_dtype(dtype), device)
    for flags in itertools.product((0, 1), repeat=3):
        assert_fake_matches(torch.ops.tsm_jit.norm_relu_backward.default, (grad, z, norm, 1e-5, list(flags)))


def assert_fake_matches(operator, arguments: tuple) -> None:
    outputs = operator(*arguments)
    with FakeTensorMode() as mode:
        fakes = operator(*tree_map_only(Tensor, mode.from_tensor, arguments))
    assert [each is None for each in outputs] == [each is None for each in fakes]
    there = [(ours, fake) for ours, fake in zip(outputs, fakes, strict=True) if ours is not None and ours.numel()]
    for ours, fake in there:
        assert (ours.shape, ours.stride(), ours.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert ours.data_ptr() % 16 == 0
    assert len({ours.data_ptr() for ours, _ in there}) == len(there)


@pytest.mark.slow
def test_inductor_trains_networks_with_other_norms(device, monkeypatch):
    """Other norms are called as modules. So ``norm_add_relu`` has no norm, and one gradient for both summands."""
    as_on_a_gpu(monkeypatch, device)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, fused, x = pair(
        lambda: tsm(small(BasicBlock, (1, 2, 1, 1), norm_layer=OtherNorm)), device, dtype=torch.float32
    )
    torch._dynamo.reset()
    assert_same_gradients_to_rounding(net, torch.compile(fused, fullgraph=True), F.interpolate(x, scale_factor=2))


def compiled_and_profiled(function):
    """Compiled so that a profile has the kernels that Inductor generates, also those for the CPU."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, options={"cpp.enable_kernel_profile": True})


def operator_calls(compiled, *inputs: Tensor, parameters: Sequence[Tensor] = ()) -> collections.Counter:
    """How often each operator is called by ``compiled(*inputs)``. Of kernels of Inductor, the sum is at "generated".

    With ``parameters``, it also computes their gradients.
    """

    def profiled(function, inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> list:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out = function(*inputs)
            if parameters:
                torch.autograd.grad(out.sum(), parameters)
        return [each for each in profile.events() if not re.match("cu(da)?[A-Z]", each.name)]  # CUDA's interface

    def generated(events: list) -> int:
        """Counts events that are no operators, contain none, and are in none."""
        containers = {event.cpu_parent.id for event in events if event.cpu_parent is not None}
        outside = [event for event in events if event.cpu_parent is None or "::" not in event.cpu_parent.name]
        return sum("::" not in event.name and event.id not in containers for event in outside)

    events = profiled(compiled, inputs, parameters)
    calls = collections.Counter(event.name for event in events)
    convolution = nn.Conv2d(inputs[0].shape[1], 4, 3, bias=False).to(inputs[0])
    control = compiled_and_profiled(convolution.to(memory_format=torch.channels_last))
    control(inputs[0])  # compiles
    calls["generated"] = generated(events) - generated(profiled(control, inputs[:1]))  # compilers have events, too
    return calls


@pytest.mark.slow
def test_inductor_trains_in_place(device, monkeypatch):
    """Compiled code copies nothing that our operators write: neither norm statistics nor gradients of shifts."""
    as_on_a_gpu(monkeypatch, device)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    net, fused, x = pair(lambda: tsm(small(layers=(2, 3, 2, 2))), device, dtype=torch.float32)
    x = F.interpolate(x, scale_factor=3)
    compiled = compiled_and_profiled(fused)
    assert_same_gradients_to_rounding(net, compiled, x)
    for (name, ours), theirs in zip(fused.named_buffers(), net.buffers(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max(), name
    blocks = sum(isinstance(module, Bottleneck) for module in fused.modules())
    calls = operator_calls(compiled, x, parameters=list(fused.parameters()))
    assert 0 < calls["generated"] < 3 * blocks  # the stem and the head; a copy per norm would add 3 per block
    assert calls["tsm_jit::batch_norm_stats_"] == 3 * blocks + 4
    assert calls["tsm_jit::residual_block_backward"] == blocks  # with the adjoint of the shift, in place
    assert calls["tsm_jit::temporal_shift_backward"] == 0


@pytest.mark.parametrize("biased", [False, True])
def test_norms_that_share_their_weights(device, biased, monkeypatch):
    as_on_a_gpu(monkeypatch, device)
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device)
    for each in (net, fused):
        block = each.layer2[0]
        if biased:  # then layers run one by one
            block.conv2.bias = nn.Parameter(block.bn2.bias.detach().clone())
        block.bn2.weight, block.downsample[1].weight = block.bn1.weight, block.bn3.weight
    torch._dynamo.reset()
    assert_same_step(net, torch.compile(fused, backend="aot_eager", fullgraph=True), x)


@pytest.mark.slow
def test_one_graph_for_every_batch_size(device):
    net, fused, _ = pair(NETWORKS["ResNet, basic blocks"], device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for frames, stance in ((8, "default"), (12, "default"), (20, "fail_on_recompile")):
        x = torch.randn(frames, 3, 32, 32, dtype=torch.float64, device=device)
        with torch.compiler.set_stance(stance):
            assert_same_step(net, compiled, x.contiguous(memory_format=torch.channels_last))


def test_compilers_write_nothing_before_we_do():
    """Compiled code does not initialise memory that our operators fill."""
    shift = Shift(4, 4, 1, "zeros", ((4, 1), (4, -1))).encode()

    def both(z: Tensor, identity: Tensor) -> tuple[Tensor, ...]:
        out = norm_add_relu_both_layouts(z, None, identity, None, None, shift, 2, may_overwrite_identity=False)
        return *out, -z[:1]

    compiled = compiled_and_profiled(both)
    z, identity = (torch.randn(8, 16, 6, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
    with torch.inference_mode():
        for ours, expected in zip(compiled(z, identity), both(z, identity), strict=True):
            assert_same_bits(ours, expected)
        calls = operator_calls(compiled, z, identity)
    assert calls["tsm_jit::norm_add_relu_"] == calls["generated"] == 1  # the negative


def test_compiled_inference_norms_in_place(device, monkeypatch):
    """Without gradients our operators compute all norms but the first, in compiled networks too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its error is about 1e-3
    net, fused, x = pair(NETWORKS["ResNet, bottlenecks"], device, dtype=torch.float32)
    compiled = compiled_and_profiled(fused.eval())
    with torch.inference_mode():
        assert (compiled(x) - net.eval()(x)).norm() <= 1e-3 * net(x).norm()
        calls = operator_calls(compiled, x)
    blocks = sum(isinstance(module, Bottleneck) for module in fused.modules())
    assert calls["tsm_jit::norm_add_relu_"] + calls["tsm_jit::norm_add_relu"] == 3 * blocks
    assert calls["tsm_jit::norm_add_relu_"] >= 2 * blocks  # the norms inside a block; stages may keep their input
    assert 0 < calls["generated"] < blocks  # neither norms nor copies


@pytest.mark.slow
@pytest.mark.parametrize("in_parts", [False, True])
def test_compiled_training_keeps_no_second_input_of_a_stage(monkeypatch, in_parts):
    """A graph saves for the backward what the network without shift saves, and the boundary frames."""
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: in_parts)
    saved_bytes = {}

    def keeps(name: str):
        def count(graph, _):
            (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
            values = [node.meta["val"] for node in results if node is not None and node.op != "placeholder"]
            saved_bytes[name] = sum(each.nbytes for each in values if isinstance(each, Tensor))
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
    assert saved_bytes["fused"] <= saved_bytes["without shift"] + OF_STAGES // 16 - in_parts * OF_STAGES


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
