"""The registry of cases, networks with every kind of shift, and comparisons."""

import copy
import functools

import torch
import torch.distributed as dist
import torchvision
from support import assert_same_bits
from torch import Tensor, nn

import tsm_jit
from tsm_jit.distributed import parallelize_time, shard_frames
from tsm_jit.modules.base import ShiftedModule
from tsm_jit.plans import Shift

MESHES = {}
CASES = {}  # name: (number of ranks, transports of the edges, what each rank does with their mesh)
TRANSPORTS = ("gloo", "gloo, one GPU", "peer memory, one GPU", "NCCL", "peer memory")  # gloo alone is on CPUs
COLLECTIVES, ON_GPUS = ("gloo", "gloo, one GPU", "NCCL"), TRANSPORTS[1:]
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def case(ranks, on=TRANSPORTS, **arguments):
    """Registers a function as a case, for each number of ranks and for these transports.

    Cases in which the transport makes no difference run with collectives only.
    """

    def register(function):
        for count in ranks:
            name = "-".join([function.__name__, *map(str, arguments.values()), f"{count} ranks"])
            CASES[name] = (count, on, functools.partial(function, **arguments))
        return function

    return register


def share(whole: Tensor, mesh) -> Tensor:
    """The part ``[N*L, ...]`` of ``whole`` ``[N, T, ...]`` that this rank must compute."""
    return torch.tensor_split(whole, mesh.size(), 1)[mesh.get_local_rank()].flatten(0, 1)


def average(net: nn.Module, group=None) -> None:
    """What DDP does with gradients."""
    for weight in net.parameters():
        dist.all_reduce(weight.grad, group=group)
        weight.grad /= dist.get_world_size(group)


class Groups(ShiftedModule):
    """Any plan."""

    def __init__(self, net, shift: Shift, inplace=False):
        super().__init__()
        self.net, self.shift, self.inplace, self.n_segment = net, shift, inplace, shift.n_segment

    def shift_of(self, x):
        return self.shift.canonical().encode()

    def forward(self, x):
        return self.call_shifted(x, self.shift_of(self.whole_clips(x)))


class Block(nn.Module):
    """A residual block, the place where shifting in place goes wrong."""

    def __init__(self, shift):
        super().__init__()
        self.conv1, self.norm = shift(nn.Conv2d(8, 8, 3, padding=1)), nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.norm(self.conv1(x)))))


class Tokens(nn.Module):
    """A linear layer for tokens, such as that of an attention, in a network of images."""

    def __init__(self, inplace):
        super().__init__()
        self.shift = tsm_jit.TokenShift(nn.Linear(8, 8), 7, 4, inplace=inplace, num_prefix_tokens=1)

    def forward(self, x):
        return x + self.shift(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def tsm(inplace=False, **options):
    return lambda net: tsm_jit.TemporalShift(net, 7, 4, inplace=inplace, **options)


def tsam(inplace=False):
    return lambda net: tsm_jit.tsam.TemporalShift(net, 7, 5, 2, 3, inplace=inplace)


def circular(inplace=False):
    shift = Shift(7, 7, 1, "circular", ((3, 2), (2, -5)))
    return lambda net: Groups(net, shift, inplace)


SHIFTS = {"TSM": tsm, "TSAM": tsam, "past": functools.partial(tsm, direction="past"), "circular": circular}


def model_of(kind="TSM", inplace=True) -> tsm_jit.VideoModel:
    """A network of clips of seven frames."""
    shift = SHIFTS[kind](inplace)
    tokens = [Tokens(inplace)] if kind == "TSM" else []
    net = nn.Sequential(Block(shift), Block(shift), *tokens, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return tsm_jit.VideoModel(net, nn.Linear(8, 3)).double()


def new_clips(clips=2, length=7) -> Tensor:
    return torch.randn(clips, length, 8, 3, 4, dtype=torch.float64)


def loss_of(scores: Tensor) -> Tensor:
    return (scores.square() * torch.arange(1, 4)).mean()


def compare(model, mesh, clips, run=None, whole=None, close=close) -> None:
    """Scores, gradients of clips and of weights of the split ``model`` equal those of one process, with ``whole``."""
    whole, x = copy.deepcopy(model) if whole is None else whole, clips.clone().requires_grad_()
    expected = whole(x)
    loss_of(expected).backward()
    parallelize_time(model, mesh)
    mine = shard_frames(clips, mesh).requires_grad_()
    scores = (model if run is None else run)(mine)
    close(scores, expected)
    loss_of(scores).backward()
    average(model, mesh.get_group())
    close(mine.grad / mesh.size(), share(x.grad, mesh))
    for (name, weight), (_, single) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        close(weight.grad, single.grad, msg=lambda text, name=name: f"{name}: {text}")
    first = scores.detach().clone()
    dist.broadcast(first, 0, group=mesh.get_group())
    assert_same_bits(first, scores)
    with torch.no_grad():
        close(model(mine), expected)
    with torch.inference_mode():
        held = torch.tensor_split(clips, mesh.size(), 1)[mesh.get_local_rank()]
        before = held.clone()
        close(model(held), expected)
        assert_same_bits(held, before)


def resnet(length=5) -> nn.Module:
    """A narrow ResNet, with statistics that are not those of a new network."""
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=3)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(1, 2)
    tsm_jit.make_temporal_shift(net, length, inplace=True)
    return net.double().eval()
