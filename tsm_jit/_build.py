"""Compiles the kernels into one shared library: the compilers all at once, each bounded in time, without a shell.

``torch.utils.cpp_extension`` would run ninja, which hands every path to a shell, take its tools from the user's
environment, wait for a compiler that hangs, and need several seconds of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tsm_jit import _toolchain
from tsm_jit._toolchain import BuildError

if TYPE_CHECKING:
    from tsm_jit._loader import Recipe

SECONDS = 300  # a compiler that takes longer hangs
MOST_LOGGED = 2**24  # bytes; a compiler that says more never ends
EVERY_GENERATION = "all"
_NAMES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# Such failures pass by themselves: the next import may try again.
_PASSING = "Killed|signal 9\\b|o space left|quota exceeded|ile size limit|File too large|ut of memory|annot allocate"
_PASSING += "|Input/output error|tale file handle|temporarily unavailable"
# So does what somebody else does to a compiler; one that crashes will do so again.
_ENDED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGXFSZ}


def say(message: str, end: str = "\n") -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"tsm_jit: {message}{end}")
        sys.stderr.flush()


def build(recipe: Recipe, folder: Path, library: str, log: Path, chosen: str | None) -> dict[str, Any]:
    """Compiles ``recipe`` into ``folder/library``, for the GPUs that ``chosen`` lists; returns what to remember of it.

    While it runs there is one line on standard error, which counts the seconds if that is a terminal.
    """
    (folder / "kernels").symlink_to(recipe.kernels)
    package = Path(torch.__file__).parent
    cpp = [*recipe.cxx, *recipe.cflags, "-std=c++17", "-fPIC", "-isystem", str(package / "include")]
    libraries = [f"-L{package / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    codes, facts, compile_cuda = [], {}, None
    if recipe.compiler:
        cpp += recipe.cuda_defines
        libraries += ["-lc10_cuda", "-ltorch_cuda"]
    if recipe.by == "nvcc":
        codes = gpu_code(recipe.compiler, _toolchain.nvcc_architectures(recipe.compiler), chosen)
        toolkit, version = _toolchain.toolkit_root(recipe.compiler), _toolchain.nvcc_version(recipe.compiler)
        facts["toolkit"] = f"{toolkit} (CUDA {version})"
        facts["nvcc"] = str(toolkit / "bin" / "nvcc")
        _refuse_second_runtime(version)
        if version != torch.version.cuda:
            say(f"warning: {_mismatch(version)}")
        flags = _gencode(codes)
        # gcc is all that nvcc looks for.
        host = [] if shutil.which("gcc") else ["-ccbin", _plain_name(folder, "host", recipe.cxx[0])]
        nvcc = _plain_name(folder, "cuda", str(recipe.compiler))
        compile_cuda = [nvcc, *recipe.cuda_cflags, *flags, *host, "-std=c++17", "-Xcompiler=-fPIC"]
        if toolkit != Path("/usr"):  # whose headers g++ must find by itself
            cpp += ["-isystem", str(toolkit / "include")]
        libraries += _toolchain.cudart(toolkit)
    elif recipe.by == "NVRTC":
        version, known = _toolchain.nvrtc_can(recipe.compiler)
        codes = gpu_code(recipe.compiler, known, chosen)
        facts["toolkit"] = f"{recipe.compiler} (CUDA {version})"
        if version != torch.version.cuda:
            say(f"warning: {_mismatch(version, 'NVRTC')}")
        cpp += recipe.nvrtc_defines
        libraries += ["-ldl", "-Wl,--no-undefined"]  # all that is launched is there
    architectures = [code.replace("compute_", "PTX ") for code in codes]

    def compile_cpp(name: str, *options: str) -> list[str]:
        return [*cpp, *recipe.cflags_of.get(name, ()), *options, "-c", f"kernels/{name}", "-o", f"{name}.o"]

    def with_nvcc(*more: str) -> list[list[str]]:
        return [[*compile_cuda, *more, "-c", f"kernels/{name}", "-o", f"{name}.o"] for name in recipe.cuda_sources]

    def with_nvrtc(name: str, code: str) -> list[str]:
        command = _toolchain.nvrtc_command(recipe.compiler)
        return [*command, f"kernels/{name}", code, "-o", f"{name}.{code}", *recipe.nvrtc_flags]

    names = [*recipe.cpp_sources]
    commands = [compile_cpp(name) for name in recipe.cpp_sources]
    with _Progress(["CPU", *architectures]) as progress, open(log, "ab") as output:
        if recipe.by == "nvcc":
            names += recipe.cuda_sources
            try:
                _run([*with_nvcc(), *commands], folder, output, progress)
            except BuildError:
                older = _older_gxx(_said(output))
                if older is None:
                    raise
                output.truncate(0)
                host = _plain_name(folder, "older", older)
                _run([*with_nvcc("-ccbin", host), *commands], folder, output, progress)
        elif recipe.by == "NVRTC":
            from tsm_jit._nvrtc import assembly

            names += [*recipe.cuda_sources, *recipe.nvrtc_sources, "images"]
            commands += [compile_cpp(name, "-x", "c++") for name in recipe.cuda_sources]
            commands += [compile_cpp(name) for name in recipe.nvrtc_sources]
            images = [with_nvrtc(name, code) for code in codes for name in recipe.cuda_sources]
            _run([*images, *commands], folder, output, progress)
            (folder / "images.s").write_text(assembly(folder, recipe.cuda_sources, codes))
            _run([[*recipe.cxx, "-c", "images.s", "-o", "images.o"]], folder, output, progress)
        else:
            _run(commands, folder, output, progress)
        objects = [f"{name}.o" for name in names]
        _run([[*recipe.cxx, "-shared", "-o", library, *objects, *libraries]], folder, output, progress)
    return {**facts, "architectures": architectures, "seconds": round(progress.seconds(), 1)}


def _plain_name(folder: Path, link: str, tool: str) -> str:
    """A name of ``tool`` in ``folder``: nvcc hands its own and that of the C++ compiler to a shell, and leaves the
    spaces in them unquoted. Through a link to its folder, from where a tool finds what belongs to it."""
    where, name = os.path.split(tool)
    if not re.fullmatch(r"[\w.+-]+", name, re.ASCII):
        raise BuildError(f"a compiler's name must be of letters, digits and _.+- for nvcc: rename {tool!r}")
    (folder / link).symlink_to(where)
    return f"{link}/{name}"


def gpu_code(compiler: Path, known: list[str], chosen: str | None) -> list[str]:
    """What to compile for, as ``["sm_90", "compute_75"]``: what ``chosen`` lists in the words of
    ``TORCH_CUDA_ARCH_LIST``, else the GPUs of this machine as far as they are ``known``; and PTX for others, the oldest
    only if one of these is as old or there is none."""
    more_ptx = set()
    if chosen == EVERY_GENERATION:  # code for the first GPU of a generation runs on the others
        native = set({arch[:-1]: arch for arch in sorted(known, key=int, reverse=True)}.values())
    elif chosen in (None, "native"):
        native = {arch for arch in _toolchain.gpu_architectures() if arch in known}
    else:
        native = set()
        for name, meaning in _NAMES.items():
            chosen = chosen.replace(name, meaning)
        for word in re.split(r"[;,\s]+", chosen.strip("; ,\t\n")):
            match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", word)
            if not match or match[1] + match[2] not in known:
                raise BuildError(
                    "TORCH_CUDA_ARCH_LIST and --arch take GPU architectures that the compiler knows, such as "
                    f"'8.0;9.0+PTX' ({compiler} knows {' '.join(f'{arch[:-1]}.{arch[-1]}' for arch in known)}), "
                    f"got {word!r}"
                )
            native.add("".join(match.group(1, 2, 3)))
            if match[4]:
                more_ptx.add("".join(match.group(1, 2, 3)))
    oldest, newer = _toolchain.PORTABLE_ARCHITECTURES
    portable = newer if native and newer in known and all(_age(arch) >= _age(newer) for arch in native) else oldest
    return [
        f"{kind}_{arch}"
        for kind, archs in (("sm", native), ("compute", {portable, *more_ptx}))
        for arch in sorted(archs, key=_age)
    ]


def _gencode(codes: list[str]) -> list[str]:
    """nvcc's flags for what :func:`gpu_code` returns. Most of the time goes into PTX, so machine code shares the newest
    portable one, unless it is for one GPU alone (``sm_90a``)."""
    _, newer = _toolchain.PORTABLE_ARCHITECTURES
    shared = f"compute_{newer}" in codes
    of: dict[str, list[str]] = {}
    for code in codes:
        kind, _, arch = code.partition("_")
        share = shared and kind == "sm" and arch.isdecimal() and _age(arch) >= _age(newer)
        of.setdefault(newer if share else arch, []).append(code)
    return [f"-gencode=arch=compute_{virtual},code=[{','.join(made)}]" for virtual, made in of.items()]


def _age(architecture: str) -> int:
    return int(architecture.rstrip("abcdefghijklmnopqrstuvwxyz"))


def _refuse_second_runtime(version: str) -> None:
    """nvcc of another major version than torch's CUDA brings a CUDA runtime of its own beside torch's, which an older
    driver refuses: not where NVRTC, which is of torch's version and as good, can do it."""
    if _major(version) == _major(torch.version.cuda):
        return
    driver, said = _toolchain.driver_cuda_version(), _versions("nvcc", version)
    cure = f"set CUDA_HOME to a toolkit of CUDA {torch.version.cuda}, or TSM_JIT_NVRTC=1"
    if driver is not None and _major(version) > _major(driver):
        raise BuildError(f"{said}, and the driver runs none newer than {driver}: {cure}")
    if _toolchain.find_nvrtc() is not None:
        raise BuildError(f"{said}: {cure}")


