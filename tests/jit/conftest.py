"""Fresh processes that import tsm_jit, and stand-ins for compilers, which need most of the time of a real build."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch

from tsm_jit._jit import cache, spec, tools

# Every import runs this script: it computes a shift, and prints the facts that tests compare.
SCRIPT = """
import json, os, sys, warnings, torch
variables = dict(os.environ)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
{before}
    import tsm_jit
x = torch.arange(4 * 2 * 3.0).view(4, 2, 3)
y = tsm_jit.shift_groups(x, 4, [(1, 1), (1, -1)], padding="circular")
assert torch.equal(y[:, 0], x[:, 0].roll(-1, 0)) and torch.equal(y[:, 1], x[:, 1].roll(1, 0))
facts = {{"warnings": [str(warning.message) for warning in caught], "modules": sorted(sys.modules)}}
facts |= {{"same_variables": variables == dict(os.environ), "started_cuda": torch.cuda.is_initialized()}}
print(json.dumps(tsm_jit.info() | facts))
"""
# Where torch is imported an import takes little time: forks of one process import, each after one of the statements.
FORKS = """
import json, os, sys, torch
for before in json.loads(sys.argv[1]):
    if os.fork() == 0:
        try:
            exec(before)
            import tsm_jit
            x = torch.arange(8.0).view(8, 1)
            assert torch.equal(tsm_jit.shift_groups(x, 8, [(1, 1)], padding="circular"), x.roll(-1, 0))
            result = tsm_jit.info()["devices"]["cpu"]
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        os.write(1, json.dumps(result).encode() + b"\\n")
        os._exit(0)
    os.wait()
"""
# The same for scripts: a fork for each one that comes through the socket, with its output files.
SERVER = """
import json, os, socket, sys, traceback, torch
requests, path = socket.socket(fileno=int(sys.argv[1])), sys.path[:]
while True:
    data, files, *_ = socket.recv_fds(requests, 2**18, 2)
    if not data:
        break
    request = json.loads(data)
    if "wait" in request:
        requests.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]))
        continue
    if pid := os.fork():
        requests.send(b"%d" % pid)
        [os.close(file) for file in files]
        continue
    code = 1
    try:
        requests.close()
        [os.dup2(file, number) for number, file in enumerate(files, 1)]
        [os.close(file) for file in files]
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.path[:] = ["", *os.environ["PYTHONPATH"].split(os.pathsep), *path]
        sys.modules.pop("sitecustomize", None)
        try:
            import sitecustomize
        except ImportError:
            pass
        exec(request["script"], {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""
# cuda.bindings.nvrtc, without the compiler.
NVRTC = """
class nvrtcResult:
    NVRTC_SUCCESS = 0
def returns(*values, error=0):
    return lambda *arguments: (error, *values)
nvrtcVersion, nvrtcGetSupportedArchs = returns(VERSION), returns([75, 80, 90])
nvrtcCreateProgram, nvrtcCompileProgram = returns("program", error=ERROR), returns()
nvrtcGetPTXSize = nvrtcGetCUBINSize = returns(0)
nvrtcGetPTX = nvrtcGetCUBIN = returns()
nvrtcGetErrorString = returns(b"NVRTC is out of luck")
"""


class Fork:
    """Runs a script as ``subprocess.Popen`` does, in a fork of a process that has imported nothing but torch."""

    def __init__(self, script: str, environment: dict[str, str], folder: Path):
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 (closed with this object)
        request = {"script": script, "environment": environment, "folder": str(folder)}
        self.pid = self.ask(request, *(file.fileno() for file in self.files))

    def communicate(self, timeout: float | None = None) -> list[str]:
        requests, _ = self.server()
        requests.settimeout(timeout)
        try:
            self.returncode = self.ask({"wait": self.pid})
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            requests.recv(100)  # the answer, so that the next request gets its own
            raise
        for file in self.files:
            file.seek(0)
        return [file.read() for file in self.files]

    @classmethod
    def ask(cls, request: dict, *files: int) -> int:
        requests, _ = cls.server()
        socket.send_fds(requests, [json.dumps(request).encode()], files)
        return int(requests.recv(100))

    @staticmethod
    @functools.cache
    def server() -> tuple[socket.socket, subprocess.Popen]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVER, str(theirs.fileno())]
        with theirs:
            return ours, subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])


