"""The CUDA kernels without a GPU: compiled as C++, run thread by thread under sanitizers, against the CPU kernels."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = "kernel<<<grid, block, shared, stream_>>>(a);"


def test_the_cuda_kernels_compute_what_the_cpu_kernels_do(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source = (ROOT / "kernels/temporal_shift.cu").read_text()
    assert source.count(LAUNCH) == 1
    (tmp_path / "kernels.cpp").write_text(
        source.replace(LAUNCH, "cuda_on_cpu::launch(kernel, grid, block, shared, a);")
    )
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    warnings = ["-Wno-unknown-pragmas", "-Wno-attributes"]
    folders = [f"-I{ROOT / folder}" for folder in ("tests/cuda_on_cpu", "kernels")]
    files = [tmp_path / "kernels.cpp", ROOT / "tests/cuda_on_cpu/compare.cpp", ROOT / "kernels/temporal_shift.cpp"]
    program = tmp_path / "compare"
    subprocess.run(["g++", "-std=c++17", *sanitizers, *warnings, *folders, *files, "-o", program], check=True)
    seed = str(random.SystemRandom().randrange(2**32))
    run = subprocess.run([program, seed, "2000"], capture_output=True, text=True)
    assert run.returncode == 0, f"seed {seed}\n{run.stdout}{run.stderr[-3000:]}"
