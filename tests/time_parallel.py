"""What each process of ``test_time_parallel.py`` does: cases that compare clips split over ranks with whole clips."""

import copy
import datetime
import faulthandler
import functools
import os
import pickle
import random
import resource
import sys
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory
import torchvision
from support import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tsm_jit
from tsm_jit import reference
from tsm_jit.distributed import parallelize_time, shard_frames
from tsm_jit.modules.base import ShiftedModule
from tsm_jit.plans import Shift

MESHES = {}
CASES = {}  # name: (number of ranks, transports of the edges, what each rank does with their mesh)
TRANSPORTS = ("gloo", "NCCL", "peer memory")  # gloo on CPUs, the others on GPUs
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def case(ranks, on=TRANSPORTS, **arguments):
    """Registers a function as a case, for each number of ranks and for these transports.

    Cases in which the transport makes no difference run on GPUs with NCCL only.
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


# --- the shift -------------------------------------------------------------------------------------------------------


class Groups(ShiftedModule):
    """Any plan."""

    def __init__(self, net, shift: Shift, inplace=False):
        super().__init__()
        self.net, self.shift, self.inplace, self.n_segment = net, shift, inplace, shift.n_segment

    def shift_of(self, x):
        return self.shift.canonical().encode()

    def forward(self, x):
        return self.call_shifted(x, self.shift_of(self.whole_clips(x)))


def random_shift(padding: str, ranks: int) -> Shift:
    """Many groups, distances beyond a rank's frames, frames that do not take part."""
    length = random.randint(ranks, 4 * ranks)
    shifted = random.choice((length, random.randint(1, length)))
    plan = tuple((random.randint(0, 3), random.randint(-length - 1, length + 1)) for _ in range(random.randint(1, 5)))
    return Shift(length, shifted, 1, padding, ((2, 1), (1, -1), *plan))


@case((2, 3, 4), padding="zeros")
@case((2, 3, 4), padding="keep")
@case((2, 3, 4), padding="replicate")
@case((2, 3, 4), padding="circular")
def plans(mesh, padding):
    for _ in range(4):
        shift = random_shift(padding, mesh.size())
        channels = sum(width for width, _ in shift.plan) + random.randint(0, 2)
        x = torch.randn(2, shift.n_segment, channels, 2, 3, dtype=torch.float64)
        weight, tangent = torch.randn_like(x), torch.randn_like(x)
        if random.random() < 0.5:
            x = x.to(memory_format=torch.channels_last_3d)
        net = Groups(nn.Identity(), shift)
        parallelize_time(net, mesh)
        mine = shard_frames(x, mesh).requires_grad_()
        seed = shard_frames(weight, mesh).requires_grad_()
        out = net(mine)
        assert_same_bits(out, share(reference.temporal_shift(x.flatten(0, 1), shift).view_as(x), mesh))
        (grad,) = torch.autograd.grad(out, mine, seed, create_graph=True)
        expected = reference.temporal_shift_backward(weight.flatten(0, 1), shift).view_as(x)
        if padding == "replicate":
            close(grad, share(expected, mesh))  # sums in another order
        else:
            assert_same_bits(grad, share(expected, mesh))
        (twice,) = torch.autograd.grad(grad, seed, shard_frames(tangent, mesh))
        assert_same_bits(twice, share(reference.temporal_shift(tangent.flatten(0, 1), shift).view_as(x), mesh))


@case((3,), dtype=torch.bfloat16)
@case((3,), dtype=torch.bool)
@case((3,), dtype=torch.complex64)
@case((3,), dtype=torch.float8_e5m2)
def dtypes(mesh, dtype):
    shift = Shift(7, 6, 1, "circular", ((2, 1), (1, -2)))
    x = (3 * torch.randn(1, 7, 4, 2, 1)).to(dtype)
    net = Groups(nn.Identity(), shift)
    parallelize_time(net, mesh)
    assert_same_bits(net(shard_frames(x, mesh)), share(reference.temporal_shift(x[0], shift)[None], mesh))


