"""Times a network whose clips are split over several GPUs, and compares it with one GPU that has all frames.

Each number of ranks trains and runs the same network on the same clip. Batch normalization uses the frames of its rank.
The efficiency is ``time of one rank / (ranks * time of all)``: with 4 ranks, 1.0 is four times as fast.
"""

from __future__ import annotations

import contextlib
import copy
import queue
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from tsm_jit.bench import timing
from tsm_jit.bench.rows import Mismatch, Row, mebibytes
from tsm_jit.convert.distributed import parallelize_time, shard_frames
from tsm_jit.convert.tsm import make_temporal_shift
from tsm_jit.modules.video import VideoModel

CLASSES = 400  # of Kinetics-400
TIME_OUT = timedelta(seconds=120)


class Case(NamedTuple):
    """A network and the length and size of its clip."""

    network: str = "resnet50"
    frames: int = 512
    size: int = 224
    steps: int = 5  # in a row, without waiting for the device
    repeats: int = 5


QUICK = Case("resnet18", 8, 32, 1, 2)


def ranks(device: torch.device) -> list[int]:
    """Returns the numbers of ranks to measure: powers of two up to the number of GPUs, 1 and 2 on a CPU."""
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    return [2**exponent for exponent in range(most.bit_length())]


def rows(device: torch.device, counts: Sequence[int], case: Case) -> Iterator[list[Row]]:
    """Yields, for each number of ranks, time, efficiency and peak memory of training and inference.

    Raises Mismatch if the split network does not have the scores of the whole one.
    """
    results = torch.multiprocessing.get_context("spawn").Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = device.type, max(counts), folder, counts, case, results
        processes = torch.multiprocessing.start_processes(_run, arguments, max(counts), join=False)
        first: list[Row] = []
        try:
            for _ in counts:
                measured = None
                while measured is None:
                    with contextlib.suppress(queue.Empty):
                        measured = results.get(timeout=1)
                    if measured is None:
                        processes.join(0)  # raises the error of a process that ended with one
                if isinstance(measured, Mismatch):
                    raise measured
                first = first or measured
                yield [_compared(row, one) for row, one in zip(measured, first, strict=True)]
            while not processes.join():
                pass
        finally:
            for process in processes.processes:  # those that wait for others
                process.terminate()
                process.join()


def _compared(row: Row, one: Row) -> Row:
    peak, peak_of_one = row["peak_mebibytes"], one["peak_mebibytes"]
    return row | {
        "efficiency": one["milliseconds"] / row["milliseconds"] / row["ranks"] * one["ranks"],
        "of_one_rank_memory": None if peak is None or peak_of_one is None else peak / peak_of_one,
    }


# --- one of the processes --------------------------------------------------------------------------------------------


def _run(rank: int, kind: str, world: int, folder: str, counts: Sequence[int], case: Case, results: Any) -> None:
    """Measures with each number of ranks, while the other processes wait."""
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, rank)
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    file = f"file://{Path(folder).resolve()}/rendezvous"
    dist.init_process_group(backend, init_method=file, rank=rank, world_size=world, timeout=TIME_OUT)
    try:
        for count in counts:
            mesh = DeviceMesh(kind, list(range(count)))
            if rank < count:
                measured: list[Row] | Mismatch
                try:
                    measured = list(_measure(mesh, device, case))
                except Mismatch as error:
                    measured = error
                if rank == 0:
                    results.put(measured)
                if isinstance(measured, Mismatch):
                    return
            dist.barrier()
    finally:
        dist.destroy_process_group()


