"""Cases of networks: outputs and gradients equal those of one process."""

import copy
import functools
import random

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_compiler, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tsm_jit
from time_parallel.cases import (
    COLLECTIVES,
    MESHES,
    average,
    case,
    close,
    compare,
    loss_of,
    model_of,
    new_clips,
    resnet,
    share,
)
from tsm_jit.distributed import parallelize_time, shard_frames
from tsm_jit.ops import exchange
from tsm_jit.ops.exchange import ranks_of


@case((2, 3, 4), kind="TSM", inplace=True)
@case((3,), kind="TSM", inplace=False)
@case((2, 4), kind="TSAM", inplace=True)
@case((3,), kind="TSAM", inplace=False)
@case((4,), kind="past", inplace=False)
@case((4,), kind="circular", inplace=True)
def networks(mesh, kind, inplace):
    compare(model_of(kind, inplace), mesh, new_clips())


@case((3,))
def shifts_in_the_head(mesh):
    frames = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = tsm_jit.VideoModel(frames, tsm_jit.TemporalShift(nn.Linear(8, 3), 7, 4))
    compare(model.double(), mesh, new_clips())


@case((2,), on=("gloo",))
def bounded_memory(mesh):
    """Networks are exact if the ranks prepare more exchanges than they keep."""
    before, exchange.MAX_CALLS = exchange.MAX_CALLS, 3
    compare(model_of(), mesh, new_clips(5))  # no other test has so many
    assert len(ranks_of(mesh.get_group().group_name, torch.device("cpu")).prepared) <= 3
    exchange.MAX_CALLS = before


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


@case((2,), on=COLLECTIVES)
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


@case((2,), on=COLLECTIVES)
def compiled(mesh):
    model = model_of()
    compare(model, mesh, new_clips(), run=torch.compile(model, backend="aot_eager", fullgraph=True))
    shifts = nn.Sequential(*[tsm_jit.TemporalShift(nn.Identity(), 7, 4) for _ in range(3)])
    parallelize_time(shifts, mesh)
    graphs = CompileCounter()
    for shift in shifts:
        shift.compile(backend=graphs)
    shifts(shard_frames(new_clips(), mesh))
    assert graphs.frame_count == 1  # modules share it


class Branches(nn.Module):
    """Branches with equal shifts, none of which needs the result of another."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Sequential(*[tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 7, 4) for _ in range(2)]) for _ in range(3)]
        )

    def forward(self, x):
        return sum((branch(x) - x).tanh() for branch in self.branches).mean((2, 3))


def shuffled(module: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
    """The same graph, with its nodes in another order on each rank."""
    order, graph, copies = random.Random(random.random() + dist.get_rank()), torch.fx.Graph(), {}
    waiting = list(module.graph.nodes)
    while waiting:
        ready = [node for node in waiting if all(each in copies for each in node.all_input_nodes)]
        places = [node for node in ready if node.op == "placeholder"]
        others = [node for node in ready if node.op != "output"]
        node = places[0] if places else order.choice(others or ready)
        copies[node] = graph.node_copy(node, copies.get)
        waiting.remove(node)
    return torch.fx.GraphModule(module, graph)


@case((2, 3), on=COLLECTIVES, checkpointed=False)
@case((2,), on=COLLECTIVES, checkpointed=True)
def compiled_in_any_order(mesh, checkpointed):
    """Compilers may choose another order of independent operators on each rank."""
    branches = Branches()
    if checkpointed:
        branches.branches = nn.ModuleList([Checkpointed(branch, False) for branch in branches.branches])
    model = tsm_jit.VideoModel(branches, nn.Linear(8, 3)).double()
    backend = aot_autograd(
        fw_compiler=make_boxed_compiler(shuffled),
        bw_compiler=make_boxed_compiler(shuffled),
        partition_fn=min_cut_rematerialization_partition,
    )
    compare(model, mesh, new_clips(), run=torch.compile(model, backend=backend, fullgraph=True))


@case((2,), on=("gloo",))
def compiled_in_a_checkpoint(mesh):
    """Two clip lengths in one backward are an error."""
    net = nn.Sequential(tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 8)).double()
    parallelize_time(net, mesh)
    net.compile(backend="aot_eager")
    x = torch.randn(8, 8, 3, 5, dtype=torch.float64, requires_grad=True)

    def loss(n_segment):
        with tsm_jit.n_segment(net, n_segment):
            return checkpoint(net, x, use_reentrant=False, determinism_check="none").sum()

    losses = loss(8) + loss(4)
    with tsm_jit.n_segment(net, 4), pytest.raises(RuntimeError, match="n_segment must be"):
        losses.backward()


@case((2,), on=COLLECTIVES)
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
    """In evaluation it is exact, and surgery finds the shifts inside. PyTorch's has no training on CPUs."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(resnet())
    compare(tsm_jit.VideoModel(net).eval(), mesh, torch.randn(1, 5, 3, 32, 32, dtype=torch.float64))


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


@case((2, 4), on=("gloo", "NCCL", "peer memory"))  # PyTorch crashes where gloo scatters gradients on a GPU
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
