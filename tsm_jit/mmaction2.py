"""TSM's shift for mmaction2 (https://github.com/open-mmlab/mmaction2).

The import of this module replaces mmaction2's ``TemporalShift`` in its backbones, such as ``ResNetTSM`` and
``MobileNetV2TSM``. It needs one line, in a script or in a config::

    import tsm_jit.mmaction2

    custom_imports = dict(imports=["tsm_jit.mmaction2"], allow_failed_imports=False)

Networks that are built after it have the shift of this package. Outputs, gradients and state-dict keys stay. Networks
that exist do not change, and :func:`restore` returns mmaction2's class. The order of the imports of mmaction2 and of
this module is free, since this module imports mmaction2's models. Without mmaction2 it has only the class.
:func:`tsm_jit.residual.fuse` takes mmaction2's ``ResNetTSM``.

Example::

    import tsm_jit.mmaction2

    shift = tsm_jit.mmaction2.TemporalShift(torch.nn.Conv2d(64, 64, 1), num_segments=8)
    y = shift(torch.randn(2 * 8, 64, 56, 56))
"""

from tsm_jit.convert.mmaction2 import apply, restore
from tsm_jit.modules.mmaction2 import TemporalShift

__all__ = ["TemporalShift", "apply", "restore"]

apply()
