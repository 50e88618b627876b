"""What this machine can compile with: the C++ compiler, the CUDA toolkit, the architectures of its GPUs.

Finding is cheap and runs at every import; what starts a process or loads a driver is asked only to build something.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Any GPU from there on runs what is compiled for a virtual architecture: its driver finishes the compilation. The
# kernels use nothing newer than the second one: machine code for a newer GPU, made of it, is the same.
PORTABLE_ARCHITECTURES = ("75", "80")
_PROBE_SECONDS = 30
MOST_SAID = 2**20  # bytes of a compiler's output that are read
_CXX = (["c++"], ["g++"], ["clang++"])


class BuildError(Exception):
    """The tools cannot build it: trying again without a change would fail again."""


def find_cxx() -> list[str] | None:
    """The C++ compiler and its options: ``CXX`` if set, else c++, g++ or clang++ on the path."""
    chosen = []
    if "CXX" in os.environ:
        import shlex  # of no use in most imports

        try:
            chosen = shlex.split(os.environ["CXX"])
        except ValueError:  # a quote that is not closed
            return None
    for name, *options in [chosen] if chosen else _CXX:
        if found := shutil.which(name):
            return [os.path.abspath(found), *options]
    return None


def find_nvcc() -> Path | None:
    """nvcc: of ``CUDA_HOME`` or ``CUDA_PATH``, on the path, in the usual place, in pip's nvidia wheels."""
    candidates = (path.absolute() for path in _nvcc_candidates())
    return next((path for path in candidates if os.access(path, os.X_OK) and path.is_file()), None)


def _nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        yield from reversed(_found(Path(folder), "cu*/bin/nvcc"))


def find_nvrtc() -> Path | None:
    """The NVRTC library of torch's CUDA version: of pip's wheels, of torch's own folder, where the system has it."""
    major = torch.version.cuda.partition(".")[0]
    name = re.compile(rf"libnvrtc(-[0-9a-f]{{8}})?\.so\.{major}(\.[0-9.]+)?")
    for folder in _nvrtc_folders():
        found = [path for path in _found(folder, "libnvrtc*") if name.fullmatch(path.name) and path.is_file()]
        if found:
            return found[0].absolute()
    return None


def _found(folder: Path, pattern: str) -> list[Path]:
    """In order; nothing where this user may not look."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _nvrtc_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        yield from reversed(_found(Path(folder), "cu*/lib"))  # of CUDA 13 and later, or cuda_nvrtc
    yield Path(torch.__file__).parent / "lib"
    yield from (Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder)
    yield Path(sys.prefix, "lib")
    yield Path("/usr/local/cuda/lib64")
    yield Path(f"/usr/lib/{platform.machine()}-linux-gnu")
    yield Path("/usr/lib64")


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit of ``nvcc`` in nvcc's own opinion: the nvcc on the path may be a script that calls another."""
    # A dry run prints its settings and compiles nothing; the source need not exist.
    said = _output([str(nvcc), "--dryrun", "-c", "-o", os.devnull, "-x", "cu", os.devnull])
    if match := re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE):
        return Path(match[1]).resolve()
    return nvcc.resolve().parent.parent


def cudart(toolkit: Path) -> list[str]:
    """What links to the CUDA runtime of ``toolkit``, which pip's wheels have under its full name alone; and finds it
    again, in a process whose torch has loaded another."""
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        for found in sorted((toolkit / folder).glob("libcudart.so*")):
            return [str(found), f"-Wl,-rpath,{found.parent}"]
    return ["-lcudart"]  # where a distribution keeps its libraries


def nvcc_architectures(nvcc: Path) -> list[str]:
    """What ``nvcc`` can compile for, as ``["75", "80", ...]``."""
    said = _output([str(nvcc), "--list-gpu-arch"])
    if known := re.findall(r"^compute_(\d+)\s*$", said, re.MULTILINE):
        return known
    raise BuildError(f"{nvcc} --list-gpu-arch must list GPU architectures, got {said[:200]!r}")


