"""Fuses the temporal shift of a ResNet (TSM, arXiv:1811.08383) into the kernels between its residual blocks.

A residual block ends in ``x = relu(z + identity)``, and the next block starts with ``shift(x)``. A separate shift
kernel reads and writes all of x. But the shift only moves values, so it commutes with elementwise operations::

    shift(relu(z + identity)) = relu(shift(z) + shift(identity))

So the existing add+ReLU kernel writes ``shift(x)`` directly. It writes the boundary frames, which the shift drops, to a
separate small tensor. The next block computes its identity from both. The same kernel also applies the batch
normalization of the block. Under ``no_grad``, at the end of a stage, it also writes the pixels that the next stage's
``downsample`` reads. ``kernels/README.md`` describes the kernels.

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
    tsm_jit.residual.fuse(net)  # same outputs, gradients and state-dict keys
"""

from tsm_jit.fused.api import FusedNetwork, Stage, fuse, unfuse

__all__ = ["FusedNetwork", "Stage", "fuse", "unfuse"]
