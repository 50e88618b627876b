"""The folder of compiled kernels.

    <cache>/<key>/                       an entry: the library, manifest.json, build.log; or a failure without a library
    <cache>/<key>.lock                   held by the process that builds it
    <cache>/<key>.tmp-<host>-<random>/   a build in progress, or what a killed one left

An entry appears by one rename and never changes. To read one takes no lock and writes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsm_jit._jit import tools
from tsm_jit._jit.spec import LIBRARY, BuildError, BuildSpec

LOG = "build.log"
_MANIFEST = "manifest.json"
_LOCK_SECONDS = 600  # longer than a build may take
_STALE_SECONDS = 3600
_MAX_LOG = 2**20


@dataclass(frozen=True)
class Entry:
    """A published build, or the record of a failed one."""

    folder: Path
    manifest: dict[str, Any]  # of a build: what worker.py returns, "backend", "portable", "target", "sha256"

    @property
    def error(self) -> str | None:
        return self.manifest.get("error")

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY

    def is_whole(self) -> bool:
        if self.error is not None:
            return True
        with contextlib.suppress(FileNotFoundError):
            _refuse_writable_by_others(self.library)
            return hashlib.sha256(self.library.read_bytes()).hexdigest() == self.manifest["sha256"]
        return False


def cache_folder() -> Path:
    """``TSM_JIT_CACHE``, or ``tsm_jit`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    try:
        if chosen := tools.path_variable("TSM_JIT_CACHE"):
            return chosen
        return (tools.path_variable("XDG_CACHE_HOME") or Path("~/.cache").expanduser().absolute()) / "tsm_jit"
    except RuntimeError:
        raise OSError("HOME is not set and this user has no home folder")


def find(spec: BuildSpec, other_gpus: bool = False) -> Entry | None:
    """A good entry for this machine, whichever compilers made it: one of ``build`` first, then the newest.

    With ``other_gpus`` also one for other GPUs, if its PTX runs on all: slower to load, but better than none.
    """
    folders = [path for path in cache_folder().glob(f"{spec.part(0)}-*") if "." not in path.name]
    entries = [entry for folder in sorted(folders, key=_date, reverse=True) if (entry := _read_manifest(folder))]
    built = [entry for entry in entries if entry.error is None]
    good = [entry for entry in built if entry.manifest["portable"]]
    good += [entry for entry in built if entry.manifest["target"] == spec.part(1)]
    good += [entry for entry in built if other_gpus and "PTX 75" in entry.manifest["architectures"]]
    return next((entry for entry in good if entry.is_whole()), None)


def read(folder: Path) -> Entry | None:
    """The entry in ``folder``, or None if it is missing or damaged.

    Raises:
        PermissionError: if other users could have written it, or if it cannot be read.
    """
    entry = _read_manifest(folder)
    return entry if entry is not None and entry.is_whole() else None


def _read_manifest(folder: Path) -> Entry | None:
    try:
        for path in (folder.parent, folder, folder / _MANIFEST):
            _refuse_writable_by_others(path)
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    needed = {"backend", "portable", "target", "architectures", "notes", "sha256"}
    is_manifest = isinstance(manifest, dict) and (needed <= manifest.keys() or "error" in manifest)
    return Entry(folder, manifest) if is_manifest else None


def _refuse_writable_by_others(path: Path) -> None:
    """A shared library is code: it must come from files that only this user and root can write."""
    status = path.stat()
    # Root accepts any owner: it can write anywhere, and in a container the home folder may belong to another user.
    if hasattr(os, "geteuid") and os.geteuid() not in (0, status.st_uid) and status.st_uid != 0:
        raise PermissionError(f"{path} belongs to user {status.st_uid}, not to user {os.geteuid()}")
    if os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others: run chmod go-w on it")


def get_or_build(
    spec: BuildSpec, build: Callable[[BuildSpec, Path], dict], log: Callable[[str], None], replace: bool = False
) -> Entry:
    """The entry of exactly this spec, which may be the record of a failure; built if it is missing.

    Args:
        spec: what to build.
        build: builds in a folder, as :func:`tsm_jit._jit.build.build`.
        log: takes a line of text for the user.
        replace: build even if there is an entry.

    Raises:
        OSError: for a failure that may pass by itself; it is not recorded.
    """
    folder = cache_folder() / spec.key
    entry = read(folder)
    if entry is None or replace:
        mode = 0o755 if spec.portable and tools.variable("TSM_JIT_CACHE") else 0o700  # portable: for other users, too
        _make_folder(folder.parent, mode)
        _refuse_writable_by_others(folder.parent)
        with _lock(folder.with_name(f"{spec.key}.lock"), log) as locked:
            entry = read(folder)  # another process may have built it while this one waited
            if entry is None or replace:
                if entry is None and folder.exists():
                    log(f"{folder} is damaged: building it again")
                _remove_leftovers(folder.parent, spec.key if locked else None)
                entry = _build(spec, folder, build, replace, mode)
    return entry


def _make_folder(cache: Path, mode: int) -> None:
    """Makes the cache folder and its missing parents with permissions ``mode``, independently of the umask."""
    for path in (*reversed(cache.parents), cache):
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # another process made it
                path.mkdir(mode=0o700)
                path.chmod(mode)
    if not os.access(cache, os.W_OK):
        raise PermissionError(f"{cache} is read-only: run python -m tsm_jit build where it can be written")


@contextlib.contextmanager
def _lock(path: Path, log: Callable[[str], None]) -> Iterator[bool]:
    """Held by one process at a time; the system takes it from a process that dies.

    On a file system without locks this yields False at once: each process builds, and the first one publishes.
    """
    import filelock  # not needed for a warm import

    lock = filelock.FileLock(path)
    locked = True
    with contextlib.ExitStack() as stack:
        try:
            try:
                stack.enter_context(lock.acquire(timeout=2))
            except filelock.Timeout:
                log(f"waiting for another process that is compiling the kernels ({path})")
                stack.enter_context(lock.acquire(timeout=_LOCK_SECONDS))
        except filelock.Timeout:
            raise TimeoutError(f"{path} was held for {_LOCK_SECONDS} s: end the process that holds it")
        except (NotImplementedError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            locked = False
        yield locked


def _remove_leftovers(cache: Path, locked: str | None) -> None:
    """Removes what killed builds of the locked key left on this host, and old leftovers of all."""
    for folder in cache.glob("*.tmp-*"):
        own = folder.name.startswith(f"{locked}.tmp-{_host()}")  # on network drives another host may not see our lock
        if own or time.time() - _date(folder) > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _temporary(entry: Path) -> Iterator[Path]:
    folder = entry.with_name(f"{entry.name}.tmp-{_host()}-{uuid.uuid4().hex}")
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build(spec: BuildSpec, folder: Path, build: Callable[[BuildSpec, Path], dict], replace: bool, mode: int) -> Entry:
    """Builds in one temporary folder and publishes another, to which no process that outlives the build can write."""
    manifest: dict[str, Any] = {"backend": spec.backend, "portable": spec.portable, "target": spec.part(1)}
    with _temporary(folder) as work, _temporary(folder) as new:
        try:
            manifest |= build(spec, work)
            library = (work / LIBRARY).read_bytes()
            manifest["sha256"] = hashlib.sha256(library).hexdigest()
            (new / LIBRARY).write_bytes(library)
        except BuildError as error:
            if replace:
                raise  # the present entry may work
            manifest["error"] = str(error)
        with contextlib.suppress(FileNotFoundError), open(work / LOG, "rb") as log:
            (new / LOG).write_bytes(log.read(_MAX_LOG))
        (new / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in new.iterdir():
            path.chmod(mode & 0o666)
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # a crash of the machine must not leave a named but empty file
        new.chmod(mode)
        return _publish(new, folder, replace)


def _publish(new: Path, folder: Path, replace: bool) -> Entry:
    """Renames a finished entry to its place. If another process was first, its entry is taken."""
    for _ in range(3):
        try:
            os.replace(new, folder)
        except OSError:
            entry = read(folder)
            if entry is not None and not replace:
                return entry
            with _temporary(folder) as old, contextlib.suppress(FileNotFoundError):
                os.replace(folder, old / "damaged")
        else:
            break
    if (entry := read(folder)) is None:
        raise OSError(f"{folder} was damaged while it was written")
    return entry


def clean(spec: BuildSpec, everything: bool = False, older_than: float | None = None) -> int:
    """Removes entries of this version of tsm_jit and PyTorch, and what killed builds left; returns the bytes freed.

    Args:
        spec: of this version.
        everything: also entries of other versions.
        older_than: only entries that were built so many days ago, of any version.
    """
    cache = cache_folder()
    pattern = f"{spec.part(0)}-*" if not everything and older_than is None else "*-*-*"
    before = time.time() - (older_than or 0) * 86400
    freed = 0
    for path in cache.glob(pattern):
        key, _, suffix = path.name.partition(".")
        if len(key) != len(spec.key) or _date(path) > before or (suffix and _is_locked(cache / f"{key}.lock")):
            continue
        freed += size(path)
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if path.exists():
            raise PermissionError(f"{path} cannot be removed: make {cache} writable, or clean it as its owner")
    return freed


def _is_locked(path: Path) -> bool:
    import filelock

    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except (NotImplementedError, OSError):  # a timeout is an OSError
        return True


def size(path: Path) -> int:
    """The bytes of a file or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _date(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process may have removed it
        return time.time()
