"""One clip over several GPUs or processes: each holds consecutive frames of every clip.

A temporal shift (TSM, arXiv:1811.08383) lets a frame read few channels of its neighbours. So if a clip is split over
ranks, only those channels of the frames at the cuts travel. Everything else in the network works on single frames. The
memory for activations is divided by the number of ranks. Outputs and gradients equal those of one process that has all
frames. See "One clip over several GPUs" in examples/README.md.

Example::

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: no arguments
    mesh = init_device_mesh("cpu", (1,))  # on 4 GPUs: "cuda", (4,)
    net = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(net, n_segment=16, inplace=True)
    model = tsm_jit.VideoModel(net)
    tsm_jit.distributed.parallelize_time(model, mesh)
    clips = torch.randn(2, 16, 3, 64, 64)
    scores = model(tsm_jit.distributed.shard_frames(clips, mesh))  # [2, 1000], equal on all ranks
    dist.destroy_process_group()
"""

from tsm_jit.convert.distributed import parallelize_time, shard_frames

__all__ = ["parallelize_time", "shard_frames"]
