"""``python -m tsm_jit info``, ``build`` and ``--help``; test_jit_cache.py tests ``clean``."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tsm_jit._jit import spec

COMMAND = ("-m", "tsm_jit")


def test_info_shows_devices_and_the_command_lines_that_were_run_as_text_and_as_json(built, importer):
    text, as_json = (importer.command("info", *json, TSM_JIT_CACHE=built.parent) for json in ([], ["--json"]))
    assert text.stderr == as_json.stderr == ""
    facts = json.loads(as_json.stdout)
    assert facts["devices"]["cpu"] == "compiled kernels"
    assert facts["cache"]["entry"] == built.name
    assert any("bindings/shift.cpp" in command for command in facts["cache"]["commands"])
    lines = text.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == list(facts)
    assert {f"    {command}" for command in facts["cache"]["commands"]} <= set(lines)


@pytest.mark.parametrize("command", ["info", "info --json"])
@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_reader_that_stops_early_causes_no_traceback(command, buffering):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as output:
        done = subprocess.run(
            [sys.executable, *COMMAND, *command.split()],
            env=os.environ | {"PYTHONUNBUFFERED": buffering},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_info_of_an_empty_cache_compiles_nothing_and_reports_that_the_next_import_will(importer, cxx):
    done = importer.command("info", "--json", cuda=True, CXX=cxx, CUDA_HOME=importer.toolkit())
    facts = json.loads(done.stdout)
    assert all("next import" in device for device in facts["devices"].values())
    assert facts["tools"]["nvcc"].startswith(str(importer.folder))
    assert not importer.cache.exists()


def test_a_broken_torch_is_reported_without_a_traceback(importer):
    (importer.folder / "torch.py").write_text("raise OSError('libtorch_cpu.so: too short')")
    done = importer.run(*COMMAND, "info", path=(importer.folder,))
    assert done.returncode == 1
    assert "OSError: libtorch_cpu.so: too short" in done.stderr
    assert str(importer.folder / "torch.py") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["--help", "build --help", "clean --older-than -1"])
def test_help_and_wrong_options_compile_nothing(importer, arguments):
    done = importer.command(*arguments.split())
    assert done.returncode == (2 if "-1" in arguments else 0)
    assert "usage: python -m tsm_jit" in done.stdout + done.stderr
    assert not importer.cache.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench --shape 1,2", "--shape 1,2: a shape must be"),
        ("bench --report none.json", "--report none.json: not the JSON of a full run"),
        ("demo --video none.mp4", "none.mp4 does not exist"),
    ],
)
def test_a_wrong_argument_is_reported_before_anything_is_compiled(importer, arguments, message):
    for package in ("av", "matplotlib", "torchvision", "tqdm"):
        pytest.importorskip(package, reason="needs the demo extra")
    done = importer.command(*arguments.split())
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert not importer.cache.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_what_root_builds_for_an_image_serves_every_user_with_any_compilers_before_all_else(importer, shared, cxx):
    if any(not parent.stat().st_mode & stat.S_IXOTH for parent in Path(spec.__file__).parents):
        pytest.skip("tsm_jit lies in a folder that only its owner can read")
    importer.cache = shared / "new" / "cache"
    done = importer.command("build", cuda=True, CUDA_HOME=importer.toolkit(), CXX=cxx)
    (entry,) = importer.entries()
    assert str(entry) in done.stdout
    assert {stat.S_IMODE(path.stat().st_mode) for path in (entry, importer.cache)} == {0o755}
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {0o644}
    others = {"CXX": "/nowhere/c++", "CUDA_HOME": "/nowhere", "TORCH_CUDA_ARCH_LIST": "9.0", "NVCC_APPEND_FLAGS": "-G"}
    for before in ("import grp, pwd, shlex; os.setuid(12345)", ""):  # Python may lie where only root can read
        facts = importer(before, cuda=True, **others)
        assert facts["devices"]["cuda"] == "compiled kernels (sm_75, sm_80, sm_90, PTX 75)"
        assert facts["cache"]["entry"] == entry.name
        assert facts["stderr"] == ""
        assert facts["warnings"] == []


@pytest.mark.parametrize(
    ("compiler", "options", "expected"),
    [
        ("/nowhere/c++", "", "no C++ compiler"),
        ("/bin/false", "", "compiler failed"),
        (None, "--arch banana", "'banana'"),
    ],
)
def test_a_build_that_fails_is_reported_without_a_traceback_and_records_nothing(
    importer, cxx, compiler, options, expected
):
    variables = {"CXX": compiler or cxx, "CUDA_HOME": importer.toolkit()}
    done = importer.command("build", *options.split(), cuda=compiler is None, **variables)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(importer.cache.glob("*/manifest.json"))
