"""Writes the results of the benchmark: tables during the run, JSON and plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from tsm_jit.bench.rows import Row

_COLUMNS = {
    "calls": ("call", "microseconds", "cheaper_than_stock"),
    "peers": (
        "shape", "dtype", "layout", "depth", "operation", "who",
        "milliseconds", "gigabytes_per_second", "of_copy", "against_eager", "peak_mebibytes",
    ),
    "floor": ("shape", "dtype", "layout", "depth", *(operations := (
        "forward", "backward", "forward in place", "backward in place"
    ))),
    "sweep": ("mebibytes", *operations),
    "online": (
        "streams", "who", "median_milliseconds", "p99_milliseconds", "latency_frames", "state_mebibytes",
        "peak_mebibytes",
    ),
    "network": (
        "network", "method", "batch", "training", "compiled", "who",
        "milliseconds", "of_no_shift", "peak_mebibytes", "of_no_shift_memory",
    ),
    "time_parallel": (
        "network", "frames", "training", "graph", "ranks",
        "milliseconds", "efficiency", "peak_mebibytes", "of_one_rank_memory",
    ),
    "families": (
        "network", "batch", "training", "graph", "who",
        "milliseconds", "of_no_shift", "peak_mebibytes", "of_no_shift_memory",
    ),
}  # fmt: skip
_HEADS = {
    "depth": "shift",
    "who": "implementation",
    "microseconds": "us",
    "milliseconds": "ms",
    "median_milliseconds": "median ms",
    "p99_milliseconds": "p99 ms",
    "gigabytes_per_second": "GB/s",
    "mebibytes": "MiB",
    "peak_mebibytes": "peak MiB",
    "latency_frames": "latency",
    "state_mebibytes": "state MiB",
    "of_copy": "of copy",
    "against_eager": "vs eager",
    "cheaper_than_stock": "vs stock",
    "of_no_shift": "vs no shift",
    "of_no_shift_memory": "memory vs no shift",
    "of_one_rank_memory": "of one rank",
}
_TEXT = ("shape", "dtype", "layout", "depth", "operation", "call", "who", "network", "method")
_WIDTHS = {"shape": 26, "dtype": 8, "layout": 13, "call": 25, "who": 27, "network": 26} | dict.fromkeys(operations, 20)
_TITLES = {
    "calls": "CPU overhead of one call, 8 frames of 64 channels of 2x2. vs stock: times as fast as TSM's own code",
    "peers": "Single calls, on CUDA with cold caches. TSAM, 2: of depth 2. of copy: bandwidth relative to a copy of "
    "the tensor. vs eager: times as fast as eager PyTorch",
    "floor": "Many calls in a row: microseconds, and % of the bandwidth of a copy of the same number of bytes",
    "sweep": "Sizes from small to large, float32 NCHW TSM: microseconds, and % of the bandwidth of a copy",
    "online": "One frame of a TSM-ResNet-50, 224x224 float32: from the frame on the device to scores there. "
    "latency: the scores are those of the frame that arrived this number of frames before",
    "network": "Networks with 8 frames per clip (TSAM: and a segment of audio), channels_last, on CUDA in bfloat16. "
    "Training: a step of SGD. Inference: on CUDA as a CUDA graph",
    "time_parallel": "One clip split over ranks, channels_last, on CUDA in bfloat16, 224x224. Training: a step of SGD. "
    "efficiency: time of one rank / time / ranks",
    "families": "Networks of every architecture, with TSM's shift, 8 frames per clip, channels_last, on CUDA in "
    "bfloat16. graph: a CUDA graph, the time of the GPU alone. Memory: without a graph",
}


class Progress:
    """Prints tables to stdout row by row, and shows a progress bar on stderr if that is a terminal."""

    def __init__(self, environment: Row, measurements: int):
        # The estimate of the remaining time is the mean over all measurements, as their durations differ.
        self._bar = tqdm(total=measurements, unit="measurement", leave=False, smoothing=0, disable=None)
        self._print(", ".join(f"{name}: {value}" for name, value in environment.items() if value is not None))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def section(self, name: str) -> Callable[[list[Row]], None]:
        """Starts a table. Returns a function that prints the rows of one measurement."""
        columns = _COLUMNS[name]
        self._print("", _TITLES[name], "  ".join(_aligned(column, _HEADS.get(column, column)) for column in columns))
        self._bar.set_description(name)

        def step(rows: list[Row]) -> None:
            for row in rows:
                self._print("  ".join(_aligned(column, _text(column, row[column])) for column in columns))
            self._bar.update()

        return step

    def _print(self, *lines: str) -> None:
        self._bar.write("\n".join(lines), file=sys.stdout)  # removes the bar from the terminal while it writes
        sys.stdout.flush()


def _aligned(column: str, text: str) -> str:
    """Pads a cell. Columns of text are aligned to the left, numbers to the right."""
    width = max(_WIDTHS.get(column, 9), len(_HEADS.get(column, column)))
    return text.ljust(width) if column in _TEXT else text.rjust(width)


def _text(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "depth":
        return f"TSAM, {value}" if value else "TSM"
    if column in operations:
        return f"{value['microseconds']:.1f} us, {value['of_floor']:.1%}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column in ("of_copy", "of_no_shift", "of_no_shift_memory", "efficiency", "of_one_rank_memory"):
        return f"{value:.1%}"
    if column in ("against_eager", "cheaper_than_stock"):
        return f"{value:.2f}x"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(results: Row, folder: Path) -> str:
    """Writes a JSON file, which has the name of the measurement. Returns the file name."""
    folder.mkdir(parents=True, exist_ok=True)
    named = [each for each in ("network", "families", "time_parallel") if each in results]
    if named:
        name = f"{named[0]}.json"
    elif _is_of_streams(results):
        name = "streams.json"
    else:
        name = "bench.json"
    partial = folder / f"{name}.partial"  # an interrupted write leaves the earlier file intact
    partial.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    partial.replace(folder / name)
    return name


def _is_of_streams(results: Row) -> bool:
    """Whether these are the results of ``bench --streams``. Those of ``bench`` also have a table of streams."""
    return "online" in results and "calls" not in results


def save(results: Row, folder: Path) -> None:
    """Writes the JSON file and the plots."""
    names = [write(results, folder), *draw(results, folder)]
    sys.stdout.write(f"\nwritten to {folder}: {', '.join(names)}\n")


def draw(results: Row, folder: Path) -> list[str]:
    """Draws a PNG file for every plot. Returns the file names."""
    written = []
    plots = {"sweep": draw_sweep, "peers": draw_peers, "network": draw_network, "families": draw_families}
    plots |= {"time_parallel": draw_time_parallel} | ({"online": draw_streams} if _is_of_streams(results) else {})
    for table, plot in plots.items():
        if results.get(table):
            name = "streams.png" if table == "online" else f"{table}.png"
            plot(results[table], results["environment"]).savefig(folder / name, dpi=110)
            written.append(name)
    return written


def markdown(results: Row) -> str:
    """Returns the tables of examples/README.md. Raises ValueError or KeyError unless it was a full run on a GPU."""
    about = results["environment"]
    if about["driver"] is None:
        raise ValueError("it ran on the CPU")
    title = f"{about['device']}, driver {about['driver']}, torch {about['torch']}, commit {about['commit']}"
    if "network" in results or "families" in results:
        tables = (("network", _network_markdown), ("families", _families_markdown))
        return "\n".join(table(results[name], title) for name, table in tables if results.get(name))
    if "time_parallel" in results:
        return _time_parallel_markdown(results["time_parallel"], title)
    if _is_of_streams(results):
        return _streams_markdown(results["online"], title)
    whose = {
        "forward": ("eager", "compiled", "tsm_jit", "tsm_jit in place"),
        "backward": ("eager", "compiled", "tsm_jit"),
    }
    columns = [(operation, who) for operation, names in whose.items() for who in names]
    heads = [f"{operation}: {who}" for operation, who in columns]
    lines = [f"{title}. Milliseconds of one call with cold caches, float32, NCHW:", ""]
    lines.append("| (B, T, C, H, W)/fold_div | " + " | ".join(heads) + " |")
    lines.append("| --- |" + " --- |" * len(columns))
    peers = [row for row in results["peers"] if (row["dtype"], row["layout"], row["depth"]) == ("float32", "NCHW", 0)]
    times = {(row["shape"], (row["operation"], row["who"])): row["milliseconds"] for row in peers}
    for shape in dict.fromkeys(row["shape"] for row in peers):
        lines.append(f"| {shape} | " + " | ".join(f"{times[shape, column]:.3f}" for column in columns) + " |")

    # examples/README.md has rows for several clip lengths. The JSON also has other shapes.
    floor = [row for row in results["floor"] if row["depth"] == 0 and "256, 56, 56" in row["shape"]]
    if not floor:
        raise ValueError("it has no row of 256 channels of 56x56")
    shapes = ", ".join(dict.fromkeys(row["shape"] for row in floor))
    lines += [
        "",
        "Bandwidth relative to a copy of as many bytes, many calls in a row on rotating buffers. "
        "The least and the most of these shapes:",
    ]
    lines += [f"{shapes}.", "", "| | " + " | ".join(operations) + " |", "| --- |" + " --- |" * len(operations)]
    for dtype, layout in dict.fromkeys((row["dtype"], row["layout"]) for row in floor):
        cells = []
        for operation in operations:
            parts = [row[operation]["of_floor"] for row in floor if (row["dtype"], row["layout"]) == (dtype, layout)]
            cells.append(" to ".join(dict.fromkeys(f"{part:.0%}" for part in (min(parts), max(parts)))))
        lines.append(f"| {dtype}, {layout} | " + " | ".join(cells) + " |")

    online = results["online"]
    lines += [
        "",
        "Milliseconds of one frame of each stream through a ResNet-50, 224x224 float32, "
        "from the frame on the GPU to its scores:",
        "",
    ]
    counts = _stream_counts(online)
    lines += ["| | " + " | ".join(f"{n}: median | {n}: p99" for n in counts) + " |"]
    lines += ["| --- |" + " --- | --- |" * len(counts)]
    for who in dict.fromkeys(row["who"] for row in online):
        rows = [row for row in online if row["who"] == who]
        cells = [f"{row['median_milliseconds']:.2f} | {row['p99_milliseconds']:.2f}" for row in rows]
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _stream_counts(rows: list[Row]) -> list[str]:
    return [f"{n} stream{'s' if n > 1 else ''}" for n in dict.fromkeys(row["streams"] for row in rows)]


def _streams_markdown(rows: list[Row], title: str) -> str:
    columns = ("median_milliseconds", "p99_milliseconds", "state_mebibytes", "peak_mebibytes")
    heads = [f"{n}: {head}" for n in _stream_counts(rows) for head in ("median", "p99", "state", "peak memory")]
    lines = [
        f"{title}. A frame of each stream through a ResNet-50, 224x224 float32, milliseconds and MiB:",
        "",
        "| | latency, frames | " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * (1 + len(heads)),
    ]
    for who in dict.fromkeys(row["who"] for row in rows):
        of_who = [row for row in rows if row["who"] == who]
        cells = ["-" if row[column] is None else f"{row[column]:.2f}" for row in of_who for column in columns]
        lines.append(f"| {who} | {of_who[0]['latency_frames']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_streams(rows: list[Row], environment: Row) -> Figure:
    """Draws bars of the time, the latency and the memory of each method, for each number of streams."""
    names, counts = list(dict.fromkeys(row["who"] for row in rows)), dict.fromkeys(row["streams"] for row in rows)
    titles = {
        "median_milliseconds": "a frame, ms: median, line to p99",
        "latency_frames": "latency, frames",
        "state_mebibytes": "state, MiB",
        "peak_mebibytes": "peak memory, MiB",
    }
    columns = [column for column in titles if any(row[column] is not None for row in rows)]
    figure = Figure(figsize=(3 * len(columns) + 2, 0.5 * len(names) + 1.5), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        for k, (streams, label) in enumerate(zip(counts, _stream_counts(rows), strict=True)):
            known = [row for row in rows if row["streams"] == streams and row[column] is not None]
            places = [names.index(row["who"]) + k / (len(counts) + 1) for row in known]
            above = [row["p99_milliseconds"] - row["median_milliseconds"] for row in known]
            lines = {"xerr": ([0] * len(known), above)} if column == "median_milliseconds" else {}
            widths, height = [row[column] for row in known], 1 / (len(counts) + 1)
            bars = axis.barh(places, widths, height, align="edge", label=label, ecolor="gray", **lines)
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axis.margins(x=0.15)  # room for the labels
        axis.set(title=titles[column], yticks=[i + 1 / 3 for i in range(len(names))], yticklabels=names)
        axis.set(xlim=(0, None), ylim=(len(names), -0.2))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=len(counts), loc="outside lower center")
    figure.suptitle(f"A TSM-ResNet-50 on streams, 224x224 float32, on {environment['device']}")
    return figure


def _time_parallel_markdown(rows: list[Row], title: str) -> str:
    counts = list(dict.fromkeys(row["ranks"] for row in rows))
    heads = [f"{n} GPU{'s' if n > 1 else ''}" for n in counts]
    lines = [
        f"{title}. One clip of {rows[0]['frames']} frames. Milliseconds; with several GPUs the efficiency, and the "
        "peak memory of each relative to one GPU:",
        "",
        "| | " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * len(heads),
    ]
    for mode, by_ranks in _by_mode(rows).items():
        cells = []
        for row in by_ranks:
            memory = "" if row["peak_mebibytes"] is None else f"{row['peak_mebibytes']:.0f} MiB"
            cell = f"{row['milliseconds']:.2f}"
            if row["ranks"] > 1:
                cell += f" ({row['efficiency']:.1%})"
                memory = memory and f"{row['of_one_rank_memory']:.2f}"
            cells.append(f"{cell}, {memory}" if memory else cell)
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_mode(rows: list[Row]) -> dict[str, list[Row]]:
    modes: dict[str, list[Row]] = {}
    for row in rows:
        mode = f"{'training' if row['training'] else 'inference'}, {'CUDA graph' if row['graph'] else 'eager'}"
        modes.setdefault(mode, []).append(row)
    return modes


def draw_time_parallel(rows: list[Row], environment: Row) -> Figure:
    """Draws the efficiency and the memory of each rank against the number of ranks."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    efficiency, memory = figure.subplots(1, 2)
    for mode, by_ranks in _by_mode(rows).items():
        counts = [row["ranks"] for row in by_ranks]
        (line,) = efficiency.plot(counts, [100 * row["efficiency"] for row in by_ranks], marker="o", label=mode)
        if all(row["peak_mebibytes"] is not None for row in by_ranks):
            peaks = [row["peak_mebibytes"] / 1024 for row in by_ranks]
            memory.plot(counts, peaks, marker="o", color=line.get_color())
    efficiency.set(ylabel="efficiency, %", ylim=(0, 110))
    efficiency.legend()
    memory.set(ylabel="peak memory of a rank, GiB", ylim=(0, None))
    for axis in (efficiency, memory):
        axis.set(xscale="log", xlabel="ranks", xticks=counts, xticklabels=counts)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.suptitle(f"{rows[0]['network']}, a clip of {rows[0]['frames']} frames, on {environment['device']}")
    return figure


