"""The first import: really compiled, really broken, in processes of their own.

Most scenarios hide nvcc, since it takes most of the time and they are not about it.
"""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tsm_jit import _loader, _toolchain

ROOT = Path(_loader.__file__).resolve().parent.parent
WITHOUT_NVCC = Path(__file__).parent / "without_nvcc"
# What every scenario must still compute, whatever serves it, and what it says of itself.
SCRIPT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tsm_jit
import torch
x = torch.arange(4 * 2 * 3.0).view(4, 2, 3)
y = tsm_jit.shift_groups(x, 4, [(1, 1), (1, -1)], padding="circular")
assert torch.equal(y[:, 0], x[:, 0].roll(-1, 0)) and torch.equal(y[:, 1], x[:, 1].roll(1, 0))
assert tsm_jit.shift_groups(x, 4, [(1, 1), (1, -1)], padding="circular", inplace=True) is x and torch.equal(x, y)
assert "torch.utils.cpp_extension" not in sys.modules, "slow to import, and of no use when warm"
assert not torch.cuda.is_initialized(), "an import must not start CUDA: the process could not fork"
print(json.dumps({**tsm_jit.info(), "warnings": [str(w.message) for w in caught if "tsm_jit" in str(w.message)]}))
"""


def environment(cache: Path, cuda: bool = False, **changes) -> dict:
    """Ours with another cache, without nvcc unless ``cuda``; a value of None removes a variable."""
    path = [str(ROOT), *sys.path] if cuda else [str(WITHOUT_NVCC), str(ROOT), *sys.path]
    result = dict(os.environ, TSM_JIT_CACHE=str(cache), PYTHONPATH=os.pathsep.join(path))
    for name in ("TSM_JIT_REQUIRE", "TORCH_CUDA_ARCH_LIST"):
        result.pop(name, None)
    for name, value in changes.items():
        result.pop(name, None)
        if value is not None:
            result[name] = str(value)
    return result


def start(cache: Path, **changes) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
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


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """A cache that one import has filled, from which other scenarios start."""
    if _toolchain.find_cxx() is None:
        pytest.skip("needs a C++ compiler")
    cache = tmp_path_factory.mktemp("loader") / "cache"
    facts, err = import_it(cache)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert err.count("tsm_jit: compiling the CPU kernels") == 1
    assert err.count("tsm_jit: compiled in") == 1
    return cache


@pytest.fixture
def warm(built, tmp_path) -> Path:
    """A copy of that cache to spoil."""
    return Path(shutil.copytree(built, tmp_path / "cache", symlinks=True))


def test_cold_import_leaves_one_private_entry(built):
    (entry,) = entries(built)
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    assert sorted(path.name for path in entry.iterdir()) == [_loader.LOG, _loader.MANIFEST, _loader.LIBRARY]
    manifest = json.loads((entry / _loader.MANIFEST).read_text())
    assert manifest["sha256"] == hashlib.sha256((entry / _loader.LIBRARY).read_bytes()).hexdigest()
    assert not manifest["cuda"]


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
    assert {path: path.stat().st_mtime_ns for path in warm.rglob("*")} == before


def test_two_processes_import_a_cold_cache_at_once(tmp_path):
    """With everything that this machine can compile."""
    cache = tmp_path / "cache"
    processes = [start(cache, cuda=True) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert sum(err.count("tsm_jit: compiling") for _, err in results) == 1
    expected = "compiled kernels" if _toolchain.torch_has_cuda() and _toolchain.find_nvcc() else ""
    for facts, _ in results:
        assert facts["devices"]["cpu"] == "compiled kernels"
        assert facts["devices"]["cuda"].startswith(expected)
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "manifest", "no manifest"])
def test_damaged_entries_are_built_again(warm, damage):
    (entry,) = entries(warm)
    library, manifest = entry / _loader.LIBRARY, entry / _loader.MANIFEST
    data = bytearray(library.read_bytes())
    if damage == "truncated":
        library.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        library.write_bytes(data)
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "missing":
        library.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.unlink()
    facts, err = import_it(warm)
    assert err.count("tsm_jit: compiling") == 1
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert import_it(warm)[1] == ""


def test_without_a_cpp_compiler_everything_takes_plain_torch(tmp_path):
    cache = tmp_path / "cache"
    for _ in range(2):  # told at every import, tried once
        facts, err = import_it(cache, CXX="/nowhere/c++")
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
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\necho "error: the sky is falling" >&2\nexit 1\n')
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    facts, err = import_it(cache, CXX=compiler)
    assert "compiling" in err
    assert len(facts["warnings"]) == 1
    facts, err = import_it(cache, CXX=compiler)
    assert "compiling" not in err
    assert facts["devices"]["cpu"].startswith("plain torch")
    assert len(facts["warnings"]) == 1


def test_without_nvcc_only_the_cpu_part_is_there(built):
    """And no word is said of CUDA on a machine without a GPU."""
    facts, _ = import_it(built)
    if torch.version.cuda is None:
        assert facts["devices"]["cuda"] == "this torch has no CUDA"
    else:
        assert facts["devices"]["cuda"].startswith("plain torch")
        assert "nvcc was not found" in facts["devices"]["cuda"]
        assert bool(facts["warnings"]) == _toolchain.gpu_is_visible()


def test_an_nvcc_that_fails_leaves_the_cpu_part(tmp_path):
    if torch.version.cuda is None:
        pytest.skip("needs a torch with CUDA")
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "nvcc fatal error: out of luck" >&2\nexit 1\n')
    nvcc.chmod(0o755)
    cache = tmp_path / "cache"
    facts, err = import_it(cache, cuda=True, CUDA_HOME=home)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["devices"]["cuda"].startswith("plain torch: BuildError")
    assert "out of luck" in facts["devices"]["cuda"]
    facts, err = import_it(cache, cuda=True, CUDA_HOME=home)
    assert err.count("compiling") == 0


def test_a_wrapper_script_for_nvcc_is_seen_through(tmp_path):
    nvcc = _toolchain.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    root = _toolchain.toolkit_root(nvcc)
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{nvcc.resolve()}" "$@"\n')
    wrapper.chmod(0o755)
    assert _toolchain.toolkit_root(wrapper) == root
    assert (root / "include" / "cuda_runtime.h").is_file()
    assert _toolchain.PORTABLE_ARCHITECTURE in _toolchain.nvcc_architectures(wrapper)


def test_the_key_follows_sources_flags_and_tools(tmp_path, monkeypatch):
    key = _loader.Recipe.here().key
    assert _loader.Recipe.here().key == key
    kernels = Path(shutil.copytree(_loader.kernel_folder(), tmp_path / "kernels"))
    with monkeypatch.context() as m:
        m.setattr(_loader, "kernel_folder", lambda: kernels)
        assert _loader.Recipe.here().key == key
        source = kernels / "temporal_shift.h"
        date = source.stat().st_mtime_ns
        source.write_text(source.read_text() + "\n")
        os.utime(source, ns=(date, date))  # edited, yet no younger
        assert _loader.Recipe.here().key != key
    with monkeypatch.context() as m:
        m.setattr(torch, "__version__", "99.0")
        assert _loader.Recipe.here().key != key
    with monkeypatch.context() as m:
        m.setattr(_loader, "_CFLAGS", ("-O1",))
        assert _loader.Recipe.here().key != key
    with monkeypatch.context() as m:
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        m.setenv("CXX", str(compiler))
        assert _loader.Recipe.here().key != key
    if torch.version.cuda is not None and _toolchain.find_nvcc() is not None:
        with monkeypatch.context() as m:
            m.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
            assert _loader.Recipe.here().key != key


def test_a_cache_that_others_could_write_is_refused(warm):
    warm.chmod(0o777)
    facts, _ = import_it(warm)
    assert "can be written by others" in facts["devices"]["cpu"]
    assert str(warm) in facts["warnings"][0]
    warm.chmod(0o700)
    (entry,) = entries(warm)
    entry.chmod(0o770)
    assert "can be written by others" in import_it(warm)[0]["devices"]["cpu"]


def test_a_cache_of_another_user_is_refused(warm):
    if os.geteuid() != 0:
        pytest.skip("needs root to give a folder away")
    os.chown(warm, 12345, -1)
    assert "belongs to user 12345" in import_it(warm)[0]["devices"]["cpu"]


def test_a_link_in_place_of_an_entry_is_refused(warm, tmp_path):
    (entry,) = entries(warm)
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    assert "or a link to one" in import_it(warm)[0]["devices"]["cpu"]


def test_what_a_killed_build_leaves_does_not_hold_up_the_next(tmp_path):
    cache = tmp_path / "cache"
    process = start(cache)
    deadline = time.monotonic() + 60
    while not (cache.is_dir() and any(cache.glob("tmp-*/build.ninja"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    facts, err = import_it(cache)
    assert err.count("tsm_jit: compiling") == 1
    assert facts["devices"]["cpu"] == "compiled kernels"


def test_the_second_of_two_publishers_takes_the_first_ones_entry(warm, tmp_path):
    (entry,) = entries(warm)
    manifest = json.loads((entry / _loader.MANIFEST).read_text())
    late = Path(shutil.copytree(entry, warm / "tmp-late"))
    (late / "late").touch()
    assert _loader._publish(late, entry) == manifest
    assert not (entry / "late").exists()


@pytest.mark.parametrize("required", ["1", "cpu"])
def test_required_kernels_that_are_missing_are_an_error(tmp_path, required):
    process = start(tmp_path / "cache", CXX="/nowhere/c++", TSM_JIT_REQUIRE=required)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"ImportError: TSM_JIT_REQUIRE={required}, but cpu tensors would take plain torch" in err


def test_required_kernels_that_are_there(built):
    facts, _ = import_it(built, TSM_JIT_REQUIRE="cpu")
    assert facts["devices"]["cpu"] == "compiled kernels"
    process = start(built, TSM_JIT_REQUIRE="gpu")
    assert "TSM_JIT_REQUIRE must be 1, cpu or cuda, got 'gpu'" in process.communicate(timeout=300)[1]


def test_the_users_environment_is_left_alone(tmp_path):
    script = "import os; before = dict(os.environ); import tsm_jit; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", script], env=environment(tmp_path / "cache"), check=True, timeout=300)


def test_cold_import_with_spaces_and_umlauts_in_every_path(tmp_path):
    """Of the cache and of the sources; and with ninja and the interpreter's folder off the path."""
    home = tmp_path / "Übung mit Raum"
    home.mkdir()
    shutil.copytree(ROOT / "tsm_jit", home / "tsm_jit", ignore=shutil.ignore_patterns("__pycache__"))
    if not (home / "tsm_jit" / "kernels").exists():
        shutil.copytree(_loader.kernel_folder(), home / "tsm_jit" / "kernels")
    tools = {_toolchain.find_cxx(), _toolchain.find_nvcc()} - {None}
    path = os.pathsep.join([*{str(tool.parent) for tool in tools}, "/usr/bin", "/bin"])
    facts, _ = import_it(
        home / "cache", PYTHONPATH=os.pathsep.join([str(home), *sys.path]), PATH=path, PYTHONIOENCODING="utf-8"
    )
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["tools"]["nvcc"] is None or facts["devices"]["cuda"].startswith("compiled kernels")


def test_command_line(warm):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "tsm_jit", *arguments]
        return subprocess.run(
            command, env=environment(warm), cwd=warm.parent, capture_output=True, text=True, timeout=300
        )

    (entry,) = entries(warm)
    shown = run("info")
    assert shown.returncode == 0
    assert "compiled kernels" in shown.stdout
    assert entry.name in shown.stdout
    facts = json.loads(run("info", "--json").stdout)
    assert facts["cache"]["folder"] == str(warm)
    assert facts["cache"]["bytes"] > 0
    assert facts["versions"]["torch"] == torch.__version__
    (warm / "not ours").mkdir()
    (warm / "not ours" / _loader.MANIFEST).write_text("{}")
    (warm / ("tmp-" + "0" * 32)).mkdir()  # what another process is building
    os.utime(Path(shutil.copytree(entry, warm / ("tmp-" + "1" * 32))), (0, 0))  # what a killed one left
    cleaned = run("clean")
    assert cleaned.returncode == 0
    assert "compiling" not in cleaned.stderr
    assert sorted(path.name for path in entries(warm)) == ["not ours", "tmp-" + "0" * 32]
    assert run("--help").returncode == 0
    assert run().returncode == 2
