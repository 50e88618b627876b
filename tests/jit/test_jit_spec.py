"""The cache key, the search for tools, and the choice of GPU architectures."""

import importlib.util
import itertools
import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tsm_jit import _jit
from tsm_jit._jit import architectures, build, cache, spec, tools

KNOWN = ["75", "80", "86", "89", "90", "100", "120"]
VARIABLES = [
    "TSM_JIT_CACHE",
    "XDG_CACHE_HOME",
    "TSM_JIT_NVRTC",
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "TORCH_CUDA_ARCH_LIST",
]
VARIABLES += spec.VARIABLES


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_every_field_and_backend_changes_the_key():
    here = spec.here("nvcc")
    keys = {spec.here(backend).key for backend in spec.BACKENDS}
    for field in fields(here):
        value = getattr(here, field.name)
        others = {str: lambda: value + "x", tuple: lambda: (*value, "x"), dict: lambda: {**value, "x": "y"}}
        keys.add(replace(here, **{field.name: others.get(type(value), lambda: not value)()}).key)
    assert len(keys) == len(spec.BACKENDS) + len(fields(here))


def test_every_file_that_is_compiled_or_builds_is_in_the_key(tmp_path, monkeypatch):
    package, kernels = tmp_path / "tsm_jit" / "_jit", tmp_path / "tsm_jit" / "kernels"
    shutil.copytree(Path(spec.__file__).parent, package)
    shutil.copytree(spec.kernel_folder(), kernels)

    def key() -> str:
        module_spec = importlib.util.spec_from_file_location("copied", package / "spec.py")
        copied = importlib.util.module_from_spec(module_spec)
        monkeypatch.setitem(sys.modules, "copied", copied)
        module_spec.loader.exec_module(copied)
        return copied.here("nvrtc").part(0)

    before = key()
    assert before == spec.here("nvrtc").part(0), "the place of the files does not matter"
    builders = [package / f"{name}.py" for name in ("worker", "nvrtc", "architectures")]
    for path in (*builders, *(path for path in kernels.rglob("*") if path.is_file() and path.suffix != ".md")):
        text = path.read_text()
        path.write_text(text + "\n")
        assert key() != before, path
        path.write_text(text)


def test_tools_and_gpus_change_their_part_of_the_key_alone(importer, monkeypatch):
    home = importer.toolkit()
    monkeypatch.setenv("CUDA_HOME", str(home))
    before = spec.here("nvcc")

    def changed() -> list[int]:
        return [part for part in range(3) if spec.here("nvcc").part(part) != before.part(part)]

    of_tools = [(name, "-G") for name in spec.VARIABLES] + [("CXX", "c++ -O1"), ("CXX", "/bin/false")]
    for name, value in [("TORCH_CUDA_ARCH_LIST", "8.0"), *of_tools]:
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert changed() == ([2] if (name, value) in of_tools else [1]), name
    with monkeypatch.context() as context:
        context.setattr(tools, "gpu_models", lambda: ["a GPU of next year"])
        assert changed() == [1]
    os.utime(home / "bin" / "nvcc", (0, 0))
    assert changed() == [2]


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_counts_as_unset(monkeypatch, name):
    def seen() -> list:
        return [cache.cache_folder(), _jit.backends(), tools.find_cxx(), tools.find_nvcc(), spec.here("nvcc")]

    before = seen()
    for value in ("", " "):
        monkeypatch.setenv(name, value)
        assert seen() == before


def test_a_variable_passes_nvcc_over(monkeypatch):
    before = _jit.backends()
    monkeypatch.setenv("TSM_JIT_NVRTC", "0")
    assert _jit.backends() == before
    monkeypatch.setenv("TSM_JIT_NVRTC", "1")
    assert "nvcc" not in _jit.backends()


