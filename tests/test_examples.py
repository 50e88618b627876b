"""Every example runs as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tsm_jit

ROOT = Path(__file__).resolve().parent.parent


# The one that trains for minutes has a file of tests of its own.
SCRIPTS = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "arrow_of_time.py"})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_example(script):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(tsm_jit.__file__).parent.parent), *sys.path]))
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
