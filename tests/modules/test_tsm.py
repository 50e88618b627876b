"""TSM's modules and surgery: in place inside residual blocks, keys, placement, pooling."""

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import numpy
import pytest
import torch
import torchvision
from support import assert_same_bits
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import tsm_jit
from tsm_jit import TemporalPool, TemporalShift, make_temporal_pool, make_temporal_shift, reference
from tsm_jit.plans import Shift


class PlainShift(nn.Module):
    """The oracle before a module."""

    def __init__(self, net, n_segment, n_div):
        super().__init__()
        self.net, self.n_segment, self.n_div = net, n_segment, n_div

    def forward(self, x):
        fold = x.shape[1] // self.n_div
        shift = Shift(self.n_segment, self.n_segment, 1, "zeros", ((fold, 1), (fold, -1)))
        return self.net(_PlainFunction.apply(x, shift))


class _PlainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift):
        ctx.shift = shift
        return reference.temporal_shift(x, shift)

    @staticmethod
    def backward(ctx, grad):
        return reference.temporal_shift_backward(grad, ctx.shift), None


def run(block, x, weight):
    """Output, gradient of the input and of every parameter."""
    x = x.clone().requires_grad_()
    inner = x * 1  # as in a network, the block's input is no leaf
    out = block(inner)
    (out * weight).sum().backward()
    assert_same_bits(inner, x)
    return [out, x.grad, *(p.grad for p in block.parameters())]


def blocks(device):
    torch.backends.cudnn.deterministic = True
    down = nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32))
    yield "basic", BasicBlock(16, 16).to(device), (16, 16)
    yield "bottleneck", Bottleneck(32, 8).to(device), (32, 32)
    yield "downsampling", BasicBlock(16, 32, 2, copy.deepcopy(down)).to(device), (16, 32)


@pytest.mark.parametrize("channels_last", [False, True])
def test_in_place_inside_residual_blocks(device, channels_last):
    """What in-place shifts get wrong: the skip branch, the saved input of conv1, the gradients of both."""
    for name, block, (c_in, c_out) in blocks(device):
        x = torch.randn(2 * 4, c_in, 6, 6, device=device)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        size = 3 if name == "downsampling" else 6
        weight = torch.randn(2 * 4, c_out, size, size, device=device)
        nets = []
        for make in (
            lambda conv: PlainShift(conv, 4, 8),
            lambda conv: TemporalShift(conv, 4, 8),
            lambda conv: TemporalShift(conv, 4, 8, inplace=True),
        ):
            net = copy.deepcopy(block)
            net.conv1 = make(net.conv1)
            nets.append(net)
        expected, *others = [run(net, x, weight) for net in nets]
        for actual in others:
            for a, e in zip(actual, expected, strict=True):
                assert_same_bits(a, e)
        for net in nets:
            net.eval()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                y = x.clone()
                outs = [net(y) for net in nets]
                assert_same_bits(y, x)
                for out in outs[1:]:
                    assert_same_bits(out, outs[0])


@pytest.mark.parametrize(
    "net",
    [
        nn.ReLU(inplace=True),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(16, 4, 1)),
        nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sigmoid()),
        nn.Identity(),
        nn.Flatten(),
        nn.Sequential(nn.Flatten(), nn.Linear(16 * 9, 3)),
        nn.BatchNorm2d(16),
    ],
    ids=lambda net: str(net).replace("\n", ""),
)
def test_in_place_before_anything(device, net):
    """Modules that write into their input, return it, or look at it through a view."""
    net = net.to(device)
    x = torch.randn(8, 16, 3, 3, device=device)
    weight = torch.randn_like(net(x.clone()))
    modules = [PlainShift(copy.deepcopy(net), 4, 8), TemporalShift(copy.deepcopy(net), 4, 8, inplace=True)]
    expected, actual = [run(module, x, weight) for module in modules]
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    with torch.no_grad():
        y = x.clone()
        expected, actual = [module(y) for module in modules]
        assert_same_bits(y, x)
        assert_same_bits(actual, expected)


WRAP = pytest.mark.parametrize("wrap", [nn.Sequential, lambda conv: conv], ids=["a list of layers", "a layer"])


