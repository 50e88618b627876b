"""Cases of ranks that differ."""

import pytest
import torch
import torch.distributed as dist

import tsm_jit
from time_parallel.cases import case, close, compare, loss_of, model_of, new_clips
from tsm_jit.distributed import parallelize_time, shard_frames


@case((2, 3), on=("gloo, one GPU", "NCCL"))
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
    for net, name in (model, "clips"), (model.backbone, "x"):
        mine = shard_frames(new_clips(), mesh)
        with pytest.raises(ValueError, match=rf"rank 0: clips .*rank 2: {name} must have the 2 frames .*\[3, 8, 3"):
            net(mine[:3] if rank == 2 else mine)
    with (
        tsm_jit.n_segment(model, 2 if rank == 0 else 7),
        pytest.raises(ValueError, match=r"rank 0: n_segment must be at least .* ranks, 3, got 2; rank 1: clips"),
    ):
        model(mine)
    scores = model(shard_frames(new_clips(), mesh))
    with pytest.raises(ValueError, match=r"rank 0: the sum of \[2, 3\] .*; rank 1: clips"):
        loss_of(scores).backward() if rank == 0 else model(shard_frames(new_clips(), mesh))


@case((2,))
def a_gradient_on_one_rank(mesh):
    """It would wait for gradients that the other rank does not send."""
    model, rank = model_of(), mesh.get_local_rank()
    parallelize_time(model, mesh)
    mine = shard_frames(new_clips(3), mesh)
    mine.requires_grad_(rank == 1)
    with pytest.raises(ValueError, match=r"rank 0: clips .*float64, .*; rank 1: clips .*float64 that need a gradient"):
        model(mine)
    mine = mine.detach()
    for weight in model.parameters():
        weight.requires_grad_(rank == 0 and weight is model.head.weight)
    with pytest.raises(ValueError, match=r"rank 0: the sum of .*float64 that need a gradient.*; rank 1: the sum of"):
        model(mine)
    compare(model_of(), mesh, new_clips())


@case((2,), on=("gloo",))
def a_rank_that_starts_again(mesh):
    """After an error between two shifts of one shape. The ranks notice, and then agree again."""
    model, rank = model_of(), mesh.get_local_rank()
    parallelize_time(model, mesh)
    mine = shard_frames(new_clips(), mesh)
    if rank == 1:
        failing = model.backbone[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(mine)
        failing.remove()
    with pytest.raises(ValueError, match=r"rank 0: clips .*'backbone\.1\.conv1'; rank 1: clips .*'backbone\.0\.conv1'"):
        model(mine)
    compare(model_of(), mesh, new_clips())


@case((2,), on=("gloo",))
def a_network_that_another_rank_split(mesh):
    model, clips = model_of(), new_clips(length=8)
    tsm_jit.n_segment(model, 8)
    expected = model(clips)
    parallelize_time(model, mesh)
    copies, mine = [model], shard_frames(clips, mesh)
    dist.broadcast_object_list(copies, 0, group=mesh.get_group())
    with pytest.raises(ValueError, match=r"rank 0: clips .*; rank 1: net must be split .* rank 1 of 2, .* rank 0 of 2"):
        copies[0](mine)
    parallelize_time(copies[0], mesh)
    close(copies[0](mine), expected)
