"""What this process runs on and why, for ``tsm_jit.info()`` and ``python -m tsm_jit info``."""

from __future__ import annotations

import platform
from typing import Any

import torch

from tsm_jit import __version__, _loader, _toolchain


def info() -> dict[str, Any]:
    """Which backend serves each device and why, the versions, the tools found, the cache: all JSON-serialisable.

    Nothing is compiled and no GPU is touched. The keys:

    - ``devices``: for ``cpu`` and ``cuda`` what their tensors take, compiled kernels or plain torch, and why;
    - ``versions``: of tsm_jit, torch, torch's CUDA, Python and the platform;
    - ``tools``: the C++ compiler, nvcc, and NVRTC, which is used for want of nvcc or by ``TSM_JIT_NVRTC``; or ``None``;
    - ``cache``: its folder, the key of this build, its size in bytes, the GPU architectures and the CUDA toolkit or
      NVRTC it was compiled with, how long that took in seconds.
    """
    status = _loader.status()
    cxx, nvcc = _toolchain.find_cxx(), _toolchain.find_nvcc()
    nvrtc = _toolchain.find_nvrtc() if _toolchain.torch_has_cuda() else None
    return {
        "devices": dict(status.devices),
        "versions": {
            "tsm_jit": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "tools": {
            "cxx": " ".join(cxx) if cxx else None,
            "nvcc": str(nvcc) if nvcc else None,
            "nvrtc": str(nvrtc) if nvrtc else None,
        },
        "cache": {
            "folder": status.cache,
            "key": status.key,
            "bytes": _loader.entry_bytes(status),
            "architectures": status.manifest.get("architectures"),
            "toolkit": status.manifest.get("toolkit"),
            "seconds": status.manifest.get("seconds"),
        },
    }