def test_in_place_keeps_no_second_activation(device):
    """The shifted copy dies with the call; the backward makes another."""
    module = TemporalShift(nn.Conv2d(16, 8, 1).to(device), 4, inplace=True)
    shifted = []
    module.net.register_forward_pre_hook(lambda _, inputs: shifted.append(weakref.ref(inputs[0])))
    x = torch.randn(8, 16, 5, 5, device=device, requires_grad=True)
    y = module(x * 1)
    gc.collect()
    assert shifted[0]() is None
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("part", [slice(None), slice(0, 8)], ids=["whole", "a view of larger memory"])
@WRAP
def test_in_place_keeps_no_more_memory_than_out_of_place(wrap, part):
    """It keeps no float32 input next to its bfloat16 copy, and no memory of which the input is a small view."""
    conv = nn.Conv2d(16, 4, 1)
    values = numpy.random.default_rng().standard_normal((32, 16, 3, 3), dtype=numpy.float32)
    memory = weakref.ref(values)
    x = torch.from_numpy(values)[part]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=part == slice(None)):
        PlainShift(wrap(conv), 4, 8)(x).sum().backward()
        gradient, conv.weight.grad = conv.weight.grad, None
        y = TemporalShift(wrap(conv), 4, 8, inplace=True)(x)
    del x, values
    assert memory() is None
    y.sum().backward()
    assert_same_bits(conv.weight.grad, gradient)


