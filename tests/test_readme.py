"""The README's Python runs as written, and its plain-torch equivalent is one."""

import re
from pathlib import Path

import torch
from support import assert_same_bits

import tsm_jit

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


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
