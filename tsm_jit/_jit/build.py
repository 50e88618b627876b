"""Runs the worker: a child process that builds one library, bounded in time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tsm_jit._jit import tools
from tsm_jit._jit.cache import LOG
from tsm_jit._jit.spec import BuildError, BuildSpec, kernel_folder

RESULT = "result.json"
SECONDS = 300  # a build that takes longer hangs
_INTERRUPTED = {-getattr(signal, name, 0) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}
# The package itself must not be imported in the child, as that would build: a stub stands for it.
_START = """
import sys, types
package, sys.path[:] = sys.argv[1], sys.argv[2:]
sys.modules["tsm_jit"] = types.ModuleType("tsm_jit")
sys.modules["tsm_jit"].__path__ = [package]
from tsm_jit._jit import worker
worker.main()
"""


def missing_tool(backend: str) -> str | None:
    """Why this machine cannot build ``backend``, and what to do."""
    if sys.platform == "win32":
        return "the kernels are not built on Windows"
    if not sys.executable or getattr(sys, "frozen", False):
        return "a Python interpreter starts the compilers, and this program has none"
    if backend == "nvcc" and tools.find_nvcc() is None:
        return "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to it"
    if backend == "nvrtc" and tools.find_nvrtc() is None:
        return "NVRTC was not found: pip install cuda-bindings of the CUDA version of PyTorch"
    if tools.find_cxx() is None:
        return f"no C++ compiler was found: install g++ or clang++, or set CXX, got {os.environ.get('CXX', '')!r}"
    if tools.find_ninja() is None:
        return "ninja was not found: pip install ninja"
    return None


def build(spec: BuildSpec, folder: Path) -> dict[str, Any]:
    """Builds the library in ``folder``, with a log.

    Returns:
        What the manifest says of the build: ``architectures``, ``toolkit``, ``notes``, ``seconds``.

    Raises:
        BuildError: if it would fail again.
        OSError: if it may succeed the next time.
    """
    request = {
        "spec": asdict(spec),
        "kernels": str(kernel_folder()),
        "cxx": tools.find_cxx(),
        "nvcc": str(tools.find_nvcc()),
        "ninja": tools.find_ninja(),
    }
    (folder / "request.json").write_text(json.dumps(request))
    package = Path(__file__).resolve().parent.parent
    started = time.monotonic()
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(package), *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE,  # its end tells the worker that this process has died
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if time.monotonic() - started > SECONDS:
                    raise BuildError(
                        f"the compilers did not end within {SECONDS} s: set CXX or CUDA_HOME to other compilers"
                    )
                time.sleep(0.02)
        finally:
            if not (folder / RESULT).exists():  # else the worker has ended itself and all that it started
                end_session(process.pid)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    try:
        result = json.loads((folder / RESULT).read_bytes())
    except FileNotFoundError:
        lines = (folder / LOG).read_text(errors="replace").split()
        message = f"the build ended with exit code {process.returncode} and no result: {' '.join(lines[-20:])}"
        raise (OSError if process.returncode in _INTERRUPTED else BuildError)(message)
    if "error" in result:
        raise (OSError if result["transient"] else BuildError)(result["error"])
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def end_session(leader: int) -> None:
    """Kills all processes of a session. Its process groups are many, as ninja makes one for each compiler."""
    for _ in range(100):  # ninja may be starting another one
        others = _groups(leader) - {leader}
        if not others:
            break
        for group in others:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _groups(session: int) -> set[int]:
    """The process groups of a session, on Linux."""
    groups = set()
    for process in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError):  # it has just ended
            text = Path("/proc", process, "stat").read_text(errors="replace")
            state, _, group, its_session = text.rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                groups.add(int(group))
    return groups
