"""What this process runs on and why, for ``tsm_jit.info()`` and ``python -m tsm_jit info``."""

from __future__ import annotations

import platform
from typing import Any

import torch

from tsm_jit import __version__, _loader, _toolchain


def info() -> dict[str, Any]:
    """Which backend serves each device and why, the versions, the tools found, the cache: all JSON-serialisable.

    Nothing is compiled and no GPU is touched. The keys:

    - ``devices``: for ``cpu`` and ``cuda`` what their tensors take, and why;
    - ``versions``: of tsm_jit, torch, torch's CUDA, Python and the platform;
    - ``tools``: the C++ compiler, nvcc and the folder of ninja that a compilation would use, ``None`` if there is none;
    - ``cache``: its folder, the key of this build, its size in bytes, how long it took in seconds.
    """
    status = _loader.status()
    found = {"cxx": _toolchain.find_cxx(), "nvcc": _toolchain.find_nvcc(), "ninja": _toolchain.find_ninja()}
    return {
        "devices": dict(status.devices),
        "versions": {
            "tsm_jit": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "tools": {name: str(path) if path else None for name, path in found.items()},
        "cache": {
            "folder": status.cache,
            "key": status.key,
            "bytes": _loader.entry_bytes(status),
            "architectures": status.manifest.get("architectures"),
            "seconds": status.manifest.get("seconds"),
        },
    }
