"""Training in several processes."""

import contextlib
import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def gradients(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    net(x).square().mean().backward()
    return {name: weight.grad for name, weight in net.named_parameters()}


def start(function: Callable, arguments: tuple, ranks: int, *, forked: bool = True) -> None:
    """Runs ``function(rank, *arguments)`` on each rank. The ranks are forks of one process, or new ones as CUDA needs.

    That process imports once, for all tests, what takes seconds. If a rank fails, the others are ended.
    """
    preloaded = ["torch._dynamo", "torch.distributed.fsdp", "torchvision", "processes", "tsm_jit"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    method = "forkserver" if forked else "spawn"
    processes = torch.multiprocessing.start_processes(function, arguments, ranks, join=False, start_method=method)
    while not processes.join(grace_period=1):
        pass


def launch(main: Callable[[list[str]], int], arguments: list, folder: Path, ranks: int = 2) -> str:
    """Runs a command line on the CPU in several processes, as torchrun does. Returns what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start(_launched, (ranks, port, main, [*map(str, arguments)], folder), ranks)
    return "".join((folder / f"{rank}.out").read_text() for rank in range(ranks))


def _launched(rank, ranks, port, main, arguments, folder) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    with (folder / f"{rank}.out").open("w") as out, contextlib.redirect_stdout(out):
        assert main(arguments) == 0


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
    start(_train, arguments, ranks, forked=device.type == "cpu")
