"""Builds one library by ``torch.utils.cpp_extension.load``, in a child process that build.py starts.

The child owns its environment, so the user's stays as it is. It can be killed with everything it started. ``load`` also
loads the library, which tests it before it is published.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from tsm_jit._jit import architectures, nvrtc
from tsm_jit._jit.build import RESULT, end_session
from tsm_jit._jit.cache import LOG
from tsm_jit._jit.spec import LIBRARY, VARIABLES, BuildError

_PROBE_SECONDS = 30
_MAX_FILE = 2**26  # bytes; a compiler that prints more never ends
_MAX_OUTPUT = 2**24  # of one compiler
# Failures that pass although nothing changes on this machine.
_TRANSIENT = re.compile(
    r"Killed|signal 9\b|o space left|quota exceeded|ut of memory|annot allocate|Input/output error|tale file handle"
)


def main() -> None:
    """Builds in the current folder. Writes ``result.json``, also of a failure, and ends with everything it started."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where the user's program ignores it, exit codes would be lost
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        result = _build(**json.loads(Path("request.json").read_bytes()))
    except Exception as error:
        traceback.print_exc()  # into the log
        result = _failure(error)
    Path("result.new").write_text(json.dumps(result))
    os.replace("result.new", RESULT)
    end_session(os.getpid())


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1):
        pass
    end_session(os.getpid())


def _build(spec: dict[str, Any], kernels: str, cxx: list[str], nvcc: str, ninja: str) -> dict[str, Any]:
    folder = Path.cwd()
    if match := re.search(r"[$:|`\n]", str(folder)):
        raise BuildError(f"TSM_JIT_CACHE must be a path without {match[0]!r}, for ninja and nvcc, got {folder}")
    for name in spec["digests"]:  # under plain names, as ninja passes paths to a shell
        if Path(kernels, name).exists():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(kernels, name), name)
    _set_environment(cxx, ninja)
    sources, gpu_flags = spec["sources"], spec["gpu_flags"]
    codes: list[str] = []
    facts: dict[str, Any] = {"notes": []}
    if spec["backend"] != "cpu":
        _link_cuda_runtime()
    if spec["backend"] == "nvcc":
        toolkit, version, known = _probe(nvcc)
        codes = _choose(spec, version, known, facts)
        facts["toolkit"] = f"{toolkit} (CUDA {version})"
        gpu_flags += [shlex.quote(flag) for flag in architectures.gencode(codes)]
        if "NVCC_CCBIN" not in os.environ:
            gpu_flags.append(f"-ccbin={os.environ['CXX']}")
        _set_toolkit(toolkit, nvcc)
    elif spec["backend"] == "nvrtc":
        version, known = nvrtc.version(), nvrtc.known_architectures()
        codes = _choose(spec, version, known, facts)
        facts["toolkit"] = f"NVRTC (CUDA {version})"
        sources = nvrtc.compile_all(sources, codes, gpu_flags)

    import torch.utils.cpp_extension as cpp_extension  # reads the environment

    cpp_extension.TORCH_LIB_PATH = shlex.quote(cpp_extension.TORCH_LIB_PATH)  # load does not quote it
    cpp_extension.load(
        name=Path(LIBRARY).stem,
        sources=sources,
        extra_cflags=spec["cflags"],
        extra_cuda_cflags=gpu_flags,
        extra_ldflags=spec["ldflags"],
        build_directory=str(folder),
        verbose=True,
        with_cuda=spec["backend"] == "nvcc",
        is_python_module=False,
    )
    return {**facts, "architectures": [code.replace("compute_", "PTX ") for code in codes]}


def _set_environment(cxx: list[str], ninja: str) -> None:
    script = _bounded(_plain_name("host", cxx[0]), shlex.join(cxx))
    for name in ("CC", "CUDA_VISIBLE_DEVICES", "CUDA_INC_PATH", "CUDNN_HOME", "CUDNN_PATH"):
        os.environ.pop(name, None)  # they are not in the key, so the result must not depend on them
    for name in VARIABLES:
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    os.environ.update(
        CXX=script,
        PATH=os.pathsep.join([os.path.dirname(ninja), os.environ.get("PATH", os.defpath)]),
        TMPDIR=".",  # a killed compiler leaves nothing elsewhere
        LC_ALL="C.UTF-8",  # for _failure
        TORCH_DONT_CHECK_COMPILER_ABI="1",
        TORCH_NO_COMPILER_WRAPPER="1",
    )


def _set_toolkit(toolkit: Path, nvcc: str) -> None:
    """Gives nvcc and its toolkit names without spaces: nvcc passes its own name to a shell, unquoted."""
    name = _plain_name("nvcc", nvcc)
    name.parent.symlink_to(Path(nvcc).parent)
    Path("toolkit").symlink_to(toolkit)
    # Debian's toolkit is in /usr. load does not name the headers there, as g++ finds them itself, in the right order.
    os.environ.update(CUDA_HOME="/usr" if toolkit == Path("/usr") else "toolkit")
    os.environ["PYTORCH_NVCC"] = _bounded(_plain_name("gpu", nvcc), str(name))