def _mismatch(version: str, compiler: str = "nvcc") -> str:
    said = _versions(compiler, version)
    if _major(version) != _major(torch.version.cuda):
        return f"{said}: the kernels use a CUDA runtime of their own, and need a driver that knows both"
    return f"{said}: with a driver older than {compiler}, the kernels run on no other GPUs than they are compiled for"


def _versions(compiler: str, version: str) -> str:
    return f"{compiler} is of CUDA {version}, torch of CUDA {torch.version.cuda}"


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _older_gxx(said: str) -> str | None:
    """The newest g++ that nvcc takes, if it said that the one it found is too new."""
    match = re.search(r"unsupported GNU version! gcc versions later than (\d+)", said)
    found = (shutil.which(f"g++-{version}") for version in range(int(match[1]), 8, -1)) if match else ()
    return next(filter(None, found), None)


class _Progress:
    """The line that says what is compiled; on a terminal with the seconds, and with their sum at the end."""

    def __init__(self, targets: list[str]):
        self.started = time.monotonic()
        self.counted = 0
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.line = f"compiling the kernels (only once) for {', '.join(targets)}"

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def tick(self) -> None:
        """Counts on, each second."""
        if not self.terminal or self.seconds() < self.counted:
            return
        self.counted = int(self.seconds()) + 1
        seconds = f": {self.seconds():.0f} s"
        # A line that is longer than the terminal could not be overwritten.
        width = shutil.get_terminal_size().columns - len(f"tsm_jit: {seconds}")
        say(self.line[:width] + seconds, end="\r")

    def __enter__(self) -> _Progress:
        self.tick()
        if not self.terminal:
            say(self.line)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.terminal:
            say(f"{self.line}: {'done' if kind is None else 'failed'} after {self.seconds():.1f} s")


