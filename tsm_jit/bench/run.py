"""Runs the measurements of ``python -m tsm_jit bench``, and collects their rows."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tsm_jit._jit.info import info
from tsm_jit.bench import network, report, streams, time_parallel
from tsm_jit.bench.operator import (
    DTYPES,
    LAYOUTS,
    QUICK_SHAPES,
    SHAPES,
    Shape,
    call_overhead_rows,
    floor_row,
    peer_rows,
    sweep,
)
from tsm_jit.bench.rows import Row


def environment(device: torch.device) -> Row:
    """Returns versions and hardware, on which the results depend."""
    facts: Row = dict(info()["versions"])
    facts["commit"] = _commit()
    facts["kernels"] = info()["devices"][device.type]
    facts["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device": properties.name, "multiprocessors": properties.multi_processor_count, "driver": _driver()}
    else:
        facts |= {"device": "CPU", "driver": None}
    return facts


def _commit() -> str | None:
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():  # an installed package may be inside of another repository
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(
    output: Path,
    device: torch.device,
    shapes: tuple[Shape, ...],
    quick: bool,
    measurement: str = "operator",
    families: Sequence[str] = (),
) -> Row:
    """Runs the benchmark, or a minimal part if ``quick``. Writes ``bench.json`` and plots into ``output``.

    The other measurements write a JSON file of their name: ``"network"`` times whole networks, ``"streams"`` networks
    on live streams, ``"time_parallel"`` clips that are split over several GPUs. With ``families`` it times only these
    networks and writes ``families.json``.
    """
    torch.manual_seed(0)
    parts = _parts(device, shapes, quick, measurement, families)
    results: Row = {"environment": environment(device)}
    try:
        with report.Progress(results["environment"], sum(part.measurements for part in parts)) as progress:
            for part in parts:
                results[part.name], step = [], progress.section(part.name)
                for rows in part.rows:
                    results[part.name] += rows
                    step(rows)
                    report.write(results, output)  # an interrupted run keeps the rows it has measured
    finally:
        report.save(results, output)
    return results


class Part(NamedTuple):
    """One table of a run: each of its measurements yields some rows when it is iterated."""

    name: str
    measurements: int
    rows: Iterable[list[Row]]


def _parts(
    device: torch.device, shapes: tuple[Shape, ...], quick: bool, measurement: str, families: Sequence[str]
) -> list[Part]:
    if measurement == "network" or families:
        return _network_parts(device, quick, families)
    if measurement == "streams":
        return [_streams_part(device, quick)]
    if measurement == "time_parallel":
        return [_time_parallel_part(device, quick)]
    parts = _operator_parts(device, shapes, quick)
    return parts if quick else [*parts, _streams_part(device, quick)]


def _operator_parts(device: torch.device, shapes: tuple[Shape, ...], quick: bool) -> list[Part]:
    cuda = device.type == "cuda"
    selected = shapes or (QUICK_SHAPES if quick else SHAPES if cuda else SHAPES[:3])
    dtypes, layouts = (DTYPES[:1], LAYOUTS[:1]) if quick else (DTYPES, LAYOUTS)
    lengths = [Shape(64 // t, t, 256, 56, 56) for t in (4, 8, 16, 32)]
    odd = [Shape(16, 8, 2048, 7, 7), Shape(16, 8, 1024, 14, 14), Shape(16, 8, 72, 28, 28)]
    grid = selected if quick or shapes or not cuda else (*lengths, *odd)
    Case = tuple[Shape, torch.dtype, str, int]
    floors: list[Case] = list(itertools.product(grid, dtypes, layouts, (0,) if quick else (0, 1, 2, 3, 4)))
    compared: list[Case] = list(itertools.product(selected, dtypes, layouts, (0,) if quick else (0, 2)))

    largest = 2**22 if quick else 2**33 if cuda else 2**28
    if cuda:  # rotating buffers need the tensor four times
        largest = min(largest, torch.cuda.mem_get_info(device)[0] // 5)
    sizes = list(sweep(largest))

    return [
        Part("calls", 1, map(call_overhead_rows, [device])),
        Part("floor", len(floors), ([floor_row(*case, device)] for case in floors)),
        Part("sweep", len(sizes), ([floor_row(shape, torch.float32, "NCHW", 0, device)] for shape in sizes)),
        Part("peers", len(compared), (peer_rows(*case, device, 50, not quick) for case in compared)),
    ]


def _network_parts(device: torch.device, quick: bool, families: Sequence[str]) -> list[Part]:
    """Returns the tables of all networks, or only of those that ``families`` names."""
    cuda, repeats, parts = device.type == "cuda", 5 if quick else 50, []
    if not families:
        resnets = network.cases(cuda, quick)
        parts.append(Part("network", len(resnets), network.rows(device, resnets, repeats)))
        families = network.FAMILIES[:1] if quick else network.FAMILIES
    installed = []
    for name in families:
        if package := network.missing_package(name):
            sys.stderr.write(f"{name} is skipped: it needs {package}\n")
        else:
            installed.append(name)
    selected = network.family_cases(cuda, quick, installed)
    return [*parts, Part("families", len(selected), network.rows(device, selected, repeats, network.EVERY_FAMILY))]


def _streams_part(device: torch.device, quick: bool) -> Part:
    counts = streams.STREAMS[:1] if quick else streams.STREAMS
    return Part(
        "online", len(counts), streams.rows(device, 3 if quick else 300 if device.type == "cuda" else 10, counts)
    )


def _time_parallel_part(device: torch.device, quick: bool) -> Part:
    counts = time_parallel.ranks(device)
    case = time_parallel.QUICK if quick or device.type == "cpu" else time_parallel.Case()
    return Part("time_parallel", len(counts), time_parallel.rows(device, counts, case))
