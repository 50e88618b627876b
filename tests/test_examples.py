"""Every example runs as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tsm_jit

ROOT = Path(__file__).resolve().parent.parent


# Those that train for minutes have files of tests of their own.
TRAINING = {"arrow_of_time.py", "long_clips.py"}
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name not in TRAINING)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example(script):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(tsm_jit.__file__).parent.parent), *sys.path]))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
