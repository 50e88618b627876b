"""``tsm_jit.info()`` and ``python -m tsm_jit info``: the backend of each device, versions, tools and the cache."""

from __future__ import annotations

import platform
import re
from typing import Any

import torch

from tsm_jit import _jit
from tsm_jit._jit import cache, spec, tools
from tsm_jit._version import __version__


def info() -> dict[str, Any]:
    """Reports which backend serves each device and why, the versions, the tools and the cache.

    Nothing is compiled and no GPU is touched.

    Returns:
        A dictionary that JSON can represent:

        - ``devices``: for ``cpu`` and ``cuda``, whether their tensors use compiled kernels or the PyTorch fallback;
        - ``backends``: for nvcc, nvrtc and cpu, whether it was used, and if not, why;
        - ``versions``: of tsm_jit, torch, PyTorch's CUDA, Python and the platform;
        - ``tools``: the C++ compiler, nvcc, the NVRTC interface and ninja, or ``None``;
        - ``cache``: its folder, the entry in use, its size in bytes, GPU architectures, toolkit, seconds of compilation
          and the command lines that were run.

    Example::

        facts = tsm_jit.info()
        print(facts["devices"]["cpu"])  # compiled kernels
    """
    status = _jit.status
    cxx, entry = tools.find_cxx(), status.entry
    return {
        "devices": {name: status.device(name) for name in ("cpu", "cuda")},
        "backends": {name: _backend(name, status) for name in spec.BACKENDS},
        "versions": {
            "tsm_jit": __version__,
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "tools": {
            "cxx": " ".join(cxx) if cxx else None,
            "nvcc": _text(tools.find_nvcc()),
            "nvrtc": _text(tools.find_nvrtc()),
            "ninja": tools.find_ninja(),
        },
        "cache": {
            "folder": _folder(),
            "entry": entry.folder.name if entry else None,
            "bytes": cache.size(entry.folder) if entry else None,
            **{name: entry.manifest.get(name) if entry else None for name in ("architectures", "toolkit", "seconds")},
            "commands": _commands(entry) if entry else None,
        },
    }


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _folder() -> str:
    try:
        return str(cache.cache_folder())
    except OSError as error:
        return str(error)


def _backend(name: str, status: _jit.Status) -> str:
    if status.entry is not None and status.entry.manifest["backend"] == name:
        return "used"
    if name in status.failed:
        return f"not used: {status.failed[name]}"
    if name not in _jit.backends():
        return "not used: " + ("TSM_JIT_NVRTC is set" if torch.version.cuda else "this PyTorch has no CUDA")
    if status.entry is None:
        return "not compiled yet: the next import will try it"
    return f"not needed: {status.entry.manifest['backend']} compiled the kernels of all devices"


def _commands(entry: cache.Entry) -> list[str]:
    """The command lines that ninja ran, from the log."""
    try:
        text = (entry.folder / cache.LOG).read_text(errors="replace")
    except OSError:
        return []
    return re.findall(r"^\[\d+/\d+\] (.*)$", text, re.MULTILINE)