def _network_markdown(rows: list[Row], title: str) -> str:
    names = list(dict.fromkeys(row["who"] for row in rows))
    others = [name for name in names if name != "no shift"]
    lines = [f"{title}. Without shift: time, and peak memory in brackets. With shift: both relative to no shift:", ""]
    lines.append("| | no shift | " + " | ".join(others) + " |")
    lines.append("| --- |" + " --- |" * len(names))
    for case, variants in _by_case(rows).items():
        plain = variants["no shift"]
        cells = [f"{plain['milliseconds']:.2f} ms ({plain['peak_mebibytes']:.0f} MiB)"]
        for row in map(variants.get, others):
            cells.append("-" if row is None else f"{row['of_no_shift']:.2f} ({row['of_no_shift_memory']:.2f})")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _by_case(rows: list[Row]) -> dict[str, dict[str, Row]]:
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        mode = f"{'compiled' if row['compiled'] else 'eager'} {'training' if row['training'] else 'inference'}"
        title = f"{row['method']}-{row['network'].replace('resnet', 'ResNet-')}, {row['batch']} clips, {mode}"
        cases.setdefault(title, {})[row["who"]] = row
    return cases


# The values in each cell of the table of architectures: name, rows that have it, and column relative to no shift.
_FAMILY_VALUES: dict[str, tuple[Callable[[Row], bool], str]] = {
    "training": (lambda row: row["training"] and not row["graph"], "of_no_shift"),
    "GPU time of training": (lambda row: row["training"] and row["graph"], "of_no_shift"),
    "inference": (lambda row: not row["training"], "of_no_shift"),
    "peak memory in training": (lambda row: row["training"] and not row["graph"], "of_no_shift_memory"),
}


