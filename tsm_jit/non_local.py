"""Non-local blocks as in TSM's networks (arXiv:1711.07971): modules and surgery."""

from tsm_jit.convert.non_local import make_non_local
from tsm_jit.modules.non_local import NL3DWrapper, NONLocalBlock3D

__all__ = ["NL3DWrapper", "NONLocalBlock3D", "make_non_local"]