def test_in_place_takes_read_only_memory(tmp_path):
    script = """
import mmap, sys, torch, tsm_jit
with open(sys.argv[1], "rb") as file:
    x = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.float32).view(8, 16, 7)
conv = torch.nn.Conv1d(16, 8, 1)
for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
    with context():
        outputs = [tsm_jit.TemporalShift(conv, 4, inplace=inplace)(x) for inplace in (True, False)]
        assert torch.equal(*outputs)
"""
    numpy.random.default_rng().standard_normal(8 * 16 * 7, dtype=numpy.float32).tofile(tmp_path / "frames")
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "frames"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("net", [nn.Conv2d(16, 24, 3, 2), nn.Conv2d(16, 24, 1), nn.BatchNorm2d(16)], ids=repr)
def test_shapes_on_the_meta_device(net, inplace):
    x = torch.randn(8, 16, 5, 5)
    module = tsm_jit.TemporalShift(net, 4, inplace=inplace)
    assert copy.deepcopy(module).to("meta")(x.to("meta")).shape == module(x).shape


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "net", [nn.Identity(), nn.Conv2d(64, 24, 1), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)], ids=repr
)
def test_a_tensor_that_a_transform_has_left_behind(device, net, inplace):
    """Outside of its transform, PyTorch takes it as its value."""
    module = tsm_jit.TemporalShift(net, 4, inplace=inplace).to(device)
    x = torch.randn(8, 64, 5, 5, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    left = []

    def total(value: Tensor) -> Tensor:
        left.append(value)
        return value.sum()

    torch.func.grad(total)(x)
    gradients = [torch.autograd.grad(module(each).pow(3).sum(), x)[0] for each in (left[0], x)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_in_place_leaves_no_trace_for_autograd(device):
    """A tensor that another graph saved passes through the module without recording, and is not stale afterwards."""
    leaf = torch.randn(8, 16, 3, 3, device=device, requires_grad=True)
    x = torch.relu(leaf)
    conv = TemporalShift(nn.Conv2d(16, 4, 1).to(device), 4, inplace=True)
    version = x._version
    with torch.no_grad():
        conv(x)
    assert x._version == version
    x.sum().backward()
    assert_same_bits(leaf.grad, (leaf > 0).float())


def test_in_place_keeps_the_input_when_net_fails(device):
    conv = TemporalShift(nn.Conv2d(15, 4, 1).to(device), 4, inplace=True)
    x = torch.randn(8, 16, 3, 3, device=device)
    before = x.clone()
    for recording in (False, True):
        with torch.set_grad_enabled(recording), pytest.raises(RuntimeError):
            conv(x)
        assert_same_bits(x, before)


@WRAP
def test_in_place_input_changed_before_the_backward_is_reported(device, wrap):
    conv = TemporalShift(wrap(nn.Conv2d(16, 4, 1).to(device)), 4, inplace=True)
    x = torch.randn(8, 16, 3, 3, device=device)
    y = conv(x)
    x.add_(1)
    with pytest.raises(RuntimeError):
        y.sum().backward()
    assert all(parameter.grad is None for parameter in conv.parameters())


class _Conjugate(nn.Module):
    """Saves a view of its input that has other bits than the input, and the real part, which has another dtype."""

    def forward(self, x):
        return x.conj() * x.conj() * x.real.sin()


def test_in_place_before_views_that_strides_do_not_describe(device):
    x = torch.randn(8, 16, 3, dtype=torch.complex64, device=device)
    weight = torch.randn_like(x)
    results = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        out = TemporalShift(_Conjugate(), 4, 8, inplace)(leaf * 1)
        (out * weight).abs().sum().backward()
        results.append((out, leaf.grad))
    for a, e in zip(results[1], results[0], strict=True):
        assert_same_bits(a.resolve_conj(), e.resolve_conj())


def test_in_place_leaves_saved_tensors_to_hooks(device):
    """Hooks such as those of offloading get what a shift out of place saves."""
    net = nn.Sequential(nn.Conv2d(16, 4, 1)).to(device)
    x = torch.randn(8, 16, 3, 3, device=device, requires_grad=True)
    saved = []
    for inplace in (False, True):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, packed=packed: packed.append(t) or t, lambda t: t):
            TemporalShift(net, 4, inplace=inplace)(x)
        saved.append(packed)
    for a, e in zip(*saved, strict=True):
        assert_same_bits(a, e)


def test_in_place_inference_tensor_while_autograd_records(device):
    conv = nn.Conv2d(16, 4, 1).to(device)
    with torch.inference_mode():
        x = torch.randn(8, 16, 3, 3, device=device)
    for module in (conv, nn.ReLU()):
        module.requires_grad_(False)
        assert_same_bits(TemporalShift(module, 4, 8, inplace=True)(x), TemporalShift(module, 4, 8)(x))


def test_in_place_hook_that_keeps_the_input(device):
    conv = nn.Conv2d(16, 4, 1).to(device)
    inputs_of_hook = []
    conv.register_forward_hook(lambda module, inputs, output: inputs_of_hook.append(inputs[0]))
    x = torch.randn(8, 16, 3, 3, device=device)
    with torch.no_grad():
        TemporalShift(conv, 4, 8, inplace=True)(x)
        TemporalShift(conv, 4, 8)(x)
    assert_same_bits(*inputs_of_hook)


def test_in_place_double_backward(device):
    conv = nn.Conv2d(16, 4, 1).double().to(device)
    x = torch.randn(8, 16, 2, 2, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for inplace in (False, True):
        out = TemporalShift(conv, 4, 8, inplace)(x).pow(3).sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        results.append(torch.autograd.grad(grad.pow(2).sum(), x)[0])
    assert_same_bits(*results)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gradient_that_a_hook_keeps_stays_as_it_is(device, inplace):
    """The adjoint overwrites the gradient from the convolution, but not if a hook has seen it."""
    conv = nn.Conv2d(16, 4, 1).to(device)
    shift, grads = tsm_jit.TemporalShift(conv, 4, inplace=inplace), []
    conv.register_full_backward_hook(lambda _, grad_input, __: grads.extend((grad_input[0], grad_input[0].clone())))
    x = torch.randn(8, 16, 3, 3, device=device, requires_grad=True)
    grad = torch.randn(8, 4, 3, 3, device=device)
    shift(x).backward(grad)
    assert_same_bits(grads[0], grads[1])
    assert not torch.equal(grads[0], x.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_place_in_a_checkpoint(device, reentrant):
    from torch.utils.checkpoint import checkpoint

    torch.backends.cudnn.deterministic = True
    block = BasicBlock(16, 16).to(device)
    make_block = copy.deepcopy(block)
    block.conv1 = TemporalShift(block.conv1, 4, 8, inplace=True)
    make_block.conv1 = PlainShift(make_block.conv1, 4, 8)
    x, weight = torch.randn(8, 16, 4, 4, device=device), torch.randn(8, 16, 4, 4, device=device)
    expected = run(make_block, x, weight)
    leaf = x.clone().requires_grad_()
    out = checkpoint(block, leaf * 1, use_reentrant=reentrant)
    (out * weight).sum().backward()
    for a, e in zip([out, leaf.grad, *(p.grad for p in block.parameters())], expected, strict=True):
        assert_same_bits(a, e)


def test_in_place_under_autocast(device):
    conv = nn.Conv2d(16, 4, 1).to(device)
    x = torch.randn(8, 16, 3, 3, device=device)
    weight = torch.randn(8, 4, 3, 3, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected, actual = [run(m, x, weight)[:2] for m in (PlainShift(conv, 4, 8), TemporalShift(conv, 4, 8, True))]
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e)
        with torch.no_grad():
            assert_same_bits(TemporalShift(conv, 4, 8, inplace=True)(x), TemporalShift(conv, 4, 8)(x))


def test_in_place_compiled(device):
    conv = nn.Conv2d(16, 4, 1).to(device)
    module = TemporalShift(conv, 4, 8, inplace=True)
    x = torch.randn(8, 16, 3, 3, device=device)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x), module(x))
    with torch.no_grad():
        assert_same_bits(compiled(x), module(x))


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (4, 7, 3, 3), (1, 16, 3, 3), (0, 16, 3, 3), (8, 16)])
def test_in_place_odd_shapes(device, shape):
    """No fold, one frame, nothing at all, no plane."""
    n_segment = min(4, max(1, shape[0]))
    net = (nn.Conv2d(shape[1], 4, 1) if len(shape) == 4 else nn.Linear(shape[1], 4)).to(device)
    x = torch.randn(shape, device=device)
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            y = x.clone()
            out = TemporalShift(net, n_segment, 8, inplace=True)(y)
            assert_same_bits(out, PlainShift(net, n_segment, 8)(x))
            assert_same_bits(y, x)


