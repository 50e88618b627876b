"""Activation checkpointing: a recomputation has the clip length of its forward, or an error is raised."""

import contextlib
import copy
import functools
import gc
import itertools
import re
import weakref

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.exc import Unsupported
from torch.utils.checkpoint import CheckpointError, checkpoint
from torchvision.models.resnet import BasicBlock, ResNet

import tsm_jit
from tsm_jit.fused import execute

KINDS = pytest.mark.parametrize("reentrant", [False, True])


@pytest.fixture(autouse=True)
def forget_compiled_code():
    """PyTorch no longer compiles functions that have raised an error, or too often, in other tests either."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.init()  # compilers do so, and a checkpoint refuses to be where it happens
    yield
    torch.compiler.reset()
    if torch.__version__ < "2.14":
        gc.collect()  # an error leaves a checkpoint whose end removes hooks, at the latest in the next test


@contextlib.contextmanager
def changed_length(*lengths: int, in_compiled_code: bool = False):
    """Expects our error, which names these lengths, or that of a checkpoint that saves other tensors than before.

    Args:
        in_compiled_code: whether Dynamo may say instead that its code raises an exception, without our message.
    """
    with pytest.raises(RuntimeError) as caught:
        yield
    if isinstance(caught.value, (CheckpointError, *([Unsupported] if in_compiled_code else []))):
        return
    for word in ("n_segment", *map(str, lengths)):
        assert re.search(rf"\b{word}\b", str(caught.value)), str(caught.value)


def module(inplace: bool = False) -> nn.Module:
    return tsm_jit.TemporalShift(nn.Conv2d(16, 4, 1), 8, inplace=inplace).double()


def resnet(fused: bool, device, layers=(2, 2, 2, 2)) -> nn.Module:
    net = ResNet(BasicBlock, list(layers), num_classes=3).double().to(device, memory_format=torch.channels_last)
    tsm_jit.make_temporal_shift(net, 8, inplace=True)
    if fused:
        tsm_jit.residual.fuse(net)
    return net.eval()


def frames(net: nn.Module, device) -> torch.Tensor:
    shape = (8, 16, 4, 4) if isinstance(net, tsm_jit.TemporalShift) else (8, 3, 32, 32)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


MAKERS = {
    "out of place": lambda device: module().to(device),
    "in place": lambda device: module(True).to(device),
    "network": functools.partial(resnet, False),
    "fused": functools.partial(resnet, True),
}


@KINDS
@pytest.mark.parametrize("name", MAKERS)
def test_another_clip_length_in_the_backward_is_an_error(device, name, reentrant):
    net = MAKERS[name](device)
    x = frames(net, device)
    net(x)  # forwards with other lengths, before and without a backward, change nothing
    with tsm_jit.n_segment(net, 4):
        y = checkpoint(net, x, use_reentrant=reentrant)
    with changed_length(8, 4):
        y.sum().backward()


@KINDS
@pytest.mark.parametrize("name", MAKERS)
def test_a_backward_within_the_context_is_exact(device, name, reentrant):
    net = MAKERS[name](device)
    x = frames(net, device)
    grads = []
    for wrap in (lambda net, x: net(x), functools.partial(checkpoint, use_reentrant=reentrant)):
        with tsm_jit.n_segment(net, 4):
            grad = torch.autograd.grad if not reentrant else _by_backward
            grads.append(grad(wrap(net, x).square().sum(), [x, *net.parameters()]))
        wrap(net, x).sum().backward()  # another length, after the backward
        net.zero_grad()
        x.grad = None
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def _by_backward(loss: torch.Tensor, tensors: list) -> list:
    loss.backward()  # reentrant checkpoints do not support torch.autograd.grad
    return [tensor.grad.clone() for tensor in tensors]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_two_lengths_in_one_backward_are_an_error(device, inplace, needs_grad):
    net = module(inplace).to(device)
    x = frames(net, device).requires_grad_(needs_grad)
    with tsm_jit.n_segment(net, 4):
        first = checkpoint(net, x, use_reentrant=False)
    second = checkpoint(net, x, use_reentrant=False)
    for n in (4, 8):
        with tsm_jit.n_segment(net, n), changed_length():
            (first + second).sum().backward(retain_graph=True)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("n", [4, 8])
def test_two_lengths_in_one_backward_that_nothing_compares_are_an_error(device, needs_grad, n):
    net = module().to(device)
    x = frames(net, device).requires_grad_(needs_grad)
    unchecked = functools.partial(checkpoint, net, x, use_reentrant=False, determinism_check="none")
    with tsm_jit.n_segment(net, 4):
        first = unchecked()
    second = unchecked()
    with tsm_jit.n_segment(net, n), changed_length(8, 4):
        (first + second).sum().backward()


def test_the_output_of_frames_without_gradients_may_be_changed_in_place(device):
    net = nn.Sequential(module(), nn.ReLU(inplace=True)).to(device)
    x = frames(net[0], device).detach()
    found, expected = (
        torch.autograd.grad(y.sum(), net.parameters()) for y in (checkpoint(net, x, use_reentrant=False), net(x))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


COMPILED = pytest.mark.parametrize("parts", ["network", "blocks"])


def compiled(net: nn.Module, parts: str, **options) -> nn.Module:
    """``net`` with a compiled forward, or with compiled blocks that share their code."""
    for each in [net] if parts == "network" else net.layer1:
        each.compile(backend="aot_eager", **options)
    return net


@pytest.mark.slow
@KINDS
@COMPILED
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_in_an_eager_checkpoint(device, parts, fused, reentrant, fullgraph):
    """Right as long as the length stays until the backward, else an error. Code is compiled once for each case."""
    net = compiled(resnet(fused, device, (2, 1, 1, 1)), parts, fullgraph=fullgraph)
    plain = resnet(fused, device, (2, 1, 1, 1))
    plain.load_state_dict(net.state_dict())
    x = frames(net, device)

    def forward(net, n):
        with tsm_jit.n_segment(net, n):
            return checkpoint(net, x, use_reentrant=reentrant).square().sum()

    def gradients(net, n):
        net.zero_grad()
        x.grad = None
        with tsm_jit.n_segment(net, n):
            forward(net, n).backward()
        return [x.grad, *(parameter.grad for parameter in net.parameters())]

    for n in (8, 8, 4, 8, 4, 4):  # float64: compiled code may add in another order
        torch.testing.assert_close(gradients(net, n), gradients(plain, n), rtol=1e-8, atol=1e-8)
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(net, 8)
    for make in (lambda: forward(net, 4), lambda: forward(net, 4) + forward(net, 8)):
        loss = make()
        with changed_length(8, 4):
            loss.backward()


def nested(net: nn.Module, x: torch.Tensor, kinds: str) -> torch.Tensor:
    """``net(x)`` in checkpoints, the outermost first: ``"r"`` is a reentrant one, ``"n"`` a non-reentrant one."""
    if not kinds:
        return net(x)
    return checkpoint(nested, net, x, kinds[1:], use_reentrant=kinds[0] == "r")


_FAILS_AFTER_ERRORS = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="PyTorch 2.11 loses count of its hooks after an error in such a recomputation"
)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", ["rn", pytest.param("nr", marks=_FAILS_AFTER_ERRORS), "rr", "nn"])
def test_compiled_code_in_nested_checkpoints(device, kinds):
    net = module().to(device)
    plain = copy.deepcopy(net)
    net.compile(backend="aot_eager")
    x = frames(net, device)

    def loss(n):
        with tsm_jit.n_segment(net, n):
            return nested(net, x, kinds).square().sum()

    for _ in range(2):
        ours = _by_backward(loss(8), [x, net.net.weight])
        x.grad = net.net.weight.grad = None
        expected = _by_backward(plain(x).square().sum(), [x, plain.net.weight])
        x.grad = plain.net.weight.grad = None
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    loss4 = loss(4)
    with changed_length():
        loss4.backward()


@pytest.mark.parametrize("pool", [False, True])
def test_compiled_code_of_frames_without_gradients_in_an_eager_checkpoint(device, pool):
    """No saved tensor depends on the length if the layers before are frozen."""
    net = module().to(device)
    if pool:
        net = tsm_jit.TemporalPool(net.net, 8)
    plain = copy.deepcopy(net)
    net.compile(backend="aot_eager")
    x = torch.randn(8, 16, 4, 4, dtype=torch.float64, device=device)
    actual, expected = (
        torch.autograd.grad(y.square().sum(), each.net.weight)
        for each, y in ((net, checkpoint(net, x, use_reentrant=False)), (plain, plain(x)))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    with tsm_jit.n_segment(net, 4):
        loss = checkpoint(net, x, use_reentrant=False).square().sum()
    with changed_length(8, 4):
        loss.backward()


def shifted_conv() -> nn.Module:
    return tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 8)


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_two_lengths_of_a_frozen_shift_are_an_error(device, kind):
    """It saves nothing for a backward, but a layer after it reads its output."""
    net = nn.Sequential(module(), nn.Flatten(), nn.Linear(64, 3)).double().to(device)
    net[0].requires_grad_(False)
    plain = copy.deepcopy(net)
    if kind == "compiled":
        net[0].compile(backend="aot_eager")
    x = torch.randn(8, 16, 4, 4, dtype=torch.float64, device=device)

    def loss(net, n):
        with tsm_jit.n_segment(net, n):
            return checkpoint(net, x, use_reentrant=False).square().sum()

    def gradient(net, n):
        net.zero_grad()
        with tsm_jit.n_segment(net, n):
            loss(net, n).backward()
        return net[2].weight.grad

    for n in (4, 8, 4):
        torch.testing.assert_close(gradient(net, n), gradient(plain, n), rtol=1e-9, atol=1e-9)
    for n in (4, 8):
        both = loss(net, 4) + loss(net, 8)
        with tsm_jit.n_segment(net, n), changed_length():
            both.backward()


class CheckpointedShift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = shifted_conv()

    def forward(self, x):
        return checkpoint(self.shift, x, use_reentrant=False)


class InRegion(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autograd.graph.region_activation_memory_budget(0.0):
            return self.net(x)


COMPILED_PARTS = {  # two graphs where the recomputed length changes the input of the second one
    "shifts": lambda: nn.Sequential(shifted_conv(), shifted_conv()),
    "frozen": lambda: nn.Sequential(shifted_conv()),
    "frozen, pool": lambda: nn.Sequential(tsm_jit.TemporalPool(nn.Conv2d(8, 8, 1), 8)),
    "own checkpoints": lambda: nn.Sequential(CheckpointedShift(), CheckpointedShift()),
    "region": lambda: nn.Sequential(InRegion(shifted_conv()), InRegion(shifted_conv())),
}


@pytest.mark.parametrize(
    ("name", "budget"),
    [(name, budget) for name in COMPILED_PARTS for budget in (0, 0.5, 1) if name != "region" or budget == 1],
)
def test_compiled_code_that_saves_less_than_its_backward_reads(device, name, budget):
    """Each of several forwards before a backward is compared with its own recomputation, whatever else is saved."""
    if name == "region" and not hasattr(torch.autograd.graph, "region_activation_memory_budget"):
        pytest.skip("this PyTorch has no budgets for regions")
    net = COMPILED_PARTS[name]().double().to(device)
    plain = (COMPILED_PARTS["shifts"] if name in ("region", "own checkpoints") else COMPILED_PARTS[name])()
    plain.double().to(device)
    for ours, other in zip(plain.parameters(), net.parameters(), strict=True):
        ours.data.copy_(other)
    for each in net:
        each.compile(backend="aot_eager_decomp_partition")
    x = torch.randn(8, 8, 3, 5, dtype=torch.float64, device=device, requires_grad="frozen" not in name)

    def loss(net, n, determinism="default"):
        with tsm_jit.n_segment(net, n):
            return checkpoint(net, x, use_reentrant=False, determinism_check=determinism).square().sum()

    def gradients(net, loss, n):
        with tsm_jit.n_segment(net, n):
            return torch.autograd.grad(loss, [each for each in (x, *net.parameters()) if each.requires_grad])

    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=name == "own checkpoints"),
    ):
        for n in (8, 4):
            found, expected = (gradients(each, loss(each, n) + loss(each, n), n) for each in (net, plain))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for determinism, (n, last) in itertools.product(("default", "none"), ((8, 4), (4, 8))):
            both = loss(net, n, determinism) + loss(net, last, determinism)
            with changed_length():
                gradients(net, both, last)


@KINDS
def test_compiled_code_with_checkpoints_of_its_own_in_an_eager_checkpoint(device, reentrant):
    net = nn.Sequential(CheckpointedShift(), CheckpointedShift()).double().to(device)
    plain = copy.deepcopy(net)
    net.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 8, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        found = _by_backward(checkpoint(net, x, use_reentrant=reentrant).square().sum(), [x, *net.parameters()])
        x.grad = None
        expected = _by_backward(plain(x).square().sum(), [x, *plain.parameters()])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        with tsm_jit.n_segment(net, 4):
            loss = checkpoint(net, x, use_reentrant=reentrant).square().sum()
        # Of an error in a reentrant checkpoint, Dynamo only says that the code raises an exception.
        with changed_length(8, 4, in_compiled_code=True):
            loss.backward()


def test_compiled_code_with_checkpoints_of_its_own_under_other_hooks(device):
    net = CheckpointedShift().double().to(device)
    plain = copy.deepcopy(net)
    net.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 8, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        found = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    expected = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_compiled_reentrant_forwards_of_one_length_before_their_backwards(device):
    net = module().to(device)
    net.compile(backend="aot_eager")
    x = frames(net, device)
    first, second = (checkpoint(net, x, use_reentrant=True).sum() for _ in range(2))
    first.backward()
    with (
        tsm_jit.n_segment(net, 4),
        changed_length(4, 8),
    ):
        second.backward()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("sums", [False, True], ids=["as on the CPU", "as on a GPU"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_fused_layer_of_one_block_in_two_checkpoints(device, sums, compiled, needs_grad, monkeypatch):
    """Its only shift is of its input. With sums per channel, it is part of an operator for the whole block."""
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: sums and x.shape[1] > 1)
    net = resnet(True, device, (1, 1, 1, 1)).layer1
    if compiled:
        net.compile(backend="aot_eager")
    x = torch.randn(8, 64, 4, 4, dtype=torch.float64, device=device).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(needs_grad)
    with tsm_jit.n_segment(net, 4):
        first = checkpoint(net, x, use_reentrant=False).sum()
    second = checkpoint(net, x, use_reentrant=False).sum()
    with changed_length():
        (first + second).backward()


@pytest.mark.parametrize("training", [False, True])
def test_reentrant_forwards_of_two_lengths_are_an_error(device, training):
    net = module().to(device).train(training)
    x = frames(net, device)
    with tsm_jit.n_segment(net, 4):
        first = checkpoint(net, x, use_reentrant=True)
    second = checkpoint(net, x, use_reentrant=True)
    with changed_length():
        (first + second).sum().backward()


@KINDS
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_without_a_backward_may_have_another_length(device, training, reentrant):
    net = resnet(False, device).train(training)
    x = frames(net, device)
    with tsm_jit.n_segment(net, 4):
        loss = checkpoint(net, x, use_reentrant=reentrant).square().sum()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            net(x)
            checkpoint(net, x, use_reentrant=reentrant)
    with tsm_jit.n_segment(net, 4):
        loss.backward()


def test_without_recomputation_the_length_may_change_before_the_backward(device):
    for inplace in (False, True):
        net = module(inplace).to(device)
        x = frames(net, device)
        with tsm_jit.n_segment(net, 4):
            expected = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
            loss = net(x).square().sum()
        for ours, other in zip(torch.autograd.grad(loss, [x, *net.parameters()]), expected, strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=0)


@pytest.mark.parametrize("hooks", ["save_on_cpu", "identity"])
@pytest.mark.parametrize("name", MAKERS)
def test_saved_tensor_hooks(device, name, hooks):
    """They compute nothing again, so the clip length may change before the backward."""
    net = MAKERS[name](device)
    x = frames(net, device)
    with tsm_jit.n_segment(net, 4):
        expected = torch.autograd.grad(net(x).square().sum(), x)[0]
    kinds = {
        "save_on_cpu": torch.autograd.graph.save_on_cpu(),
        "identity": torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    }
    with kinds[hooks], tsm_jit.n_segment(net, 4):
        y = net(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out of place", "in place"])
def test_compiled_backwards_of_eager_forwards(device, name):
    net = MAKERS[name](device)
    x = frames(net, device)
    expected = _by_backward(net(x).square().sum(), [x, *net.parameters()])
    net.zero_grad()
    x.grad = None
    loss = net(x).square().sum()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        actual = _by_backward(loss, [x, *net.parameters()])
    for ours, other in zip(actual, expected, strict=True):  # float64: convolutions may add in another order
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-9)


def test_modules_without_attributes_of_later_versions_take_their_defaults():
    shift = module()
    expected = copy.deepcopy(shift)
    for name in ("direction", "inplace"):
        del shift.__dict__[name]
    x = torch.randn(8, 16, 4, 4, dtype=torch.float64)
    assert torch.equal(shift(x), expected(x))
    tokens = tsm_jit.TokenShift(nn.Linear(8, 8), 4)
    expected = copy.deepcopy(tokens)
    del tokens.__dict__["num_prefix_tokens"]
    x = torch.randn(8, 5, 8)
    assert torch.equal(tokens(x), expected(x))
    block = tsm_jit.non_local.NONLocalBlock3D(8)
    expected = copy.deepcopy(block)
    del block.__dict__["mode"]
    x = torch.randn(1, 8, 2, 4, 4)
    assert torch.equal(block(x), expected(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_weight_that_changed_before_the_backward_is_an_error(device, inplace):
    module = tsm_jit.TemporalShift(nn.Conv2d(16, 8, 1), 4, inplace=inplace).to(device)
    scores = module(torch.randn(8, 16, 6, 5, device=device, requires_grad=True))
    with torch.no_grad():
        module.net.weight.mul_(2)
    with pytest.raises(RuntimeError):
        scores.sum().backward()
    assert module.net.weight.grad is None


def test_forwards_without_backward_keep_no_tensors(device):
    module = tsm_jit.TemporalShift(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()), 4, inplace=True).to(device)
    x = torch.randn(8, 16, 7, 5, device=device, requires_grad=True)
    outputs = []
    hook = module.net[1].register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    for _ in range(3):
        module(x)
    hook.remove()
    gc.collect()
    assert [output() for output in outputs] == [None] * 3


def test_hooks_for_saved_tensors_may_be_forbidden(device):
    module = tsm_jit.TemporalShift(nn.Conv2d(16, 8, 1), 4, inplace=True).to(device)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks"):
        module(torch.randn(8, 16, 6, 5, device=device)).sum().backward()


def test_a_trace_of_one_clip_takes_any_number():
    net = torchvision.models.resnet18(num_classes=3)
    tsm_jit.make_temporal_shift(net, 4)
    model = tsm_jit.VideoModel(net).eval()
    traced = torch.jit.trace(model, torch.randn(1, 4, 3, 32, 32), check_trace=False)
    clips = torch.randn(3, 4, 3, 32, 32)
    torch.testing.assert_close(traced(clips), model(clips))
