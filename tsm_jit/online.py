"""Streaming: runs a converted network frame by frame (TSM's online form, arXiv:1811.08383, section 4.2).

Each shift stores the fold of the current frame that the next frame reads. For every frame the network then computes the
same scores as for a clip that starts with the stream, without computing a frame twice.

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")  # a stream has no next frame yet
    stream = tsm_jit.online.convert(net.eval())
    with torch.inference_mode():
        for frame in torch.randn(8, 1, 3, 112, 112):
            scores = stream(frame)  # the scores [1, 1000] of this frame [1, C, H, W]
"""

from tsm_jit.convert.online import convert
from tsm_jit.modules.online import OnlineNetwork, State

__all__ = ["OnlineNetwork", "State", "convert"]
