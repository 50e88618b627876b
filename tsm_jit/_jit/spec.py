"""``BuildSpec``: everything that decides what the compiled library is, and the cache key, which is a hash of it."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from tsm_jit._jit import tools

LIBRARY = "tsm_jit_kernels.so"
BACKENDS = ("nvcc", "nvrtc", "cpu")  # the best first; each needs a C++ compiler and ninja

# Relative to the kernel folder, the slowest first. load names object files by base name, so these are unique.
_CPU_SOURCES = (
    "bindings/residual.cpp",
    "bindings/shift.cpp",
    "residual/norm_add_relu.cpp",
    "residual/norm_relu_max_pool.cpp",
    "residual/add_relu_backward.cpp",
    "shift/temporal_shift.cpp",
)
_CUDA_SOURCES = ("residual/residual.cu", "shift/temporal_shift.cu")
SOURCES = {
    "nvcc": (*_CUDA_SOURCES, *_CPU_SOURCES),
    "nvrtc": (*_CUDA_SOURCES, *_CPU_SOURCES, "core/nvrtc.cpp"),
    "cpu": _CPU_SOURCES,
}
# C++20, load's default, takes 10 s longer. A library for the stable ABI of PyTorch 2.10 runs on every later one.
_CFLAGS = ("-O3", "-std=c++17", "-I.", "-DTORCH_TARGET_VERSION=0x020a000000000000")
CFLAGS = {
    "nvcc": (*_CFLAGS, "-DTSM_JIT_CUDA", "-DUSE_CUDA"),
    "nvrtc": (*_CFLAGS, "-DTSM_JIT_CUDA", "-DUSE_CUDA", "-DTSM_JIT_NVRTC"),
    "cpu": _CFLAGS,
}
# NVRTC also compiles the host code, to find the kernels that it launches. The second flag makes it device code.
GPU_FLAGS = {
    "nvcc": ("-std=c++17", "-I.", "--threads=2"),
    "nvrtc": ("--std=c++17", "--device-as-default-execution-space", "-I."),
    "cpu": (),
}
# load links libtorch_python, which is not needed. In "." lies the CUDA runtime that PyTorch uses (worker.py).
_AS_NEEDED = ("-Wl,--as-needed",) if platform.system() == "Linux" else ()
_CUDA_LIBRARIES = ("-L.", "-lcudart", "-lc10_cuda", "-ltorch_cuda")
LDFLAGS = {
    "nvcc": (*_AS_NEEDED, *_CUDA_LIBRARIES),
    "nvrtc": (*_AS_NEEDED, *_CUDA_LIBRARIES, "-Wl,--no-undefined"),  # a kernel that was not compiled is an error
    "cpu": _AS_NEEDED,
}
VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")


class BuildError(Exception):
    """A build fails, and will fail again until something changes."""


# The key has one part for the program, one for the target and one for the tools. Entries with the same program and
# target are interchangeable, even if other tools compiled them.
_PROGRAM, _TARGET, _TOOLS = ({"part": index} for index in range(3))


@dataclass(frozen=True)
class BuildSpec:
    """Everything that decides what the compiled library is."""

    backend: str = field(metadata=_PROGRAM)
    sources: tuple[str, ...] = field(metadata=_PROGRAM)  # the files to compile
    digests: dict[str, str] = field(metadata=_PROGRAM)  # sha256 of each kernel file and of the code that builds
    cflags: tuple[str, ...] = field(metadata=_PROGRAM)
    gpu_flags: tuple[str, ...] = field(metadata=_PROGRAM)
    ldflags: tuple[str, ...] = field(metadata=_PROGRAM)
    torch_version: str = field(metadata=_PROGRAM)
    torch_cuda: str | None = field(metadata=_PROGRAM)
    platform: tuple[str, ...] = field(metadata=_PROGRAM)

    architectures: str = field(metadata=_TARGET)  # as in TORCH_CUDA_ARCH_LIST, or "native" or "all"
    gpus: tuple[str, ...] = field(metadata=_TARGET)  # the models in this machine, unless portable
    portable: bool = field(metadata=_TARGET)  # for every machine, by ``python -m tsm_jit build``

    cxx: tuple[Any, ...] = field(metadata=_TOOLS)
    gpu_compiler: tuple[Any, ...] = field(metadata=_TOOLS)
    variables: tuple[str | None, ...] = field(metadata=_TOOLS)  # that nvcc reads

    def part(self, index: int) -> str:
        """The hash of the fields of the program (0), of the target (1) or of the tools (2)."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["part"] == index}
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[: (24, 12, 12)[index]]

    @property
    def key(self) -> str:
        return "-".join(self.part(index) for index in range(3))


def here(backend: str, build_for: str | None = None) -> BuildSpec:
    """The spec of ``backend`` on this machine; a portable one if ``build_for`` lists GPU architectures."""
    on_gpu = backend != "cpu"
    cxx = tools.find_cxx()
    return BuildSpec(
        backend=backend,
        sources=SOURCES[backend],
        digests=_digests(),
        cflags=CFLAGS[backend],
        gpu_flags=GPU_FLAGS[backend],
        ldflags=LDFLAGS[backend],
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        platform=(platform.system(), platform.machine()),
        architectures=(build_for or tools.variable("TORCH_CUDA_ARCH_LIST") or "native") if on_gpu else "",
        gpus=tuple(tools.gpu_models()) if on_gpu and build_for is None else (),
        portable=build_for is not None,
        cxx=(*cxx, tools.identity(cxx[0])) if cxx else (),
        gpu_compiler=tuple(map(tools.identity, _gpu_compiler(backend))),
        variables=tuple(map(tools.variable, VARIABLES)) if backend == "nvcc" else (),
    )


def _gpu_compiler(backend: str) -> list[Path]:
    """The files of the GPU compiler of ``backend``, if there is one. It runs on every import, so it does no more."""
    if backend == "nvcc" and (nvcc := tools.find_nvcc()):
        return [nvcc]
    if backend == "nvrtc" and (nvrtc := tools.find_nvrtc()):
        return [nvrtc, *tools.nvrtc_libraries()]
    return []


def kernel_folder() -> Path:
    """The kernel sources: in the package once installed, next to it in a source checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / _CPU_SOURCES[0]).is_file():
            return folder
    raise FileNotFoundError(f"the kernel sources are missing: {package / 'kernels'} does not exist")


@functools.cache
def _digests() -> dict[str, str]:
    folder = kernel_folder()
    kernels = [path for path in folder.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    files = {path.relative_to(folder).as_posix(): path for path in kernels}
    files |= {name: Path(__file__).with_name(name) for name in ("worker.py", "nvrtc.py", "architectures.py")}
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in sorted(files)}
