"""Streams: a converted network that is fed one frame at a time (TSM's online form, arXiv:1811.08383, section 4.2).

Each shift keeps, of the frame before, the fold that the next frame reads. The network then computes for every frame
what it computes offline, in a clip that began with the stream; nothing is computed twice.

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")  # no shift may read a frame that is still to come
    stream = tsm_jit.online.convert(net.eval())
    with torch.inference_mode():
        for frame in video:
            scores = stream(frame)  # [1, C, H, W] in, the scores of this frame out
"""

from tsm_jit.convert.online import convert
from tsm_jit.modules.online import OnlineNetwork, State

__all__ = ["OnlineNetwork", "State", "convert"]
