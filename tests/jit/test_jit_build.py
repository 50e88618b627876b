"""Builds: what compilers may do to us, real compilers, and what follows where one fails."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tsm_jit._jit import build, cache, spec, tools

# The machine seems to have a GPU.
SEES = "exists = os.path.exists; os.path.exists = lambda path: path == '/dev/nvidiactl' or exists(path)\n"


def processes_in(folder: Path) -> list[str]:
    names = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            names += [process.name] * (process / "cwd").readlink().is_relative_to(folder)
        except OSError:  # it has just ended
            continue
    return names


@pytest.fixture
def attempt(importer, monkeypatch):
    """Builds with a C++ compiler that runs a script."""

    def run(text: str) -> cache.Entry:
        monkeypatch.setenv("TSM_JIT_CACHE", str(importer.cache))
        monkeypatch.setenv("CXX", str(importer.script("bin/c++", text)))
        return cache.get_or_build(spec.here("cpu"), build.build, lambda line: None)

    return run


def test_a_compiler_that_fails_is_reported_with_its_first_error_and_the_log_and_is_not_tried_again(importer):
    """The error is in English for users of any language."""
    text = 'case $LC_ALL in C*) echo "x.cpp:1: error: the sky is falling" ;; esac; echo "error: another"; exit 1'
    compiler = importer.script("c++", text)
    for first in (True, False):
        facts = importer(CXX=compiler, LC_ALL="de_DE.UTF-8", LANG="de_DE.UTF-8")
        (warning,) = facts["warnings"]
        (entry,) = importer.entries()
        assert f"x.cpp:1: error: the sky is falling (log: {entry / cache.LOG})" in warning
        assert "error: another" in (entry / cache.LOG).read_text()
        assert ("compiling" in facts["stderr"]) == first


def test_a_compiler_that_hangs_is_ended_with_everything_it_started(attempt, importer, monkeypatch):
    monkeypatch.setattr(build, "SECONDS", 8)
    assert "8 s" in attempt("trap '' INT TERM HUP; touch ../../started; sleep 1000 & sleep 1000").error
    assert (importer.folder / "started").exists()
    assert processes_in(importer.folder) == []


def test_output_without_end_is_bounded(attempt, monkeypatch):
    monkeypatch.setattr(build, "SECONDS", 60)
    entry = attempt("exec yes error")
    assert "60 s" not in entry.error, "else ninja would have taken all memory"
    assert cache.size(entry.folder) < 2**22


def test_a_compiler_that_creates_nothing_is_reported(attempt):
    assert spec.LIBRARY in attempt("exit 0").error


@pytest.mark.parametrize("text", ["kill -9 $$", "echo 'c++: fatal error: Killed signal'; exit 1"])
def test_a_compiler_that_was_killed_is_not_recorded(attempt, importer, text):
    with pytest.raises(OSError, match="Killed"):
        attempt(text)
    assert importer.entries() == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_that_ignores_the_end_of_its_children_is_no_obstacle(importer, cxx, fails):
    compiler = importer.script("c++", "echo 'error: broken'; exit 1") if fails else cxx
    facts = importer("import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)", CXX=compiler)
    assert ("error: broken (log: " if fails else "compiled kernels") in facts["devices"]["cpu"]


def test_the_death_of_the_importing_process_ends_worker_and_compilers(importer):
    compiler = importer.script("c++", "trap '' INT TERM HUP; touch ../../called; sleep 1000")
    process = importer.begin(fresh=True, CXX=compiler)
    while not (importer.folder / "called").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while processes_in(importer.cache) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_in(importer.cache) == []


@pytest.mark.parametrize("character", "$:`")
def test_a_cache_folder_that_ninja_or_nvcc_cannot_read_is_reported(importer, cxx, character):
    importer.cache = importer.folder / f"a{character}b"
    (warning,) = importer(CXX=cxx)["warnings"]
    assert "TSM_JIT_CACHE must" in warning
    assert str(importer.cache) in warning


LOAD = """
import sys, torch
files = lambda: {line.split(maxsplit=5)[5] for line in open("/proc/self/maps").read().splitlines() if ".so" in line}
before = files()
torch.ops.load_library(sys.argv[1])
print(*(files() - before), sep="\\n")
"""


TABLE = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
class Kernel(ctypes.Structure):
    _fields_ = [("host", ctypes.c_void_p), ("name", ctypes.c_char_p), ("source", ctypes.c_int32)]
count = ctypes.c_int32.in_dll(library, "_ZN7tsm_jit15n_nvrtc_kernelsE").value
for kernel in (Kernel * count).in_dll(library, "_ZN7tsm_jit13nvrtc_kernelsE"):
    assert ctypes.cast(library[kernel.name.decode()], ctypes.c_void_p).value == kernel.host
    print(kernel.name.decode())
"""


