"""Detects the command line, and reports a failed import of torch there.

The package imports this module first. Without torch no other module can be imported, and the command line then prints
the reason instead of a traceback.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys


def is_command_line() -> bool:
    """Whether this process is ``python -m tsm_jit`` or ``tsm-jit``.

    The package then loads no kernels on import. ``clean`` must not compile the kernels that it removes, and ``info``
    must work if they cannot be loaded.
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python has not found the module yet; its name precedes its arguments
        return re.fullmatch(r"(-\w*m)?tsm_jit", sys.orig_argv[-len(sys.argv)]) is not None
    return os.path.basename(program) == "tsm-jit"


def _without_torch(error: Exception) -> str:
    spec = importlib.util.find_spec("torch")
    message = f"tsm_jit needs torch, which cannot be imported: {type(error).__name__}: {error}"
    facts = {
        "error": message,
        "torch": spec.origin if spec else "not installed: pip install torch",
        "python": f"{platform.python_version()} ({sys.executable})",
        "path": os.pathsep.join(sys.path),
    }
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return message
    return "\n".join(f"{name:<6} {value}" for name, value in facts.items())


if is_command_line():
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken installation may raise any exception
        sys.exit(_without_torch(error))
