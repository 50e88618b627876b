"""Finds the compiled kernels in the cache or compiles them into it, and loads them. Runs once, on ``import tsm_jit``.

    key      sha256 of the sources, the flags, torch and the platform; and of each compiler's path, size and date
    warm     <cache>/<key>/ is there, is ours, its checksum holds: load it. No lock, no write, no compiler is asked.
             A compiler that is not here is not compared: what it made elsewhere, or before it was removed, is as good.
             What python -m tsm_jit build made comes first, and no compiler is compared at all
    cold     lock; build in <cache>/tmp-<random>; copy what was made into another, which no compiler knows, with its
             manifest; rename that to <cache>/<key>
    failed   a compiler's error is published as well, so that the next import does not compile in vain; the step below
             is taken: nvcc -> NVRTC, the library that torch brings, of the same sources -> kernels for the CPU alone
             -> plain torch. One warning says why

GPU architectures are not in the key. What is built holds machine code for the GPUs of the machine that built it and a
portable form (PTX) that the drivers of others complete: of all from sm_80 on where every GPU is as new, else from sm_75
on. So imports ask the driver only beside GPUs of other names than where the former was made.
What was built where no GPU was is built again once where there is one, unless ``python -m tsm_jit build`` made it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsm_jit import _toolchain
from tsm_jit._toolchain import BuildError

LIBRARY = "tsm_jit_kernels.so"
MANIFEST = "manifest.json"
LOG = "build.log"

_CPU_SOURCES = ("bindings.cpp", "temporal_shift.cpp", "residual_shift.cpp")
_CUDA_SOURCES = ("residual_shift.cu", "temporal_shift.cu")  # the longest first
_NVRTC_SOURCES = ("driver.cpp",)
_HEADERS = (
    *("temporal_shift.h", "residual_shift.h", "element.h", "temporal_shift.cuh", "residual_shift.cuh"),
    *("launch.h", "driver.h", "nvrtc_std.h"),
)
# The stable ABI of the oldest torch we support: what is built runs on every later one.
_CFLAGS = ("-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_CFLAGS_OF = {"bindings.cpp": ("-O1",)}  # a call is as fast; optimizing takes most of the time -O3 needs for it
_CUDA_CFLAGS = ("--threads=2",)  # one architecture each
_CUDA_DEFINES = ("-DTSM_JIT_CUDA", "-DUSE_CUDA")
_NVRTC_DEFINES = ("-DTSM_JIT_NVRTC",)
# Host code must be taken for device code to be read at all; none of it is in what is made.
_NVRTC_FLAGS = ("--std=c++17", "--device-as-default-execution-space", "-Ikernels")
_CHOICES = ("TORCH_CUDA_ARCH_LIST", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
NVCC, NVRTC, CPU_ALONE = "nvcc", "NVRTC", "C++ compiler"  # who may build it, the best first; each needs the last one
NOT_FOUND = {
    NVCC: "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to it",
    NVRTC: "NVRTC, which comes with most torches, was not found: pip install nvidia-cuda-nvrtc",
}
_OWN_FOLDER = "set TSM_JIT_CACHE to a folder of your own"
_NAME_HOLDER_AFTER_SECONDS = 2
_LEAST_FREE = 2**20
_LOCK_SECONDS = 600  # longer than a build may take, its second try with another C++ compiler included


@dataclass(eq=False, repr=False)  # whose code takes time to make
class Status:
    """What this process runs on, for :func:`tsm_jit.info`."""

    devices: dict[str, str] = field(default_factory=dict)  # "cpu" and "cuda": what serves them, and why
    missing: dict[str, str] = field(default_factory=dict)  # device: why it has no kernels though it could
    failed: dict[str, str] = field(default_factory=dict)  # builder: why it was passed over
    cache: str | None = None
    key: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False  # by this import, or by another while this one waited
    pending: str | None = None  # the builder that will be tried first, if nothing was to be compiled


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
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise OSError(f"HOME is not set and user {os.geteuid()} has no home folder: {_OWN_FOLDER}")
    return Path(base).absolute() / "tsm_jit"


# --- what to build ---------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Recipe:
    """Everything that decides what the compiled library is."""

    by: str
    kernels: Path
    cxx: list[str] | None
    compiler: Path | None  # nvcc or NVRTC, if it is here
    key: str  # of entries that will do: with a * for each compiler that is not here
    entry: str  # the one that an import makes
    built: str  # the one that ``python -m tsm_jit build`` makes, with whatever it finds

    cpp_sources = _CPU_SOURCES
    cuda_sources = _CUDA_SOURCES
    cflags = _CFLAGS
    cflags_of = _CFLAGS_OF
    cuda_cflags = _CUDA_CFLAGS
    cuda_defines = _CUDA_DEFINES
    nvrtc_sources = _NVRTC_SOURCES
    nvrtc_defines = _NVRTC_DEFINES
    nvrtc_flags = _NVRTC_FLAGS

    @staticmethod
    def here(by: str) -> Recipe:
        kernels = kernel_folder()
        cxx = _toolchain.find_cxx()
        names = (*_CPU_SOURCES, *_CUDA_SOURCES, *_NVRTC_SOURCES, *_HEADERS)
        sources = {name: _digest((kernels / name).read_bytes()) for name in names}
        flags = (_CFLAGS, _CFLAGS_OF, _CUDA_CFLAGS, _CUDA_DEFINES, _NVRTC_DEFINES, _NVRTC_FLAGS)
        versions = (torch.__version__, torch.version.cuda, platform.system(), platform.machine())
        base = _digest(sources, flags, versions)[:32]
        cxx_part = _digest(_identity(Path(cxx[0])), cxx)[:8] if cxx else "*"
        if by == CPU_ALONE:
            compiler, part = None, "cpu"
        else:
            compiler = _toolchain.find_nvcc() if by == NVCC else _toolchain.find_nvrtc()
            choices = [os.environ.get(name) for name in _CHOICES]
            part = by.lower() + (_digest(_identity(compiler), choices)[:8] if compiler else "*")
        key = f"{base}-{cxx_part}-{part}"
        return Recipe(by, kernels, cxx, compiler, key, key.replace("*", "none"), f"{base}-built")


def builders() -> tuple[str, ...]:
    """Who may build the kernels, the best first."""
    if not _toolchain.torch_has_cuda():
        return (CPU_ALONE,)
    return (NVRTC, CPU_ALONE) if nvrtc_is_chosen() else (NVCC, NVRTC, CPU_ALONE)


def nvrtc_is_chosen() -> bool:
    """Whether NVRTC is to compile the kernels even where nvcc is."""
    return os.environ.get("TSM_JIT_NVRTC", "") not in ("", "0")


def _digest(*facts: Any) -> str:
    data = facts[0] if isinstance(facts[0], bytes) else json.dumps(facts).encode()
    return hashlib.sha256(data).hexdigest()


def _identity(tool: Path) -> list[Any]:
    """A tool by its path, size and date; running it would take longer than the rest of the import."""
    try:
        real = tool.resolve()
        found = real.stat()
    except OSError:  # what a script called is gone
        return [str(tool)]
    return [str(tool), str(real), found.st_size, found.st_mtime_ns]


# --- the cache -------------------------------------------------------------------------------------------------------


def _refuse_foreign(target: Path, above: bool = False) -> None:
    """A shared library is code: ours comes from no file or folder that somebody else could write to or put in its
    place. Folders ``above`` may be shared as far as nobody can rename what is in them."""
    for path in (*reversed(target.parents), target):
        above_it = above or path != target
        found = os.lstat(path)
        # Without a user 0, as in some containers, whoever has / is root; but so seems everybody from outside.
        if found.st_uid not in {os.geteuid(), 0, *([os.stat("/").st_uid] if above_it else [])}:
            raise PermissionError(f"{path} belongs to user {found.st_uid}, not to you: {_OWN_FOLDER}")
        if stat.S_ISLNK(found.st_mode):
            path.stat()  # raises for a link to itself
            _refuse_foreign(path.parent / os.readlink(path), above_it)
        elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (above_it and _safely_shared(path, found)):
            raise PermissionError(f"{path} can be written by others: run chmod go-w on it, or {_OWN_FOLDER}")


def _safely_shared(path: Path, found: os.stat_result) -> bool:
    """Whether only its owner can rename what lies in a folder: it is sticky, or of a group that is its owner alone."""
    if found.st_mode & stat.S_ISVTX:
        return True
    if found.st_mode & stat.S_IWOTH:
        return False
    with contextlib.suppress(OSError):  # there are no access control lists here
        if "system.posix_acl_access" in os.listxattr(path):
            return False  # of whom it may be, too
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(found.st_uid).pw_name, grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    members = {*group.gr_mem, *(user.pw_name for user in pwd.getpwall() if user.pw_gid == found.st_gid)}
    return group.gr_name == owner and members <= {owner}


def _read(entry: Path) -> dict[str, Any] | None:
    """The manifest of a cache entry that is whole and ours, else None."""
    try:
        for path in (entry.parent, entry, entry / MANIFEST):
            _refuse_foreign(path)
        manifest = json.loads((entry / MANIFEST).read_bytes())
        if manifest.pop("seal") != _digest(manifest):
            return None
        if "error" not in manifest:
            _refuse_foreign(entry / LIBRARY)
            if hashlib.sha256((entry / LIBRARY).read_bytes()).hexdigest() != manifest["sha256"]:
                return None
    except (FileNotFoundError, NotADirectoryError, AttributeError, KeyError, TypeError, ValueError):
        return None
    except PermissionError as error:
        if error.errno is None:  # of ours
            raise
        cure = f"have its owner run chmod -R a+rX {entry.parent}, or {_OWN_FOLDER}"
        raise PermissionError(f"{error.filename} cannot be read: {cure}")
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    sealed = {**manifest, "seal": _digest(manifest)}  # against damage; against others there are owners and modes
    (folder / MANIFEST).write_text(json.dumps(sealed, indent=1))


def _look_up(recipe: Recipe) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What ``build`` made, by whatever; the entry that the compilers here made, or, if they are not here, what others
    made, the newest first."""
    cache = cache_folder()
    for entry in (cache / recipe.built, *sorted(cache.glob(recipe.key), key=_date, reverse=True)):
        manifest = _read(entry)
        if manifest is None or ("error" in manifest and entry.name != recipe.entry):
            continue
        if manifest["by"] == recipe.by or (manifest["by"], recipe.by) == (NVRTC, NVCC):
            yield entry, manifest