@case((2,))
def clips_and_strides(mesh):
    """Five dimensions; no clip at all; an expanded tensor and an expanded gradient."""
    shift = tsm_jit.TemporalShift(nn.Identity(), 5, 4)
    parallelize_time(shift, mesh)
    x = torch.randn(3, 5, 8, 2, 1)
    expected = tsm_jit.temporal_shift(x, fold_div=4)
    mine = torch.tensor_split(x, 2, 1)[mesh.get_local_rank()].requires_grad_()
    out = shift(mine)
    assert_same_bits(out.flatten(0, 1), share(expected, mesh))
    out.sum().backward()
    whole = x.clone().requires_grad_()
    tsm_jit.temporal_shift(whole, fold_div=4).sum().backward()
    assert_same_bits(mine.grad.flatten(0, 1), share(whole.grad, mesh))
    wide = shard_frames(x, mesh).expand(-1, -1, 2, 6)
    assert_same_bits(shift(wide), share(expected, mesh).expand(-1, -1, 2, 6))
    assert shift(shard_frames(x[:0], mesh)).shape == (0, 8, 2, 1)


# --- networks --------------------------------------------------------------------------------------------------------


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


FAMILIES = {"TSM": tsm, "TSAM": tsam, "past": functools.partial(tsm, direction="past"), "circular": circular}


def model_of(family="TSM", inplace=True) -> tsm_jit.VideoModel:
    """A network of clips of seven frames."""
    shift = FAMILIES[family](inplace)
    tokens = [Tokens(inplace)] if family == "TSM" else []
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


@case((2, 3, 4), family="TSM", inplace=True)
@case((3,), family="TSM", inplace=False)
@case((2, 4), family="TSAM", inplace=True)
@case((3,), family="TSAM", inplace=False)
@case((4,), family="past", inplace=False)
@case((4,), family="circular", inplace=True)
def networks(mesh, family, inplace):
    compare(model_of(family, inplace), mesh, new_clips())


class Checkpointed(nn.Module):
    def __init__(self, net, use_reentrant):
        super().__init__()
        self.net, self.use_reentrant = net, use_reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.use_reentrant)


@case((2,), use_reentrant=False)
@case((2,), use_reentrant=True)
def checkpointing(mesh, use_reentrant):
    model = model_of()
    for i in range(3):
        model.backbone[i] = Checkpointed(model.backbone[i], use_reentrant)
    compare(model, mesh, new_clips())


@case((2,), on=("gloo", "NCCL"))
def autocast(mesh):
    model, clips = model_of().float(), new_clips().float()
    whole = copy.deepcopy(model)
    parallelize_time(model, mesh)
    with torch.autocast(clips.device.type, torch.bfloat16):
        expected, scores = whole(clips), model(shard_frames(clips, mesh))
    assert scores.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(scores, expected, rtol=0.02, atol=0.02)
    loss_of(expected.float()).backward()
    loss_of(scores.float()).backward()
    average(model, mesh.get_group())
    for weight, single in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, single.grad, rtol=0.1, atol=0.02)


@case((2,), on=("gloo", "NCCL"))
def compiled(mesh):
    model = model_of()
    compare(model, mesh, new_clips(), run=torch.compile(model, backend="aot_eager", fullgraph=True))


def resnet(length=5) -> nn.Module:
    """A narrow ResNet, with statistics that are not those of a new network."""
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=3)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(1, 2)
    tsm_jit.make_temporal_shift(net, length, inplace=True)
    return net.double().eval()


@case((2,), on=("gloo", "NCCL"))
def fused(mesh):
    """In either order; frozen norms."""
    net = resnet()
    tsm_jit.residual.fuse(net)
    compare(tsm_jit.VideoModel(net).eval(), mesh, torch.randn(1, 5, 3, 32, 32, dtype=torch.float64))
    net = resnet()
    frames = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = net(frames)
    parallelize_time(net, mesh)
    tsm_jit.residual.fuse(net)
    with torch.no_grad():
        close(net(shard_frames(frames[None], mesh)), share(expected[None], mesh))