def test_the_class_is_that_of_tsm():
    conv = nn.Conv2d(16, 4, 1)
    module = TemporalShift(conv)
    assert (module.net, module.n_segment, module.fold_div, module.inplace) == (conv, 3, 8, False)
    assert list(module.state_dict()) == ["net.weight", "net.bias"]
    TemporalShift(conv, n_segment=8, n_div=4, inplace=True, vect=4)
    x = torch.randn(6, 9, 2, 2)
    expected = reference.temporal_shift(x, Shift(3, 3, 1, "zeros", ((3, 1), (3, -1))))
    assert_same_bits(TemporalShift.shift(x, 3), expected)
    assert_same_bits(TemporalShift.shift(x, n_segment=3, fold_div=3, inplace=False, vect=8), expected)
    assert TemporalShift.shift(x, 3, inplace=True) is x
    again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    y = torch.randn(6, 16, 2, 2)
    assert_same_bits(again(y), module(y))
    assert "n_segment=3, fold_div=8, inplace=False" in repr(module)


def test_errors_of_the_module_leave_the_input_alone(device):
    module = TemporalShift(nn.Conv2d(16, 4, 1).to(device), n_segment=3, inplace=True)
    x = torch.randn(8, 16, 3, 3, device=device)
    before = x.clone()
    for recording in (False, True):
        with torch.set_grad_enabled(recording), pytest.raises(ValueError, match="n_segment must divide the 8 frames"):
            module(x)
    assert_same_bits(x, before)


# --- surgery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("place", ["block", "blockres"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_converted_resnet_against_a_plain_conversion(name, place, inplace):
    net = getattr(torchvision.models, name)(num_classes=5).double()
    plain = copy.deepcopy(net)
    for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        for i, block in enumerate(stage):
            if place == "block":
                stage[i] = PlainShift(block, 4, 8)
            else:
                block.conv1 = PlainShift(block.conv1, 4, 8)
    make_temporal_shift(net, 4, place=place, inplace=inplace)
    assert list(net.state_dict()) == list(plain.state_dict())
    x, weight = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    for a, e in zip(run(net, x, weight), run(plain, x, weight), strict=True):
        assert_same_bits(a, e)
    net.eval(), plain.eval()
    with torch.no_grad():
        assert_same_bits(net(x), plain(x))


