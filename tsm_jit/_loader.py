"""Finds the compiled kernels in the cache or compiles them into it, and loads them. Runs once, on ``import tsm_jit``.

    key      sha256 of the sources, the flags, torch, the compilers (by path, size and date) and the platform
    warm     <cache>/<key>/ is there, is ours, its checksum holds: load it. No lock, no write, no compiler is asked
    cold     lock; build in <cache>/tmp-<uuid>; write the manifest; rename to <cache>/<key>
    failed   a compiler's error is published as well, so that the next import does not compile in vain; the step below
             is taken: kernels for CPU and CUDA -> for the CPU alone -> plain torch. One warning says why

GPU architectures are not in the key. What is built holds machine code for the GPUs of the machine that built it and a
portable form (PTX) that every other GPU's driver completes, so it is right everywhere, and no import asks a driver.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsm_jit import _toolchain

LIBRARY = "tsm_jit_kernels.so"
MANIFEST = "manifest.json"
LOG = "build.log"

_CPU_SOURCES = ("bindings.cpp", "temporal_shift.cpp", "residual_shift.cpp")
_CUDA_SOURCES = ("temporal_shift.cu", "residual_shift.cu")
_HEADERS = ("temporal_shift.h", "residual_shift.h", "element.h", "temporal_shift.cuh", "residual_shift.cuh")
# The stable ABI of the oldest torch we support: what is built runs on every later one.
_CFLAGS = ("-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_CUDA_CFLAGS = ("--threads=2",)  # one architecture each
_CUDA_DEFINES = ("-DTSM_JIT_CUDA", "-DUSE_CUDA")
_BUILD_SECONDS = 900
_NAME_HOLDER_AFTER_SECONDS = 2


class BuildError(Exception):
    """A compiler said no: the same call would fail again."""


@dataclass
class Status:
    """What this process runs on, for :func:`tsm_jit.info`."""

    devices: dict[str, str] = field(default_factory=dict)  # "cpu" and "cuda": what serves them, and why
    missing: dict[str, str] = field(default_factory=dict)  # device: why it has no kernels though it could
    cache: str | None = None
    key: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


def kernel_folder() -> Path:
    """The kernel sources: in the package once installed, beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / _CPU_SOURCES[0]).is_file():
            return folder
    raise FileNotFoundError(f"the kernel sources are missing: no {package / 'kernels'}")


def cache_folder() -> Path:
    """``TSM_JIT_CACHE``, or ``tsm_jit`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("TSM_JIT_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base).absolute() / "tsm_jit"


# --- what to build ---------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """Everything that decides what the compiled library is."""

    kernels: Path
    cxx: Path | None
    nvcc: Path | None  # None: build for the CPU alone
    key: str

    @staticmethod
    def here(cuda: bool = True) -> Recipe:
        kernels = kernel_folder()
        cxx = _toolchain.find_cxx()
        nvcc = _toolchain.find_nvcc() if cuda and _toolchain.torch_has_cuda() else None
        digest = hashlib.sha256()
        for name in (*_CPU_SOURCES, *_CUDA_SOURCES, *_HEADERS):
            digest.update(name.encode() + b"\0" + (kernels / name).read_bytes() + b"\0")
        facts = (
            _CFLAGS,
            _CUDA_CFLAGS,
            _CUDA_DEFINES,
            torch.__version__,
            torch.version.cuda,
            (platform.system(), platform.machine()),
            _identity(cxx),
            os.environ.get("CXX"),
            _identity(nvcc),
            nvcc is not None and _toolchain.gpu_is_visible(),
            [os.environ.get(name) for name in ("TORCH_CUDA_ARCH_LIST", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")],
        )
        digest.update(json.dumps(facts).encode())
        return Recipe(kernels, cxx, nvcc, digest.hexdigest()[:32])

    def job(self, folder: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
        """The arguments of torch's ``load``, the environment of the process that calls it, the architectures."""
        assert self.cxx is not None
        ninja = _toolchain.find_ninja()
        if ninja is None:
            raise FileNotFoundError("ninja was not found: pip install ninja")
        environment = dict(os.environ, CXX=os.environ.get("CXX") or str(self.cxx), CUDA_VISIBLE_DEVICES="")
        path = [str(ninja), os.path.dirname(sys.executable)]
        names, cflags, cuda_cflags, architectures = list(_CPU_SOURCES), list(_CFLAGS), list(_CUDA_CFLAGS), []
        if self.nvcc is not None:
            root = _toolchain.toolkit_root(self.nvcc)
            environment["CUDA_HOME"] = str(root)
            path.append(str(root / "bin"))
            names += _CUDA_SOURCES
            cflags += _CUDA_DEFINES
            if chosen := os.environ.get("TORCH_CUDA_ARCH_LIST"):
                architectures = [chosen]  # torch understands it
            else:
                flags, architectures = _architecture_flags(self.nvcc)
                cuda_cflags += flags
        environment["PATH"] = os.pathsep.join([*path, environment.get("PATH", "")])
        arguments = {
            "name": Path(LIBRARY).stem,
            "sources": [str(self.kernels / name) for name in names],
            "extra_cflags": cflags,
            "extra_cuda_cflags": cuda_cflags,
            "extra_include_paths": [str(self.kernels)],
            "build_directory": str(folder),
            "with_cuda": self.nvcc is not None,
            "sys_path": sys.path,
        }
        return arguments, environment, architectures


