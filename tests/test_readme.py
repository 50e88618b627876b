"""The README's Python runs as written, its plain-torch equivalent is one, its table of features is what tests show."""

import json
import re
from pathlib import Path

import pytest
import torch
from support import assert_same_bits

import tsm_jit
from tsm_jit.bench import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_block_runs_after_the_ones_before():
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    assert names["net"].layer1[0].conv1.n_segment == 8


def test_equivalent_to():
    (block,) = [block for block in BLOCKS if "zeros_like" in block]
    x = torch.randn(2 * 8, 64, 56, 56)
    names = {"torch": torch, "x": x}
    exec(block, names)
    assert_same_bits(names["y"].flatten(0, 1), tsm_jit.temporal_shift(x, 8))


def test_the_numbers_are_those_of_the_committed_runs():
    """What stands between two comments is what the command that the first one names prints."""
    sections = re.findall(r"<!-- python -m tsm_jit (.*?) -->\n\n(.*?)\n<!-- end -->", README, re.DOTALL)
    paths = [command.split()[-1] for command, _ in sections]
    assert paths == ["examples/results/h100/network.json", "examples/results/h100/bench.json"]
    for path, (_, section) in zip(paths, sections, strict=True):
        assert report.markdown(json.loads((ROOT / path).read_text())) == section


def test_the_tables_of_features_are_what_the_tests_show(request):
    """Every cell that says something has a test, and every feature that a test shows has its cell."""
    if not {path.name for path in Path(__file__).parent.glob("test_*.py")} <= request.config.collected:
        pytest.skip("needs the whole suite collected")
    cells = {}
    for heads in ("CPU | CUDA | compiled", "convert | in place | checkpoint keys | compiled | ONNX | online"):
        table = re.search(rf"^\| \| {re.escape(heads)} \|\n\|.*\n((?:\|.*\n)+)", README, re.MULTILINE)
        for line in table[1].splitlines():
            name, *says = line.strip("| ").split(" | ")
            texts = zip(heads.split(" | "), says, strict=True)
            cells |= {(name, column): {text} for column, text in texts if text != "n/a"}
    assert cells == request.config.features
