"""Measures time on the device, CPU overhead and memory of a call."""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Call = Callable[[], object]
Name = TypeVar("Name")

_FLUSH_BYTES = 256 * 2**20  # more than the L2 of any GPU


def medians(
    calls: dict[Name, Call], device: torch.device, prepare: Call, repeats: int, seconds: float
) -> dict[Name, float]:
    """Returns the median seconds of each call, in shuffled order, on CUDA with cold caches.

    ``prepare`` runs before each call and restores buffers that in-place calls change. The loop ends early after
    ``seconds`` per call. Times of a few microseconds include the gap before the launch: see :func:`in_a_row`.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    for call in calls.values():  # warm-up
        call()
        call()
    deadline = time.perf_counter() + seconds * len(calls)
    for repeat in range(repeats):
        order = list(calls)
        random.shuffle(order)
        for name in order:
            prepare()
            if flush is not None:
                flush.zero_()
            times[name].append(_elapsed(calls[name], device))
        if repeat >= 4 and time.perf_counter() > deadline:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def _elapsed(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def in_a_row(calls: Sequence[Call], device: torch.device, prepare: Call, repeats: int = 7) -> float:
    """Returns the median seconds of one call among many in a row, each on a separate buffer.

    ``prepare`` restores the buffers. On CUDA the calls are a CUDA graph, so launch gaps do not count. If the buffers
    exceed the L2 cache, caches are cold. A second graph runs every call three times, so the start of the graph cancels.
    """

    def work(rounds: int) -> None:
        for _ in range(rounds):
            results = [call() for call in calls]  # keeps all results, so that they do not share memory
            del results

    def median(run: Call) -> float:
        times = []
        for _ in range(repeats):
            prepare()
            times.append(_elapsed(run, device))
        return statistics.median(times)

    if device.type != "cuda":
        work(1)
        return median(lambda: work(1)) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(1)
    torch.cuda.current_stream().wait_stream(stream)
    seconds = {}
    for rounds in (1, 3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work(rounds)
        graph.replay()
        seconds[rounds] = median(graph.replay)
        del graph
    return (seconds[3] - seconds[1]) / (2 * len(calls))


def captured(call: Call, pool: Any = None) -> Call:
    """Captures a call as a CUDA graph, with memory of ``pool`` if given. Returns a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()

    def replay() -> None:
        graph.replay()
        call.__name__  # noqa: B018  keeps the tensors of the graph alive

    return replay


def host_seconds(call: Call, calls: int = 2000, repeats: int = 9) -> float:
    """Returns the CPU seconds of one call, the best of several rounds. It is for very small tensors."""
    for _ in range(100):
        call()
    best = float("inf")
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls // repeats):
            call()
        best = min(best, (time.perf_counter() - begin) / (calls // repeats))
    return best


@dataclass
class Cost:
    """The cost of one step: median seconds, and peak memory in bytes above the start (None: unknown)."""

    seconds: float
    peak: int | None


def measure(steps: Mapping[Name, Call], device: torch.device, repeats: int, advance: Call) -> dict[Name, Cost]:
    """Runs the steps alternately, ``repeats`` times each, so that a temporary slowdown affects all of them.

    ``advance`` runs after each step, to show the progress.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    peaks: dict[Name, list[int | None]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, run in steps.items():
            peak = peak_memory(device)
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
            peaks[name].append(peak())
            advance()
    return {
        name: Cost(statistics.median(seconds[name]), max((p for p in peaks[name] if p is not None), default=None))
        for name in steps
    }


def peak_memory(device: torch.device) -> Callable[[], int | None]:
    """Starts a measurement. Returns a function that returns the peak memory since, in bytes above the start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - start
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system, so that reuse counts
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
        resident = _resident("VmRSS")
    except (OSError, AttributeError):
        return lambda: None
    return lambda: _resident("VmHWM") - resident


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Returns the peak memory of one call in bytes, above the memory before it. None if unknown, as on CPUs."""
    if device.type != "cuda":
        return None
    call()
    peak = peak_memory(device)
    call()
    torch.cuda.synchronize()
    return peak()


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the last-level cache in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("KM")) * (2**20 if size.endswith("M") else 2**10) for size in sizes), default=2**25)
