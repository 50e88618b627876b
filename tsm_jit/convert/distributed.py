"""Splits the frames of clips over processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tsm_jit.modules.base import ClipModule, ShiftedModule
from tsm_jit.ops.time_shard import TimeShard


def parallelize_time(net: nn.Module, mesh: Any) -> None:
    """Lets each rank of ``mesh`` process consecutive frames of every clip, in place on ``net``.

    The shifts (TSM, arXiv:1811.08383; TSAM) then exchange frames with other ranks. Outputs and gradients equal those of
    one process with all frames; only sums over ranks are rounded in another order. Weights, state-dict keys and the
    structure of ``net`` do not change.

    ``n_segment`` stays the length of the whole clip. Of ``R`` ranks each holds ``L = n_segment // R`` frames, the first
    ``n_segment % R`` ranks one more: see :func:`shard_frames`. ``net`` takes these frames ``[N*L, C, H, W]`` and
    returns their outputs. A :class:`tsm_jit.VideoModel` takes them in this shape or as ``[N, L, C, H, W]``. It returns
    the mean over all frames of the clip: the same scores ``[N, K]`` on every rank. TSAM's audio segments are the last
    frames.

    All ranks must call ``net`` and ``backward`` equally often and with equal shapes. ``backward`` computes gradients of
    the *sum* of the losses of all ranks. ``DistributedDataParallel`` and FSDP2 average gradients over their ranks. If
    these contain the ranks of ``mesh``, the gradients are exact without scaling. Double backward is supported.

    :func:`tsm_jit.n_segment` sets the length of the whole clip. :func:`tsm_jit.remove_temporal_shift` also ends the
    split: a :class:`tsm_jit.VideoModel` then takes whole clips. In a fused network (:func:`tsm_jit.residual.fuse`) the
    shifts run separately.

    Args:
        net: a network with temporal shifts. Batch normalization in training needs ``torch.nn.SyncBatchNorm`` to see the
            frames of other ranks.
        mesh: a one-dimensional ``torch.distributed.device_mesh.DeviceMesh``, such as ``mesh["time"]``. With one rank,
            ``net`` does not communicate. A later call with another mesh replaces this one.

    Raises:
        TypeError: ``net`` is not a module or ``mesh`` is not a ``DeviceMesh``.
        ValueError: ``mesh`` has more than one dimension or lacks this process. ``net`` is then unchanged, as after the
            next two errors.
        ValueError: ``net`` has no temporal shift, several clip lengths, or one below the number of ranks.
        ValueError: ``net`` has temporal pools or non-local blocks, which combine frames in other ways.
        ValueError: in ``forward``: another process split ``net``, and this one has unpickled it. Or the process group
            was destroyed. Or only some shifts of a :class:`tsm_jit.VideoModel` are split.
        ValueError: in ``forward`` and ``backward``: ranks differ in shape, dtype, clip length or layer, or only on some
            the input of a shift needs a gradient. On CPUs all ranks raise. On GPUs they do if the call is new to all of
            them, else they wait until the time-out: see "One clip over several GPUs" in examples/README.md.
        ValueError: in ``forward``: an input does not have the frames that its rank must hold. On CPUs all ranks raise.
            On GPUs this one does, and the others wait until the time-out.
        RuntimeError: in ``forward`` and ``backward``: another rank died or does not answer within the time-out of the
            process group.
        RuntimeError: in ``forward`` and ``backward``: a CUDA graph captures a shape that has not run before. If the
            graph has a backward, the shape must have run with one.
        NotImplementedError: in ``forward``: ``net`` is exported, traced or transformed by ``torch.func``. In
            ``backward``: ``is_grads_batched`` is true.

    Example::

        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: no arguments
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "time"))  # on 8 GPUs: "cuda", (2, 4)
        net = torchvision.models.resnet18()
        tsm_jit.make_temporal_shift(net, n_segment=16, inplace=True)
        model = tsm_jit.VideoModel(net)
        tsm_jit.distributed.parallelize_time(model, mesh["time"])
        wrapped = torch.nn.parallel.DistributedDataParallel(model)  # over all ranks
        clips, labels = torch.randn(2, 16, 3, 64, 64), torch.tensor([3, 7])
        scores = wrapped(tsm_jit.distributed.shard_frames(clips, mesh["time"]))
        torch.nn.functional.cross_entropy(scores, labels).backward()
        dist.destroy_process_group()
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    shard = _shard_of(mesh)
    modules = {name: module for name, module in net.named_modules() if isinstance(module, ClipModule)}
    for name, module in modules.items():
        if not isinstance(module, ShiftedModule):
            raise ValueError(
                "net must have no temporal modules except shifts to split its clips, since a shift reads few frames of "
                f"other ranks, got {type(module).__name__} at {name!r}, which combines frames in another way"
            )
        shard.length(module.n_segment)  # raises ValueError
    lengths = {module.n_segment for module in modules.values()}
    if shard.ranks > 1 and len(lengths) > 1:
        raise ValueError(f"net must have one clip length to split its clips, got n_segment {sorted(lengths)}")
    if not modules:
        raise ValueError(f"net must have temporal shifts to split its clips, got {type(net).__name__} without")
    for name, module in modules.items():
        module.time_shard, module.name_in_network = shard, name


def shard_frames(clips: Tensor, mesh: Any) -> Tensor:
    """Returns the frames that this rank of ``mesh`` holds of every clip (see :func:`parallelize_time`).

    Args:
        clips: whole clips ``[N, T, ...]`` of any dtype, equal on all ranks. Nothing is communicated. Shard the numbers
            of the frames, ``[N, T]``, to read only the frames of this rank.
        mesh: a one-dimensional ``DeviceMesh`` of ``R`` ranks.

    Returns:
        The frames ``[N*L, ...]``. ``L`` is ``T // R``, and one more for the first ``T % R`` ranks.

    Raises:
        TypeError: ``clips`` is not a tensor or ``mesh`` is not a ``DeviceMesh``.
        ValueError: ``mesh`` has more than one dimension or lacks this process, ``clips`` has fewer than two dimensions,
            or ``T`` is below ``R``.

    Example::

        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: no arguments
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        frames = tsm_jit.distributed.shard_frames(torch.randn(2, 16, 3, 64, 64), mesh)  # [32, 3, 64, 64]
        dist.destroy_process_group()
    """
    if not isinstance(clips, Tensor):
        raise TypeError(f"clips must be a tensor, got {type(clips).__name__}")
    shard = _shard_of(mesh)
    if clips.dim() < 2:
        raise ValueError(f"clips must be [N, T, ...], got {list(clips.shape)}")
    if clips.shape[1] < shard.ranks:
        raise ValueError(f"clips must have at least one frame for each of {shard.ranks} ranks, got {list(clips.shape)}")
    held = shard.frames(clips.shape[1])
    return clips[:, held.start : held.stop].flatten(0, 1)


def _shard_of(mesh: Any) -> TimeShard:
    from torch.distributed.device_mesh import DeviceMesh  # not in every build of PyTorch

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, such as mesh['time'], got {mesh.ndim} dimensions")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh must have this process as one of its ranks, got ranks {mesh.mesh.tolist()}")
    return TimeShard(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
