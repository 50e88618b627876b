"""The rows of the benchmark's tables."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


class Mismatch(RuntimeError):
    """An implementation computes other values than the reference."""


def mebibytes(count: int | None) -> float | None:
    """Converts bytes to MiB. None means unknown."""
    return None if count is None else count / 2**20