@case((2, 3), on=("NCCL",))
def training_with_synchronized_norm(mesh):
    plain = resnet().train()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), mesh.get_group())
    clips = torch.randn(2, 5, 3, 32, 32, dtype=torch.float64)
    near = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)  # it exchanges inverses of deviations
    compare(tsm_jit.VideoModel(model), mesh, clips, whole=tsm_jit.VideoModel(plain), close=near)


@case((2,), on=("gloo",))
def synchronized_norm(mesh):
    """PyTorch's has no training on CPUs. In evaluation it is exact, and surgery finds the shifts inside."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(resnet())
    compare(tsm_jit.VideoModel(net).eval(), mesh, torch.randn(1, 5, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        net.train()(torch.randn(3 - mesh.get_local_rank(), 3, 32, 32, dtype=torch.float64))


# --- with data parallelism -------------------------------------------------------------------------------------------


def compare_weights(model, whole, all_clips) -> None:
    loss_of(whole(all_clips)).backward()
    for weight, single in zip(model.parameters(), whole.parameters(), strict=True):
        grad = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
        close(grad, single.grad)


@case((2, 4))
def ddp(mesh):
    """Over all ranks, data and time, with a layer after the mean; the loss is not scaled."""
    both = MESHES["data and time", mesh.size()]
    model, clips = nn.Sequential(model_of(), nn.Linear(3, 3).double()), new_clips(clips=4)
    whole = copy.deepcopy(model)
    parallelize_time(model, both["time"])
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group())
    mine = clips.chunk(both["data"].size())[both.get_local_rank("data")]
    loss_of(wrapped(shard_frames(mine, both["time"]))).backward()
    compare_weights(model, whole, clips)


@case((2, 4))
def fsdp2(mesh):
    """Weights sharded over data, gradients averaged over time as well."""
    both = MESHES["time and data", mesh.size()]
    model, clips = model_of(), new_clips(clips=4)
    whole = copy.deepcopy(model)
    parallelize_time(model, both["time"])
    for block in model.backbone[:2]:
        fully_shard(block, mesh=both)
    fully_shard(model, mesh=both)
    mine = clips.chunk(both["data"].size())[both.get_local_rank("data")]
    loss_of(model(shard_frames(mine, both["time"]))).backward()
    compare_weights(model, whole, clips)


# --- surgery and errors ---------------------------------------------------------------------------------------------


@case((2,), on=("gloo", "NCCL"))
def surgery(mesh):
    model = model_of()
    keys, clips = list(model.state_dict()), new_clips(length=6)
    whole = copy.deepcopy(model)
    parallelize_time(model, mesh)
    assert list(model.state_dict()) == keys
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(resnet_split(mesh)))]
    assert list(copies[1].state_dict()) == list(resnet().state_dict())
    with torch.no_grad():
        for length in (6, 5):
            some = clips[:, :length]
            with tsm_jit.n_segment(model, length), tsm_jit.n_segment(copies[0], length):
                tsm_jit.n_segment(whole, length)
                close(model(shard_frames(some, mesh)), whole(some))
                close(copies[0](shard_frames(some, mesh)), whole(some))
        tsm_jit.remove_temporal_shift(model)
        tsm_jit.remove_temporal_shift(whole)
        close(model(clips), whole(clips))  # a network of single frames again, of whole clips
    one = MESHES["one"]
    model = model_of()
    parallelize_time(model, mesh)
    parallelize_time(model, one)
    clips = new_clips()
    whole = copy.deepcopy(model)
    for module in whole.modules():
        module.__dict__.pop("time_shard", None)
    ours, theirs = clips.clone().requires_grad_(), clips.clone().requires_grad_()
    scores, expected = model(shard_frames(ours, one)), whole(theirs)
    assert_same_bits(scores, expected)
    scores.sum().backward()
    expected.sum().backward()
    assert_same_bits(ours.grad, theirs.grad)


def resnet_split(mesh) -> nn.Module:
    net = resnet()
    parallelize_time(net, mesh)
    return net


@case((2,), on=("gloo",))
def refused(mesh):
    model = model_of()
    parallelize_time(model, mesh)
    rank, frames = mesh.get_local_rank(), 4 - mesh.get_local_rank()
    for wrong in (new_clips(length=7), new_clips(1, frames + 1).flatten(0, 1)):
        with pytest.raises(ValueError, match=rf"must have the {frames} frames that rank {rank} of 2 holds of n_segm"):
            model(wrong)
    with pytest.raises(ValueError, match=rf"the {frames} frames of each clip that rank {rank} of 2 holds of n_segm"):
        model.backbone(new_clips(1, frames + 1).flatten(0, 1))
    short = "n_segment must be at least the number of ranks, 2, got 1"
    with tsm_jit.n_segment(model, 1), pytest.raises(ValueError, match=short):
        model(new_clips(length=1))
    with pytest.raises(ValueError, match=short):
        parallelize_time(tsm_jit.TemporalShift(nn.Identity(), 1), mesh)
    pooled = torchvision.models.resnet18()
    tsm_jit.make_temporal_pool(pooled, 8)
    with pytest.raises(ValueError, match=r"except shifts .* got TemporalPool at 'layer2'"):
        parallelize_time(pooled, mesh)
    attends = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(attends, 8, non_local="dot_product")
    with pytest.raises(ValueError, match=r"except shifts .* got NL3DWrapper at 'layer2\.0'"):
        parallelize_time(attends, mesh)
    assert not any(getattr(module, "time_shard", None) for module in attends.modules())
    with pytest.raises(ValueError, match="net must have temporal shifts"):
        parallelize_time(nn.Linear(1, 1), mesh)
    with pytest.raises(TypeError, match=r"net must be a .*Module, got int"):
        parallelize_time(1, mesh)
    with pytest.raises(TypeError, match=r"mesh must be a torch\.distributed\.device_mesh\.DeviceMesh, got list"):
        parallelize_time(model, [0, 1])
    with pytest.raises(TypeError, match="clips must be a tensor, got list"):
        shard_frames([1], mesh)
    for shape, rule in (((3,), r"must be \[N, T, \.\.\.\], got \[3\]"), ((3, 1), r"each of 2 ranks, got \[3, 1\]")):
        with pytest.raises(ValueError, match=rule):
            shard_frames(torch.randn(shape), mesh)
    split = resnet_split(mesh)
    with pytest.raises(ValueError, match="net must get its shifts before parallelize_time splits its clips"):
        tsm_jit.shift_before(split, {"layer1.0.conv2": functools.partial(tsm_jit.TemporalShift, n_segment=5)})
    shift = tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 2)
    parallelize_time(shift, mesh)
    for trace in (
        torch.fx.symbolic_trace,
        lambda net: torch.jit.trace(net, torch.randn(2, 8, 1, 1)),
        lambda net: torch.export.export(net, (torch.randn(2, 8, 1, 1),)),
        lambda net: torch.func.grad(lambda x: net(x).sum())(torch.randn(2, 8, 1, 1)),
    ):
        with pytest.raises(Exception, match="split over ranks must not be"):
            trace(nn.Sequential(shift))


@case((4,), on=("gloo",))
def mesh_of_two_dimensions(mesh):
    with pytest.raises(ValueError, match=r"mesh must have one dimension, such as mesh.'time'., got 2 dimensions"):
        parallelize_time(model_of(), MESHES["time and data", 4])
    if dist.get_rank() == 3:
        with pytest.raises(ValueError, match=r"mesh must have this process as one of its ranks, got ranks \[0, 1\]"):
            parallelize_time(model_of(), MESHES[2])


# --- ranks that differ -----------------------------------------------------------------------------------------------


@case((2, 3), on=("NCCL",))
def other_new_shapes(mesh):
    """Those that are new to all ranks, which can go on."""
    model, rank = model_of(), mesh.get_local_rank()
    parallelize_time(model, mesh)
    model(shard_frames(new_clips(), mesh))
    with pytest.raises(
        ValueError, match=r"same shape.*rank 0: clips \[23, 7, 8, 3, 4\].*rank 1: clips \[24, 7, 8, 3, 4\]"
    ):
        model(shard_frames(new_clips(23 + rank), mesh))  # no other test has so many clips
    lengths = r"rank 0: clips \[2, 28, 8.*rank 1: clips \[2, 29, 8"
    with tsm_jit.n_segment(model, 28 + rank), pytest.raises(ValueError, match=lengths):
        model(shard_frames(new_clips(2, 28 + rank), mesh))
    compare(model_of(), mesh, new_clips())


@case((3,), on=("gloo",))
def other_shapes(mesh):
    """All ranks name the shapes, whether they have seen them before or not, and can go on."""
    model, rank = model_of(), mesh.get_local_rank()
    parallelize_time(model, mesh)
    for clips in (2, 3):
        model(shard_frames(new_clips(clips), mesh))
    for mine in ((2, 2, 3), (4, 2, 2)):
        with pytest.raises(ValueError, match=rf"rank 0: clips \[{mine[0]}, 7, .*rank 2: clips \[{mine[2]}, 7, "):
            model(shard_frames(new_clips(mine[rank]), mesh))
    turned = new_clips().transpose(3, 4) if rank == 1 else new_clips()
    with pytest.raises(
        ValueError, match=r"same shape.*rank 0: clips \[2, 7, 8, 3, 4\].*rank 1: clips \[2, 7, 8, 4, 3\]"
    ):
        model(shard_frames(turned, mesh))
    model.to(torch.float32 if rank == 1 else torch.float64)
    with pytest.raises(ValueError, match=r"rank 0: clips .* torch\.float64.*rank 1: clips .* torch\.float32"):
        model(shard_frames(new_clips().to(model.head.weight.dtype), mesh))
    model.double()
    with (
        tsm_jit.n_segment(model, 7 if rank else 10),
        pytest.raises(ValueError, match=r"clips \[2, 10, .*clips \[2, 7,"),
    ):
        model(shard_frames(new_clips(2, 7 if rank else 10), mesh))
    scores = model(shard_frames(new_clips(), mesh))
    with pytest.raises(ValueError, match=r"rank 0: the sum of \[2, 3\] .*; rank 1: clips"):
        loss_of(scores).backward() if rank == 0 else model(shard_frames(new_clips(), mesh))


@case((4,), on=("gloo",))
def ranks_that_hang_or_die(mesh):  # the last case
    """Of two ranks that share clips, one hangs; of two others, one dies. The other ranks get an error."""
    mesh, model, rank = MESHES["pair"], model_of(), dist.get_rank()
    parallelize_time(model, mesh)
    dist.barrier()  # the first call connects the ranks of a pair, which takes time on a busy machine
    model(shard_frames(new_clips(), mesh))
    dist.barrier()
    if rank == 3:
        os._exit(0)
    if rank == 1:
        time.sleep(7)
        return
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 5000ms" if rank == 0 else "Connection|Read error|closed"):
        model(shard_frames(new_clips(), mesh))
    assert time.monotonic() - begin < 60


# --- CUDA graphs and streams of GPUs ---------------------------------------------------------------------------------


def captured(function, *arguments):
    """Captures ``function`` as a CUDA graph. Returns a function that takes the values of other arguments."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*arguments)

    def replay(*new):
        for argument, value in zip(arguments, new, strict=True):
            argument.copy_(value)
        graph.replay()
        return out.clone()

    return replay


