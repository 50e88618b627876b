"""``python -m tsm_jit``: see :mod:`tsm_jit.cli`."""

from tsm_jit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
