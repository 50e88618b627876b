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
    - ``backends``: for nvcc, NVRTC, the C++ compiler alone and plain torch, whether it was chosen, and if not, why;
    - ``versions``: of tsm_jit, torch, torch's CUDA, Python and the platform;
    - ``tools``: the C++ compiler, nvcc, and NVRTC, which is used for want of nvcc or by ``TSM_JIT_NVRTC``; or ``None``;
    - ``cache``: its folder, the key of this build or of the one that failed or is to come, its size in bytes, the GPU
      architectures and the CUDA toolkit or NVRTC it was compiled with, how long that took in seconds.
    """
    status = _loader.status()
    cxx, nvcc = _toolchain.find_cxx(), _toolchain.find_nvcc()
    nvrtc = _toolchain.find_nvrtc() if _toolchain.torch_has_cuda() else None
    return {
        "devices": dict(status.devices),
        "backends": _backends(status),
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


def _backends(status: _loader.Status) -> dict[str, str]:
    """The reason why each was chosen or not, in the order in which they are tried."""
    plain = [device for device, served in status.devices.items() if served.startswith("plain torch")]
    chosen = status.manifest.get("by") if "compiled kernels" in status.devices.values() else None
    said = {}
    for by in (_loader.NVCC, _loader.NVRTC, _loader.CPU_ALONE):
        if by == chosen:
            said[by] = f"chosen: it made {status.key}"
        elif by == status.pending:
            said[by] = "to be tried by the next import"
        elif by in status.failed:
            said[by] = f"not chosen: {status.failed[by]}"
        elif by in _loader.builders():
            said[by] = "not needed" if chosen else "to be tried if that fails"
        elif _toolchain.torch_has_cuda():
            said[by] = "not chosen: TSM_JIT_NVRTC is set"
        else:
            said[by] = "not chosen: this torch has no CUDA"
    said["plain torch"] = f"chosen for {' and '.join(plain)}, for want of kernels" if plain else "not needed"
    return said