class Delays:
    """Lets each rank be late at other times than the others."""

    def __init__(self, rank: int):
        self.random = random.Random(random.random() + rank)

    def __call__(self) -> None:
        if self.random.random() < 0.5:
            torch.cuda._sleep(self.random.randrange(500_000))  # up to about 300 us


@case((2, 3, 4), on=("NCCL", "peer memory"))
def buffers_are_read_before_they_are_written_again(mesh):
    """Eager calls, graphs of one and of three exchanges, larger clips, two streams: the host never waits."""
    delay, shift, results = Delays(mesh.get_local_rank()), tsm_jit.TemporalShift(nn.Identity(), 7, 4), []
    parallelize_time(shift, mesh)

    def three(x):
        return shift(shift(shift(x)))

    def new(size=5):
        return torch.randn(1, 7, 8, size, 3)

    def expected(x, times):
        for _ in range(times):
            x = tsm_jit.temporal_shift(x, fold_div=4)
        return share(x, mesh)

    with torch.no_grad():
        graphs = [captured(shift, shard_frames(new(), mesh)), captured(three, shard_frames(new(), mesh))]
        other = torch.cuda.Stream()
        for _ in range(100):
            which, x = random.randrange(5), new()
            delay()
            if which < 2:
                for _ in range(random.randint(1, 3)):
                    x = new()
                    results.append((graphs[which](shard_frames(x, mesh)), x, (1, 3)[which]))
                    delay()
            elif which == 2:
                results.append((three(shard_frames(x, mesh)), x, 3))
            elif which == 3:
                x = new(100_000 if random.random() < 0.2 else 7)
                results.append((shift(shard_frames(x, mesh)), x, 1))
            else:
                mine = shard_frames(x, mesh)
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    delay()
                    results.append((shift(mine), x, 1))
                torch.cuda.current_stream().wait_stream(other)
        for out, x, times in results:
            assert_same_bits(out, expected(x, times))


