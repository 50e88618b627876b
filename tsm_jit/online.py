"""Streaming: runs a converted network frame by frame (TSM's online form, arXiv:1811.08383, section 4.2).

Each shift stores the fold of the current frame that the next frame reads. For every frame the network then computes the
same scores as for the whole video, without computing a frame twice.

A shift that reads the next frame waits for it, and so do the other branches of its residual block. The waits add up:
``stream.latency`` is their sum in frames. With ``direction="past"`` it is 0.

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")
    stream = tsm_jit.online.convert(net.eval())
    with torch.inference_mode():
        for frame in torch.randn(8, 1, 3, 112, 112):
            scores = stream(frame)  # the scores [1, 1000] of this frame [1, C, H, W]

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8)
    stream = tsm_jit.online.convert(net.eval())
    with torch.inference_mode():
        for frame in torch.randn(20, 1, 3, 112, 112):
            scores = stream(frame)  # None for 16 frames, then the scores of the frame 16 frames before
        for scores in stream.flush():  # of the last 16 frames
            print(scores.argmax(1))
"""

from tsm_jit.convert.online import convert
from tsm_jit.modules.online import OnlineNetwork, State

__all__ = ["OnlineNetwork", "State", "convert"]