def _bounded(script: Path, command: str) -> str:
    """Writes a script that runs a compiler and bounds its output, as ninja would hold all of it in memory."""
    script.parent.mkdir()
    run = f'{{ {command} "$@" 2>&1 3>&- 4>&-; echo $? >&3; }}'  # 3 takes the exit code, 4 the output
    script.write_text(f'#!/bin/sh\nexec 4>&1\nexit "$({{ {run} | command -p head -c {_MAX_OUTPUT} >&4; }} 3>&1)"\n')
    script.chmod(0o700)
    return str(script)


def _plain_name(folder: str, tool: str) -> Path:
    name = os.path.basename(tool)
    if not re.fullmatch(r"[\w.+-]+", name, re.ASCII):
        raise BuildError(f"a compiler must have a name of letters, digits and _.+-, got {tool!r}")
    return Path(folder, name)


def _link_cuda_runtime() -> None:
    """Makes ``-L. -lcudart`` find the CUDA runtime that PyTorch has loaded, so that there is no second one.

    It also serves toolkits that have no ``libcudart.so``, such as pip's.
    """
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = [line.split(maxsplit=5)[5] for line in lines if re.search(r"/libcudart[^/]*$", line)]
    if paths:  # else PyTorch contains it statically, and `load` links the toolkit's
        Path("libcudart.so").symlink_to(paths[0])


def _probe(nvcc: str) -> tuple[Path, str, list[str]]:
    """nvcc's toolkit, CUDA version and known architectures. An nvcc on the path may be a script that calls another."""

    def output(*options: str) -> str:
        with open("probe", "wb") as file:  # bounded by _MAX_FILE
            try:
                command = [nvcc, *options]
                subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=_PROBE_SECONDS)
            except subprocess.TimeoutExpired:
                raise BuildError(f"{nvcc} {options[0]} did not end within {_PROBE_SECONDS} s")
        return Path("probe").read_text(errors="replace")

    # A dry run prints its settings and compiles nothing; the source need not exist.
    top = re.search(r"^#\$ TOP=(.+)$", output("--dryrun", "-c", "-o", os.devnull, "-x", "cu", os.devnull), re.MULTILINE)
    release = re.search(r"release (\d+\.\d+)", output("--version"))
    known = re.findall(r"^compute_(\d+)\s*$", output("--list-gpu-arch"), re.MULTILINE)
    if release is None or not known:
        raise BuildError(f"{nvcc} must print its release for --version and architectures for --list-gpu-arch")
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent, release[1], known


def _choose(spec: dict[str, Any], version: str, known: list[str], facts: dict[str, Any]) -> list[str]:
    """The GPU code to compile. Adds notes for the user to ``facts``."""
    cuda = torch.version.cuda or ""
    if version.partition(".")[0] != cuda.partition(".")[0]:  # it would bring a second CUDA runtime into the process
        remedy = f"set CUDA_HOME to a toolkit of CUDA {cuda}"
        raise BuildError(
            f"{spec['backend']} must be of the CUDA major version of PyTorch, {cuda}, got {version}: {remedy}"
        )
    present = set()
    try:
        for index in range(torch.cuda.device_count()):
            present.add("{}{}".format(*torch.cuda.get_device_capability(index)))
    except Exception:  # no driver that works: chosen architectures and PTX remain
        traceback.print_exc()
    codes, skipped = architectures.choose(spec["architectures"], known, sorted(present), spec["portable"])
    facts["notes"] += [f"TORCH_CUDA_ARCH_LIST has {word}, which {spec['backend']} does not know" for word in skipped]
    return codes


def _failure(error: Exception) -> dict[str, Any]:
    """What to tell of a failed build: the first error in the log, if a compiler failed."""
    with open(LOG, errors="replace") as log:
        output = log.read(2**20)
    of_system = isinstance(error, OSError) and error.errno is not None
    message = str(error) if isinstance(error, (BuildError, ValueError)) else f"{type(error).__name__}: {error}"
    if "building extension" in message:
        pattern = r"^.*(?:\b(?:error|fatal)\s*:|No space left|\bKilled\b|undefined reference|ld: cannot).*$"
        first = re.search(pattern, output, re.MULTILINE)
        message = first[0].strip()[:500] if first else "a compiler failed and printed no error"
    elif not of_system and isinstance(error, OSError):  # of loading the library
        message = f"the compilers reported success, but {error.__cause__ or error}"
    return {"error": message, "transient": of_system or bool(_TRANSIENT.search(output))}
