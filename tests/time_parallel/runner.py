"""The processes that run the cases."""

import datetime
import faulthandler
import os
import random
import resource
import sys
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from time_parallel import networks, products, shifts, streams, surgery, unequal_ranks  # noqa: F401 (they register cases)
from time_parallel.cases import CASES, MESHES, case, model_of, new_clips
from tsm_jit.distributed import parallelize_time, shard_frames
from tsm_jit.ops import exchange


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
    with pytest.raises(RuntimeError):
        model(shard_frames(new_clips(), mesh))
    seconds = time.monotonic() - begin
    assert (4 if rank == 0 else 0) < seconds < 60, seconds  # the time limit of a pair is 5 s
    with pytest.raises(ValueError, match=r"clips must have the 4 frames .* got \[2, 5, 8, 3, 4\]"):
        model(new_clips(2, 5))


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


def end_if_it_hangs() -> None:
    """Ends this process with the stacks of its threads unless the next call comes within two minutes."""
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)


def start(rank: int, world: int, folder, transport: str) -> str:
    """Connects this process with the others. Returns the type of its device."""
    torch.set_num_threads(1)
    device = "cpu" if transport == "gloo" else "cuda"
    shares_gpu = transport.endswith("one GPU")
    end_if_it_hangs()
    if device == "cuda":
        torch.cuda.set_device(0 if shares_gpu else rank)
        torch.set_default_device("cuda")
        torch.backends.cudnn.deterministic = True  # some cases compare bits of gradients
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
        os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "1000"  # after its time-out, NCCL waits 4 times as long
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the time-out of NCCL ends a process without a dump
    if transport == "NCCL":  # as if the GPUs did not reach each other's memory
        torch.cuda.can_device_access_peer = lambda *_: False
    if transport == "peer memory, one GPU":  # as if each rank had its own
        exchange._reaches_all = lambda *_: True
    dist.init_process_group(
        "gloo" if device == "cpu" or shares_gpu else "nccl",
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
    sent_through_memory = counted(exchange, "_send")
    make_meshes(rank, world, device)
    begin = time.monotonic()
    for number, (name, (ranks, transports, function)) in enumerate(CASES.items()):
        if rank >= ranks or ranks > world or transport not in transports:
            continue
        random.seed(seed + number)
        torch.manual_seed(seed + number)
        end_if_it_hangs()
        try:
            function(MESHES[ranks])
            if device == "cuda":
                torch.cuda.synchronize()
        except BaseException as error:  # also what pytest.fail raises
            print(f"{name}, rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            raise RuntimeError(f"{name}, rank {rank}") from error
        print(f"rank {rank}: {time.monotonic() - begin:.1f} s after {name}", flush=True)
    if device == "cuda":
        assert bool(sent_through_memory) == transport.startswith("peer memory"), len(sent_through_memory)
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
    end_if_it_hangs()
    (folder / "waits").touch()
    try:
        with torch.no_grad():
            model(shard_frames(new_clips(), mesh))
            torch.cuda.synchronize()
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(GETS_AN_ERROR)
    os._exit(0)