def test_keys_and_placement():
    keys = {}
    for place in ("block", "blockres"):
        net = torchvision.models.resnet50()
        make_temporal_shift(net, 8, 4, place=place)
        keys[place] = net.state_dict().keys()
        shifts = [m for m in net.modules() if isinstance(m, TemporalShift)]
        assert len(shifts) == 16
        assert {(m.n_segment, m.fold_div) for m in shifts} == {(8, 4)}
    assert "layer1.0.conv1.net.weight" in keys["blockres"]
    assert "layer4.2.conv1.net.weight" in keys["blockres"]
    assert "layer1.0.conv2.weight" in keys["blockres"]
    assert "layer1.0.net.conv1.weight" in keys["block"]


def test_every_second_block_of_resnet101():
    net = torchvision.models.resnet101()
    make_temporal_shift(net, 8)
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        assert [isinstance(b.conv1, TemporalShift) for b in stage] == [i % 2 == 0 for i in range(len(stage))]


def test_temporal_pool():
    net = torchvision.models.resnet18(num_classes=3).double()
    make_temporal_shift(net, 8, temporal_pool=True)
    make_temporal_pool(net, 8)
    assert net.layer1[0].conv1.n_segment == 8
    assert {b.conv1.n_segment for s in (net.layer2.net, net.layer3, net.layer4) for b in s} == {4}
    assert "layer2.net.0.conv1.net.weight" in net.state_dict()
    assert net(torch.randn(16, 3, 32, 32, dtype=torch.float64)).shape == (8, 3)
    with pytest.raises(ValueError, match="must not have a temporal pool yet"):
        make_temporal_pool(net, 8)


def test_temporal_pool_table():
    """Kernel 3, stride 2, padding 1 over time, by hand."""
    clip = torch.tensor([5.0, 1.0, 2.0, 9.0, 3.0, 4.0, 0.0, 7.0])
    x = torch.stack([clip, clip.flip(0)]).view(16, 1, 1, 1)
    pooled = TemporalPool.temporal_pool(x, 8)
    assert pooled.flatten().tolist() == [5, 9, 9, 7, 7, 4, 9, 5]
    assert_same_bits(TemporalPool(nn.Identity(), 8)(x), pooled)
    for n_segment in (3, 1, 0):
        with pytest.raises(ValueError, match=f"n_segment must be even to be halved, got {n_segment}"):
            TemporalPool.temporal_pool(x, n_segment)
    with pytest.raises(ValueError, match="n_segment must divide the frames of x"):
        TemporalPool.temporal_pool(x, 6)


def test_surgery_errors():
    net = torchvision.models.resnet18()
    with pytest.raises(ValueError, match="place must be one of 'block', 'blockres', got 'inplace'"):
        make_temporal_shift(net, 8, place="inplace")
    for arguments, error, message in [
        ((1, 8, "blockres", True), ValueError, "n_segment must be even to be halved, got 1"),
        ((7, 8, "blockres", True), ValueError, "n_segment must be even to be halved, got 7"),
        ((0,), ValueError, "n_segment must be at least 1, got 0"),
        (("8",), TypeError, "n_segment must be an integer, got '8'"),
        ((8.0,), TypeError, "n_segment must be an integer, got 8.0"),
        ((8, 0), ValueError, "n_div must be at least 1, got 0"),
    ]:
        with pytest.raises(error, match=message):
            make_temporal_shift(net, *arguments)
    with pytest.raises(ValueError, match="n_segment must be even to be halved, got 5"):
        make_temporal_pool(net, 5)
    assert not any(isinstance(m, TemporalShift) for m in net.modules())
    make_temporal_shift(net, 8)
    with pytest.raises(ValueError, match="converted before"):
        make_temporal_shift(net, 8)
    for other in (torchvision.models.squeezenet1_0(), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"net must have a supported architecture: .* got {type(other).__name__}"):
            make_temporal_shift(other, 8)
        with pytest.raises(TypeError, match="net must be a ResNet"):
            make_temporal_pool(other, 8)


def test_public_names():
    for name in tsm_jit.__all__:
        assert getattr(tsm_jit, name).__doc__, name


