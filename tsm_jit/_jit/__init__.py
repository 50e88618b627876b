"""The first import: finds the compiled kernels in the cache, or builds them into it, and loads them.

    load():  a good entry in the cache                         no lock, no write, no compiler is needed
             else for each backend: get_or_build, load         nvcc, then NVRTC, then the kernels for the CPU alone
             else the PyTorch fallback                         with one warning that lists the reasons

README.md in this folder explains it for users; spec.py, cache.py, build.py and worker.py are its parts.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsm_jit._jit import cache, spec, tools
from tsm_jit._jit.spec import BACKENDS, BuildError, BuildSpec

FALLBACK = "PyTorch fallback"
COMPILED = "compiled kernels"


@dataclass
class Status:
    """What serves this process, for :func:`tsm_jit.info`."""

    done: bool = False
    entry: cache.Entry | None = None  # the loaded library
    compiled: bool = False  # whether this import compiled it
    failed: dict[str, str] = field(default_factory=dict)  # backend: why it was not used

    def device(self, name: str) -> str:
        """What serves tensors of ``"cpu"`` or ``"cuda"``, and why."""
        if name == "cuda" and torch.version.cuda is None:
            return "this PyTorch has no CUDA"
        if self.entry is not None and name == "cpu":
            return COMPILED
        if self.entry is not None and self.entry.manifest["backend"] != "cpu":
            by = "NVRTC: " if self.entry.manifest["backend"] == "nvrtc" else ""
            return f"{COMPILED} ({by}{', '.join(self.entry.manifest['architectures'])})"
        backends = BACKENDS if name == "cpu" else BACKENDS[:-1]
        reasons = dict.fromkeys(self.failed[backend] for backend in backends if backend in self.failed)
        return f"{FALLBACK}: {'; '.join(reasons) or 'not compiled yet, the next import will do it'}"


status = Status()


def load() -> None:
    """Makes the kernels available.

    Raises:
        ImportError: if kernels are missing that ``TSM_JIT_REQUIRE`` asks for.
        ValueError: if ``TSM_JIT_REQUIRE`` is not ``1``, ``cpu`` or ``cuda``.
    """
    find()
    _check_required()
    _report()


def find(compile: bool = True) -> Status:
    """Loads what the cache has, or else builds it; once in a process. Never raises and never warns.

    Args:
        compile: whether to build what the cache lacks.
    """
    if status.done:
        return status
    status.done = True
    specs: dict[str, BuildSpec] = {}
    for backend in backends():
        with _noting_failure(backend):
            specs[backend] = spec.here(backend)
    # Kernels for the CPU alone come last: before them, a build for the GPU is tried.
    on_gpu = [build_spec for build_spec in specs.values() if build_spec.backend != "cpu"]
    for build_spec in on_gpu:
        if _load_cached(build_spec):
            return status
    for build_spec in on_gpu:
        if _build_and_load(build_spec, compile):
            return status
    for build_spec in on_gpu:
        if _load_cached(build_spec, other_gpus=True):
            return status
    if "cpu" in specs and not _load_cached(specs["cpu"]):
        _build_and_load(specs["cpu"], compile)
    return status


def backends() -> tuple[str, ...]:
    """The backends to try, the best first."""
    if torch.version.cuda is None:
        return BACKENDS[-1:]
    return BACKENDS if tools.variable("TSM_JIT_NVRTC") in (None, "0") else BACKENDS[1:]


def build_for(architectures: str) -> cache.Entry:
    """Builds for any machine with these GPU architectures, even if the cache has a usable entry.

    Raises:
        BuildError, OSError: if that fails.
    """
    from tsm_jit._jit.build import build, missing_tool

    # The backend is chosen by the tools that are here, as a compiler that fails is to be reported.
    backend = next((name for name in backends() if not missing_tool(name)), BACKENDS[-1])
    if missing := missing_tool(backend):
        raise BuildError(missing)
    return cache.get_or_build(spec.here(backend, architectures), _with_log(build), log, replace=True)


def log(message: str) -> None:
    """Writes a line for the user. Nothing depends on whether that is possible."""
    with contextlib.suppress(Exception):
        sys.stderr.write(f"tsm_jit: {message}\n")
        sys.stderr.flush()


def _load_cached(build_spec: BuildSpec, other_gpus: bool = False) -> bool:
    with _noting_failure(build_spec.backend):
        entry = cache.find(build_spec, other_gpus)
        if entry is not None:
            with contextlib.suppress(OSError):  # a library of its compiler may be gone: build it again
                _load_library(entry)
                return True
    return False


def _build_and_load(build_spec: BuildSpec, compile: bool) -> bool:
    with _noting_failure(build_spec.backend):
        from tsm_jit._jit.build import build, missing_tool  # not needed for a warm import

        if missing := missing_tool(build_spec.backend):
            raise BuildError(missing)  # not remembered
        entry: cache.Entry | None
        if compile:
            entry = cache.get_or_build(build_spec, _with_log(build), log)
        else:
            entry = cache.read(cache.cache_folder() / build_spec.key)
        if entry is None:
            return False
        if entry.error is not None:
            raise BuildError(f"{entry.error} (log: {entry.folder / cache.LOG})")
        _load_library(entry)
        return True
    return False


def _with_log(build: Any) -> Any:
    def run(build_spec: BuildSpec, folder: Path) -> dict[str, Any]:
        compiler = "C++" if build_spec.backend == "cpu" else build_spec.backend
        log(f"compiling the kernels with {compiler} for this and all later imports, which takes 4 to 120 s ...")
        result = build(build_spec, folder)
        log(f"compiled the kernels for {', '.join(['CPU', *result['architectures']])} in {result['seconds']} s")
        status.compiled = True
        return result

    return run


def _load_library(entry: cache.Entry) -> None:
    torch.ops.load_library(str(entry.library))
    status.entry = entry


@contextlib.contextmanager
def _noting_failure(backend: str) -> Iterator[None]:
    """Records the failure of one backend, so that the next one is tried and the import succeeds."""
    try:
        yield
    except BuildError as error:
        status.failed[backend] = str(error)
    except OSError as error:  # of the cache
        status.failed[backend] = f"{error}; or set TSM_JIT_CACHE to another folder"
    except Exception as error:
        status.failed[backend] = f"{type(error).__name__}: {error}"


def _check_required() -> None:
    required = tools.variable("TSM_JIT_REQUIRE") or "0"
    if required not in ("0", "1", "cpu", "cuda"):
        raise ValueError(f"TSM_JIT_REQUIRE must be 1, cpu or cuda, got {required!r}")
    of_machine = ("cpu", "cuda") if tools.gpu_is_visible() else ("cpu",)
    for device in {"0": (), "1": of_machine}.get(required, (required,)):
        if not status.device(device).startswith(COMPILED):
            raise ImportError(f"TSM_JIT_REQUIRE={required}, but {device} tensors use: {status.device(device)}")


def _report() -> None:
    """One warning about all that is missing."""
    texts = []
    devices = [name for name in ("cpu", "cuda") if name == "cpu" or tools.gpu_is_visible()]
    missing = {name: status.device(name) for name in devices if status.device(name).startswith(FALLBACK)}
    if missing:
        reasons = "; ".join(f"{name.upper()} tensors: {reason}" for name, reason in missing.items())
        texts.append(f"some tensors take slower code. {reasons}. After a remedy, run python -m tsm_jit clean")
    if status.compiled and status.entry is not None:
        texts += status.entry.manifest["notes"]
        if status.entry.manifest["backend"] == "nvrtc" and "nvcc" in status.failed and tools.find_nvcc():
            texts.append(f"NVRTC compiled the kernels because nvcc could not: {status.failed['nvcc']}")
    if texts:
        try:
            warnings.warn(f"tsm_jit: {'. '.join(texts)}.", RuntimeWarning, stacklevel=2)
        except Exception:  # warnings are errors here, or cannot be shown
            log(". ".join(texts))