def _identity(tool: Path | None) -> list[Any] | None:
    """A tool by its path, size and date; running it would take longer than the rest of the import."""
    if tool is None:
        return None
    real = tool.resolve()
    found = real.stat()
    return [str(tool), str(real), found.st_size, found.st_mtime_ns]


def _architecture_flags(nvcc: Path) -> tuple[list[str], list[str]]:
    """Machine code for the GPUs here as far as nvcc knows them, and PTX for all others."""
    known = _toolchain.nvcc_architectures(nvcc)
    native = [arch for arch in _toolchain.gpu_architectures() if arch in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in native]
    portable = _toolchain.PORTABLE_ARCHITECTURE
    flags.append(f"-gencode=arch=compute_{portable},code=compute_{portable}")
    return flags, [*(f"sm_{arch}" for arch in native), f"PTX {portable}"]


# --- the cache -------------------------------------------------------------------------------------------------------


def _refuse_foreign(folder: Path) -> None:
    """A shared library is code: a folder that others own or can write to is not where ours comes from."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{folder} is no folder (or a link to one): set TSM_JIT_CACHE to a folder of your own")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{folder} belongs to user {found.st_uid}, not to you: set TSM_JIT_CACHE")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by others: run chmod go-w on it, or set TSM_JIT_CACHE")


def _read(entry: Path) -> dict[str, Any] | None:
    """The manifest of a cache entry that is whole and ours, else None."""
    try:
        _refuse_foreign(entry.parent)
        _refuse_foreign(entry)
        manifest = json.loads((entry / MANIFEST).read_text())
        library = manifest["sha256"]
        if library is not None and hashlib.sha256((entry / LIBRARY).read_bytes()).hexdigest() != library:
            return None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return manifest


def _publish(folder: Path, entry: Path) -> dict[str, Any]:
    """Renames a finished folder to its entry. Whoever comes second takes what is there; what is damaged is replaced."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for _ in range(3):
        try:
            os.replace(folder, entry)
        except OSError:
            published = _read(entry)
            if published is not None:
                return published
            os.replace(entry, entry.with_name(f"tmp-{uuid.uuid4().hex}"))
        else:
            break
    published = _read(entry)
    if published is None:
        raise OSError(f"{entry} was damaged while it was written")
    return published