@pytest.mark.parametrize("folder", ["~", "home"])
def test_paths_in_variables_are_made_absolute_and_the_home_folder_is_found(importer, monkeypatch, folder):
    home = importer.folder / "home"
    tool_paths = {"CXX": importer.script("home/x/c++", ""), "CUDA_PATH": importer.script("home/x/bin/nvcc", "")}
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(importer.folder)
    for name in ("XDG_CACHE_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, f"{folder}/x")
    monkeypatch.setenv("CXX", f"{folder}/x/c++")
    assert tools.find_cxx() == [str(tool_paths["CXX"])]
    assert tools.find_nvcc() == tool_paths["CUDA_PATH"]
    assert cache.cache_folder() == home / "x" / "tsm_jit"
    monkeypatch.setenv("TSM_JIT_CACHE", f"{folder}/y")
    assert cache.cache_folder() == home / "y"


def test_nvcc_is_looked_for_in_order(importer, monkeypatch):
    """CUDA_HOME, CUDA_PATH, PATH, the usual folder, pip's packages."""
    paths = [importer.script(f"{name}/nvcc", "") for name in ("home/bin", "cuda/bin", "on", "pip/nvidia/cu13/bin")]
    monkeypatch.chdir(importer.folder)
    for name, value in {"CUDA_HOME": "home", "CUDA_PATH": "cuda", "PATH": "on"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", ["pip"])
    usual = Path("/usr/local/cuda/bin/nvcc")
    is_file = Path.is_file
    for path in [*paths[:3], *([usual] if usual.exists() else []), paths[3]]:
        assert tools.find_nvcc().absolute() == path
        if path == usual:
            monkeypatch.setattr(Path, "is_file", lambda path: path != usual and is_file(path))
        else:
            path.unlink()
    assert "CUDA_HOME" in build.missing_tool("nvcc")


def test_ninja_is_found_on_the_path_and_in_an_environment_that_is_not_activated(importer, monkeypatch):
    ninja = importer.script("bin/ninja", "")
    monkeypatch.chdir(importer.folder)
    monkeypatch.setenv("PATH", "bin")
    assert tools.find_ninja() == str(ninja), "absolute, as the worker runs in another folder"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", str(ninja.with_name("python")))
    assert tools.find_ninja() == str(ninja)


def test_cxx_may_have_a_quoted_path_and_options_and_a_wrong_one_is_shown_with_the_remedy(importer, monkeypatch):
    compiler = importer.script("with space/c++", "")
    monkeypatch.setenv("CXX", f"'{compiler}' -O1 -g")
    assert tools.find_cxx() == [str(compiler), "-O1", "-g"]
    for wrong in ("'g++", "/nowhere/c++"):
        monkeypatch.setenv("CXX", wrong)
        assert "set CXX" in build.missing_tool("cpu")
        assert wrong in build.missing_tool("cpu")


# Requested architectures; GPUs here, or "any" for a portable build; compiled architectures; skipped ones.
CHOICES = """
native                  | 90    | sm_90 compute_80                                   |
native                  | 80 86 | sm_80 sm_86 compute_80                             |
native                  | 75 90 | sm_75 sm_90 compute_75                             |
native                  |       | compute_75                                         |
native                  | 61    | compute_75                                         |
native                  | 61 90 | sm_90 compute_75                                   |
all                     | any   | sm_75 sm_80 sm_90 sm_100 sm_120 compute_75         |
9.0                     |       | sm_90 compute_80                                   |
9.0                     | 75    | sm_90 compute_75                                   |
9.0                     | any   | sm_90 compute_75                                   |
8.0;9.0+PTX             |       | sm_80 sm_90 compute_80                             |
12.0, 8.0               |       | sm_80 sm_120 compute_80                            |
8.0 9.0a                |       | sm_80 sm_90a compute_80                            |
Hopper;Turing           |       | sm_75 sm_90 compute_75                             |
Ampere+PTX              |       | sm_80 sm_86 compute_80                             |
7.0 7.5 8.0 9.0+PTX x   |       | sm_75 sm_80 sm_90 compute_75                       | 7.0 x
"""


@pytest.mark.parametrize("line", CHOICES.strip().splitlines())
def test_compiled_and_skipped_architectures(line):
    requested, gpus, compiled, skipped = (part.split() for part in line.split("|"))
    portable = gpus == ["any"]
    chosen = architectures.choose(" ".join(requested), KNOWN, [] if portable else gpus, portable)
    assert chosen == (compiled, skipped)


@pytest.mark.parametrize("requested", ["banana", "3.5", "12", "sm_90", ";", "9.0+PTX+PTX"])
def test_a_list_without_a_known_architecture_is_an_error_that_shows_it(requested):
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST.* 9\.0.* got") as caught:
        architectures.choose(requested, KNOWN, ["90"], False)
    assert repr(requested) in str(caught.value)


def test_some_code_runs_on_every_gpu_that_is_here():
    for requested, gpu, other in itertools.product(("native", "all", "7.5", "9.0a"), (*KNOWN, "87", "103"), KNOWN):
        codes, _ = architectures.choose(requested, KNOWN, [gpu, other], False)
        ranges = [architectures.capabilities(code) for code in codes]
        assert any(first <= int(gpu) <= last for first, last in ranges), (requested, gpu, other)


@pytest.mark.parametrize(
    ("codes", "flags"),
    [
        ("sm_80 sm_90 compute_80", "80,code=[sm_80,sm_90,compute_80]"),
        ("sm_80 sm_90a compute_80", "80,code=[sm_80,compute_80] 90a,code=sm_90a"),
        ("sm_75 compute_75", "75,code=[compute_75] 75,code=sm_75"),
    ],
)
def test_machine_code_shares_the_intermediate_code_of_ptx_80(codes, flags):
    assert architectures.gencode(codes.split()) == [f"-gencode=arch=compute_{flag}" for flag in flags.split()]
