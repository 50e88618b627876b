"""The CUDA kernels without a GPU: run on the CPU under sanitizers, and compared with the CPU and the naive kernels."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_SOURCES = {
    "temporal_shift": ["shift/temporal_shift.cpp"],
    "edges": ["shift/temporal_shift.cpp"],
    "residual": [f"residual/{name}.cpp" for name in ("add_relu_backward", "norm_add_relu", "norm_relu_max_pool")],
}


def compare(folder: Path, name: str, cuda_source: str, cases: int, **constants: int) -> None:
    """Runs the program ``tests/kernels/cuda_on_cpu/{name}.cpp`` with these constants of the CUDA kernels replaced."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    kernels = Path(shutil.copytree(ROOT / "kernels", folder / "kernels"))
    for constant, value in constants.items():
        replaced = 0
        for path in kernels.rglob("*.cu*"):
            text, count = re.subn(rf"(constexpr \w+ {constant} =)[^;]+;", rf"\1 {value};", path.read_text())
            path.write_text(text)
            replaced += count
        assert replaced == 1
    cuda = folder / "cuda_source.cpp"
    shutil.copyfile(kernels / cuda_source, cuda)
    # Without contraction the same formula computes the same numbers in all kernels.
    options = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    options += ["-g1", "-Wno-unknown-pragmas", "-Wno-attributes"]
    folders = [f"-I{ROOT / 'tests/kernels/cuda_on_cpu'}", f"-I{kernels}"]  # the first has another core/launch.h
    files = [cuda, ROOT / f"tests/kernels/cuda_on_cpu/{name}.cpp", *(kernels / source for source in CPU_SOURCES[name])]
    subprocess.run(["g++", *options, *folders, *files, "-o", folder / "compare"], check=True)
    seed = str(random.SystemRandom().randrange(2**32))
    run = subprocess.run([folder / "compare", seed, str(cases)], capture_output=True, text=True)
    assert run.returncode == 0, f"seed {seed}\n{run.stdout}{run.stderr[-3000:]}"


# The second case launches in parts, as only huge sizes do: bytes of a frame, clips, blocks of frames.
@pytest.mark.parametrize(("max_bytes", "max_grid"), [(2**30, 65535), (640, 2)], ids=["one launch", "many launches"])
def test_the_shift_kernels_agree(tmp_path, max_bytes, max_grid):
    source = "shift/temporal_shift.cu"
    compare(tmp_path, "temporal_shift", source, 800, kMaxBytes=max_bytes, kMaxGrid=max_grid)


# The second case needs several launches.
@pytest.mark.parametrize(("parts", "blocks"), [(16, 128), (2, 6)])
def test_edges_arrive(tmp_path, parts, blocks):
    compare(tmp_path, "edges", "shift/temporal_shift.cu", 150, kMaxEdgeParts=parts, kMaxEdgeBlocks=blocks)


def test_the_residual_kernels_agree(tmp_path):
    compare(tmp_path, "residual", "residual/residual.cu", 200, kResidualThreads=64)