def _run(commands: list[list[str]], folder: Path, output: Any, progress: _Progress) -> None:
    """Runs them all at once in ``folder``; raises BuildError if one fails, OSError if it may not fail the next time.

    The first is the longest: on few cores the others make way for it.
    """
    with contextlib.ExitStack() as stack:
        processes: list[subprocess.Popen] = []
        for command in commands:
            output.write(f"{' '.join(command)}\n".encode())
            output.flush()
            process = stack.enter_context(_toolchain.running(command, output, folder))
            if processes:
                with contextlib.suppress(OSError):  # it has ended
                    os.setpriority(os.PRIO_PGRP, process.pid, 5)
            processes.append(process)
        for command, process in zip(commands, processes, strict=True):
            code = _wait(command, process, output, progress)
            if code != 0:
                said = _said(output)
                passing = -code in _ENDED or re.search(_PASSING, said)
                raise (OSError if passing else BuildError)(_first_error(said, command, code))
            made = command[command.index("-o") + 1]
            if not (folder / made).is_file():
                raise BuildError(f"{command[0]} reported success and made no {made}")


def _wait(command: list[str], process: subprocess.Popen, output: Any, progress: _Progress) -> int:
    while (code := _toolchain.exit_code(process)) is None:
        if progress.seconds() > SECONDS:
            raise BuildError(f"{command[0]} had not ended after {SECONDS} s: set CXX or CUDA_HOME to another")
        if os.fstat(output.fileno()).st_size > MOST_LOGGED:
            raise BuildError(f"the compilers said more than {MOST_LOGGED} bytes, of which the log has the first")
        progress.tick()
        time.sleep(0.01)
    return code


def _said(output: Any) -> str:
    with open(output.name, "rb") as log:
        return log.read(_toolchain.MOST_SAID).decode(errors="replace")


def _first_error(log: str, command: list[str], code: int) -> str:
    errors = [
        line.strip() for line in log.splitlines() if re.search(r"\b(error|fatal)\s*:|No space left|ld: cannot", line)
    ]
    ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return errors[0][:500] if errors else f"{command[0]} ended {ended} and named no error"