def _publish(folder: Path, entry: Path, replace: bool = False) -> dict[str, Any]:
    """Renames a finished folder to its entry. Whoever comes second takes what is there, unless it is damaged or to be
    replaced: then that is removed."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if path != folder:  # which some network drives cannot
                raise
        finally:
            os.close(descriptor)
    for _ in range(3):
        try:
            os.replace(folder, entry)
        except OSError:
            published = _read(entry)
            if published is not None and not replace:
                return published
            with contextlib.suppress(FileNotFoundError):  # so does another process in this moment
                removed = entry.with_name(f"{_of_this_machine()}{uuid.uuid4().hex}")
                os.replace(entry, removed)
                shutil.rmtree(removed, ignore_errors=True)
        else:
            break
    published = _read(entry)
    if published is None:
        raise OSError(f"{entry} was damaged while it was written")
    return published


def _check(recipe: Recipe) -> None:
    """Raises what can be said against a build beforehand."""
    if recipe.cxx is None:
        cxx = os.environ.get("CXX", "")
        raise BuildError(f"no C++ compiler was found: install g++ or clang++, or set CXX to one, got {cxx!r}")
    if recipe.compiler is None and recipe.by in NOT_FOUND:
        raise BuildError(NOT_FOUND[recipe.by])
    cache = cache_folder()
    there = next(path for path in (cache, *cache.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise PermissionError(f"{cache} cannot be made ({there} is no folder): {_OWN_FOLDER}")
    if not os.access(there, os.W_OK):
        fill = "fill it with python -m tsm_jit build where it can be written"
        raise PermissionError(f"{cache} is read-only and has no kernels for {recipe.entry}: {fill}, or {_OWN_FOLDER}")


def _build_under_lock(recipe: Recipe, chosen: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Builds what is not there by then, or in any case if GPU architectures are ``chosen``."""
    _check(recipe)
    from tsm_jit._build import say  # of no use in a warm import without nvcc

    cache = cache_folder()
    # A build on purpose, into a folder that was named, is for others too: they may read it.
    mode = 0o755 if chosen is not None and os.environ.get("TSM_JIT_CACHE") else 0o700
    try:
        _make(cache, mode)
    except OSError as error:
        raise PermissionError(f"{cache} cannot be made ({error.strerror}): {_OWN_FOLDER}") from None
    _refuse_foreign(cache)
    entry = cache / (recipe.entry if chosen is None else recipe.built)
    path = cache / f"lock-{entry.name}"
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _acquire(lock, _NAME_HOLDER_AFTER_SECONDS):
            holder = os.pread(lock, 1000, 0).decode(errors="replace") or "another process"
            say(f"waiting for {holder}, which is compiling the kernels")
            if not _acquire(lock, _LOCK_SECONDS):
                raise TimeoutError(f"{holder} held {path} for {_LOCK_SECONDS} s: end it and try again")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        published = _read(entry)  # while we waited
        replace = chosen is not None or (published is not None and _outdated(recipe, published))
        if published is not None and not replace:
            return entry, published
        if published is None and entry.exists():
            say(f"{entry} is damaged: compiling it again")
        _sweep(cache)
        return entry, _build(recipe, entry, chosen, replace, mode)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or re.search("o space left|quota exceeded", str(error)):
            raise OSError(f"{cache} is full: free some of it, or {_OWN_FOLDER} ({error})")
        raise
    finally:
        os.close(lock)


