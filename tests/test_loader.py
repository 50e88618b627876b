"""The first import: really compiled, really broken, in processes of their own.

What is not about compilers takes stand-ins for them, since they need most of the time; most scenarios hide
nvcc and NVRTC.
"""

import errno
import fcntl
import hashlib
import json
import os
import pty
import random
import re
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tsm_jit import _build, _loader, _nvrtc, _toolchain, cli

ROOT = Path(_loader.__file__).resolve().parent.parent
CPU_ALONE = Path(__file__).parent / "cpu_alone"
# What every scenario must still compute, whatever serves it, and what it says of itself.
SCRIPT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {before}
    import tsm_jit
import torch
x = torch.arange(4 * 2 * 3.0).view(4, 2, 3)
y = tsm_jit.shift_groups(x, 4, [(1, 1), (1, -1)], padding="circular")
assert torch.equal(y[:, 0], x[:, 0].roll(-1, 0)) and torch.equal(y[:, 1], x[:, 1].roll(1, 0))
assert tsm_jit.shift_groups(x, 4, [(1, 1), (1, -1)], padding="circular", inplace=True) is x and torch.equal(x, y)
assert "torch.utils.cpp_extension" not in sys.modules, "slow to import, and of no use"
assert not torch.cuda.is_initialized(), "an import must not start CUDA: the process could not fork"
modules = [name for name in ("tsm_jit._build",) if name in sys.modules]
told = [str(w.message) for w in caught if "tsm_jit" in str(w.message)]
print(json.dumps({{**tsm_jit.info(), "warnings": told, "modules": modules}}))
"""
# To change the loader before it loads: as the command line does, it is asked to later.
PATCHED = """
    sys.argv[:] = ["tsm-jit"]
    import tsm_jit
    from tsm_jit import _build, _loader, _toolchain
    {}
    _loader.load()
"""
SEES = "_toolchain.gpu_is_visible = lambda: True"  # there is a GPU
WITHOUT_NVCC = f"_toolchain.find_nvcc = lambda: None; {SEES}"
# What stands in for NVRTC, and needs none of its time.
NVRTC = """
#include <cstring>
extern "C" {
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
int nvrtcGetNumSupportedArchs(int *count) { *count = 3; return 0; }
int nvrtcGetSupportedArchs(int *known) { known[0] = 75; known[1] = 80; known[2] = 90; return 0; }
int nvrtcCreateProgram(void **program, const char *, const char *, int, const char **, const char **) { return 0; }
int nvrtcCompileProgram(void *, int, const char **) { return 0; }
const char *nvrtcGetErrorString(int) { return "no error"; }
int nvrtcGetProgramLogSize(void *, size_t *size) { *size = 1; return 0; }
int nvrtcGetProgramLog(void *, char *log) { *log = 0; return 0; }
int nvrtcGetPTXSize(void *, size_t *size) { *size = 1; return 0; }
int nvrtcGetPTX(void *, char *image) { *image = 0; return 0; }
int nvrtcGetCUBINSize(void *, size_t *size) { *size = 1; return 0; }
int nvrtcGetCUBIN(void *, char *image) { *image = 0; return 0; }
}
"""
FAILING_NVRTC = NVRTC.replace("const char **) { return 0; }\nconst", "const char **) { return 6; }\nconst").replace(
    "*size = 1; return 0; }\nint nvrtcGetProgramLog(void *, char *log) { *log = 0;",
    '*size = 20; return 0; }\nint nvrtcGetProgramLog(void *, char *log) { std::strcpy(log, "a.cu(1): error: no");',
)
assert FAILING_NVRTC.count("return 6") == FAILING_NVRTC.count("strcpy") == 1
needs_nvcc = pytest.mark.skipif(
    torch.version.cuda is None or _toolchain.find_nvcc() is None, reason="needs nvcc and a torch with CUDA"
)
needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give things away")


def environment(cache: Path, cuda: bool = False, **changes) -> dict:
    """Ours with another cache, without nvcc and NVRTC unless ``cuda``; a value of None removes a variable."""
    path = [str(ROOT), *sys.path] if cuda else [str(CPU_ALONE), str(ROOT), *sys.path]
    result = dict(os.environ, TSM_JIT_CACHE=str(cache), PYTHONPATH=os.pathsep.join(path), OMP_NUM_THREADS="1")
    for name in ("TSM_JIT_REQUIRE", "TSM_JIT_NVRTC", "TORCH_CUDA_ARCH_LIST"):
        result.pop(name, None)
    for name, value in changes.items():
        result.pop(name, None)
        if value is not None:
            result[name] = str(value)
    return result


def start(cache: Path, before: str = "", patch: str = "", **changes) -> subprocess.Popen:
    script = SCRIPT.format(before=PATCHED.format(patch) if patch else before)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(cache, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cache.parent,
    )


def finish(process: subprocess.Popen) -> tuple[dict, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out), err


def import_it(cache: Path, **changes) -> tuple[dict, str]:
    return finish(start(cache, **changes))


def command(cache: Path, *arguments: str, umask: int = -1, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tsm_jit", *arguments],
        env=environment(cache, **changes),
        cwd=cache.parent if cache.parent.is_dir() else "/",
        umask=umask,
        capture_output=True,
        text=True,
        timeout=300,
    )


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A cache that one import has filled, from which other scenarios start."""
    if _toolchain.find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    cache = tmp_path_factory.mktemp("loader") / "cache"
    facts, err = import_it(cache)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert err == "tsm_jit: compiling the kernels (only once) for CPU\n"
    return cache


@pytest.fixture
def warm(built, tmp_path) -> Path:
    """A copy of that cache to spoil."""
    return Path(shutil.copytree(built, tmp_path / "cache", symlinks=True))


@pytest.fixture
def cxx(built, tmp_path) -> Path:
    """A C++ compiler that has the library at hand, and writes into ``calls`` where it is called and with what."""
    (entry,) = entries(built)
    return script(
        tmp_path / "bin" / "c++",
        f'echo "$PWD $@" >>"{tmp_path}/calls"\n'
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && made=$2; shift; done\n'
        f'case $made in *.so) cp "{entry}/{_loader.LIBRARY}" $made ;; *) : >$made ;; esac\n',
    )


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """A CUDA toolkit that knows two GPUs and compiles nothing; ``version`` has what it says of itself."""
    home = tmp_path / "toolkit"
    script(
        home / "bin" / "nvcc",
        f'case "$*" in --version) cat "{home}/version" ;;\n'
        "--list-gpu-arch) echo compute_75; echo compute_80; echo compute_90 ;;\n"
        f'*--dryrun*) echo "#$ TOP={home}/bin/.." ;;\n'
        '*) while [ $# -gt 0 ]; do [ "$1" = -o ] && made=$2; shift; done; : >$made ;; esac\n',
    )
    (home / "version").write_text(f"Cuda compilation tools, release {torch.version.cuda}, V{torch.version.cuda}.1\n")
    return home


