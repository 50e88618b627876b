"""What this machine can compile with: the C++ compiler, the CUDA toolkit, ninja, the architectures of its GPUs.

Finding is cheap and runs at every import; what starts a process or loads a driver is asked only to build something.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

# Any GPU from here on runs what is compiled for this virtual architecture: its driver finishes the compilation.
PORTABLE_ARCHITECTURE = "75"
_PROBE_SECONDS = 30


def find_cxx() -> Path | None:
    """The C++ compiler: the first word of ``CXX`` if set, else c++, g++ or clang++ on the path."""
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    return next((Path(found) for name in names if (found := shutil.which(name))), None)


def find_nvcc() -> Path | None:
    """nvcc: of ``CUDA_HOME`` or ``CUDA_PATH``, on the path, in the usual place, in pip's nvidia wheels."""
    return next((path for path in _nvcc_candidates() if os.access(path, os.X_OK) and path.is_file()), None)


def _nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable], "bin", "nvcc")
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit of ``nvcc`` in nvcc's own opinion: the nvcc on the path may be a script that calls another."""
    # A dry run prints its settings and compiles nothing; the source need not exist.
    said = _output([str(nvcc), "--dryrun", "-c", "-o", os.devnull, "-x", "cu", os.devnull])
    if match := re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE):
        return Path(match[1]).resolve()
    return nvcc.resolve().parent.parent


def nvcc_architectures(nvcc: Path) -> list[str]:
    """What ``nvcc`` can compile for, as ``["75", "80", ...]``."""
    return re.findall(r"^compute_(\d+)\s*$", _output([str(nvcc), "--list-gpu-arch"]), re.MULTILINE)


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=_PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.decode(errors="replace")


def find_ninja() -> Path | None:
    """The folder of ninja: of the Python package, which may be off the path, or on the path."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None and spec.origin is not None:
        import ninja

        return Path(ninja.BIN_DIR)
    found = shutil.which("ninja")
    return Path(found).parent if found else None


def gpu_is_visible() -> bool:
    """True if the machine has an NVIDIA driver, told without touching it."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def gpu_architectures() -> list[str]:
    """The compute capabilities of the machine's GPUs, as ``["90"]``, asked of NVML: CUDA itself must not be started
    by an import, since a process that started it cannot fork."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    found = set()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        for index in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
                continue
            if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0:
                found.add((major.value, minor.value))
    finally:
        nvml.nvmlShutdown()
    return [f"{major}{minor}" for major, minor in sorted(found)]


def torch_has_cuda() -> bool:
    return torch.version.cuda is not None