@case((2, 3, 4), on=("NCCL", "peer memory"))
def inference_as_a_graph(mesh):
    model, delay = model_of(), Delays(mesh.get_local_rank())
    whole = copy.deepcopy(model)
    parallelize_time(model, mesh)
    with torch.inference_mode():
        graph = captured(model, shard_frames(new_clips(), mesh))
        for _ in range(5):
            clips = new_clips()
            delay()
            close(graph(shard_frames(clips, mesh)), whole(clips))
        with pytest.raises(RuntimeError, match="split clips must run once before a CUDA graph captures them"):
            captured_at_once(model, shard_frames(new_clips(9), mesh))


def captured_at_once(function, *arguments):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        function(*arguments)


@case((2,), on=("NCCL", "peer memory"), inplace=False)
@case((2,), on=("NCCL", "peer memory"), inplace=True)
def training_as_a_graph(mesh, inplace):
    model, clips = model_of(inplace=inplace), new_clips()
    split = copy.deepcopy(model)
    parallelize_time(split, mesh)
    mine = shard_frames(clips, mesh).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(split, (mine.detach().clone().requires_grad_(),))
    delay = Delays(mesh.get_local_rank())
    for _ in range(3):
        clips = new_clips()
        split.zero_grad()
        model.zero_grad()
        delay()
        scores = graphed(shard_frames(clips, mesh).requires_grad_())
        loss_of(scores).backward()
        average(split, mesh.get_group())
        expected = model(clips)
        loss_of(expected).backward()
        close(scores, expected)
        for weight, single in zip(split.parameters(), model.parameters(), strict=True):
            close(weight.grad, single.grad)


