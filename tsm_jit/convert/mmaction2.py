"""Replaces the shift of mmaction2 (https://github.com/open-mmlab/mmaction2) in all of its networks."""

from __future__ import annotations

import importlib
import sys

from tsm_jit.modules.mmaction2 import TemporalShift

_HOME = "mmaction.models.backbones.resnet_tsm"
_original: type | None = None  # mmaction2's class, after the first `apply`


def apply() -> None:
    """Makes networks that mmaction2 builds from now on use :class:`TemporalShift` of this package.

    The import of :mod:`tsm_jit.mmaction2` calls it. Call it again after :func:`restore`. It imports mmaction2's models.
    Without mmaction2 it does nothing. Networks that exist do not change.

    Raises:
        ImportError: mmaction2 is installed, but its models cannot be imported.

    Example::

        import tsm_jit.mmaction2

        tsm_jit.mmaction2.restore()
        tsm_jit.mmaction2.apply()
    """
    global _original
    try:
        home = importlib.import_module(_HOME)
    except ModuleNotFoundError as error:
        if error.name != "mmaction":
            raise
        return
    if home.TemporalShift is not TemporalShift:
        _original = home.TemporalShift
        _replace(_original, TemporalShift)


def restore() -> None:
    """Reverts :func:`apply`: mmaction2 has its own class again. Networks that exist do not change.

    Example::

        import tsm_jit.mmaction2

        tsm_jit.mmaction2.restore()
    """
    if _original is not None:
        _replace(TemporalShift, _original)


def _replace(old: type, new: type) -> None:
    """Replaces a class in every module of mmaction2: most of them imported it by name."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mmaction":
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if value is old:
                    setattr(module, attribute, new)
