"""The benchmark: ``python -m tsm_jit bench``. :mod:`tsm_jit.bench.run` runs it."""
