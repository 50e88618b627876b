"""Networks before and after fusing, and how tests compare them."""

import copy
import itertools
import random

import pytest
import timm
import torch
import torchvision
from support import random_values
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import tsm_jit
from tsm_jit import residual
from tsm_jit.plans import PADDINGS, Shift

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def tsm(net: nn.Module, **kwargs) -> nn.Module:
    tsm_jit.make_temporal_shift(net, 4, **kwargs)
    return net


def tsam(net: nn.Module, **kwargs) -> nn.Module:
    tsm_jit.tsam.make_Shift(net, 4, 3, **({"f_div": 4, "shift_depth": 2, "n_insert": 1, "m_insert": 0} | kwargs))
    return net


def small(block=Bottleneck, layers=(1, 3, 1, 1), **kwargs) -> nn.Module:
    """Short, with a block that has others before and after it in its stage."""
    return ResNet(block, list(layers), num_classes=5, **kwargs)


NETWORKS = {
    "ResNet, basic blocks": lambda: tsm(small(BasicBlock)),
    "ResNet, bottlenecks": lambda: tsm(small()),
    "every second block": lambda: tsm(small(BasicBlock, (1, 2, 23, 1))),
    "chosen blocks": lambda: tsm(small(BasicBlock, (2, 3, 2, 2)), blocks=[1]),
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
        stem = net.conv1[-1] if isinstance(net.conv1, nn.Sequential) else getattr(net.conv1, "conv", net.conv1)
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
    """Compares gradients in float32, for x and other inputs.

    A sum in another order may change the sign of a value near zero before a ReLU. This changes all gradients before
    it by some hundredths, for this input. So the gradients of all inputs must be that close, and those of one input as
    close as sums are. Each input is used twice, since a second call may be wrong where the first is right.
    """

    def in_a_row(of: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in step(of, x)[1]])

    apart = []
    for each in (x, *(torch.randn_like(x) for _ in range(7))):
        (actual, expected), (again, _) = [(in_a_row(fused, each), in_a_row(net, each)) for _ in range(2)]
        assert (again - actual).norm() <= 1e-3 * actual.norm()
        apart.append(((actual - expected).norm() / expected.norm()).item())
    assert max(apart) <= 0.2, apart
    assert min(apart) <= 1e-2, apart


def counted(monkeypatch, module, name: str) -> list:
    """A list that grows with each call of this function of a module."""
    calls, function = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


class OtherNorm(nn.BatchNorm2d):
    """One that is called, and not folded."""


def graph_bytes(output: Tensor, counts=torch.is_tensor) -> int:
    """Of all storages that the graph of ``output`` has saved, of tensors that count."""
    storages, seen, todo = {}, set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [name for name in dir(node) if name.startswith("_raw_saved")]
        raw = [each for name in names for each in listed(getattr(node, name))]
        raw += listed(getattr(node, "saved_tensors", ())) if not names else []
        for each in raw:
            tensor = getattr(each, "data", each)
            if isinstance(tensor, Tensor) and tensor.numel() and counts(tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        todo += [function for function, _ in node.next_functions]
    return sum(storages.values())


def listed(value) -> list:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def without_shift_and_fused(device) -> tuple[nn.Module, nn.Module, Tensor]:
    net = torchvision.models.resnet18(num_classes=5).to(device, memory_format=torch.channels_last)
    fused = copy.deepcopy(net)
    tsm_jit.make_temporal_shift(fused, 4)
    residual.fuse(fused)
    return net, fused, torch.randn(8, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)


OF_STAGES = sum(4 * 8 * 64 * 16 * 16 // 2**stage for stage in range(4))  # bytes of what a block of each returns
