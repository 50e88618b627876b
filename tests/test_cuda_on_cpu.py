"""The CUDA kernels without a GPU: compiled as C++, run thread by thread under sanitizers, against the CPU kernels."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def compare(folder: Path, kernels: str, cases: int, **constants: int) -> None:
    """Runs the program ``tests/cuda_on_cpu/{kernels}.cpp`` with these constants of the CUDA kernels replaced."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    header, source = ((ROOT / f"kernels/{kernels}.{end}").read_text() for end in ("cuh", "cu"))
    for name, value in constants.items():
        definition = rf"(constexpr \w+ {name} =)[^;]+;"
        (header, in_header), (source, in_source) = (
            re.subn(definition, rf"\1 {value};", text) for text in (header, source)
        )
        assert in_header + in_source == 1
    (folder / f"{kernels}.cuh").write_text(header)
    (folder / "kernels.cpp").write_text(source)
    # Without contraction the same formula makes the same numbers in both kernels.
    options = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    options += ["-g1", "-Wno-unknown-pragmas", "-Wno-attributes"]
    folders = [f"-I{ROOT / folder}" for folder in ("tests/cuda_on_cpu", "kernels")]
    files = [folder / "kernels.cpp", *(ROOT / f"{where}/{kernels}.cpp" for where in ("tests/cuda_on_cpu", "kernels"))]
    subprocess.run(["g++", *options, *folders, *files, "-o", folder / "compare"], check=True)
    seed = str(random.SystemRandom().randrange(2**32))
    run = subprocess.run([folder / "compare", seed, str(cases)], capture_output=True, text=True)
    assert run.returncode == 0, f"seed {seed}\n{run.stdout}{run.stderr[-3000:]}"


# What only absurd sizes exceed: bytes of a frame in one launch, clips or blocks of frames in one.
@pytest.mark.parametrize(
    ("max_bytes", "max_grid"), [(2**30, 65535), (640, 2)], ids=["as it is", "one launch takes little"]
)
def test_the_cuda_kernels_compute_what_the_cpu_kernels_do(tmp_path, max_bytes, max_grid):
    compare(tmp_path, "temporal_shift", 800, kMaxBytes=max_bytes, kMaxGrid=max_grid)


def test_the_end_of_a_residual_block_is_the_same_on_cuda(tmp_path):
    compare(tmp_path, "norm_add_relu", 200, kResidualThreads=64)