def _by_family(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    """Returns the row with each value, by network, variant and name of the value. Unknown values are missing."""
    return {
        (row["network"], row["who"], name): row
        for row in rows
        for name, (has_it, column) in _FAMILY_VALUES.items()
        if has_it(row) and row[column] is not None
    }


def _families_markdown(rows: list[Row], title: str) -> str:
    row_of, networks = _by_family(rows), list(dict.fromkeys(row["network"] for row in rows))
    names = list(dict.fromkeys(row["who"] for row in rows))

    def cell(network: str, who: str) -> str:
        values = []
        for name, (_, column) in _FAMILY_VALUES.items():
            row = row_of.get((network, who, name))
            if row is None:
                values.append("-")
            elif who != "no shift":
                values.append(f"{row[column]:.2f}")
            elif column == "of_no_shift":
                values.append(f"{row['milliseconds']:.1f} ms")
            else:
                values.append(f"{row['peak_mebibytes']:.0f} MiB")
        return "-" if set(values) == {"-"} else " / ".join(values)

    lines = [
        f"{title}. {rows[0]['batch']} clips: {' / '.join(_FAMILY_VALUES)}. With shift, all relative to no shift:",
        "",
        "| | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
        *(f"| {network} | " + " | ".join(cell(network, who) for who in names) + " |" for network in networks),
    ]
    return "\n".join(lines) + "\n"


def draw_families(rows: list[Row], environment: Row) -> Figure:
    """Draws bars of time and memory relative to no shift, for one or two networks of every architecture."""
    row_of, networks = _by_family(rows), list(dict.fromkeys(row["network"] for row in rows))
    names = [name for name in dict.fromkeys(row["who"] for row in rows) if name != "no shift"]
    values = [value for value in _FAMILY_VALUES if any(key[2] == value for key in row_of)]
    figure = Figure(figsize=(3 * len(values) + 2, 0.55 * len(networks) + 1.8), layout="constrained")
    for axis, value in zip(figure.subplots(1, len(values), sharey=True, squeeze=False)[0], values, strict=True):
        column = _FAMILY_VALUES[value][1]
        for k, who in enumerate(names):
            bars = [(i, row_of.get((network, who, value))) for i, network in enumerate(networks)]
            places = [i + k / (len(names) + 1) for i, row in bars if row]
            widths = [row[column] for _, row in bars if row]
            drawn = axis.barh(places, widths, height=1 / (len(names) + 1), align="edge", label=who)
            axis.bar_label(drawn, fmt="%.2f", padding=2, fontsize=6)
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.margins(x=0.12)  # room for the labels
        axis.set(title=value, yticks=[i + 0.4 for i in range(len(networks))], ylim=(len(networks), -0.2))
        axis.set_yticklabels(networks)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=len(names), loc="outside lower center")
    figure.suptitle(f"Networks with temporal shift, relative to no shift, on {environment['device']}")
    return figure


