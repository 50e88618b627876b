"""The import itself, in processes of their own."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SERVED = "compiled kernels"
THREADS = """
import threading
threads = [threading.Thread(target=__import__, args=("tsm_jit",)) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize(("count", "before"), [(8, ""), (1, THREADS)], ids=["processes", "threads"])
def test_eight_that_import_a_cold_cache_at_once_compile_it_once(importer, cxx, count, before):
    for process in [importer.begin(before, CXX=cxx) for _ in range(count)]:
        assert importer.finish(process)["devices"]["cpu"] == SERVED
    assert (importer.folder / "calls").read_text().count(" -shared ") == 1
    assert len(importer.entries()) == 1


@pytest.mark.slow
def test_killed_at_any_moment_the_next_import_is_right_and_waits_for_nothing(importer, cxx):
    """The importing process and the worker in turn."""
    began = time.monotonic()
    importer(CXX=cxx)
    span = time.monotonic() - began
    for turn in range(int(os.environ.get("TSM_JIT_TEST_KILLS", "5"))):
        shutil.rmtree(importer.cache)
        process = importer.begin(fresh=True, CXX=cxx)
        time.sleep(random.uniform(0.4, 1) * span)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for victim in (process.pid, *map(int, workers))[turn % 2 :][:1]:
            os.kill(victim, signal.SIGKILL)
        process.communicate()
        began = time.monotonic()
        facts = importer(CXX=cxx)
        assert time.monotonic() - began < 30 + 2 * span
        assert facts["devices"]["cpu"] == SERVED, turn
        assert "waiting" not in facts["stderr"]
        assert len(importer.entries()) == 1, "what was killed has left nothing"


def test_a_warm_import_writes_nothing_and_needs_no_tool_and_no_module_that_builds(importer, cxx):
    importer(cuda=True, CUDA_HOME=importer.toolkit(), CXX=cxx)
    next(importer.cache.glob("*.lock")).unlink()
    before = {path: path.stat().st_mtime_ns for path in (importer.cache, *importer.cache.rglob("*"))}
    facts = importer(PATH="/nowhere", CXX="/nowhere/c++")
    assert facts["devices"] == {"cpu": SERVED, "cuda": f"{SERVED} (PTX 75)"}
    assert facts["warnings"] == []
    assert facts["stderr"] == ""
    assert {path: path.stat().st_mtime_ns for path in (importer.cache, *importer.cache.rglob("*"))} == before
    unneeded = {"tsm_jit._jit.build", "tsm_jit._jit.worker", "torch.utils.cpp_extension", "filelock"}
    assert not unneeded & set(facts["modules"])


def test_an_import_that_compiles_changes_no_variable_and_starts_no_cuda(importer, cxx):
    """With warnings as errors, which must not stop the worker either."""
    facts = importer(CXX=cxx, CUDA_VISIBLE_DEVICES="0", CC="cc", NVCC_APPEND_FLAGS="", PYTHONWARNINGS="error")
    assert facts["devices"]["cpu"] == SERVED
    assert "compiling" in facts["stderr"]
    assert facts["same_variables"]
    assert not facts["started_cuda"]


def test_the_kernels_work_after_a_fork(built, importer):
    fork = "import tsm_jit\nif pid := os.fork(): os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    assert importer(fork, TSM_JIT_CACHE=built.parent)["devices"]["cpu"] == SERVED


WRITES = "sys.stderr = type('', (), {{'write': lambda self, text: {0}, 'flush': lambda self: {0}}})()"
STDERR = ["sys.stderr = None", "sys.stderr = open(os.devnull); sys.stderr.close()"]
STDERR += [WRITES.format("1 / 0"), WRITES.format("None")]


@pytest.mark.parametrize("options", [(), ("-W", "error")], ids=["", "warnings are errors"])
def test_a_warning_that_cannot_be_shown_decides_nothing(importer, options):
    for result in importer.forks(STDERR, *options, CXX="/nowhere/c++"):
        assert result.startswith("PyTorch fallback"), result


def test_what_a_system_lacks_decides_nothing(importer, cxx):
    lacks = ["waitid", "listxattr", "geteuid", "getuid", "killpg", "setsid", "getpgid", "sched_getaffinity"]
    facts = importer(f"sys.modules['fcntl'] = None; [os.__dict__.pop(name, None) for name in {lacks}]", CXX=cxx)
    assert facts["devices"]["cpu"] == SERVED


@pytest.mark.parametrize(("before", "reason"), [("sys.platform = 'win32'", "Windows"), ("sys.frozen = True", "Python")])
def test_where_nothing_can_be_built_torch_serves_with_one_warning_and_no_child_is_started(importer, before, reason):
    no_child = "import subprocess; subprocess.Popen, start = None, subprocess.Popen"
    facts = importer(f"{no_child}; {before}; import tsm_jit; subprocess.Popen = start")
    (warning,) = facts["warnings"]
    assert reason in warning
    assert facts["devices"]["cpu"].startswith("PyTorch fallback")
    assert not importer.cache.exists()


def test_kernels_that_are_required(built, importer):
    sees = "exists = os.path.exists; os.path.exists = lambda path: path == '/dev/nvidiactl' or exists(path); "
    empty = "os.environ['TSM_JIT_CACHE'] += '/other'; "
    expected = [
        *(("", value, SERVED) for value in ("", "0", "1", "cpu")),
        (sees, "1", "ImportError: TSM_JIT_REQUIRE=1, but cuda"),
        ("", "cuda", "ImportError: TSM_JIT_REQUIRE=cuda, but cuda"),
        *((empty, value, f"ImportError: TSM_JIT_REQUIRE={value}, but cpu") for value in ("1", "cpu")),
        ("", "gpu", "ValueError: TSM_JIT_REQUIRE must be 1, cpu or cuda, got 'gpu'"),
    ]
    befores = [f"{before}os.environ['TSM_JIT_REQUIRE'] = '{value}'" for before, value, _ in expected]
    for result, (_, value, text) in zip(
        importer.forks(befores, TSM_JIT_CACHE=built.parent, CXX="/x"), expected, strict=True
    ):
        assert result.startswith(text), value


@pytest.mark.parametrize(
    ("value", "architectures", "skipped"),
    [("", "PTX 75", []), ("7.0 7.5 8.0 9.0+PTX", "sm_75, sm_80, sm_90, PTX 75", ["7.0"])],
)
def test_architectures_that_the_compiler_does_not_know_are_skipped_with_one_warning(
    importer, cxx, value, architectures, skipped
):
    facts = importer(cuda=True, CUDA_HOME=importer.toolkit(), CXX=cxx, TORCH_CUDA_ARCH_LIST=value)
    assert facts["devices"]["cuda"] == f"{SERVED} ({architectures})"
    assert [all(word in warning for word in skipped) for warning in facts["warnings"]] == [True] * len(skipped)


@pytest.mark.parametrize("size", ["100k", "500k"])
def test_a_full_disk_leaves_no_entry_and_is_reported_and_with_more_space_kernels_are_built(importer, cxx, size):
    disk = importer.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "none", disk, "-o"]
    if subprocess.run([*mount, f"mode=700,size={size}"], capture_output=True).returncode:
        pytest.skip("needs the permission to mount")
    try:
        importer.cache = disk / "cache"
        (warning,) = importer(CXX=cxx)["warnings"]
        assert "No space left on device" in warning
        assert importer.entries() == []
        subprocess.run([*mount, "remount,size=9m"], check=True)
        assert importer(CXX=cxx)["devices"]["cpu"] == SERVED
    finally:
        subprocess.run(["umount", disk], check=True)
