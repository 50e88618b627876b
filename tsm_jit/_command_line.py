"""Whether this process is ``python -m tsm_jit`` or ``tsm-jit``; and what that says where torch cannot be imported.

The first module that is imported: what stops all others is to be told, not shown as a traceback.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys


def is_command_line() -> bool:
    """Its commands load what they need: clean must not compile what it removes, info tells what stops an import."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # until Python has found the module, whose name comes before its arguments
        return re.fullmatch(r"(-\w*m)?tsm_jit", sys.orig_argv[-len(sys.argv)]) is not None
    return os.path.basename(program) == "tsm-jit"


def _without_torch(error: Exception) -> str:
    spec = importlib.util.find_spec("torch")
    facts = {
        "error": f"tsm_jit needs torch, which cannot be imported: {type(error).__name__}: {error}",
        "torch": spec.origin if spec else "not installed: pip install torch",
        "python": f"{platform.python_version()} ({sys.executable})",
        "path": os.pathsep.join(sys.path),
    }
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return facts["error"]
    return "\n".join(f"{name:<6} {value}" for name, value in facts.items())


if is_command_line():
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken library raises whatever it likes
        sys.exit(_without_torch(error))