# --- processes -------------------------------------------------------------------------------------------------------


def make_meshes(rank: int, world: int, device: str) -> None:
    """All processes take part in each, and in the same order."""
    for ranks in range(2, world + 1):
        MESHES[ranks] = DeviceMesh(device, list(range(ranks)))
        if ranks % 2 == 0:
            rows = [[first, first + 1] for first in range(0, ranks, 2)]
            columns = list(map(list, zip(*rows, strict=True)))
            MESHES["data and time", ranks] = DeviceMesh(device, rows, mesh_dim_names=("data", "time"))
            MESHES["time and data", ranks] = DeviceMesh(device, columns, mesh_dim_names=("time", "data"))
    pairs = [[first, first + 1] for first in range(0, world - 1, 2)]
    groups = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=5)) for ranks in pairs]
    if rank // 2 < len(groups):
        MESHES["pair"] = DeviceMesh.from_group(groups[rank // 2], device)
    MESHES["one"] = DeviceMesh.from_group([dist.new_group([each]) for each in range(world)][rank], device)


def end_if_it_hangs(device: str, seconds: int = 20) -> None:
    """Ends this process with the stacks of its threads unless the next call comes within ``seconds``, 120 on a CPU."""
    faulthandler.dump_traceback_later(120 if device == "cpu" else seconds, exit=True, file=sys.__stderr__)


def start(rank: int, world: int, folder, transport: str) -> str:
    """Connects this process with the others. Returns the type of its device."""
    torch.set_num_threads(1)
    device = "cpu" if transport == "gloo" else "cuda"
    end_if_it_hangs(device)
    if device == "cuda":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
        torch.backends.cudnn.deterministic = True  # some cases compare bits of gradients
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the time-out of NCCL ends a process without a dump
    if transport == "NCCL":  # as if the GPUs did not reach each other's memory
        torch.cuda.can_device_access_peer = lambda *_: False
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120 if device == "cpu" else 60),
    )
    return device