def build_for_real(importer, backend: str) -> dict:
    """Imports a copy of the package, with all names such that a shell or a compiler could misread them.

    nvcc is a script on the path, CUDA_HOME is unset, and the toolkit has no libcudart.so.
    """
    odd = importer.folder / "Übung 'mit' (allem);hacked; & \"#\""
    importer.cache, importer.folder = odd / "cache", odd
    shutil.copytree(Path(spec.__file__).parents[1], odd / "tsm_jit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(spec.kernel_folder(), odd / "tsm_jit" / "kernels", dirs_exist_ok=True)
    importer.script("bin/hacked", f'touch "{odd}/hacked"')
    compiler = importer.script("bin/c++", f'exec {shlex.join(tools.find_cxx())} "$@"')
    if backend == "nvcc":
        dry_run = subprocess.run([tools.find_nvcc(), "--dryrun", "-E", "-x", "cu", "-"], capture_output=True, text=True)
        toolkit = Path(re.search(r"#\$ TOP=(.*)", dry_run.stderr)[1])
        for path in (*toolkit.glob("bin/*"), *toolkit.glob("nvvm"), *toolkit.glob("include")):
            link = odd / "cuda" / path.relative_to(toolkit)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        importer.script("bin/nvcc", 'exec "${0%/*}/../cuda/bin/nvcc" "$@"')
    hides = "access = os.access; os.access = lambda path, mode: 'nvcc' not in str(path) and access(path, mode)"
    variables = {"PATH": f"{odd}/bin:{os.environ['PATH']}", "CUDA_HOME": None, "CUDA_PATH": None}
    variables |= {"CXX": shlex.quote(str(compiler)), "TORCH_CUDA_ARCH_LIST": "9.0", "PYTHONIOENCODING": "utf-8"}
    facts = importer(hides if backend == "nvrtc" else "", cuda=True, path=(odd,), **variables)
    library = importer.cache / facts["cache"]["entry"] / spec.LIBRARY
    needs = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    loads = importer.run("-c", LOAD, str(library)).stdout.split("\n")[:-1]
    hacked = (odd / "hacked").exists()
    return {**facts, "backend": backend, "library": str(library), "needs": needs, "loads": loads, "hacked": hacked}


@pytest.fixture(scope="session", params=["nvcc", "nvrtc"])
def real(request, once) -> dict:
    """What an import with nvcc, or without it, did."""
    if torch.version.cuda is None or getattr(tools, f"find_{request.param}")() is None or tools.find_cxx() is None:
        pytest.skip(f"needs a torch with CUDA, {request.param} and a C++ compiler")
    return once(request.param, lambda importer: build_for_real(importer, request.param))


@pytest.mark.slow
def test_a_script_for_nvcc_on_the_path_or_nvrtc_compiles_whatever_the_names_are(real):
    assert real["backends"][real["backend"]] == "used", real["warnings"]
    assert "sm_90, PTX 80" in real["devices"]["cuda"]
    assert real["warnings"] == []
    assert not real["hacked"]


@pytest.mark.slow
def test_the_library_takes_the_cuda_runtime_of_torch_and_brings_no_other_library(real):
    assert "[libcudart.so." in real["needs"]
    assert "libtorch_python" not in real["needs"]
    assert real["loads"] == [real["library"]]


@pytest.mark.slow
def test_the_log_and_info_show_how_ninja_compiled_our_sources(real):
    log = Path(real["library"]).with_name(cache.LOG).read_text()
    tool, suffix = {"nvcc": ("nvcc", ""), "nvrtc": (r"c\+\+", r"\.cpp")}[real["backend"]]
    for source in ("residual/residual.cu", "shift/temporal_shift.cu"):
        command = rf"\S*{tool} .*/{source}{suffix}' -o"
        assert re.search(rf"^\[\d+/\d+\] {command}", log, re.MULTILINE)
        assert any(re.match(command, line) for line in real["cache"]["commands"])


@pytest.mark.slow
@pytest.mark.parametrize("real", ["nvrtc"], indirect=True)
def test_the_table_of_kernels_has_every_kernel_that_nvrtc_compiled_with_its_host_function(real):
    kernels = set(re.findall(rb"\.entry (\w+)\(", Path(real["library"]).read_bytes()))
    output = subprocess.run([sys.executable, "-c", TABLE, real["library"]], capture_output=True, check=True).stdout
    assert set(output.split()) == kernels
    assert kernels


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [({"version": "9.2"}, "9.2"), ({"compiles": "echo 'nvcc error : out of luck'; exit 1"}, "error : out of luck")],
)
def test_where_nvcc_is_of_another_major_version_or_fails_nvrtc_compiles_with_one_warning(importer, cxx, nvcc, reason):
    variables = {"CUDA_HOME": importer.toolkit(**nvcc), "path": (importer.nvrtc(),), "CXX": cxx}
    (warning,) = importer(cuda=True, **variables)["warnings"]
    assert reason in warning
    facts = importer(cuda=True, **variables)
    assert facts["devices"]["cuda"] == "compiled kernels (NVRTC: PTX 75)"
    assert facts["warnings"] == []
    assert facts["stderr"] == "", "what failed is not tried again"


def test_where_nvrtc_fails_too_cpu_kernels_serve_with_one_warning_that_has_all_reasons(importer, cxx):
    home = importer.toolkit(compiles="echo 'nvcc error : out of luck'; exit 1")
    facts = importer(SEES, cuda=True, path=(importer.nvrtc(error=1),), CUDA_HOME=home, CXX=cxx)
    assert facts["devices"]["cpu"] == "compiled kernels"
    (warning,) = facts["warnings"]
    assert "error : out of luck" in warning
    assert "NVRTC is out of luck" in warning


def test_without_a_cpp_compiler_torch_serves_with_one_warning_that_names_both_devices(importer):
    facts = importer(SEES, cuda=True, CXX="/nowhere/c++")
    (warning,) = facts["warnings"]
    for expected in ("CPU tensors", "CUDA tensors", "no C++ compiler", "/nowhere/c++"):
        assert expected in warning or torch.version.cuda is None
    assert facts["stderr"] == ""
    assert not importer.cache.exists()
