"""Every example runs."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from support import EXAMPLES

import tsm_jit

# These train for minutes, need arguments or are modules of the others. They have their own tests.
TESTED_ELSEWHERE = (
    *("arrow_of_time", "camera", "finetune", "long_clips"),
    *("mmaction2_config", "moving_shapes", "networks", "training", "videos"),
)
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in TESTED_ELSEWHERE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example(script, monkeypatch):
    """In this process, with a small network in place of a ResNet-50."""
    ended: list[int] = []
    monkeypatch.setattr(torchvision.models, "resnet50", torchvision.models.resnet18)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # restored if the example changes it
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(sys, "exit", ended.append)
    runpy.run_path(str(script), run_name="__main__")
    assert not any(ended)  # codes


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example_as_it_is(script):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(tsm_jit.__file__).parent.parent), *sys.path]))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