def _make(folder: Path, mode: int) -> None:
    """The folder and what is missing above it, whatever the umask."""
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # another process has made it
                path.mkdir(mode=0o700)
                path.chmod(mode)


def _acquire(lock: int, seconds: float) -> bool:
    """Waits for a lock that the system takes from a process that dies. Where there are no locks, as on some network
    drives, nobody waits: each process compiles, and the first publishes."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # somebody has it; the second, on some network drives
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        except OSError:
            return True
        else:
            return True


def _sweep(cache: Path) -> int:
    """Removes what killed builds left, and not what another process may be building; returns the bytes freed. Its
    builder holds it by a lock, which a killed one has lost; where locks do not tell, its age does."""
    freed = 0
    for folder in cache.glob("tmp-*"):
        with contextlib.suppress(OSError), _held(folder) as first, _held(folder) as second:
            works = not second and folder.name.startswith(_of_this_machine())  # a lock that two can have is none
            if (first and works) or time.time() - _date(folder) > _LOCK_SECONDS:
                freed += _remove(folder)
    return freed


@contextlib.contextmanager
def _held(path: Path, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[bool]:
    """Whether ``path`` could be locked; it stays so until the end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, how)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _of_this_machine() -> str:
    """How folders begin that are built here: network drives may keep locks to each machine."""
    return f"tmp-{_digest(platform.node())[:8]}-"


