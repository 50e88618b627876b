"""Every example runs as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import EXAMPLES

import tsm_jit

# These train for minutes, need arguments or are modules of the others. They have their own tests.
TESTED_ELSEWHERE = (
    *("arrow_of_time", "camera", "finetune", "long_clips"),
    *("mmaction2_config", "moving_shapes", "networks", "training", "videos"),
)
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem not in TESTED_ELSEWHERE)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example(script):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(tsm_jit.__file__).parent.parent), *sys.path]))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