def counted(module, name: str) -> list:
    """Wraps a function so that the arguments of each call are in the list returned."""
    function, calls = getattr(module, name), []

    def wrapper(*arguments):
        calls.append(arguments)
        return function(*arguments)

    setattr(module, name, wrapper)
    return calls


def run(rank: int, world: int, folder, seed: int, transport: str) -> None:
    """One of the processes: runs all cases, until one fails."""
    device = start(rank, world, folder, transport)
    shared = counted(torch.distributed._symmetric_memory, "rendezvous")
    make_meshes(rank, world, device)
    begin = time.monotonic()
    for number, (name, (ranks, transports, function)) in enumerate(CASES.items()):
        if rank >= ranks or ranks > world or transport not in transports:
            continue
        random.seed(seed + number)
        torch.manual_seed(seed + number)
        end_if_it_hangs(device)
        try:
            function(MESHES[ranks])
            if device == "cuda":
                torch.cuda.synchronize()
        except BaseException as error:  # also what pytest.fail raises
            print(f"{name}, rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            raise RuntimeError(f"{name}, rank {rank}") from error
        print(f"rank {rank}: {time.monotonic() - begin:.1f} s after {name}", flush=True)
    if device == "cuda":
        uses_links = bool(shared)
        assert uses_links == (transport == "peer memory"), f"{transport}: {len(shared)} buffers shared"
        dist.barrier()  # no rank ends while another reads its memory
        torch.cuda.synchronize()
    os._exit(0)  # without the goodbyes of process groups whose ranks are dead


GETS_AN_ERROR = 3  # an exit code


def run_with_a_rank_that_dies(rank: int, folder, transport: str) -> None:
    """Rank 1 dies. Rank 0 ends with the code 0 only if a shift gets frames of rank 1 after that."""
    device = start(rank, 2, folder, transport)
    make_meshes(rank, 2, device)
    model, mesh = model_of(), MESHES["pair"]
    dist.barrier()
    parallelize_time(model, mesh)
    with torch.no_grad():
        model(shard_frames(new_clips(), mesh))
    dist.barrier()
    torch.cuda.synchronize()
    if rank == 1:
        os._exit(0)
    end_if_it_hangs(device, 60)  # NCCL ends the process some 20 s after its time-out of 5 s
    (folder / "waits").touch()
    try:
        with torch.no_grad():
            model(shard_frames(new_clips(), mesh))
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(GETS_AN_ERROR)
    os._exit(0)