def _date(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):  # another process may have removed it in this moment
        return math.inf


def _outdated(recipe: Recipe, manifest: dict[str, Any]) -> bool:
    """True where there is a GPU, and an entry was made where none was seen, or newer ones; and where nvcc is a script
    and what it calls has changed."""
    if recipe.compiler and "nvcc" in manifest and _identity(Path(manifest["nvcc"][0])) != manifest["nvcc"]:
        return True
    if recipe.by == CPU_ALONE or not _toolchain.gpu_is_visible():
        return False
    return manifest.get("gpu") is False or _lacks_code(manifest)


def _lacks_code(manifest: dict[str, Any]) -> bool:
    """Whether a GPU here can run nothing of it."""
    made = manifest.get("architectures", ())
    portable = min((int(name[4:].rstrip("af")) for name in made if name.startswith("PTX ")), default=0)
    if portable <= int(_toolchain.PORTABLE_ARCHITECTURES[0]) or manifest.get("gpus") == _toolchain.gpu_models():
        return False
    return any(int(arch) < portable and f"sm_{arch}" not in made for arch in _toolchain.gpu_architectures())


def _build(recipe: Recipe, entry: Path, chosen: str | None, replace: bool, mode: int) -> dict[str, Any]:
    from tsm_jit._build import build

    manifest: dict[str, Any] = {"by": recipe.by, "torch": torch.__version__}
    # What outlives its compiler may go on writing where that ran: what is published is another folder.
    with _new_folder(entry.parent) as work, _new_folder(entry.parent) as made:
        try:
            architectures = chosen or os.environ.get("TORCH_CUDA_ARCH_LIST")
            manifest |= build(recipe, work, LIBRARY, work / LOG, architectures)
            manifest["gpu"] = bool(architectures) or _toolchain.gpu_is_visible()
            manifest["gpus"] = _toolchain.gpu_models()
            nvcc = manifest.pop("nvcc", None)
            if nvcc and chosen is None:  # the key has the script that calls it, if there is one
                manifest["nvcc"] = _identity(Path(nvcc))
            data = (work / LIBRARY).read_bytes()
            manifest["sha256"] = hashlib.sha256(data).hexdigest()
            (made / LIBRARY).write_bytes(data)
        except BuildError as error:
            if replace:
                raise  # what is there may work
            if shutil.disk_usage(work).free < _LEAST_FREE:  # it may have had no room to say so
                raise OSError(errno.ENOSPC, str(error))
            manifest["error"] = str(error)
        if (work / LOG).is_file():
            with open(work / LOG, "rb") as log:
                (made / LOG).write_bytes(log.read(_toolchain.MOST_SAID))
        _write_manifest(made, manifest)
        for path in made.iterdir():
            path.chmod(mode & 0o666)
        made.chmod(mode)
        return _publish(made, entry, replace)