def nvrtc_command(nvrtc: Path) -> list[str]:
    """What asks the library what it can, or, with more arguments, to compile: a process of its own, as it may crash."""
    if not sys.executable:
        raise BuildError("NVRTC needs a Python interpreter to run in, but sys.executable is empty")
    return [sys.executable, "-I", "-S", str(Path(__file__).with_name("_nvrtc.py")), str(nvrtc)]


def nvrtc_can(nvrtc: Path) -> tuple[str, list[str]]:
    """Its version, as ``13.0``, and what it can compile for, as ``["75", "80", ...]``."""
    said = _output(nvrtc_command(nvrtc))
    version, known = re.search(r"release (\d+\.\d+)", said), re.findall(r"^compute_(\d+)\s*$", said, re.MULTILINE)
    if version and known:
        return version[1], known
    raise BuildError(f"NVRTC ({nvrtc}) must tell its version and GPU architectures, got {said[:500]!r}")


def nvcc_version(nvcc: Path) -> str:
    """Of its toolkit, as ``13.0``."""
    said = _output([str(nvcc), "--version"])
    if match := re.search(r"release (\d+\.\d+)", said):
        return match[1]
    raise BuildError(f"{nvcc} --version must name a release, got {said[:200]!r}")


def _output(command: list[str]) -> str:
    end, said = time.monotonic() + _PROBE_SECONDS, b""
    with running(command, subprocess.PIPE) as process, process.stdout as pipe:
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while poll.poll(max(0, end - time.monotonic()) * 1000):
            more = os.read(pipe.fileno(), 65536)
            said += more
            if not more:
                return said.decode(errors="replace")
            if len(said) > MOST_SAID:
                raise BuildError(f"{' '.join(command)} says more than {MOST_SAID} bytes, such as {said[:100]!r}")
    raise BuildError(f"{' '.join(command)} had not ended after {_PROBE_SECONDS} s")


@contextlib.contextmanager
def running(command: list[str], output: Any, folder: Path | None = None) -> Iterator[subprocess.Popen]:
    """Starts a compiler, without a shell; in the end it is ended, with all that it started, also if it left that."""
    # In words that are known here; a killed compiler leaves nothing elsewhere.
    variables = dict(os.environ, LC_ALL="C.UTF-8", LANGUAGE="") | ({"TMPDIR": "."} if folder else {})
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.ENOMEM):
            raise
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}")
    try:
        yield process
    finally:
        with contextlib.suppress(OSError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)  # nobody else has this number until it is waited for
        process.wait()


def exit_code(process: subprocess.Popen) -> int | None:
    """That of a process that has ended, without waiting for it; negative: the signal."""
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # the program that imports us ignores SIGCHLD: nobody will know
        return 0
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def gpu_is_visible() -> bool:
    """True if the machine has an NVIDIA driver, told without touching it."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def gpu_models() -> list[str]:
    """Their names, told without touching the driver; none where it does not show them, as in some containers."""
    told = [path.read_text(errors="replace") for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    return sorted({match[1] for text in told if (match := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))})


@contextlib.contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """What tells of GPUs and their driver, if it is here: CUDA itself must not be started by an import, since a process
    that started it cannot fork."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        nvml = None
    if nvml is None or nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def gpu_architectures() -> list[str]:
    """The compute capabilities of the machine's GPUs, as ``["90"]``."""
    found = set()
    with _nvml() as nvml:
        count = ctypes.c_uint()
        if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
                continue
            if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0:
                found.add((major.value, minor.value))
    return [f"{major}{minor}" for major, minor in sorted(found)]


def driver_cuda_version() -> str | None:
    """The newest CUDA that the driver of the machine's GPUs runs, as ``13.0``; None where it cannot be asked."""
    version = ctypes.c_int()
    with _nvml() as nvml:
        if nvml is None or nvml.nvmlSystemGetCudaDriverVersion(ctypes.byref(version)) != 0:
            return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def torch_has_cuda() -> bool:
    return torch.version.cuda is not None
