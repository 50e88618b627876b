"""Training in several processes."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def gradients(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    net(x).square().mean().backward()
    return {name: weight.grad for name, weight in net.named_parameters()}


def _train(rank, ranks, device, file, net, wrapper, compiled, x, expected) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=ranks)
    try:
        net, x = copy.deepcopy(net).to(device), x.chunk(ranks)[rank].to(device)
        if wrapper == "DDP":
            wrapped = DistributedDataParallel(net)
        else:
            mesh = init_device_mesh(device, (ranks,))
            for block in net:
                fully_shard(block, mesh=mesh)
            wrapped = fully_shard(net, mesh=mesh)
        if compiled:
            wrapped = torch.compile(wrapped, backend="aot_eager")
        wrapped(x).square().mean().backward()
        for name, weight in net.named_parameters():
            grad = weight.grad.full_tensor() if wrapper == "FSDP2" else weight.grad
            torch.testing.assert_close(grad.cpu(), expected[name])  # averaged over halves: sums in another order
        dist.barrier()  # a process that leaves while another still talks to it has been seen to end it
    finally:
        dist.destroy_process_group()


def train(wrapper, device, net, x, expected, folder, compiled=False) -> None:
    """Several processes with a part of the clips each get the gradients of one with all: two, or one per GPU."""
    ranks = 2 if device.type == "cpu" else min(2, torch.cuda.device_count())
    arguments = (ranks, device.type, str(folder / "rendezvous"), net, wrapper, compiled, x, expected)
    torch.multiprocessing.spawn(_train, arguments, nprocs=ranks)