def _measure(mesh: DeviceMesh, device: torch.device, case: Case) -> Iterator[Row]:
    torch.manual_seed(0)
    net = getattr(torchvision.models, case.network)(num_classes=CLASSES)
    make_temporal_shift(net, case.frames)
    model = VideoModel(net.to(device, memory_format=torch.channels_last))
    _check(copy.deepcopy(model), mesh, device, case)
    parallelize_time(model, mesh)
    numbers = shard_frames(torch.arange(case.frames)[None], mesh)
    frames = torch.stack([_frame(int(number), case) for number in numbers]).to(device)
    frames = frames.contiguous(memory_format=torch.channels_last)
    for training in (False, True):
        for graph in (False, True) if device.type == "cuda" else (False,):
            one = copy.deepcopy(model)
            step = _training(one, frames, mesh, graph) if training else _inference(one, frames)
            yield {
                "network": case.network,
                "frames": case.frames,
                "ranks": mesh.size(),
                "training": training,
                "graph": graph,
                "peak_mebibytes": None if graph else mebibytes(_peak_bytes(step, mesh, device)),
                "milliseconds": _seconds(timing.captured(step) if graph else step, mesh, device, case) * 1e3,
            }


def _frame(number: int, case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(3, case.size, case.size, generator=generator)


def _check(model: VideoModel, mesh: DeviceMesh, device: torch.device, case: Case) -> None:
    """Raises Mismatch on all ranks unless the split network has the scores of the whole one, in float64."""
    whole, clips = model.double().eval(), torch.stack([_frame(k, case._replace(size=32)) for k in range(case.frames)])
    clips = clips[None].double().to(device)
    with torch.inference_mode():
        expected = whole(clips)
        split = copy.deepcopy(whole)
        parallelize_time(split, mesh)
        scores = split(shard_frames(clips, mesh))
    error = torch.stack([(scores - expected).norm(), expected.norm()])
    dist.broadcast(error, 0, group=mesh.get_group())
    if not error[0] <= 1e-10 * error[1]:
        raise Mismatch(f"{case.network} on {mesh.size()} ranks does not have the scores of one rank")


def _inference(model: nn.Module, frames: Tensor) -> timing.Call:
    model.eval()
    if frames.is_cuda:
        model.bfloat16()
        frames = frames.bfloat16()

    def step() -> Tensor:
        with torch.inference_mode():
            return model(frames)

    return step


def _training(model: nn.Module, frames: Tensor, mesh: DeviceMesh, graph: bool) -> timing.Call:
    """Returns a step of SGD under autocast. Several ranks use DDP, or in a graph one all-reduce of all gradients."""
    call: nn.Module = model.train()
    weights = list(model.parameters())
    if mesh.size() > 1 and not graph:
        # Each rank keeps the statistics of its own frames, as one rank does.
        group = mesh.get_group()
        call = DistributedDataParallel(
            model, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)
    label = torch.zeros(1, dtype=torch.long, device=frames.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        autocast = torch.autocast("cuda", torch.bfloat16) if frames.is_cuda else contextlib.nullcontext()
        with autocast:
            loss = nn.functional.cross_entropy(call(frames), label)
        loss.backward()
        if mesh.size() > 1 and graph:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            total = torch.cat([each.flatten() for each in gradients])
            dist.all_reduce(total, dist.ReduceOp.AVG, group=mesh.get_group())
            parts = total.split([each.numel() for each in gradients])
            for each, part in zip(gradients, parts, strict=True):
                each.copy_(part.view(each.shape))
        optimizer.step()

    return step


def _peak_bytes(step: timing.Call, mesh: DeviceMesh, device: torch.device) -> int | None:
    """Returns the most memory of a rank during a step, with all that the benchmark keeps. None on CPUs."""
    if device.type != "cuda":
        return None
    for _ in range(2):
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    step()
    return int(_most(torch.cuda.max_memory_allocated(), mesh, device))


def _seconds(step: timing.Call, mesh: DeviceMesh, device: torch.device, case: Case) -> float:
    """Returns the median seconds of a step on the slowest rank, among several in a row."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(case.repeats + 1):
        dist.barrier(mesh.get_group())
        wait()
        begin = time.perf_counter()
        for _ in range(case.steps):
            step()
        wait()
        times.append((time.perf_counter() - begin) / case.steps)
    return _most(statistics.median(times[1:]), mesh, device)


def _most(number: float, mesh: DeviceMesh, device: torch.device) -> float:
    """Returns the greatest of the numbers of all ranks."""
    tensor = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=mesh.get_group())
    return tensor.item()