@contextlib.contextmanager
def _new_folder(cache: Path) -> Iterator[Path]:
    """One with a name that nobody can guess, held as long as this process lives; gone in the end unless renamed."""
    with contextlib.ExitStack() as stack:
        while True:
            folder = cache / f"{_of_this_machine()}{uuid.uuid4().hex}"
            folder.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover, before it was held
                stack.enter_context(_held(folder, fcntl.LOCK_EX))
                if folder.exists():
                    break
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# --- loading ---------------------------------------------------------------------------------------------------------


def _load(status: Status, compiling: bool) -> None:
    spare: list[tuple[Path, dict[str, Any]]] = []  # right for the GPU here, if not the fastest
    for by in builders():
        useless = ""
        try:
            status.cache = str(cache_folder())
            recipe = Recipe.here(by)
            for found in (*spare, *_look_up(recipe)) if by == CPU_ALONE else _look_up(recipe):
                if _outdated(recipe, found[1]):
                    if _lacks_code(found[1]):
                        useless = f"; {found[0]} has no code for the GPU here, but {found[1]['architectures']}"
                    else:
                        spare.append(found)
                    continue
                with contextlib.suppress(OSError):  # what other compilers made may need what went with them
                    _take(*found, status)
                    return
            status.key = recipe.entry
            if not compiling:
                _check(recipe)
                status.pending = by
                return
            built = _build_under_lock(recipe)
            status.compiled = not spare
            _take(*built, status)
            return
        except Exception as error:  # whatever stops one must not stop the next, nor the import
            status.failed[by] = f"{type(error).__name__}: {error}{useless}"


def _take(entry: Path, manifest: dict[str, Any], status: Status) -> None:
    status.key, status.manifest = entry.name, manifest
    if "error" in manifest:
        log = f" (log: {entry / LOG})" if (entry / LOG).is_file() else ""
        raise BuildError(manifest["error"] + log)
    torch.ops.load_library(str(entry / LIBRARY))
    status.devices["cpu"] = "compiled kernels"
    if manifest["by"] != CPU_ALONE:
        by = "NVRTC: " if manifest["by"] == NVRTC else ""
        status.devices["cuda"] = f"compiled kernels ({by}{', '.join(manifest['architectures'])})"


