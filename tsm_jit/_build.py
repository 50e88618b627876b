"""Run as a script in a process of its own: compiles what the JSON on standard input says.

A process of its own, because torch takes the toolkit and ninja from the environment, which in the user's process is not
ours to change, and because a compiler that hangs can be stopped with everything it started.
"""

import json
import sys


def main() -> None:
    job = json.load(sys.stdin)
    sys.path[:] = job.pop("sys_path")
    from torch.utils.cpp_extension import load

    load(**job, is_python_module=False, verbose=False)


if __name__ == "__main__":
    main()
