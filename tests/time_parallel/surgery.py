"""Cases of surgery on networks whose clips are split, and of wrong arguments."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
import torchvision
from support import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import tsm_jit
from time_parallel.cases import COLLECTIVES, MESHES, case, close, model_of, new_clips, resnet
from tsm_jit.distributed import parallelize_time, shard_frames


@case((2,), on=COLLECTIVES)
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
    lengths = nn.Sequential(*[tsm_jit.TemporalShift(nn.Identity(), length, 4) for length in (6, 3)])
    whole = copy.deepcopy(lengths)
    parallelize_time(lengths, one)
    assert_same_bits(lengths(clips.flatten(0, 1)), whole(clips.flatten(0, 1)))
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
        with pytest.raises(
            ValueError, match=rf"must have the {frames} frames of each clip that rank {rank} of 2 holds"
        ):
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
    half = model_of()
    half.backbone[1].conv1.n_segment = 4
    with pytest.raises(ValueError, match=r"net must have one clip length to split its clips, got n_segment \[4, 7\]"):
        parallelize_time(half, mesh)
    for partly in (half, model_of()):  # one shift is not split, or has another length
        parallelize_time(partly.backbone[0], mesh)
        with pytest.raises(ValueError, match="all shifts of a split VideoModel must be split by one call"):
            partly(shard_frames(new_clips(), mesh))
    split = resnet_split(mesh)
    with pytest.raises(ValueError, match="net must get its shifts before parallelize_time splits its clips"):
        tsm_jit.shift_before(split, {"layer1.0.conv2": functools.partial(tsm_jit.TemporalShift, n_segment=5)})
    shift = tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 2)
    parallelize_time(shift, mesh)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        shift([1.0])
    for trace in (
        torch.fx.symbolic_trace,
        lambda net: torch.jit.trace(net, torch.randn(2, 8, 1, 1)),
        lambda net: torch.export.export(net, (torch.randn(2, 8, 1, 1),)),
        lambda net: torch.func.grad(lambda x: net(x).sum())(torch.randn(2, 8, 1, 1)),
    ):
        with pytest.raises(Exception, match="split over ranks must not be"):
            trace(nn.Sequential(shift))


@case((2,), on=("gloo",))
def destroyed_group(mesh):
    model, group = model_of(), dist.new_group([0, 1])
    parallelize_time(model, DeviceMesh.from_group(group, "cpu"))
    mine = shard_frames(new_clips(), mesh)
    model(mine)
    dist.destroy_process_group(group)
    with pytest.raises(
        ValueError, match="net must be split by parallelize_time in the process that calls it, which has"
    ):
        model(mine)


@case((4,), on=("gloo",))
def mesh_of_two_dimensions(mesh):
    with pytest.raises(ValueError, match=r"mesh must have one dimension, such as mesh.'time'., got 2 dimensions"):
        parallelize_time(model_of(), MESHES["time and data", 4])
    if dist.get_rank() == 3:
        with pytest.raises(ValueError, match=r"mesh must have this process as one of its ranks, got ranks \[0, 1\]"):
            parallelize_time(model_of(), MESHES[2])
