"""The CUDA kernels without a GPU: compiled as C++, run thread by thread under sanitizers, against the CPU kernels."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = "kernel<<<grid, block, shared, stream_>>>(a);"
# What only absurd sizes exceed: of a frame in one launch, of clips or of blocks of frames in one.
MAX_BYTES, MAX_GRID = "kMaxBytes = int64_t{1} << 30", "kMaxGrid = 65535"


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("max_bytes", "max_grid"), [(2**30, 65535), (640, 2)], ids=["as it is", "one launch takes little"]
)
def test_the_cuda_kernels_compute_what_the_cpu_kernels_do(tmp_path, max_bytes, max_grid):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    header, source = ((ROOT / f"kernels/temporal_shift.{end}").read_text() for end in ("cuh", "cu"))
    (tmp_path / "temporal_shift.cuh").write_text(replaced(header, MAX_BYTES, f"kMaxBytes = {max_bytes}"))
    source = replaced(source, LAUNCH, "cuda_on_cpu::launch(kernel, grid, block, shared, a);")
    (tmp_path / "kernels.cpp").write_text(replaced(source, MAX_GRID, f"kMaxGrid = {max_grid}"))
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    warnings = ["-Wno-unknown-pragmas", "-Wno-attributes"]
    folders = [f"-I{ROOT / folder}" for folder in ("tests/cuda_on_cpu", "kernels")]
    files = [tmp_path / "kernels.cpp", ROOT / "tests/cuda_on_cpu/compare.cpp", ROOT / "kernels/temporal_shift.cpp"]
    program = tmp_path / "compare"
    subprocess.run(["g++", "-std=c++17", *sanitizers, *warnings, *folders, *files, "-o", program], check=True)
    seed = str(random.SystemRandom().randrange(2**32))
    run = subprocess.run([program, seed, "800"], capture_output=True, text=True)
    assert run.returncode == 0, f"seed {seed}\n{run.stdout}{run.stderr[-3000:]}"