def draw_network(rows: list[Row], environment: Row) -> Figure:
    """Draws bars of the time relative to the network without shift."""
    cases = _by_case(rows)
    names = list(dict.fromkeys(row["who"] for row in rows))
    figure = Figure(figsize=(11, 0.7 * len(cases) + 1.5), layout="constrained")
    axis = figure.subplots()
    for k, name in enumerate(names):
        drawn = [(i, variants[name]) for i, variants in enumerate(cases.values()) if name in variants]
        places = [i + k / (len(names) + 1) for i, _ in drawn]
        widths = [row["of_no_shift"] for _, row in drawn]
        bars = axis.barh(places, widths, height=1 / (len(names) + 1), align="edge", label=name)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set(xlabel="time relative to the network without shift", yticks=[i + 0.4 for i in range(len(cases))])
    axis.set(yticklabels=list(cases), ylim=(len(cases), -0.2))
    axis.legend(ncols=len(names), loc="upper right", fontsize=8)
    figure.suptitle(f"ResNets with temporal shift, on {environment['device']}")
    return figure


def draw_sweep(rows: list[Row], environment: Row) -> Figure:
    """Draws GB/s and % of the bandwidth of a copy against the size of the tensor."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    rate, part = figure.subplots(1, 2)
    sizes = [row["mebibytes"] for row in rows]
    for operation in operations:
        rate.plot(sizes, [row[operation]["gigabytes_per_second"] for row in rows], marker="o", label=operation)
        part.plot(sizes, [100 * row[operation]["of_floor"] for row in rows], marker="o", label=operation)
    part.axhline(100, color="gray", linewidth=0.8)
    rate.set(ylabel="GB/s")
    part.set(ylabel="% of the bandwidth of a copy", ylim=(0, None))
    for axis in (rate, part):
        axis.set(xscale="log", xlabel="tensor, MiB")
        axis.grid(alpha=0.3)
    rate.legend()
    figure.suptitle(f"temporal shift, float32 NCHW, on {environment['device']}: many calls on rotating buffers")
    return figure


def draw_peers(rows: list[Row], environment: Row) -> Figure:
    """Draws bars of the speed of each shape and operation relative to eager PyTorch."""
    keys = ("dtype", "layout", "depth")
    rows = [row for row in rows if all(row[key] == rows[0][key] for key in keys)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(2.2 * len(shapes) + 5, 7), layout="constrained")
    for axis, operation in zip(figure.subplots(2, 1), ("forward", "backward"), strict=True):
        selected = [row for row in rows if row["operation"] == operation]
        names = list(dict.fromkeys(row["who"] for row in selected))
        for k, name in enumerate(names):
            times = {row["shape"]: row["against_eager"] for row in selected if row["who"] == name}
            places = [i + (k - len(names) / 2) / (len(names) + 1) for i in range(len(shapes))]
            heights = [times.get(shape, 0) for shape in shapes]
            axis.bar(places, heights, width=1 / (len(names) + 1), align="edge", label=name)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(ylabel=f"{operation}: times as fast as eager", xticks=range(len(shapes)), xticklabels=shapes)
    figure.axes[0].legend(ncols=3)
    figure.suptitle(f"TSM's shift, {rows[0]['dtype']} {rows[0]['layout']}, on {environment['device']}")
    return figure
