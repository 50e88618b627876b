"""Non-local blocks as in TSM's networks (arXiv:1711.07971).

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8)
    tsm_jit.non_local.make_non_local(net, n_segment=8)
    scores = net(torch.randn(8, 3, 112, 112))
"""

from tsm_jit.convert.non_local import make_non_local
from tsm_jit.modules.non_local import NL3DWrapper, NONLocalBlock3D

__all__ = ["NL3DWrapper", "NONLocalBlock3D", "make_non_local"]