def test_another_clip_length():
    """Set for good, for a while, with pooling, and not at all where it cannot be."""
    net, other = torchvision.models.resnet18(num_classes=3).eval(), torchvision.models.resnet18(num_classes=3).eval()
    other.load_state_dict(net.state_dict())
    for network, clip in ((net, 4), (other, 8)):
        make_temporal_shift(network, clip, temporal_pool=True)
        make_temporal_pool(network, clip)
    x = torch.randn(16, 3, 32, 32)
    before = net(x)
    with tsm_jit.n_segment(net, 8):
        assert_same_bits(net(x), other(x))
        assert net.layer1[0].conv1.n_segment == net.layer2.n_segment == 8
        assert net.layer4[1].conv1.n_segment == 4
    assert_same_bits(net(x), before)
    for wrong, error, message in (
        (3, ValueError, "n_segment must be a multiple of 2 for a network that pools, got 3"),
        (0, ValueError, "n_segment must be at least 1, got 0"),
        (8.0, TypeError, "n_segment must be an integer, got 8.0"),
    ):
        with pytest.raises(error) as raised:
            tsm_jit.n_segment(net, wrong)
        assert str(raised.value) == message
    assert_same_bits(net(x), before)
    tsm_jit.n_segment(net, 8)
    assert_same_bits(net(x), other(x))
    with pytest.raises(ValueError, match="n_segment must be a multiple of 2 for a network that pools, got 7"):
        tsm_jit.n_segment(TemporalPool(nn.Identity(), 8), 7)
    mixed = nn.Sequential(TemporalShift(nn.Identity(), 8), TemporalShift(nn.Identity(), 3))
    with pytest.raises(ValueError, match="net must have one clip length and fractions of it, got 8 and 3"):
        tsm_jit.n_segment(mixed, 16)
    with pytest.raises(TypeError, match=r"net must be a torch\.nn\.Module, got int"):
        tsm_jit.n_segment(3, 8)
    with pytest.raises(ValueError, match="net must have temporal shifts or pools to set a clip length, got Linear"):
        tsm_jit.n_segment(nn.Linear(2, 2), 8)
    with pytest.raises(ValueError, match="n_segment must divide the 12 frames of x, got 8"):
        net(x[:12])


@pytest.mark.parametrize("place", ["block", "blockres"])
@pytest.mark.parametrize("temporal_pool", [False, True])
def test_removed_shifts_leave_the_network_as_it_was(place, temporal_pool):
    net = torchvision.models.resnet18().eval()
    keys, x = list(net.state_dict()), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        make_temporal_shift(net, 8, place=place, temporal_pool=temporal_pool)
        if temporal_pool:
            make_temporal_pool(net, 8)
        tsm_jit.remove_temporal_shift(net)
        assert list(net.state_dict()) == keys
        assert torch.equal(net(x), expected)
    shift = TemporalShift(nn.Identity())
    twice = nn.Sequential(shift, nn.ReLU(), shift)
    tsm_jit.remove_temporal_shift(twice)
    assert [type(each) for each in twice] == [nn.Identity, nn.ReLU, nn.Identity]
    with pytest.raises(ValueError, match="net must have temporal shifts or pools to remove, got ResNet"):
        tsm_jit.remove_temporal_shift(net)
    with pytest.raises(ValueError, match="net must have temporal shifts and not be one itself, got TemporalShift"):
        tsm_jit.remove_temporal_shift(TemporalShift(nn.Identity()))
    with pytest.raises(TypeError, match=r"net must be a torch.nn.Module, got int"):
        tsm_jit.remove_temporal_shift(8)
    make_temporal_shift(net, 8)


@pytest.mark.parametrize("direction", ["past", "future"])
def test_one_direction(device, direction):
    x = torch.randn(2 * 4, 16, 3, 3, device=device)
    shift = TemporalShift(nn.Identity(), 4, 8, direction=direction)
    expected = reference.temporal_shift(x, Shift(4, 4, 1, "zeros", ((2, -1 if direction == "past" else 1),)))
    assert_same_bits(shift(x), expected)
    assert f"direction='{direction}'" in repr(shift)
    net = torchvision.models.resnet18()
    make_temporal_shift(net, 4, direction=direction)
    assert {each.direction for each in net.modules() if isinstance(each, TemporalShift)} == {direction}
