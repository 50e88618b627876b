"""Finds compilers, ninja and GPUs. Everything here is cheap: no process is started and no driver is loaded."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shlex
import shutil
import sys
from pathlib import Path


def variable(name: str) -> str | None:
    """The value of an environment variable; an empty one counts as unset."""
    return os.environ.get(name, "").strip() or None


def path_variable(name: str) -> Path | None:
    """A path from an environment variable, absolute, with ``~`` expanded."""
    value = variable(name)
    return Path(value).expanduser().absolute() if value else None


def find_cxx() -> list[str] | None:
    """The C++ compiler and its options: ``CXX``, else ``c++``, ``g++`` or ``clang++`` on the path."""
    try:
        chosen = shlex.split(variable("CXX") or "")
    except ValueError:  # a quote that is not closed
        return None
    for name, *options in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if path := shutil.which(os.path.expanduser(name)):
            return [os.path.abspath(path), *options]
    return None


def find_nvcc() -> Path | None:
    """nvcc in ``CUDA_HOME`` or ``CUDA_PATH``, on the path, in ``/usr/local/cuda`` or in pip's packages."""
    homes = [path_variable("CUDA_HOME"), path_variable("CUDA_PATH")]
    candidates = [home / "bin" / "nvcc" for home in homes if home]
    if path := shutil.which("nvcc"):
        candidates.append(Path(path).absolute())
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates += sorted(_files_of_package("nvidia", "cu*/bin/nvcc"), reverse=True)
    return next((nvcc for nvcc in candidates if os.access(nvcc, os.X_OK) and nvcc.is_file()), None)


def find_nvrtc() -> Path | None:
    """The NVRTC interface of the ``cuda-bindings`` package, on which PyTorch's CUDA builds depend."""
    return next(iter(_files_of_package("cuda", "bindings/nvrtc.*so")), None)


def nvrtc_libraries() -> list[Path]:
    """The NVRTC libraries in pip's packages."""
    return sorted(_files_of_package("nvidia", "*/lib/libnvrtc.so*"))


def find_ninja() -> str | None:
    """ninja on the path, or in this Python environment even if that is not activated."""
    folders = [Path(sys.executable).parent, Path(sys.prefix, "bin"), *_files_of_package("ninja", "data/bin")]
    path = shutil.which("ninja") or shutil.which("ninja", path=os.pathsep.join(map(str, folders)))
    return os.path.abspath(path) if path else None


def _files_of_package(name: str, pattern: str) -> list[Path]:
    """Files of a package, found without importing it."""
    module_spec = importlib.machinery.PathFinder.find_spec(name)
    folders = (module_spec and module_spec.submodule_search_locations) or ()
    return [path for folder in folders for path in Path(folder).glob(pattern)]


def identity(tool: Path | str) -> list[str | int]:
    """A tool by path, size and date. To run it would take longer than the rest of the import."""
    try:
        status = os.stat(tool)
    except OSError:
        return [str(tool)]
    return [str(tool), os.path.realpath(tool), status.st_size, status.st_mtime_ns]


def gpu_is_visible() -> bool:
    """Whether the machine has an NVIDIA driver."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def gpu_models() -> list[str]:
    """The names of the machine's GPUs, if the driver's files show them; some containers hide these files."""
    texts = (path.read_text(errors="replace") for path in Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return sorted({match[1] for text in texts if (match := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))})