def _build_under_lock(recipe: Recipe, entry: Path) -> dict[str, Any]:
    from filelock import FileLock, Timeout

    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_foreign(entry.parent)
    holder = entry.with_suffix(".holder")
    lock = FileLock(entry.with_suffix(".lock"), mode=0o600)
    try:
        lock.acquire(timeout=_NAME_HOLDER_AFTER_SECONDS)
    except Timeout:
        try:
            name = holder.read_text() or "another process"
        except OSError:  # it was done in this moment
            name = "another process"
        _say(f"waiting for {name}, which is compiling the kernels")
        try:
            lock.acquire(timeout=_BUILD_SECONDS)
        except Timeout:
            raise TimeoutError(f"{name} held {lock.lock_file} for {_BUILD_SECONDS} s: end it and try again") from None
    try:
        published = _read(entry)  # while we waited
        if published is not None:
            return published
        holder.write_text(f"process {os.getpid()} on {platform.node()}")
        return _build(recipe, entry)
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _build(recipe: Recipe, entry: Path) -> dict[str, Any]:
    folder = entry.with_name(f"tmp-{uuid.uuid4().hex}")
    folder.mkdir(mode=0o700)
    started = time.monotonic()
    manifest: dict[str, Any] = {"sha256": None, "cuda": recipe.nvcc is not None, "torch": torch.__version__}
    try:
        try:
            if recipe.cxx is None:
                raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX")
            arguments, environment, architectures = recipe.job(folder)
            kinds = "CPU" if recipe.nvcc is None else f"CPU and CUDA ({', '.join(architectures)})"
            _say(f"compiling the {kinds} kernels into {entry.parent}; this happens on the first import only")
            _compile(arguments, environment, folder / LOG)
            manifest["architectures"] = architectures
            manifest["sha256"] = hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest()
            manifest["seconds"] = round(time.monotonic() - started, 1)
            _say(f"compiled in {manifest['seconds']} s")
        except BuildError as error:
            manifest["error"] = str(error)
        for path in folder.iterdir():
            if path.name not in (LIBRARY, LOG):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        return _publish(folder, entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(arguments: dict[str, Any], environment: dict[str, str], log: Path) -> None:
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("_build.py"))],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,
            start_new_session=True,  # so that a timeout can end ninja and the compilers with it
        )
        try:
            process.communicate(json.dumps(arguments).encode(), timeout=_BUILD_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if process.returncode < 0:
        raise RuntimeError(f"the compilation was ended by {signal.Signals(-process.returncode).name}")
    if process.returncode != 0:
        said = log.read_text(errors="replace")
        passing = re.search("Killed|No space left|[Oo]ut of memory|Cannot allocate", said)
        raise (OSError if passing else BuildError)(_first_error(said))


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\s*:", line) and "RuntimeError:" not in line]
    return (errors or lines or ["the compiler failed without a word"])[0][:500]


def _say(message: str) -> None:
    sys.stderr.write(f"tsm_jit: {message}\n")
    sys.stderr.flush()


# --- loading ---------------------------------------------------------------------------------------------------------


def _load() -> Status:
    status = Status(cache=str(cache_folder()))
    recipe = Recipe.here()
    if recipe.nvcc is not None:
        try:
            _load_entry(recipe, status)
            return status
        except Exception as error:  # whatever stops CUDA must not cost the CPU its kernels
            status.missing["cuda"] = f"{type(error).__name__}: {error}"
            recipe = Recipe.here(cuda=False)
    elif _toolchain.torch_has_cuda():
        if _toolchain.gpu_is_visible():
            status.missing["cuda"] = "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to it"
        else:
            status.devices["cuda"] = "plain torch: the machine shows no GPU and nvcc was not found"
    try:
        _load_entry(recipe, status)
    except Exception as error:
        status.missing["cpu"] = f"{type(error).__name__}: {error}"
    return status


def _load_entry(recipe: Recipe, status: Status) -> None:
    status.key, status.manifest = recipe.key, _manifest(recipe)
    entry = cache_folder() / recipe.key
    if "error" in status.manifest:
        log = f" (log: {entry / LOG})" if (entry / LOG).is_file() else ""
        raise BuildError(status.manifest["error"] + log)
    torch.ops.load_library(str(entry / LIBRARY))
    status.devices["cpu"] = "compiled kernels"
    if status.manifest["cuda"]:
        status.devices["cuda"] = f"compiled kernels ({', '.join(status.manifest['architectures'])})"


def _manifest(recipe: Recipe) -> dict[str, Any]:
    entry = cache_folder() / recipe.key
    return _read(entry) or _build_under_lock(recipe, entry)


_status = Status()


def status() -> Status:
    """What :func:`load` found."""
    return _status


def load() -> None:
    """Makes the kernels available; never raises unless ``TSM_JIT_REQUIRE`` asks for it."""
    global _status
    try:
        status = _load()
    except Exception as error:  # an import must not fail: plain torch computes the same
        status = Status(missing={"cpu": f"{type(error).__name__}: {error}"}, cache=str(cache_folder()))
    if not _toolchain.torch_has_cuda():
        status.devices["cuda"] = "this torch has no CUDA"
    elif "cuda" not in status.devices:
        status.missing.setdefault("cuda", status.missing.get("cpu", "not built"))
    for device, reason in status.missing.items():
        status.devices[device] = f"plain torch: {reason}"
    _status = status
    _report(status)


def _report(status: Status) -> None:
    required = os.environ.get("TSM_JIT_REQUIRE", "")
    if required not in ("", "0", "1", "cpu", "cuda"):
        raise ValueError(f"TSM_JIT_REQUIRE must be 1, cpu or cuda, got {required!r}")
    needed = {"1": ("cpu", "cuda") if _toolchain.gpu_is_visible() else ("cpu",), "cpu": ("cpu",), "cuda": ("cuda",)}
    for device in needed.get(required, ()):
        if not status.devices[device].startswith("compiled"):
            raise ImportError(f"TSM_JIT_REQUIRE={required}, but {device} tensors would take {status.devices[device]}")
    if status.missing and (status.missing.keys() != {"cuda"} or _toolchain.gpu_is_visible()):
        devices: dict[str, list[str]] = {}
        for device, reason in status.missing.items():
            if device == "cpu" or _toolchain.gpu_is_visible():
                devices.setdefault(reason, []).append(device.upper())
        what = "; ".join(f"{' and '.join(sorted(names, reverse=True))}: {reason}" for reason, names in devices.items())
        warnings.warn(
            f"tsm_jit has no compiled kernels for some tensors, which take slower plain torch ({what}). "
            "After a remedy, python -m tsm_jit clean makes the next import try again.",
            RuntimeWarning,
            stacklevel=2,
        )


# --- the command line ------------------------------------------------------------------------------------------------


def entry_bytes(status: Status) -> int | None:
    """The size of this build in the cache."""
    if status.cache is None or status.key is None:
        return None
    return _bytes_below(Path(status.cache) / status.key)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clean() -> int:
    """Removes the entries of the cache, and what killed builds left; returns the bytes freed. Whatever else lies in the
    folder stays, and so does what another process is building."""
    folder = cache_folder()
    freed = 0
    if folder.is_dir():
        _refuse_foreign(folder)
        for path in folder.iterdir():
            entry = re.fullmatch("[0-9a-f]{32}", path.name)
            left = re.fullmatch("tmp-[0-9a-f]{32}", path.name) and time.time() - path.stat().st_mtime > _BUILD_SECONDS
            if path.is_dir() and (entry or left):
                freed += _bytes_below(path)
                shutil.rmtree(path)
    return freed


def asked_to_clean() -> bool:
    """True for ``python -m tsm_jit clean``, which must not compile what it removes."""
    return any(sys.orig_argv[i : i + 3] == ["-m", "tsm_jit", "clean"] for i in range(1, len(sys.orig_argv)))