class Importer:
    """Imports tsm_jit in processes that share a cache."""

    def __init__(self, folder: Path):
        self.folder, self.cache = folder, folder / "cache"

    def environment(self, cuda: bool = False, path: tuple = (), **changes) -> dict[str, str]:
        """Ours without nvcc and NVRTC, unless ``cuda``. A value of None removes a variable."""
        alone = [] if cuda else [Path(__file__).parents[1] / "cpu_alone"]
        paths = [*path, *alone, Path(spec.__file__).parents[2], *sys.path]
        changes = {"TSM_JIT_CACHE": self.cache, "OMP_NUM_THREADS": "1", **changes}
        changes["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        removed = (*changes, "TSM_JIT_REQUIRE", "TSM_JIT_NVRTC", "TORCH_CUDA_ARCH_LIST")
        inherited = {name: value for name, value in os.environ.items() if name not in removed}
        return inherited | {name: str(value) for name, value in changes.items() if value is not None}

    def start(self, *command: str, **changes) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *command], env=self.environment(**changes), cwd=self.folder, **pipes)

    def run(self, *command: str, **changes) -> subprocess.CompletedProcess:
        process = self.start(*command, **changes)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def command(self, *arguments: str, **changes) -> subprocess.CompletedProcess:
        """Runs ``python -m tsm_jit`` in a fork."""
        script = f"""import runpy, sys
sys.argv, sys.orig_argv = ["-m", *{arguments}], [sys.executable, "-m", "tsm_jit", *{arguments}]
runpy.run_module("tsm_jit", run_name="__main__", alter_sys=True)"""
        process = Fork(script, self.environment(**changes), self.folder)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def begin(self, before: str = "", fresh: bool = False, **changes) -> subprocess.Popen | Fork:
        """Starts an import after a statement, in a ``fresh`` process or in a fork."""
        script = SCRIPT.format(before=textwrap.indent(before, "    "))
        return self.start("-c", script, **changes) if fresh else Fork(script, self.environment(**changes), self.folder)

    def finish(self, process: subprocess.Popen | Fork) -> dict:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return json.loads(out) | {"stderr": err}

    def __call__(self, before: str = "", **changes) -> dict:
        return self.finish(self.begin(before, **changes))

    def forks(self, befores: list[str], *options: str, **changes) -> list[str]:
        """What serves the CPU, or the error, of an import after each of these statements."""
        done = self.run(*options, "-c", FORKS, json.dumps(befores), **changes)
        assert done.stdout.count("\n") == len(befores), done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def entries(self) -> list[Path]:
        return [path for path in self.cache.iterdir() if path.is_dir()]

    def script(self, path: str, text: str) -> Path:
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def toolkit(self, compiles: str = ": >$output", version: str | None = torch.version.cuda) -> Path:
        """A CUDA toolkit that knows three GPUs and compiles nothing."""
        if torch.version.cuda is None:
            pytest.skip("needs a torch with CUDA")
        text = f"""case "$*" in --version) echo "Cuda compilation tools, release {version}, V1" ;;
            --list-gpu-arch) echo compute_75; echo compute_80; echo compute_90 ;;
            *--dryrun*) echo "#$ TOP={self.folder}/toolkit" ;;
            *) while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done; {compiles} ;; esac"""
        return self.script("toolkit/bin/nvcc", text).parents[1]

    def nvrtc(self, error: int = 0) -> Path:
        """A folder for PYTHONPATH with an NVRTC that compiles nothing, or fails."""
        package = self.folder / "nvrtc" / "cuda" / "bindings"
        package.mkdir(parents=True)
        for name in ("__init__.py", "nvrtc.stand-in.so"):
            (package / name).touch()
        text = NVRTC.replace("VERSION", torch.version.cuda.replace(".", ", ")).replace("ERROR", str(error))
        (package / "nvrtc.py").write_text(text)
        return package.parents[1]


class Builder:
    """Builds in no time, or raises; notes where."""

    def __init__(self):
        self.folders, self.lines, self.error, self.during = [], [], None, lambda: None

    def __call__(self, build_spec: spec.BuildSpec, folder: Path) -> dict:
        self.folders.append(folder)
        (folder / cache.LOG).write_text("[1/1] c++\n")
        (folder / spec.LIBRARY).write_bytes(bytes(range(256)) * 20)
        self.during()
        if self.error is not None:
            raise self.error
        return {"architectures": list(build_spec.gpus), "notes": [], "toolkit": None, "seconds": 0}

    def get(self, build_spec: spec.BuildSpec, **options) -> cache.Entry:
        return cache.get_or_build(build_spec, self, self.lines.append, **options)


@pytest.fixture
def importer(tmp_path) -> Importer:
    return Importer(tmp_path)


@pytest.fixture
def builder() -> Builder:
    return Builder()


@pytest.fixture
def build_spec(tmp_path, monkeypatch) -> spec.BuildSpec:
    """What to build for the CPU, into a cache of this test."""
    monkeypatch.setenv("TSM_JIT_CACHE", str(tmp_path / "cache"))
    return replace(spec.here("cpu"), torch_version="of this test")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Calls ``function(importer)`` once for all processes of pytest-xdist, and returns its result to each."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, function) -> dict:
        facts = base / name / "facts"
        with filelock.FileLock(base / f"{name}.lock"):
            if not facts.exists():
                facts.parent.mkdir()
                facts.write_text(json.dumps(function(Importer(facts.parent))))
        return json.loads(facts.read_text())

    return make


@pytest.fixture(scope="session")
def built(once) -> Path:
    """The entry of a real build for the CPU. It is not to be changed."""
    if tools.find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    facts = once("cpu", lambda importer: importer())
    assert facts["devices"]["cpu"] == "compiled kernels", facts["warnings"]
    return Path(facts["cache"]["folder"], facts["cache"]["entry"])


@pytest.fixture
def cxx(built, importer) -> Path:
    """A stand-in for a C++ compiler that copies this library, and writes into the file ``calls``."""
    text = f"""echo "$@" >>"{importer.folder}/calls"
        while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; shift; done
        case $output in *.so) cp "{built}/{spec.LIBRARY}" $output ;; *) : >$output ;; esac"""
    return importer.script("stand-in/c++", text)


@pytest.fixture
def shared():
    """A folder that other users can open. They cannot open the folders of pytest."""
    with tempfile.TemporaryDirectory(prefix="tsm_jit-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def as_user():
    """Calls a function in a fork that is another user; returns its result or its error as a text."""
    if os.geteuid() != 0:
        pytest.skip("needs root to be another user")

    def call(function, user: int = 12345) -> str:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setuid(user)
                text = str(function())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(pid, 0)
        with open(reader) as output:
            return output.read()

    return call