_status = Status()


def status() -> Status:
    """What :func:`load` found."""
    return _status


def load() -> None:
    """Makes the kernels available; never raises unless ``TSM_JIT_REQUIRE`` asks for it."""
    _report(find())


def find(compiling: bool = True) -> Status:
    """Loads what can be loaded, once in a process, and compiles it if need be; never raises and warns of nothing."""
    if _status.devices:
        return _status
    _load(_status, compiling)
    for device, needed in (("cpu", {CPU_ALONE}), ("cuda", {NVCC, NVRTC})):
        if device == "cuda" and not _toolchain.torch_has_cuda():
            _status.devices[device] = "this torch has no CUDA"
        elif device not in _status.devices and _status.pending:
            _status.devices[device] = f"not compiled yet: the next import will do it, with {_status.pending}"
        elif device not in _status.devices:
            why = dict.fromkeys(reason for by, reason in _status.failed.items() if by in needed)
            _status.missing[device] = "; ".join(why)
            _status.devices[device] = f"plain torch: {_status.missing[device]}"
    return _status


def _report(status: Status) -> None:
    required = os.environ.get("TSM_JIT_REQUIRE", "")
    if required not in ("", "0", "1", "cpu", "cuda"):
        raise ValueError(f"TSM_JIT_REQUIRE must be 1, cpu or cuda, got {required!r}")
    needed = {"1": ("cpu", "cuda") if _toolchain.gpu_is_visible() else ("cpu",), "cpu": ("cpu",), "cuda": ("cuda",)}
    for device in needed.get(required, ()):
        if not status.devices[device].startswith("compiled"):
            raise ImportError(f"TSM_JIT_REQUIRE={required}, but {device} tensors would take {status.devices[device]}")
    by_nvrtc = status.compiled and status.manifest.get("by") == NVRTC and "cuda" in status.devices
    if by_nvrtc and NVCC in status.failed and _toolchain.gpu_is_visible():
        warnings.warn(
            f"tsm_jit: NVRTC ({status.manifest['toolkit']}) compiled the CUDA kernels, which are as fast, instead of "
            f"nvcc ({status.failed[NVCC]}). TSM_JIT_NVRTC=1 chooses NVRTC.",
            RuntimeWarning,
            stacklevel=2,
        )
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


def build(chosen: str) -> tuple[Path, dict[str, Any]]:
    """Compiles for the GPU architectures that ``chosen`` lists whatever the cache holds; the entry and its manifest."""
    recipes = [Recipe.here(by) for by in builders()]
    return _build_under_lock(next(recipe for recipe in recipes if recipe.compiler or recipe.by == CPU_ALONE), chosen)


def clean(everything: bool = False, older_than: float | None = None) -> int:
    """Removes what was compiled of these sources for this torch; with ``everything``, of any; or what is ``older_than``
    so many days; and what killed builds left. Returns the bytes freed. Whatever else lies in the folder stays."""
    cache = cache_folder()
    if not cache.is_dir():
        return 0
    _refuse_foreign(cache)
    freed = _sweep(cache)
    made = "[0-9a-f]{32}" if everything or older_than is not None else Recipe.here(CPU_ALONE).key.partition("-")[0]
    before = math.inf if older_than is None else time.time() - older_than * 86400
    for entry in cache.iterdir():
        if re.fullmatch(made + "(-[0-9a-z]+)+", entry.name) and _date(entry) < before:
            freed += _remove(entry)
            if entry.exists():
                raise PermissionError(f"{entry} cannot be removed: make {cache} writable, or clean it as its owner")
    for lock in cache.glob("lock-*"):
        with contextlib.suppress(OSError), _held(lock) as free:
            if free:
                lock.unlink()
    return freed


def _remove(folder: Path) -> int:
    size = _bytes_below(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return size - _bytes_below(folder)


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