@pytest.fixture
def nvrtc(tmp_path) -> Path:
    """An NVRTC that knows three GPUs and makes empty images."""
    source, library = tmp_path / "nvrtc.cpp", tmp_path / "nvrtc" / "libnvrtc.so.99"
    source.write_text(NVRTC)
    library.parent.mkdir()
    subprocess.run([*_toolchain.find_cxx(), "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture(scope="session")
def nvml(tmp_path_factory) -> dict:
    """What makes a process see the GPUs that NVML_GPUS lists, with the driver of NVML_DRIVER."""
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "driver" / "nvml.cpp"
    command = [*_toolchain.find_cxx(), "-std=c++17", "-shared", "-fPIC", source, "-o", folder / "libnvidia-ml.so.1"]
    subprocess.run(command, check=True)
    return {"LD_LIBRARY_PATH": os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")])}


def sees(architecture: str) -> str:
    """In a process that has a GPU of it."""
    return f"{SEES}; _toolchain.gpu_architectures = lambda: [{architecture!r}]"


def finds(nvrtc: Path | None) -> str:
    """In a process that has this NVRTC."""
    return f"_toolchain.find_nvrtc = lambda: {nvrtc and f'_toolchain.Path({str(nvrtc)!r})'}"


def compilations(cxx: Path) -> int:
    return (cxx.parent.parent / "calls").read_text().count(" -shared ")


# --- the cache -------------------------------------------------------------------------------------------------------


def test_cold_import_leaves_one_private_entry(built):
    (entry,) = entries(built)
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry.stat().st_mode) == 0o700
    assert sorted(path.name for path in entry.iterdir()) == [_loader.LOG, _loader.MANIFEST, _loader.LIBRARY]
    manifest = json.loads((entry / _loader.MANIFEST).read_text())
    assert manifest["sha256"] == hashlib.sha256((entry / _loader.LIBRARY).read_bytes()).hexdigest()
    assert manifest["by"] == _loader.CPU_ALONE


def test_warm_import_builds_nothing_and_writes_nothing(warm):
    before = {path: path.stat().st_mtime_ns for path in warm.rglob("*")}
    for path in [*warm.rglob("*"), warm]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        facts, err = import_it(warm)
    finally:
        warm.chmod(0o700)
        for path in warm.rglob("*"):
            path.chmod(0o700)
    assert err == ""
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["modules"] == [], "of no use when warm"
    assert {path: path.stat().st_mtime_ns for path in warm.rglob("*")} == before


def test_damaged_entries_are_built_again(cxx, tmp_path):
    cache = tmp_path / "cache"
    import_it(cache, CXX=cxx)
    (entry,) = entries(cache)
    library, manifest = entry / _loader.LIBRARY, entry / _loader.MANIFEST
    data = library.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    damages = [
        lambda: library.write_bytes(data[: len(data) // 2]),
        lambda: library.write_bytes(flipped),
        lambda: library.write_bytes(b""),
        lambda: manifest.unlink(),
    ]
    for count, damage in enumerate(damages):
        damage()
        facts, err = import_it(cache, CXX=cxx)
        assert err.count(f"tsm_jit: {entry} is damaged: compiling it again") == 1
        assert facts["devices"]["cpu"] == "compiled kernels"
        assert compilations(cxx) == 2 + count
        assert library.read_bytes() == data
    assert import_it(cache, CXX=cxx)[1] == ""
    assert entries(cache) == [entry]
    sealed, whole = manifest.read_bytes(), _loader._read(entry)
    assert whole
    for text in (b"", b"{", b"{}", b"[]", b"0", *(flip(sealed, bit) for bit in range(8 * len(sealed)))):
        manifest.write_bytes(text)
        assert _loader._read(entry) in (None, whole), "whatever is read is what was written"
    _loader._write_manifest(entry, {**whole, "sha256": None})
    assert _loader._read(entry) is None, "no library goes unchecked"


def flip(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_library_that_is_not_what_was_compiled_is_never_loaded(warm):
    """Not even if there is no compiler to make another."""
    (entry,) = entries(warm)
    with open(entry / _loader.LIBRARY, "ab") as library:
        library.write(b"\0")
    facts, _ = import_it(warm, CXX="/nowhere/c++")
    assert facts["devices"]["cpu"].startswith("plain torch: BuildError: no C++ compiler was found")


def test_the_key_follows_sources_flags_and_tools(tmp_path, monkeypatch):
    def key() -> str:
        return _loader.Recipe.here(_loader.CPU_ALONE).key

    before = key()
    assert key() == before
    kernels = Path(shutil.copytree(_loader.kernel_folder(), tmp_path / "kernels"))
    with monkeypatch.context() as m:
        m.setattr(_loader, "kernel_folder", lambda: kernels)
        assert key() == before
        source = kernels / "temporal_shift.h"
        date = source.stat().st_mtime_ns
        source.write_text(source.read_text() + "\n")
        os.utime(source, ns=(date, date))  # edited, yet no younger
        assert key() != before
    with monkeypatch.context() as m:
        m.setattr(torch, "__version__", "99.0")
        assert key() != before
    with monkeypatch.context() as m:
        m.setattr(_loader, "_CFLAGS", ("-O1",))
        assert key() != before
    with monkeypatch.context() as m:
        m.setenv("CXX", "g++ -O1")
        assert key() != before


@needs_cuda_torch
def test_the_key_follows_nvcc_and_what_is_chosen_for_it(toolkit, monkeypatch):
    def key() -> list[str]:
        return _loader.Recipe.here(_loader.NVCC).key.split("-")

    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    nvcc = toolkit / "bin" / "nvcc"
    before = key()
    for change in ({"TORCH_CUDA_ARCH_LIST": "8.0"}, {"NVCC_APPEND_FLAGS": "-G"}):
        with monkeypatch.context() as m:
            for name, value in change.items():
                m.setenv(name, value)
            assert key() != before
    date = nvcc.stat().st_mtime_ns
    os.utime(nvcc, ns=(date, date + 1))
    assert key() != before
    assert key()[:2] == before[:2]


def test_another_compiler_makes_another_entry_and_the_old_one_stays(warm, cxx):
    (before,) = entries(warm)
    import_it(warm, CXX=cxx)
    assert len(entries(warm)) == 2
    assert import_it(warm)[0]["cache"]["key"] == before.name


def test_a_warm_cache_outlives_its_compilers(together, tmp_path):
    """An image that was built with a toolkit, and runs without one."""
    cache = Path(shutil.copytree(together[0], tmp_path / "cache", symlinks=True))
    (entry,) = entries(cache)
    facts, err = import_it(cache, CXX="/nowhere/c++")  # and without nvcc
    assert err == ""
    assert facts["cache"]["key"] == entry.name
    assert facts["devices"] == together[1][0]["devices"]
    broken = Path(shutil.copytree(entry, entry.with_name(entry.name[:33] + "0" * 8 + "-nvcc" + "0" * 8)))
    _loader._write_manifest(broken, {"by": _loader.NVCC, "error": "it failed"})
    assert import_it(cache, CXX="/nowhere/c++")[0]["cache"]["key"] == entry.name


KILLS = """
import json, os, random, shutil, signal, sys, time
import torch
seed, wanted, device, quick = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
random.seed(seed)
cache = os.environ["TSM_JIT_CACHE"]

def fork():
    pid = os.fork()
    if pid == 0:
        import tsm_jit
        os._exit(not tsm_jit.info()["devices"][device].startswith("compiled kernels"))
    return pid

def family(pid):
    # By the parent that each process names: what a thread has started is not among its process's children.
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            parents[int(name)] = int(open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[1])
        except OSError:
            pass
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found

def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

def empty():
    for name in os.listdir(cache) if os.path.exists(cache) else ():
        if not name.startswith(("tmp-", "lock-")):
            shutil.rmtree(os.path.join(cache, name))

def compilers_of(pid):
    while len(family(pid)) == 1 and os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.01)

pid = fork()
compilers_of(pid)
began = time.monotonic()
assert os.waitpid(pid, 0)[1] == 0
span, killed, longest = time.monotonic() - began, 0, 0
for turn in range(3 * wanted):
    if killed == wanted:
        break
    empty()
    pid = fork()
    compilers_of(pid)
    time.sleep(random.uniform(0, 0.9 * span))
    everyone = family(pid)
    kill([everyone, everyone[:1], everyone[1:]][turn % 3])  # with compilers, leaving orphans, compilers alone
    killed += len(everyone) > 1
    os.waitpid(pid, 0)
    empty()
    open(quick, "w").close()
    began = time.monotonic()
    assert os.waitpid(fork(), 0)[1] == 0, "the next import did not work"
    longest = max(longest, time.monotonic() - began)
    os.remove(quick)
print(json.dumps([killed, longest, span]))
"""


@pytest.mark.parametrize(
    ("by", "kills"),
    [("c++", 20), pytest.param("nvcc", 3, marks=needs_nvcc), pytest.param("nvrtc", 3, marks=needs_cuda_torch)],
)
def test_killed_at_any_moment_the_next_import_works(tmp_path, cxx, toolkit, by, kills):
    """The import with its compilers, without them, and they alone: real ones, and stand-ins once it has been killed."""
    cache, quick = tmp_path / "cache", tmp_path / "quick"
    real = f'exec {" ".join(_toolchain.find_cxx())} "$@" -O0\n'
    if by != "c++":  # whose time is not at stake
        real = cxx.read_text().partition("\n")[2]
    script(cxx, f"[ -e {quick} ] || {{ {real.strip()}; exit; }}\n" + cxx.read_text().partition("\n")[2])
    changes = {"CXX": cxx, "cuda": by != "c++", "TSM_JIT_NVRTC": "1" if by == "nvrtc" else None}
    if by == "nvcc":
        nvcc = toolkit / "bin" / "nvcc"
        text = nvcc.read_text().partition("\n")[2]
        script(nvcc, f'[ -e {quick} ] || exec "{_toolchain.find_nvcc()}" "$@"\n' + text)
        changes["CUDA_HOME"] = toolkit
    device = "cpu" if by == "c++" else "cuda"
    arguments = [sys.executable, "-c", KILLS, str(random.randrange(2**31)), str(kills), device, quick]
    done = subprocess.run(arguments, env=environment(cache, **changes), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    killed, longest, span = json.loads(done.stdout)
    assert killed >= 0.75 * kills, "most moments were after the end"
    assert longest < 10 + 3 * span, "an import waited for something"
    assert "waiting for" not in done.stderr
    deadline = time.monotonic() + 60
    while any(orphan_in(cache)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (entry,) = (path for path in entries(cache) if not path.name.startswith("tmp-"))
    assert _loader._read(entry)["sha256"], "whole, although orphans went on for a while"
    assert sorted(path.name for path in entry.iterdir()) == [_loader.LOG, _loader.MANIFEST, _loader.LIBRARY]


def orphan_in(cache: Path):
    for process in Path("/proc").glob("[0-9]*/cwd"):
        try:
            yield process.readlink().is_relative_to(cache)
        except OSError:  # it has ended, or is not ours
            yield False


def test_what_outlives_its_compiler_writes_nowhere_that_counts(tmp_path, cxx):
    """A helper that a compiler leaves, and one whose compiler is killed before it ends."""
    helper = "(while :; do echo x >helper; echo talk; sleep 0.02; done) &\n"
    script(cxx, helper + cxx.read_text().partition("\n")[2])
    cache = tmp_path / "cache"
    assert import_it(cache, CXX=cxx)[0]["devices"]["cpu"] == "compiled kernels"
    (entry,) = entries(cache)
    assert sorted(path.name for path in entry.iterdir()) == [_loader.LOG, _loader.MANIFEST, _loader.LIBRARY]
    assert not any(orphan_in(cache)), "it is ended with its compiler"
    script(cxx, helper + "kill -9 $$\n")
    shutil.rmtree(entry)
    assert "plain torch: OSError: " in import_it(cache, CXX=cxx)[0]["devices"]["cpu"]
    assert not any(orphan_in(cache))
    assert entries(cache) == []


@pytest.mark.parametrize("runs_away", [True, False], ids=["in a session of its own", "killed with the import"])
def test_an_orphan_does_not_write_into_what_is_published(tmp_path, cxx, runs_away):
    """What no signal to the compilers reaches goes on where they ran."""
    if runs_away:
        first = f"setsid sh -c 'while [ ! -e {tmp_path}/stop ]; do echo x >helper; echo talk; sleep 0.02; done' &\n"
    else:
        first = f'[ -e "{tmp_path}/calls" ] || (while [ ! -e {tmp_path}/stop ]; do echo x >helper; sleep 0.02; done)\n'
    script(cxx, first + cxx.read_text().partition("\n")[2])
    cache = tmp_path / "cache"
    try:
        if runs_away:
            import_it(cache, CXX=cxx)
        else:
            killed = start(cache, CXX=cxx)
            while not any(orphan_in(cache)):
                time.sleep(0.02)
            killed.kill()
            killed.communicate()
            (tmp_path / "calls").touch()
            import_it(cache, CXX=cxx)
        (entry,) = (path for path in entries(cache) if not path.name.startswith("tmp-"))
        size = (entry / _loader.LOG).stat().st_size
        time.sleep(0.2)
        assert sorted(path.name for path in entry.iterdir()) == [_loader.LOG, _loader.MANIFEST, _loader.LIBRARY]
        assert (entry / _loader.LOG).stat().st_size == size
        assert _loader._read(entry)["sha256"]
    finally:
        (tmp_path / "stop").touch()
        while any(orphan_in(cache)):
            time.sleep(0.02)


def test_leftovers_of_killed_builds_go_with_the_next_build(tmp_path, cxx):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    old, young = (cache / f"tmp-{digit * 32}" for digit in "01")
    for folder in (old, young):
        (folder / "below").mkdir(parents=True)
    os.utime(old, (0, 0))
    import_it(cache, CXX=cxx)
    assert not old.exists()
    assert young.exists(), "another process may be building it"


def test_the_second_of_two_publishers_takes_the_first_ones_entry(warm):
    (entry,) = entries(warm)
    manifest = _loader._read(entry)
    late = Path(shutil.copytree(entry, warm / "tmp-late"))
    (late / "late").touch()
    assert _loader._publish(late, entry) == manifest
    assert not (entry / "late").exists()
    assert _loader._publish(late, entry, replace=True) == manifest
    assert entries(warm) == [entry]
    assert (entry / "late").exists()


def test_leftovers_of_a_killed_build_go_at_once(tmp_path, cxx):
    """With the next build, or clean; but not what is being built, nor what another machine may be building."""
    text = cxx.read_text().partition("\n")[2]
    script(cxx, f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done\n" + text)
    cache = tmp_path / "cache"
    killed, alive = start(cache, CXX=cxx), start(cache, CXX=f"{cxx} -O0")
    while len(entries(cache) if cache.exists() else ()) < 4:
        time.sleep(0.02)
    elsewhere = cache / ("tmp-" + "0" * 8 + "-" + "0" * 32)
    elsewhere.mkdir()
    assert command(cache, "clean").returncode == 0
    assert len(entries(cache)) == 5
    assert len(list(cache.glob("lock-*"))) == 2
    killed.kill()
    killed.communicate()
    assert command(cache, "clean").returncode == 0
    assert len(entries(cache)) == 3
    assert len(list(cache.glob("lock-*"))) == 1
    (tmp_path / "go").touch()
    assert finish(alive)[0]["devices"]["cpu"] == "compiled kernels"
    assert [path for path in entries(cache) if path.name.startswith("tmp-")] == [elsewhere]


def test_files_are_on_the_disk_before_they_are_published(warm, monkeypatch):
    (entry,) = entries(warm)
    made = Path(shutil.copytree(entry, warm / "tmp-made"))
    shutil.rmtree(entry)
    files, calls, replace = {path.stat().st_ino for path in made.iterdir()}, [], os.replace

    def fsync(descriptor):
        calls.append(os.fstat(descriptor).st_ino)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")  # as on some network drives

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    _loader._publish(made, entry)
    assert files < set(calls[: calls.index("replace")])


SMALL_DISK = """
mount -t tmpfs -o mode=700,size={size} none "$1" && "$2" -c "$3" && ls -A "$1/cache" &&
mount -o remount,size=9m "$1" && "$2" -c "$3"
"""


@needs_root
@pytest.mark.parametrize("size", ["40k", "300k", "900k"])
def test_a_disk_that_is_really_full_is_told_with_the_cure(tmp_path, cxx, size):
    """To a compiler that has no room for its last words, and says them in other words than ours."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare")
    fails = "{ seq 99999; echo 'schwerer Fehler: Kein Platz'; rm x; exit 1; } 2>/dev/null"
    script(cxx, f"head -c 1000000 /dev/zero >x || {fails}\nrm x\n" + cxx.read_text().partition("\n")[2])
    disk = tmp_path / "disk"
    disk.mkdir()
    program = [disk, sys.executable, SCRIPT.format(before="")]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", SMALL_DISK.format(size=size), "sh", *program],
        env=environment(disk / "cache", CXX=cxx),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    full, *left, larger = done.stdout.splitlines()
    (warning,) = json.loads(full)["warnings"]
    assert f"{disk / 'cache'} is full: free some of it, or set TSM_JIT_CACHE to a folder of your own" in warning
    assert all(name.startswith("lock-") for name in left), "and it is tried again"
    assert json.loads(larger)["devices"]["cpu"] == "compiled kernels"


@pytest.mark.parametrize("size", [100, 30_000])
def test_a_full_disk_leaves_no_half_entry_and_is_told(tmp_path, size):
    """No file may grow beyond that: not the log, not what a compiler makes."""
    cache = tmp_path / "cache"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    facts, _ = import_it(cache, before=limit)
    assert facts["devices"]["cpu"].startswith("plain torch: OSError")
    assert re.search("[Ff]ile size limit|File too large", facts["warnings"][0])
    assert entries(cache) == [], "so the next import tries again"


def test_a_cache_that_cannot_be_made_is_told_with_the_cure():
    facts, _ = import_it(Path("/proc/tsm_jit"))
    assert "/proc/tsm_jit cannot be made" in facts["warnings"][0]
    assert "set TSM_JIT_CACHE to a folder of your own" in facts["warnings"][0]


def test_a_read_only_cache_without_an_entry_is_told_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("TSM_JIT_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(PermissionError, match=f"{tmp_path} is read-only .* set TSM_JIT_CACHE to a folder of your own"):
        _loader._build_under_lock(_loader.Recipe.here(_loader.CPU_ALONE))
    assert not list(tmp_path.iterdir())


# --- at the same time ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def together(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A cache that 16 processes have imported cold, with everything that this machine can compile; what they say."""
    if _toolchain.find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    cache = tmp_path_factory.mktemp("together") / "cache"
    processes = [start(cache, cuda=True) for _ in range(16)]
    results = [finish(process) for process in processes]
    assert sum(err.count("tsm_jit: compiling") for _, err in results) == 1
    return cache, [facts for facts, _ in results]


def test_sixteen_processes_import_a_cold_cache_with_one_compilation(together):
    cache, results = together
    expected = "compiled kernels" if _toolchain.torch_has_cuda() and _toolchain.find_nvcc() else ""
    for facts in results:
        assert facts["devices"]["cpu"] == "compiled kernels"
        assert facts["devices"]["cuda"].startswith(expected)
    assert len(entries(cache)) == 1


def test_locks_that_do_not_exclude(tmp_path, cxx):
    """As on network drives that have none, or keep them to each machine: all compile, one is published."""
    rendezvous = f'while [ $(grep -c " -shared " "{tmp_path}/calls") -lt 16 ]; do sleep 0.1; done\n'
    text = cxx.read_text().replace("case $made in", f"case $made in *.so) {rendezvous}esac\ncase $made in", 1)
    script(cxx, text.partition("\n")[2])
    useless = [
        "import fcntl; fcntl.flock = lambda *a: None",
        "import fcntl\n    def flock(*a): raise OSError(37, 'No locks available')\n    fcntl.flock = flock",
    ]
    cache = tmp_path / "cache"
    results = [finish(process) for process in [start(cache, before=lock, CXX=cxx) for lock in 8 * useless]]
    assert compilations(cxx) == 16
    assert all(facts["devices"]["cpu"] == "compiled kernels" for facts, _ in results)
    assert len(entries(cache)) == 1
    assert import_it(cache, CXX=cxx)[1] == ""
    folders = {Path(call.split(" ")[0]).name for call in (tmp_path / "calls").read_text().splitlines()}
    assert len(folders) == 16
    assert all(re.fullmatch("tmp-[0-9a-f]{8}-[0-9a-f]{32}", name) for name in folders), (
        "nobody can guess where a build is"
    )


def test_who_waits_says_for_whom_and_gives_up(warm):
    """In a fraction of the time."""
    (entry,) = entries(warm)
    shutil.rmtree(entry)
    with open(warm / f"lock-{entry.name}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1 on somewhere")
        lock.flush()
        facts, err = import_it(warm, patch="_loader._NAME_HOLDER_AFTER_SECONDS = 0; _loader._LOCK_SECONDS = 0.5")
    assert "tsm_jit: waiting for process 1 on somewhere, which is compiling the kernels" in err
    assert re.search("process 1 on somewhere held .* for 0.5 s: end it and try again", facts["warnings"][0])
    assert _loader._NAME_HOLDER_AFTER_SECONDS == 2
    assert _build.SECONDS < _loader._LOCK_SECONDS


def test_threads_import_at_once(tmp_path, cxx):
    threads = (
        "import threading\n"
        "    threads = [threading.Thread(target=__import__, args=('tsm_jit',)) for _ in range(8)]\n"
        "    [thread.start() for thread in threads]; [thread.join() for thread in threads]"
    )
    facts, _ = import_it(tmp_path / "cache", before=threads, CXX=cxx)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert compilations(cxx) == 1


FORK = """
import os, sys, torch, tsm_jit

def started():
    return os.path.exists(sys.argv[1])

assert tsm_jit.info()["devices"]["cpu"] == "compiled kernels"
assert not started()
pid = os.fork()
if pid == 0:
    x = torch.arange(8.0).view(8, 1)
    os._exit(not torch.equal(tsm_jit.shift_groups(x, 8, [(1, 1)], padding="circular"), x.roll(-1, 0)))
assert os.waitpid(pid, 0)[1] == 0
torch.cuda.is_available()
print(started())
"""


@needs_cuda_torch
def test_an_import_starts_no_cuda_so_the_process_can_fork(together, tmp_path):
    """A driver that notes its start stands in for the machine's."""
    source, mark = tmp_path / "driver.cpp", tmp_path / "started"
    source.write_text(
        "#include <cstdio>\n"
        f'static int start() {{ std::fclose(std::fopen("{mark}", "w")); return 100; }}\n'
        'extern "C" int cuInit(unsigned) { return start(); }\n'
        'extern "C" int cuDriverGetVersion(int *v) { *v = 13000; return 0; }\n'
        'extern "C" int cuGetProcAddress_v2(char *, void **, int, unsigned long, int *) { return start(); }\n'
    )
    driver = tmp_path / "libcuda.so.1"
    subprocess.run([*_toolchain.find_cxx(), "-shared", "-fPIC", source, "-o", driver], check=True)
    variables = environment(together[0], cuda=True, LD_LIBRARY_PATH=tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FORK, mark], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n", "torch itself starts this driver, so it would have been seen"


def test_eight_ranks_from_cold(tmp_path, cxx):
    """With a real compiler, at its quickest."""
    script(cxx, f'echo "$PWD $@" >>"{tmp_path}/calls"\nexec {" ".join(_toolchain.find_cxx())} "$@" -O0\n')
    program = tmp_path / "rank.py"
    program.write_text("import tsm_jit; print(tsm_jit.info()['devices']['cpu'])\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", program]
    variables = environment(tmp_path / "cache", CXX=cxx)
    done = subprocess.run(launch, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled kernels") == 8
    assert compilations(cxx) == 1


# --- finding tools ---------------------------------------------------------------------------------------------------


def test_without_a_cpp_compiler_everything_takes_plain_torch(tmp_path):
    facts, err = import_it(tmp_path / "cache", CXX="/nowhere/c++")
    assert facts["devices"]["cpu"].startswith("plain torch: BuildError: no C++ compiler was found")
    assert len(facts["warnings"]) == 1
    assert "no C++ compiler was found: install g++ or clang++, or set CXX" in facts["warnings"][0]
    assert "compiling" not in err


def test_one_warning_names_every_device_and_reason(monkeypatch):
    monkeypatch.setattr(_toolchain, "gpu_is_visible", lambda: True)
    for missing, expected in [
        ({"cuda": "no nvcc", "cpu": "no g++"}, r"\(CUDA: no nvcc; CPU: no g\+\+\)"),
        ({"cpu": "no g++", "cuda": "no g++"}, r"\(CUDA and CPU: no g\+\+\)"),
        ({"cuda": "no nvcc"}, r"\(CUDA: no nvcc\)"),
    ]:
        with pytest.warns(RuntimeWarning, match=expected) as caught:
            _loader._report(_loader.Status(missing=missing))
        assert len(caught) == 1


def test_a_gpu_that_is_not_there_is_not_missed(monkeypatch, recwarn):
    monkeypatch.setattr(_toolchain, "gpu_is_visible", lambda: False)
    _loader._report(_loader.Status(missing={"cuda": "no nvcc"}))
    assert not recwarn.list


def test_a_compiler_that_fails_is_reported_and_not_tried_again(tmp_path):
    compiler = script(tmp_path / "c++", 'echo "error: the sky is falling" >&2; exit 1\n')
    facts, err = import_it(tmp_path / "cache", CXX=compiler)
    assert "compiling" in err
    assert len(facts["warnings"]) == 1
    assert "the sky is falling" in facts["warnings"][0]
    facts, err = import_it(tmp_path / "cache", CXX=compiler)
    assert "compiling" not in err
    assert facts["devices"]["cpu"].startswith("plain torch")
    assert len(facts["warnings"]) == 1


def test_a_compiler_that_hangs_is_ended_with_all_it_started(tmp_path):
    compiler = script(tmp_path / "c++", f"mkfifo {tmp_path}/never; sh -c 'cat <{tmp_path}/never'\n")
    cache = tmp_path / "cache"
    facts, _ = import_it(cache, patch="_build.SECONDS = 0.5", CXX=compiler)
    assert re.search(r"c\+\+ had not ended after 0.5 s", facts["warnings"][0])
    assert "compiling" not in import_it(cache, CXX=compiler)[1], "nobody waits for it twice"
    assert not any(orphan_in(cache))


@needs_cuda_torch
@pytest.mark.parametrize("says", ["sh -c 'sleep 1000'", "head -c 999 /dev/urandom"])
def test_an_nvcc_that_hangs_or_talks_nonsense_leaves_the_cpu_part(tmp_path, cxx, says):
    script(tmp_path / "cuda" / "bin" / "nvcc", says + "\n")
    facts, _ = import_it(
        tmp_path / "cache",
        patch="_toolchain._PROBE_SECONDS = 0.5; _toolchain.find_nvrtc = lambda: None",
        cuda=True,
        CXX=cxx,
        CUDA_HOME=tmp_path / "cuda",
        PYTHONIOENCODING="utf-8",
    )
    assert facts["devices"]["cpu"] == "compiled kernels"
    expected = (
        "had not ended after 0.5 s" if "sleep" in says else "nvcc --list-gpu-arch must list GPU architectures, got"
    )
    assert expected in facts["devices"]["cuda"]


@needs_cuda_torch
def test_output_without_end_is_bounded(tmp_path, cxx, toolkit):
    """Of an nvcc that is asked, and of a compiler."""
    endless = script(tmp_path / "endless", "exec yes error\n")
    memory = "import resource; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    memory += "; _toolchain.find_nvrtc = lambda: None"
    after = "import resource; assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000"
    (toolkit / "bin" / "nvcc").unlink()
    (toolkit / "bin" / "nvcc").symlink_to(endless)
    patch = f"{memory}; _loader.load(); {after}"
    facts, _ = import_it(tmp_path / "cache", patch=patch, cuda=True, CXX=cxx, CUDA_HOME=toolkit)
    assert "says more than" in facts["devices"]["cuda"]
    facts, _ = import_it(tmp_path / "cache", patch=patch, CXX=endless)
    assert "the compilers said more than" in facts["devices"]["cpu"]
    for entry in entries(tmp_path / "cache"):
        assert sum(path.stat().st_size for path in entry.iterdir()) < 2 * _toolchain.MOST_SAID


def test_a_compiler_that_makes_nothing_is_named(tmp_path):
    facts, _ = import_it(tmp_path / "cache", CXX=script(tmp_path / "c++", "echo bananas\n"))
    assert "c++ reported success and made no bindings.cpp.o" in facts["devices"]["cpu"]


def test_without_nvcc_and_nvrtc_only_the_cpu_part_is_there(built):
    """And no word is said of CUDA on a machine without a GPU."""
    facts, _ = import_it(built)
    if torch.version.cuda is None:
        assert facts["devices"]["cuda"] == "this torch has no CUDA"
    else:
        assert facts["devices"]["cuda"].startswith("plain torch")
        assert "nvcc was not found" in facts["devices"]["cuda"]
        assert bool(facts["warnings"]) == _toolchain.gpu_is_visible()


@needs_cuda_torch
@pytest.mark.parametrize("with_nvrtc", [True, False])
def test_where_nvcc_fails_nvrtc_compiles_and_without_it_the_cpu_part_is_left(tmp_path, cxx, toolkit, nvrtc, with_nvrtc):
    nvcc = toolkit / "bin" / "nvcc"
    script(nvcc, nvcc.read_text().partition("\n")[2].replace(": >$made", 'echo "nvcc fatal : out of luck"; exit 1'))
    patch = f"{finds(nvrtc if with_nvrtc else None)}; {SEES}"
    patch += "; _toolchain.gpu_architectures = lambda: ['90']"
    arguments = {"patch": patch, "cuda": True, "CXX": cxx, "CUDA_HOME": toolkit}
    cuda = "compiled kernels (NVRTC: sm_90, PTX 80)" if with_nvrtc else "plain torch: BuildError: nvcc fatal : out of"
    for first in (True, False):
        facts, err = import_it(tmp_path / "cache", **arguments)
        assert facts["devices"]["cpu"] == "compiled kernels"
        assert facts["devices"]["cuda"].startswith(cuda)
        assert err.count("compiling") == (2 if first else 0), "what failed is not tried again"
        assert len(facts["warnings"]) == (first or not with_nvrtc), "each time only where something is slower"
        for warning in facts["warnings"]:
            assert "nvcc fatal : out of luck (log: " in warning
            assert ("NVRTC" in warning and "as fast" in warning) if with_nvrtc else "NVRTC" in warning


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    home, other, wheels = (tmp_path / name for name in ("home", "other", "wheels"))
    for folder in (home / "bin", other, wheels / "nvidia" / "cu13" / "bin"):
        script(folder / "nvcc", "")
    monkeypatch.setenv("PATH", str(other))
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CUDA_PATH", "/nowhere")
    assert _toolchain.find_nvcc() == home / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert _toolchain.find_nvcc() == other / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    assert _toolchain.find_nvcc() == other / "nvcc"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "other")
    assert _toolchain.find_nvcc() == other / "nvcc", "compilers run in another folder"
    monkeypatch.syspath_prepend(str(wheels))
    assert wheels / "nvidia" / "cu13" / "bin" / "nvcc" in _toolchain._nvcc_candidates()


@needs_nvcc
def test_a_wrapper_script_for_nvcc_is_seen_through(tmp_path):
    nvcc = _toolchain.find_nvcc()
    root = _toolchain.toolkit_root(nvcc)
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec "{nvcc.resolve()}" "$@"\n')
    assert _toolchain.toolkit_root(wrapper) == root
    assert (root / "include" / "cuda_runtime.h").is_file()
    assert set(_toolchain.PORTABLE_ARCHITECTURES) <= set(_toolchain.nvcc_architectures(wrapper))


@needs_nvcc
@pytest.mark.parametrize("home", [None, "/nowhere"])
def test_a_script_for_nvcc_alone_on_the_path_compiles(tmp_path, home):
    """Outside its toolkit, with CUDA_HOME unset or wrong; really. With a space in the path: see below."""
    script(tmp_path / "bin" / "nvcc", f'exec "{_toolchain.find_nvcc()}" "$@"\n')
    quick = script(tmp_path / "c++", f'exec {" ".join(_toolchain.find_cxx())} "$@" -O0\n')
    path = os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"])
    facts, _ = import_it(tmp_path / "cache", cuda=True, PATH=path, CUDA_HOME=home, CUDA_PATH=None, CXX=quick)
    assert facts["tools"]["nvcc"] == str(tmp_path / "bin" / "nvcc")
    assert facts["backends"]["nvcc"].startswith("chosen")


@needs_nvcc
def test_a_partial_toolkit_is_enough():
    """Torch's own headers of CUDA need cuSPARSE and others; ours need none of a library."""
    root = _toolchain.toolkit_root(_toolchain.find_nvcc())
    includes = [f"-isystem{Path(torch.__file__).parent / 'include'}", f"-isystem{root / 'include'}"]
    for name in _loader._CPU_SOURCES:
        command = [*_toolchain.find_cxx(), "-std=c++17", *_loader._CFLAGS, *_loader._CUDA_DEFINES, *includes, "-M"]
        done = subprocess.run([*command, _loader.kernel_folder() / name], capture_output=True, text=True, check=True)
        assert not re.search("cusparse|cublas|cusolver|cudnn|curand|cufft", done.stdout)


def test_a_toolkit_of_pip_has_the_runtime_under_its_full_name_alone(tmp_path):
    lib = tmp_path / "toolkit" / "lib"
    lib.mkdir(parents=True)
    (tmp_path / "runtime.cpp").write_text('extern "C" int cudaRuntime() { return 13; }')
    (tmp_path / "ours.cpp").write_text('extern "C" int cudaRuntime(); extern "C" int ours() { return cudaRuntime(); }')
    compiler = [*_toolchain.find_cxx(), "-shared", "-fPIC", "-o"]
    name = "libcudart.so.13"
    subprocess.run([*compiler, lib / name, tmp_path / "runtime.cpp", f"-Wl,-soname,{name}"], check=True)
    library = tmp_path / "ours.so"
    subprocess.run([*compiler, library, tmp_path / "ours.cpp", *_toolchain.cudart(lib.parent)], check=True)
    load = f"import ctypes; print(ctypes.CDLL({str(library)!r}).ours())"
    assert subprocess.run([sys.executable, "-c", load], capture_output=True, text=True).stdout == "13\n"


@needs_nvcc
def test_a_cpp_compiler_too_new_for_nvcc(tmp_path):
    """nvcc asks the compiler for its version, and takes an older one; all of them real."""
    older = [name for version in range(9, 16) if (name := shutil.which(f"g++-{version}"))]
    if not older:
        pytest.skip("needs a g++-9 to g++-15")
    script(tmp_path / "bin" / "gcc", f'exec {older[-1]} -U__GNUC__ -D__GNUC__=99 "$@"\n')
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    facts, _ = import_it(tmp_path / "cache", cuda=True, PATH=path, CXX=older[-1])
    assert facts["devices"]["cuda"].startswith("compiled kernels")
    (entry,) = entries(tmp_path / "cache")
    assert "-ccbin older/" + Path(older[-1]).name in (entry / _loader.LOG).read_text()


@needs_cuda_torch
@pytest.mark.parametrize(("major", "minor", "told"), [(-1, 0, "runtime of their own"), (0, 1, "driver older")])
def test_an_nvcc_of_another_version_is_told(tmp_path, cxx, toolkit, major, minor, told):
    mine = [int(part) for part in torch.version.cuda.split(".")]
    version = f"{mine[0] + major}.{mine[1] + minor}"
    (toolkit / "version").write_text(f"release {version}, V{version}.1")
    arguments = {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit, "patch": finds(None)}
    facts, err = import_it(tmp_path / "cache", **arguments)
    assert facts["cache"]["toolkit"] == f"{toolkit} (CUDA {version})"
    assert facts["devices"]["cuda"].startswith("compiled kernels")
    assert f"warning: nvcc is of CUDA {version}, torch of CUDA {torch.version.cuda}: " in err
    assert told in err


@needs_cuda_torch
@pytest.mark.parametrize("major", [-1, 1])
def test_an_nvcc_of_another_major_version_is_passed_over_where_nvrtc_is(tmp_path, cxx, toolkit, nvrtc, nvml, major):
    """Its kernels would bring a second CUDA runtime into the process."""
    version = f"{int(torch.version.cuda.split('.')[0]) + major}.0"
    (toolkit / "version").write_text(f"release {version}, V{version}.1")
    patch = f"{finds(nvrtc)}; {SEES}"
    arguments = {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit, **nvml, "NVML_GPUS": "90", "NVML_DRIVER": "99000"}
    facts, _ = import_it(tmp_path / "cache", patch=patch, **arguments)
    assert facts["devices"]["cuda"] == "compiled kernels (NVRTC: sm_90, PTX 80)"
    (warning,) = facts["warnings"]
    assert f"nvcc is of CUDA {version}, torch of CUDA {torch.version.cuda}: set CUDA_HOME to" in warning


@needs_cuda_torch
def test_an_nvcc_whose_runtime_the_driver_is_too_old_for_is_passed_over(tmp_path, cxx, toolkit, nvml):
    """It would refuse every launch, while torch's own CUDA runs."""
    major = int(torch.version.cuda.split(".")[0])
    (toolkit / "version").write_text(f"release {major + 1}.0, V{major + 1}.0.1")
    patch = f"{finds(None)}; {SEES}"
    for driver, served in (
        (f"{major}080", "plain torch: BuildError: "),
        (f"{major + 1}000", "compiled kernels (sm_90"),
    ):
        cache = tmp_path / driver
        arguments = {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit, **nvml, "NVML_GPUS": "90", "NVML_DRIVER": driver}
        facts, _ = import_it(cache, patch=patch, **arguments)
        assert facts["devices"]["cuda"].startswith(served)
        assert ("the driver runs none newer than" in facts["devices"]["cuda"]) == served.startswith("plain")


@needs_cuda_torch
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (None, ["compute_75"]),
        ("native", ["compute_75"]),
        ("9.0", ["sm_90", "compute_80"]),
        ("7.5;9.0+PTX", ["sm_75", "sm_90", "compute_75", "compute_90"]),
        ("7.5, 9.0a", ["sm_75", "sm_90a", "compute_75"]),
        ("7.5;8.0+PTX", ["sm_75", "sm_80", "compute_75", "compute_80"]),
        ("Hopper", ["sm_90", "compute_80", "compute_90"]),
        ("8.0 9.0a", ["sm_80", "sm_90a", "compute_80"]),
        (_build.EVERY_GENERATION, ["sm_75", "sm_80", "sm_90", "compute_75"]),
    ],
)
def test_the_list_of_architectures(toolkit, monkeypatch, chosen, expected):
    monkeypatch.setattr(_toolchain, "gpu_architectures", lambda: ["61"])
    nvcc = toolkit / "bin" / "nvcc"
    assert _build.gpu_code(nvcc, _toolchain.nvcc_architectures(nvcc), chosen) == expected
    assert _build.gpu_code(nvcc, ["75", "90"], "9.0") == ["sm_90", "compute_75"], "an nvcc that does not know 80"


def test_machine_code_shares_the_ptx_of_the_newest_portable_architecture():
    def virtual(*codes: str) -> list[str]:
        return [flag.removeprefix("-gencode=arch=compute_") for flag in _build._gencode(list(codes))]

    assert virtual("sm_90", "compute_80") == ["80,code=[sm_90,compute_80]"]
    assert virtual("sm_80", "sm_90a", "compute_80") == ["80,code=[sm_80,compute_80]", "90a,code=[sm_90a]"]
    assert virtual("sm_75", "sm_90", "compute_75") == ["75,code=[sm_75,compute_75]", "90,code=[sm_90]"]
    both = virtual("sm_75", "sm_90", "compute_75", "compute_80")
    assert both == ["75,code=[sm_75,compute_75]", "80,code=[sm_90,compute_80]"]


@needs_cuda_torch
def test_an_absurd_list_of_architectures_leaves_the_cpu_part(tmp_path, cxx, toolkit):
    arguments = {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit, "TORCH_CUDA_ARCH_LIST": "9.0 banana"}
    facts, _ = import_it(tmp_path / "cache", **arguments)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert "TORCH_CUDA_ARCH_LIST and --arch take GPU architectures" in facts["devices"]["cuda"]
    assert facts["devices"]["cuda"].endswith("got 'banana'")
    for absurd in ("12", "3.5", "sm_90", ";", "9.0+PTX+PTX"):
        with pytest.raises(_toolchain.BuildError, match="--arch take GPU architectures"):
            _build.gpu_code(toolkit / "bin" / "nvcc", ["75", "90"], absurd)


@needs_cuda_torch
def test_what_was_built_without_a_gpu_is_built_again_once_where_there_is_one(tmp_path, cxx, toolkit, nvml):
    cache, arguments = tmp_path / "cache", {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit, **nvml}
    blind = {"patch": "_toolchain.gpu_is_visible = lambda: False", "NVML_GPUS": ""}
    sighted = {"patch": SEES, "NVML_GPUS": "90 90"}
    assert import_it(cache, **blind, **arguments)[0]["cache"]["architectures"] == ["PTX 75"]
    assert import_it(cache, **sighted, **arguments)[0]["cache"]["architectures"] == ["sm_90", "PTX 80"]
    for eyes in (sighted, blind):
        facts, err = import_it(cache, **eyes, **arguments)
        assert facts["cache"]["architectures"] == ["sm_90", "PTX 80"]
        assert err == ""
    assert len(entries(cache)) == 1


@needs_cuda_torch
def test_what_was_built_for_newer_gpus_is_built_again_where_one_is_older(tmp_path, cxx, toolkit):
    cache, arguments = tmp_path / "cache", {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit}

    def on(model: str, architecture: str) -> tuple[list[str], str]:
        patch = f"{sees(architecture)}; _toolchain.gpu_models = lambda: [{model!r}]"
        facts, err = import_it(cache, patch=patch, **arguments)
        return facts["cache"]["architectures"], err

    assert on("H100", "90")[0] == ["sm_90", "PTX 80"]
    assert on("A100", "80") == (["sm_90", "PTX 80"], "")
    assert on("T4", "75")[0] == ["sm_75", "PTX 75"]
    for gpu in (("T4", "75"), ("H100", "90")):
        assert on(*gpu) == (["sm_75", "PTX 75"], "")


@needs_cuda_torch
def test_an_entry_without_code_for_the_gpu_is_not_loaded_even_if_no_other_can_be_built(tmp_path, cxx, toolkit):
    """It would fail at the first operator."""
    cache, arguments = tmp_path / "cache", {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit}
    import_it(cache, patch=sees("90"), **arguments)
    nvcc = toolkit / "bin" / "nvcc"
    text, date = nvcc.read_text(), nvcc.stat().st_mtime_ns
    nvcc.write_text(text.replace(": >$made", "exit 1  "))
    os.utime(nvcc, ns=(date, date))
    older = f"{sees('75')}; {finds(None)}; _toolchain.gpu_models = lambda: [1]"
    assert nvcc.stat().st_size == len(text), "the same to the key"
    facts, _ = import_it(cache, patch=older, **arguments)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["devices"]["cuda"].startswith("plain torch: BuildError: ")
    (warning,) = facts["warnings"]
    assert "has no code for the GPU here, but ['sm_90', 'PTX 80']" in warning


@needs_cuda_torch
def test_what_an_nvcc_that_is_a_script_calls_is_compared_too(tmp_path, cxx, toolkit):
    wrapper = script(tmp_path / "wrapper" / "bin" / "nvcc", f'exec {toolkit / "bin" / "nvcc"} "$@"\n')
    arguments = {"cuda": True, "CXX": cxx, "CUDA_HOME": wrapper.parent.parent}
    assert "compiling" in import_it(tmp_path / "cache", **arguments)[1]
    assert import_it(tmp_path / "cache", **arguments)[1] == ""
    with open(toolkit / "bin" / "nvcc", "a") as nvcc:
        nvcc.write("# of the next version\n")
    assert "compiling" in import_it(tmp_path / "cache", **arguments)[1]
    assert import_it(tmp_path / "cache", **arguments)[1] == ""


def test_the_users_environment_is_left_alone(tmp_path, cxx):
    script = "import os; before = dict(os.environ); import tsm_jit; assert dict(os.environ) == before"
    subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path / "cache", CXX=cxx), check=True, timeout=300
    )


def test_cold_import_with_spaces_umlauts_and_commands_in_every_path(tmp_path):
    """Of the cache, the sources and every tool; no shell takes a name for a command. No gcc, for which nvcc would look,
    and no ninja or interpreter on the path."""
    odd = tmp_path / "Übung 'mit' $(touch $PWNED) `touch $PWNED`; touch $PWNED"
    shutil.copytree(ROOT / "tsm_jit", odd / "tsm_jit", ignore=shutil.ignore_patterns("__pycache__"))
    if not (odd / "tsm_jit" / "kernels").exists():
        shutil.copytree(_loader.kernel_folder(), odd / "tsm_jit" / "kernels")
    compiler = script(odd / "bin" / "c++", f'exec {" ".join(_toolchain.find_cxx())} "$@"\n')
    for name in ("sh", "as", "ld", "cat", "rm"):
        if found := shutil.which(name):
            (odd / "bin" / name).symlink_to(found)
    nvcc = _toolchain.find_nvcc() if _toolchain.torch_has_cuda() else None
    if nvcc:
        toolkit = _toolchain.toolkit_root(nvcc)
        (odd / "toolkit" / "bin").mkdir(parents=True)
        for path in (*toolkit.glob("*"), *(toolkit / "bin").glob("*")):
            link = odd / "toolkit" / path.relative_to(toolkit)
            link.exists() or link.symlink_to(path)
    facts, _ = import_it(
        odd / "cache",
        PYTHONPATH=os.pathsep.join([str(odd), *sys.path]),
        PATH=odd / "bin",
        CXX=shlex.quote(str(compiler)),
        CUDA_HOME=odd / "toolkit",
        PWNED=tmp_path / "pwned",
        PYTHONIOENCODING="utf-8",
    )
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["tools"]["cxx"] == str(compiler)
    if nvcc:
        assert facts["tools"]["nvcc"] == str(odd / "toolkit" / "bin" / "nvcc")
        assert re.match(r"compiled kernels \((?!NVRTC)", facts["devices"]["cuda"])
    assert not list(tmp_path.rglob("pwned"))


def test_a_compiler_whose_name_a_shell_could_read_is_refused(tmp_path):
    for name in ("g++ $(touch pwned)", "c++;", "c ++", "ü++"):
        with pytest.raises(_toolchain.BuildError, match="must be of letters, digits"):
            _build._plain_name(tmp_path, "host", str(tmp_path / name))


@pytest.mark.parametrize("required", ["1", "cpu"])
def test_required_kernels_that_are_missing_are_an_error(tmp_path, required):
    process = start(tmp_path / "cache", CXX="/nowhere/c++", TSM_JIT_REQUIRE=required)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"ImportError: TSM_JIT_REQUIRE={required}, but cpu tensors would take plain torch" in err


@needs_cuda_torch
def test_required_cuda_kernels_that_are_missing_are_an_error(built):
    process = start(built, TSM_JIT_REQUIRE="cuda")
    assert "ImportError: TSM_JIT_REQUIRE=cuda, but cuda tensors would take" in process.communicate(timeout=300)[1]


@needs_cuda_torch
def test_required_kernels_are_those_of_cuda_too_where_a_gpu_is(built):
    process = start(built, patch=SEES, TSM_JIT_REQUIRE="1")
    assert "ImportError: TSM_JIT_REQUIRE=1, but cuda tensors would take plain" in process.communicate(timeout=300)[1]


def test_the_readme_has_every_variable():
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("needs a source checkout")
    table = "".join(line for line in readme.read_text().splitlines() if line.startswith("| `"))
    sources = "".join(path.read_text() for path in (ROOT / "tsm_jit").glob("*.py"))
    ours = re.findall(r'environ\.get\("(TSM_JIT_\w+)"', sources)
    assert len(ours) > 2
    for name in (*ours, *_loader._CHOICES, "CXX", "CUDA_HOME", "CUDA_PATH"):
        assert f"`{name}`" in table, name


def test_required_kernels_that_are_there(built, monkeypatch):
    facts, _ = import_it(built, TSM_JIT_REQUIRE="cpu")
    assert facts["devices"]["cpu"] == "compiled kernels"
    monkeypatch.setenv("TSM_JIT_REQUIRE", "gpu")
    with pytest.raises(ValueError, match="TSM_JIT_REQUIRE must be 1, cpu or cuda, got 'gpu'"):
        _loader._report(_loader.Status())


# --- NVRTC -----------------------------------------------------------------------------------------------------------


def kernels_of(image: bytes) -> set[str]:
    return {name.decode() for name in re.findall(rb"(?:\.text\.|\.entry )(_Z\w+)", image)}


@pytest.fixture(scope="session")
def by_nvrtc(tmp_path_factory) -> tuple[Path, dict, str]:
    """A cache that an import without nvcc has filled, for sm_90 and everything else; what it said."""
    if torch.version.cuda is None or _toolchain.find_nvrtc() is None or _toolchain.find_cxx() is None:
        pytest.skip("needs a C++ compiler and a torch with CUDA and NVRTC")
    cache = tmp_path_factory.mktemp("nvrtc") / "cache"
    return cache, *import_it(cache, patch=WITHOUT_NVCC, cuda=True, TORCH_CUDA_ARCH_LIST="9.0")


def test_without_nvcc_nvrtc_compiles_the_kernels(by_nvrtc):
    """Really; it is told once."""
    cache, facts, err = by_nvrtc
    assert err == "tsm_jit: compiling the kernels (only once) for CPU, sm_90, PTX 80\n"
    assert facts["devices"] == {"cpu": "compiled kernels", "cuda": "compiled kernels (NVRTC: sm_90, PTX 80)"}
    assert facts["cache"]["toolkit"].startswith(f"{_toolchain.find_nvrtc()} (CUDA ")
    (warning,) = facts["warnings"]
    assert "compiled the CUDA kernels, which are as fast, instead of nvcc (BuildError: nvcc was not found" in warning
    assert "TSM_JIT_NVRTC=1" in warning
    (entry,) = entries(cache)
    assert re.fullmatch("[0-9a-f]{32}-[0-9a-f]{8}-nvrtc[0-9a-f]{8}", entry.name)
    needed = subprocess.run(["readelf", "-d", entry / _loader.LIBRARY], capture_output=True, text=True).stdout
    assert "libtorch_cuda" in needed
    assert not re.search("libcudart|libcuda\\.|libnvrtc", needed)
    for changes in ({"patch": WITHOUT_NVCC}, {"TSM_JIT_NVRTC": "1"}, {"patch": WITHOUT_NVCC, "CXX": "/nowhere/c++"}):
        again, err = import_it(cache, cuda=True, TORCH_CUDA_ARCH_LIST="9.0", **changes)
        assert err == ""
        assert again["warnings"] == []
        assert again["devices"] == facts["devices"]


DRIVE = """
import ctypes, json, os, sys
import torch, tsm_jit
assert "NVRTC" in tsm_jit.info()["devices"]["cuda"]
assert not os.path.exists(os.environ["STUB"] + "/calls"), "an import must not touch the driver"
launches = ctypes.CDLL(os.environ["STUB"] + "/launches.so")
for name in ("use", "one", "all"):
    getattr(launches, name).restype = ctypes.c_char_p
print(json.dumps(eval(sys.argv[1], {"launches": launches}), default=bytes.decode))
"""


@pytest.fixture(scope="session")
def stub(by_nvrtc, tmp_path_factory) -> Path:
    """A folder with a driver that notes what is asked of it, and a program that launches every kernel."""
    folder, here = tmp_path_factory.mktemp("stub"), Path(__file__).parent / "driver"
    compiler = [*_toolchain.find_cxx(), "-std=c++17", "-shared", "-fPIC", "-pthread", "-o"]
    subprocess.run([*compiler, folder / "libcuda.so.1", here / "libcuda.cpp"], check=True)
    (entry,) = entries(by_nvrtc[0])
    library, kernels = entry / _loader.LIBRARY, f"-I{_loader.kernel_folder()}"
    subprocess.run([*compiler, folder / "launches.so", here / "launches.cpp", kernels, library], check=True)
    return folder


def drive(cache: Path, stub: Path, what: str, **changes) -> tuple[object, list[str]]:
    """The value of an expression of ``launches``, and what the driver noted of it."""
    (stub / "calls").unlink(missing_ok=True)
    libraries = os.pathsep.join([str(stub), os.environ.get("LD_LIBRARY_PATH", "")])
    settings = {"TSM_JIT_NVRTC": "1", "TORCH_CUDA_ARCH_LIST": "9.0", "LD_LIBRARY_PATH": libraries, "STUB": stub}
    done = subprocess.run(
        [sys.executable, "-c", DRIVE, what],
        env=environment(cache, cuda=True, **{**settings, **changes}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    calls = (stub / "calls").read_text().splitlines() if (stub / "calls").exists() else []
    return json.loads(done.stdout), calls


LAUNCH = (
    r"launch (?P<name>\w+) grid (?P<sizes>\d+ \d+ \d+ block \d+ \d+ \d+) shared (?P<shared>\d+) stream 7 mode 0 "
    r"argument (?P<argument>\d+) extra \(nil\) device (?P<device>\d)"
)


def test_every_kernel_that_is_launched_is_in_the_images_and_no_other(by_nvrtc, stub):
    """By a driver without a GPU; on its second device, which the machine code is not for, out of the PTX."""
    told, calls = drive(by_nvrtc[0], stub, "[launches.use(0), launches.all(), launches.use(1), launches.all()]")
    assert told == [None] * 4
    loads = [call for call in calls if call.startswith("load")]
    assert loads == [
        f"load {number} {kind} captured 2 options 0"  # 2: also while a graph is captured
        for number, kind in enumerate(["cubin", "cubin", "PTX", "PTX"])
    ]
    launches = [re.fullmatch(LAUNCH, call) for call in calls if call.startswith("launch")]
    assert all(launches)
    for device, images in [("0", (0, 1)), ("1", (2, 3))]:
        launched = {launch["name"] for launch in launches if launch["device"] == device}
        in_images = [kernels_of((stub / f"image{number}").read_bytes()) for number in images]
        assert launched == in_images[0] | in_images[1]
        assert len(launched) > 50
    for launch in launches:
        sizes = [int(size) for size in re.findall(r"\d+", launch["sizes"])]
        assert min(sizes) > 0
        assert sizes[3] * sizes[4] * sizes[5] <= 1024
        assert int(launch["shared"]) <= 48 * 1024
    got = [call for call in calls if call.startswith("get")]
    assert len(got) == len(set(got)) < len(launches), "each kernel is looked up once in an image"
    with_data = [launch for launch in launches if "shift_tile" in launch["name"]]
    assert {int(launch["argument"]) - 2**20 for launch in with_data} == {1, 2, 4, 8, 16}


def test_a_thread_without_a_context_takes_that_of_torch(by_nvrtc, stub):
    """As threads of autograd are, and all at once."""
    told, calls = drive(by_nvrtc[0], stub, "launches.at_once(8)")
    assert told == 8
    assert calls.count("retain 0") == calls.count("current 0") == 8
    assert sum(call.startswith("load") for call in calls) == 1
    assert sum(call.startswith("get") for call in calls) == 1
    assert sum(call.startswith("launch") for call in calls) == 8
    _, calls = drive(by_nvrtc[0], stub, "[launches.use(device) for device in (1, 1, 0, 0)]")
    assert calls == ["retain 1", "current 1", "retain 0", "current 0"]


@pytest.mark.parametrize("fails", ["cuDevicePrimaryCtxRetain", "cuLibraryLoadData", "cuLaunchKernel"])
def test_what_the_driver_says_is_told(by_nvrtc, stub, fails):
    told, _ = drive(by_nvrtc[0], stub, "launches.use(0) or launches.one()", STUB_FAILS=fails)
    assert told == "out of memory"


def test_no_driver_or_an_old_one_is_told(by_nvrtc, stub, tmp_path):
    old, none = tmp_path / "old", tmp_path / "none"
    for folder in (old, none):
        folder.mkdir()
        (folder / "launches.so").symlink_to(stub / "launches.so")
    (none / "libcuda.so.1").write_text("no library")
    source = Path(__file__).parent / "driver" / "libcuda.cpp"
    compiler = [*_toolchain.find_cxx(), "-std=c++17", "-shared", "-fPIC", "-DOLD", "-o"]
    subprocess.run([*compiler, old / "libcuda.so.1", source], check=True)
    assert drive(by_nvrtc[0], old, "launches.use(0)")[0] == "the driver is older than CUDA 12"
    if not _toolchain.gpu_is_visible():
        assert drive(by_nvrtc[0], none, "launches.use(0)")[0] == "libcuda.so.1, the driver, cannot be loaded"


def test_a_kernel_that_is_not_in_the_images_does_not_link(tmp_path, nvrtc):
    """NVRTC made images, without a kernel in them; the compiler and the linker are real."""
    patch = f"{WITHOUT_NVCC}; {finds(nvrtc)}"
    facts, _ = import_it(tmp_path / "cache", patch=patch, cuda=True)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["devices"]["cuda"].startswith("plain torch: BuildError: ")
    assert "nvcc was not found: install the CUDA toolkit" in facts["devices"]["cuda"]
    (log,) = (entry / _loader.LOG for entry in entries(tmp_path / "cache") if "-nvrtc" in entry.name)
    assert "undefined reference to `void tsm_jit::shift_tile<" in log.read_text()


def test_the_images_of_a_gpu():
    """By compute capability: machine code of its generation, then PTX; of several the newest."""
    known = ["sm_80", "sm_86", "sm_90a", "sm_90", "sm_100f", "compute_75", "compute_90", "compute_100a"]

    table = re.findall(r"\.quad \.L(\w+)_x\.cu\n\.long (\d+), (\d+)", "\n".join(_nvrtc.images("x.cu", known)))
    assert {name for name, _, _ in table} == set(known)
    expected = {75: "compute_75", 80: "sm_80", 87: "sm_86", 89: "sm_86", 90: "sm_90a", 91: "sm_90", 120: "compute_90"}
    for capability, image in {**expected, 100: "sm_100f", 103: "sm_100f", 110: "compute_90"}.items():
        assert next(name for name, low, high in table if int(low) <= capability <= int(high)) == image


@needs_cuda_torch
def test_the_switch_chooses_nvrtc_and_both_builds_stay(tmp_path, cxx, toolkit, nvrtc):
    cache = tmp_path / "cache"
    arguments = {"patch": f"{finds(nvrtc)}; {sees('90')}", "cuda": True, "CXX": cxx, "CUDA_HOME": toolkit}
    for _ in range(2):
        for switch, served in [("1", "NVRTC: sm_90, PTX 80"), ("0", "sm_90, PTX 80"), (None, "sm_90, PTX 80")]:
            facts, _ = import_it(cache, TSM_JIT_NVRTC=switch, **arguments)
            assert facts["devices"]["cuda"] == f"compiled kernels ({served})"
            assert facts["warnings"] == []
    assert len(entries(cache)) == 2
    assert compilations(cxx) == 2
    done = command(cache, "clean", "--all", CXX=cxx)
    assert done.returncode == 0
    assert entries(cache) == []


@needs_cuda_torch
def test_what_nvcc_made_is_taken_before_nvrtc_is_asked(tmp_path, cxx, toolkit, nvrtc):
    """And NVRTC is asked where all that was made is for the CPU alone."""
    cache, found = tmp_path / "cache", finds(nvrtc)
    arguments = {"cuda": True, "CXX": cxx, "TORCH_CUDA_ARCH_LIST": "9.0"}
    import_it(cache, patch="_toolchain.find_nvcc = _toolchain.find_nvrtc = lambda: None", **arguments)
    facts, _ = import_it(cache, patch=f"{WITHOUT_NVCC}; {found}", **arguments)
    assert facts["devices"]["cuda"] == "compiled kernels (NVRTC: sm_90, PTX 80)"
    shutil.rmtree(cache / facts["cache"]["key"])
    import_it(cache, CUDA_HOME=toolkit, **arguments)
    for compiler in (cxx, "/nowhere/c++"):
        facts, err = import_it(cache, patch=f"{WITHOUT_NVCC}; {found}", **{**arguments, "CXX": compiler})
        assert facts["devices"]["cuda"] == "compiled kernels (sm_90, PTX 80)"
        assert facts["warnings"] == []
        assert err == ""
    made = cache / facts["cache"]["key"]
    manifest = _loader._read(made)
    (made / _loader.LIBRARY).write_bytes(b"needs a library that went with nvcc")
    manifest["sha256"] = hashlib.sha256((made / _loader.LIBRARY).read_bytes()).hexdigest()
    _loader._write_manifest(made, manifest)
    facts, _ = import_it(cache, patch=f"{WITHOUT_NVCC}; {found}", **arguments)
    assert facts["devices"]["cuda"] == "compiled kernels (NVRTC: sm_90, PTX 80)", "what does not load is made again"


@needs_cuda_torch
@pytest.mark.parametrize(
    ("library", "told"),
    [
        (None, "was not found"),
        ("", "file too short"),
        ("int nvrtcVersion(...) { __builtin_trap(); }", "must tell its version and GPU architectures"),
        (FAILING_NVRTC, "a.cu(1): error: no"),
    ],
    ids=["missing", "empty", "crashes", "fails"],
)
def test_without_nvcc_and_a_working_nvrtc_the_cpu_part_is_left(tmp_path, cxx, library, told):
    made = tmp_path / "libnvrtc.so"
    if library:
        source = tmp_path / "nvrtc.cpp"
        source.write_text(library if library.startswith("\n") else f'extern "C" {library}')
        subprocess.run([*_toolchain.find_cxx(), "-shared", "-fPIC", source, "-o", made], check=True)
    elif library == "":
        made.touch()
    found = finds(None if library is None else made)
    arguments = {"patch": f"{WITHOUT_NVCC}; {found}", "cuda": True, "CXX": cxx}
    for switch in (None, "1"):
        facts, err = import_it(tmp_path / "cache", TSM_JIT_NVRTC=switch, **arguments)
        assert facts["devices"]["cpu"] == "compiled kernels"
        assert facts["devices"]["cuda"].startswith("plain torch: ")
        (warning,) = facts["warnings"]
        assert told in warning
        assert ("nvcc was not found: install" in warning) == (switch is None)
    assert err == "", "what failed is not tried again"


@needs_cuda_torch
def test_nvrtc_is_looked_for_in_order(tmp_path, monkeypatch):
    major = torch.version.cuda.partition(".")[0]
    wheels, torch_folder, system = (tmp_path / name for name in ("wheels", "torch", "system"))
    found = [
        wheels / "nvidia" / "cu99" / "lib" / f"libnvrtc.so.{major}",
        torch_folder / "lib" / f"libnvrtc-0a1b2c3d.so.{major}.0",
        system / f"libnvrtc.so.{major}.1.2",
    ]
    for path in found:
        path.parent.mkdir(parents=True)
        for name in (f"libnvrtc-builtins.so.{major}.0", f"libnvrtc.alt.so.{major}", "libnvrtc.so.1", path.name):
            (path.parent / name).touch()
    monkeypatch.setattr(sys, "path", [str(wheels)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(torch, "__file__", str(torch_folder / "__init__.py"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(system))
    for path in found:
        assert _toolchain.find_nvrtc() == path
        path.unlink()
    assert _toolchain.find_nvrtc() not in found


# --- security --------------------------------------------------------------------------------------------------------


def test_a_cache_that_others_could_write_is_refused(warm):
    warm.chmod(0o777)
    facts, _ = import_it(warm)
    assert "can be written by others" in facts["devices"]["cpu"]
    assert str(warm) in facts["warnings"][0]
    warm.chmod(0o700)
    (entry,) = entries(warm)
    entry.chmod(0o770)
    with pytest.raises(PermissionError, match=f"{entry} can be written by others"):
        _loader._read(entry)
    entry.chmod(0o700)
    for path in entry.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for name in (_loader.LIBRARY, _loader.MANIFEST):
        (entry / name).chmod(0o620)
        with pytest.raises(PermissionError, match=f"{name} can be written by others"):
            _loader._read(entry)
        (entry / name).chmod(0o600)


@needs_root
def test_a_cache_of_another_user_is_refused(warm):
    os.chown(warm, 12345, -1)
    assert "belongs to user 12345" in import_it(warm)[0]["devices"]["cpu"]


@pytest.fixture
def deep(tmp_path) -> Path:
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True)
    _loader._refuse_foreign(folder)
    return folder


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_a_folder_above_that_others_could_write_is_refused(deep, mode):
    """They could put a cache of their own in the place of ours."""
    deep.parent.chmod(mode)
    with pytest.raises(PermissionError, match=f"{deep.parent} can be written by others"):
        _loader._refuse_foreign(deep)
    deep.parent.chmod(mode | stat.S_ISVTX)
    _loader._refuse_foreign(deep)
    deep.chmod(0o1777)
    with pytest.raises(PermissionError, match=f"{deep} can be written by others"):
        _loader._refuse_foreign(deep)


@needs_root
def test_a_folder_above_that_a_group_could_write_is_refused(deep):
    """But not if the group is its owner's own, as where the umask is 002."""
    deep.parent.chmod(0o775)
    _loader._refuse_foreign(deep)
    os.chown(deep.parent, -1, 12345)
    with pytest.raises(PermissionError, match="above can be written by others"):
        _loader._refuse_foreign(deep)


@needs_root
def test_a_group_in_which_others_are_is_refused_whatever_its_name(deep, monkeypatch):
    """One may be the first group of others without listing them."""
    import pwd

    deep.parent.chmod(0o775)
    users = pwd.getpwall()
    stranger = pwd.struct_passwd(("stranger", "x", 12345, 0, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwall", lambda: [*users, stranger])
    with pytest.raises(PermissionError, match="above can be written by others"):
        _loader._refuse_foreign(deep)


def test_a_folder_above_that_an_access_control_list_opens_is_refused(deep):
    def entry(tag: int, rights: int, who: int = 0xFFFFFFFF) -> bytes:
        return struct.pack("<HHI", tag, rights, who)

    stranger = struct.pack("<I", 2) + entry(1, 7) + entry(2, 7, 12345) + entry(4, 5) + entry(0x10, 7) + entry(0x20, 0)
    try:
        os.setxattr(deep.parent, "system.posix_acl_access", stranger)
    except OSError:
        pytest.skip("needs a file system with access control lists")
    with pytest.raises(PermissionError, match="above can be written by others"):
        _loader._refuse_foreign(deep)


@needs_root
def test_a_user_who_seems_to_have_the_root_folder_is_trusted_above_the_cache_alone(deep, monkeypatch):
    """As where only one user of a container is known outside: everybody else is nobody, the system's files too."""
    really = os.stat
    nobody = os.stat_result([*os.stat("/")[:4], 65534, *os.stat("/")[5:]])
    monkeypatch.setattr(os, "stat", lambda path, **more: nobody if path == "/" else really(path, **more))
    os.chown(deep.parent, 65534, -1)
    (deep / "entry").mkdir()
    _loader._refuse_foreign(deep)
    for path in (deep / "entry", deep):
        os.chown(path, 65534, -1)
        with pytest.raises(PermissionError, match=f"{path} belongs to user 65534"):
            _loader._read(deep / "entry")
        os.chown(path, 0, -1)


@needs_root
def test_a_folder_above_of_another_user_is_refused(deep):
    os.chown(deep.parent, 12345, -1)
    with pytest.raises(PermissionError, match="above belongs to user 12345"):
        _loader._refuse_foreign(deep)


def test_links_are_followed_if_they_are_ours_and_end_where_nobody_else_writes(deep, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("above")
    _loader._refuse_foreign(link / "cache")
    deep.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="above can be written by others"):
        _loader._refuse_foreign(link / "cache")
    (tmp_path / "itself").symlink_to("itself")
    with pytest.raises(OSError, match="symbolic links"):
        _loader._refuse_foreign(tmp_path / "itself")


@needs_root
def test_a_link_of_another_user_is_refused(deep, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("above")
    os.lchown(link, 12345, -1)
    with pytest.raises(PermissionError, match="link belongs to user 12345"):
        _loader._refuse_foreign(link / "cache")


# --- the command line ------------------------------------------------------------------------------------------------


def test_info(warm, capsys):
    (entry,) = entries(warm)
    shown = command(warm, "info", "--json")
    assert shown.returncode == 0, shown.stderr
    facts = json.loads(shown.stdout)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["cache"]["key"] == entry.name
    assert facts["cache"]["folder"] == str(warm)
    assert facts["cache"]["bytes"] > 0
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["tools"]["cxx"]
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(facts)


def test_info_compiles_nothing_and_waits_for_nobody(tmp_path, cxx, toolkit):
    cache, arguments = tmp_path / "cache", {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit}
    shown = command(cache, "info", "--json", **arguments)
    assert shown.stderr == ""
    assert not cache.exists()
    facts = json.loads(shown.stdout)
    by = _loader.builders()[0]
    assert facts["devices"]["cpu"] == f"not compiled yet: the next import will do it, with {by}"
    assert facts["backends"][by] == "to be tried by the next import"
    key = facts["cache"]["key"]
    cache.mkdir(mode=0o700)
    with open(cache / f"lock-{key}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert json.loads(command(cache, "info", "--json", **arguments).stdout) == facts
    import_it(cache, **arguments)
    facts = json.loads(command(cache, "info", "--json", **arguments).stdout)
    assert facts["backends"][by] == f"chosen: it made {key}"
    assert facts["cache"]["key"] == key
    assert facts["cache"]["bytes"] > 0
    facts = json.loads(command(cache, "info", "--json", **{**arguments, "TSM_JIT_NVRTC": "1"}).stdout)
    if _toolchain.torch_has_cuda():
        assert facts["backends"]["nvcc"] == "not chosen: TSM_JIT_NVRTC is set"
    facts = json.loads(command(cache, "info", "--json", CXX="/nowhere/c++", TSM_JIT_CACHE=tmp_path / "other").stdout)
    for by in _loader.builders():
        assert facts["backends"][by].startswith("not chosen: BuildError: no C++ compiler was found")
    assert facts["backends"]["plain torch"].startswith("chosen for cpu")
    assert facts["cache"]["key"]


@pytest.mark.parametrize("name", ["info", "clean"])
def test_the_command_line_says_what_stops_torch(tmp_path, name):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: too short')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = command(tmp_path / "cache", name, PYTHONPATH=path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for expected in ("OSError: libtorch_cpu.so: too short", str(tmp_path / "torch.py"), sys.executable):
        assert expected in done.stderr
    if name == "info":
        assert "too short" in json.loads(command(tmp_path / "cache", name, "--json", PYTHONPATH=path).stdout)["error"]


def test_info_works_when_everything_is_broken(tmp_path):
    """No sources, a file in place of the cache, no compilers, and kernels that are required."""
    ignored = shutil.ignore_patterns("kernels", "__pycache__")
    shutil.copytree(ROOT / "tsm_jit", tmp_path / "without kernels" / "tsm_jit", ignore=ignored)
    path = os.pathsep.join(
        [str(tmp_path / "without kernels"), *(path for path in sys.path if not Path(path, "tsm_jit").is_dir())]
    )
    cache = tmp_path / "cache"
    cache.touch()
    broken = {"CXX": "'", "CUDA_HOME": "/nowhere", "PATH": "/nowhere", "TSM_JIT_REQUIRE": "1"}
    for changes, expected in [
        ({"PYTHONPATH": path}, "the kernel sources are missing"),
        ({}, 'set CXX to one, got "\'"'),
        ({"CXX": None, "PATH": os.environ["PATH"]}, f"{cache} cannot be made"),
    ]:
        shown = command(cache, "info", "--json", **{**broken, **changes})
        assert shown.returncode == 0, shown.stderr
        assert expected in json.loads(shown.stdout)["devices"]["cpu"]


@needs_cuda_torch
def test_build_for_others_leaves_a_cache_that_just_works(tmp_path, cxx, toolkit):
    """Read-only, without compilers, on a machine with a GPU that the default would have compiled for."""
    cache, arguments = tmp_path / "cache", {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit}
    for options, architectures in [([], "sm_75, sm_80, sm_90, PTX 75"), (["--arch", "7.5"], "sm_75, PTX 75")]:
        done = command(cache, "build", *options, **arguments)
        assert done.returncode == 0, done.stderr
        (entry,) = entries(cache)
        assert done.stdout == f"compiled {entry} for CPU, {architectures}\n"
    for path in (entry, cache):
        path.chmod(0o500)
    for changes in (arguments, {"CXX": "/nowhere/c++"}):
        facts, err = import_it(cache, patch=sees("90"), **changes)
        assert facts["devices"]["cuda"] == "compiled kernels (sm_75, PTX 75)"
        assert facts["cache"]["key"] == entry.name
        assert err == ""
    for path in (cache, entry):
        path.chmod(0o700)
    done = command(cache, "build", "--arch", "banana", **arguments)
    assert done.returncode == 1
    assert done.stderr.endswith("got 'banana'\n")
    assert import_it(cache, **arguments)[0]["devices"]["cuda"] == "compiled kernels (sm_75, PTX 75)"


@pytest.fixture
def shared():
    """A folder that another user can come to, as those of pytest are not."""
    folder = Path(tempfile.mkdtemp(prefix="tsm_jit-"))
    folder.chmod(0o755)
    if not all(path.stat().st_mode & stat.S_IXOTH for path in _loader.kernel_folder().parents):
        pytest.skip("needs kernel sources that another user can read")
    yield folder
    shutil.rmtree(folder)


# With all imports done, since Python itself may lie where only root can read.
STRANGER = "import grp, os, pwd, shlex; os.setgroups([]); os.setgid(12345); os.setuid(12345)"


@needs_root
@needs_cuda_torch
def test_what_root_built_serves_another_user_with_other_compilers(shared, cxx, toolkit):
    """And with other variables; what root's import made is his, and what to do is told."""
    other = script(shared / "c++", "exit 1\n")
    arguments = {"cuda": True, "CXX": cxx, "CUDA_HOME": toolkit}
    changes = {"CXX": other, "CUDA_HOME": "/nowhere", "TORCH_CUDA_ARCH_LIST": "9.0", "NVCC_APPEND_FLAGS": "-G"}
    cache = shared / "new" / "cache"
    assert command(cache, "build", umask=0o077, **arguments).returncode == 0
    (entry,) = entries(cache)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (cache.parent, cache, entry)} == {0o755}
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {0o644}
    for who in (STRANGER, ""):
        facts, err = import_it(cache, cuda=True, patch=who, **changes)
        assert err == ""
        assert facts["devices"]["cuda"] == "compiled kernels (sm_75, sm_80, sm_90, PTX 75)"
        assert facts["cache"]["key"] == entry.name

    private = shared / "private"
    import_it(private, **arguments)
    facts, _ = import_it(private, cuda=True, patch=STRANGER, **changes)
    assert f"cannot be read: have its owner run chmod -R a+rX {private}, or set TSM_JIT_CACHE" in facts["warnings"][0]


@pytest.mark.parametrize("umask", [0, 0o002])
def test_the_folders_above_a_new_cache_are_private_whatever_the_umask(tmp_path, cxx, umask):
    cache = tmp_path / "new" / "folders" / "tsm_jit"
    changes = {"TSM_JIT_CACHE": None, "XDG_CACHE_HOME": cache.parent, "CXX": cxx}
    for _ in range(2):
        facts, err = import_it(tmp_path / "cache", before=f"import os; os.umask({umask})", **changes)
        assert facts["devices"]["cpu"] == "compiled kernels"
    assert err == ""
    (entry,) = entries(cache)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (cache.parents[1], cache.parent, cache, entry)} == {0o700}


@needs_root
def test_a_user_without_a_home_is_told_with_the_cure(shared):
    nothing = {"TSM_JIT_CACHE": None, "XDG_CACHE_HOME": None, "HOME": None}
    facts, _ = import_it(shared / "cache", patch=STRANGER, **nothing)
    expected = "HOME is not set and user 12345 has no home folder: set TSM_JIT_CACHE to a folder of your own"
    assert expected in facts["warnings"][0]
    assert not list(shared.iterdir())


@needs_cuda_torch
def test_build_without_nvcc_and_nvrtc_says_that_it_is_for_the_cpu_alone(tmp_path, cxx):
    done = command(tmp_path / "cache", "build", CXX=cxx)
    (entry,) = entries(tmp_path / "cache")
    assert done.returncode == 0
    assert done.stdout == f"compiled {entry} for CPU\n"
    assert done.stderr.endswith(f"no kernels for CUDA: {'; '.join(_loader.NOT_FOUND.values())}\n")


def test_clean(warm, monkeypatch, capsys):
    (entry,) = entries(warm)
    other = Path(shutil.copytree(entry, warm / ("0" * 32 + entry.name[32:])))  # of another version
    (warm / "not ours").mkdir()
    (warm / "not ours" / _loader.MANIFEST).write_text("{}")
    young, old = warm / ("tmp-" + "0" * 32), warm / ("tmp-" + "1" * 32)
    young.mkdir()  # what another process is building
    os.utime(shutil.copytree(entry, old), (0, 0))  # what a killed one left
    os.utime(other, (0, 0))

    for module in (["-m", "tsm_jit"], ["-mtsm_jit"], ["-Wignore", "-umtsm_jit"]):
        clean = [sys.executable, *module, "clean", "--older-than", "99999"]
        cleaned = subprocess.run(clean, env=environment(warm, CXX="/bin/false"), capture_output=True, text=True)
        assert cleaned.returncode == 0
        assert cleaned.stderr == "", "it must not compile what it removes"
    assert set(entries(warm)) == {entry, other, young, warm / "not ours"}

    monkeypatch.setenv("TSM_JIT_CACHE", str(warm))
    for options, left in [([], {other, young}), (["--older-than", "1"], {young})]:
        assert cli.main(["clean", *options]) == 0
        assert set(entries(warm)) == left | {warm / "not ours"}
    shutil.copytree(warm / "not ours", other)
    assert cli.main(["clean", "--all"]) == 0
    assert set(entries(warm)) == {young, warm / "not ours"}
    assert not list(warm.glob("lock-*"))
    with pytest.raises(SystemExit):
        cli.main(["clean", "--older-than=-1"])
    assert "must be a number of days, 0 or more, got '-1'" in capsys.readouterr().err


def test_clean_says_what_it_could_not_remove(warm, monkeypatch, capsys):
    (entry,) = entries(warm)
    monkeypatch.setenv("TSM_JIT_CACHE", str(warm))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    assert cli.main(["clean", "--all"]) == 1
    expected = f"not everything was removed: {entry} cannot be removed: make {warm} writable, or clean it as its owner"
    assert expected in capsys.readouterr().err


def test_help_compiles_nothing(tmp_path, capsys):
    done = command(tmp_path / "cache", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert not (tmp_path / "cache").exists()
    for name in ("info", "build", "clean"):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert f"usage: python -m tsm_jit {name}" in capsys.readouterr().out


def test_on_a_terminal_one_line_counts_the_seconds(tmp_path, cxx):
    text = cxx.read_text().partition("\n")[2]
    script(
        cxx,
        f'while ! grep -q go "{tmp_path}/calls"; do read go <{tmp_path}/pipe; echo go >>{tmp_path}/calls; done\n'
        + text,
    )
    os.mkfifo(tmp_path / "pipe")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "import tsm_jit"], env=environment(tmp_path / "cache", CXX=cxx), stderr=theirs
    )
    os.close(theirs)
    said = b""
    while b": 1 s" not in said:
        said += os.read(ours, 1000)
    (tmp_path / "pipe").write_text("go\ngo\n")
    while b"done after" not in said:
        said += os.read(ours, 1000)
    assert process.wait(60) == 0
    line = "tsm_jit: compiling the kernels (only once) for CPU"
    *counted, last = said.decode().strip().split("\r")
    assert all(re.fullmatch(re.escape(line) + r": \d+ s", step) for step in counted)
    assert re.fullmatch(re.escape(line) + r": done after \d+\.\d s", last)


def test_the_table_of_failures_names_tests_that_exist():
    contributing = ROOT / "CONTRIBUTING.md"
    if not contributing.is_file():
        pytest.skip("needs a source checkout")
    named = set(re.findall(r"`(test_\w+)`", contributing.read_text()))
    assert named
    assert named <= globals().keys()
