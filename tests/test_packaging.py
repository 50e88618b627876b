"""Wheel, sdist and editable install: each holds the kernel sources, finds them, and is the same to the cache."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tsm_jit

pytest.importorskip("hatchling", reason="builds without a network, with hatchling at hand")
pytest.importorskip("editables", reason="hatchling makes editable installs with it")

ROOT = Path(__file__).resolve().parent.parent
CPU_ALONE = Path(__file__).parent / "cpu_alone"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


SOURCES = files(ROOT / "kernels")


def run(*command, **arguments) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, **arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clean checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs a source checkout")
    folder = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "dist", "build", "*.png")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packaging") / "cache"


def test_the_wheel_is_pure_python_with_the_raw_kernels(wheel):
    assert wheel.name == f"tsm_jit-{tsm_jit.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"tsm_jit/kernels/{name}" for name in SOURCES} <= names
    assert "tsm_jit/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".o")) or name.startswith(("tests", "kernels"))]


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_install(kind, request, source, cache, tmp_path):
    """What a pure-Python wheel holds, unpacked where Python looks for packages: that is its installation."""
    if kind == "sdist":
        with tarfile.open(request.getfixturevalue("sdist")) as archive:
            archive.extractall(tmp_path, filter="data")
        unpacked = next(tmp_path.glob("tsm_jit-*"))
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, unpacked)
        package = next(tmp_path.glob("*.whl"))
    elif kind == "editable":
        hook = f"from hatchling.build import build_editable; print(build_editable({str(tmp_path)!r}))"
        package = tmp_path / run(sys.executable, "-c", hook, cwd=source).split()[-1]
    else:
        package = request.getfixturevalue("wheel")
    site = tmp_path / "site"
    zipfile.ZipFile(package).extractall(site)

    script = (
        # folders that the .pth file of an editable install adds come before installed packages
        f"import site, sys; before = set(sys.path); site.addsitedir({str(site)!r})\n"
        "sys.path.sort(key=lambda path: path in before)\n"
        "import json, tsm_jit, torch; from tsm_jit._jit import spec\n"
        "x = torch.arange(8.0).view(8, 1); y = tsm_jit.shift_groups(x, 8, [(1, 1)], padding='circular')\n"
        "assert torch.equal(y, x.roll(-1, 0))\n"
        "print(json.dumps([tsm_jit.__file__, str(spec.kernel_folder()), tsm_jit.info()]))"
    )
    elsewhere = [path for path in sys.path if path and not Path(path, "tsm_jit").is_dir()]
    variables = dict(
        os.environ, TSM_JIT_CACHE=str(cache), PYTHONPATH=os.pathsep.join([str(CPU_ALONE), str(site), *elsewhere])
    )
    package, kernels, info = json.loads(run(sys.executable, "-c", script, env=variables, cwd=tmp_path))
    home = source if kind == "editable" else site
    assert Path(package).resolve().is_relative_to(home.resolve())
    assert Path(kernels).resolve().is_relative_to(home.resolve())
    assert files(Path(kernels)) == SOURCES
    assert info["devices"]["cpu"] == "compiled kernels"
    # One entry for all three: the key depends on the sources, not on their folder.
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
