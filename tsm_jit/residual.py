"""Temporal shift for free: a converted ResNet whose stream between residual blocks is kept in shifted form.

A residual block ends in ``x = relu(z + identity)`` and the next one begins with ``shift(x)``: a pass over the memory
that reads all of x and writes it again. But a shift moves whole values, so it commutes with what works value by value::

    shift(relu(z + identity)) = relu(shift(z) + shift(identity))

So the pass that is made anyway writes ``shift(x)`` in place of x. The few frames that the shift does not read (one of T
frames, of the channels that move) go to a tensor of their own, and both together are the next block's identity. The
same pass applies the batch normalization before it and, without gradients at the end of a stage, writes what the next
one's ``downsample`` reads, too. See README, "Shift for free".

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
    tsm_jit.residual.fuse(net)  # same outputs, gradients and keys
"""

from tsm_jit.fused.api import FusedNetwork, Stage, fuse, unfuse

__all__ = ["FusedNetwork", "Stage", "fuse", "unfuse"]
