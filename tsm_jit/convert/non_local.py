"""Inserts TSM's non-local blocks into networks (arXiv:1711.07971)."""

from __future__ import annotations

from torch import nn

from tsm_jit._checks import integer, one_of
from tsm_jit.convert.architectures import resnet_stages
from tsm_jit.convert.surgery import check_clip_lengths, shift_before
from tsm_jit.modules.base import ClipModule
from tsm_jit.modules.non_local import MODES, Mode, NL3DWrapper


def make_non_local(
    net: nn.Module, n_segment: int, *, sub_sample: bool = True, mode: Mode = "embedded_gaussian"
) -> None:
    """Inserts a non-local block after every second block of ``layer2`` and ``layer3`` of a ResNet, as TSM does.

    It changes ``net`` in place. Paper: Non-local Neural Networks, arXiv:1711.07971.

    Args:
        net: a ResNet of torchvision or timm, with or without temporal shifts.
        n_segment: the clip length in frames in these stages. In a network that pools over time this is half the clip
            length of the input.
        sub_sample, mode: as in :class:`NONLocalBlock3D`.

    Raises:
        TypeError: ``net`` is not a ResNet with batch normalization, or ``n_segment`` is not an integer.
        ValueError: ``net`` already has non-local blocks; ``n_segment`` is below 1 or differs from the clip length of
            ``net``; or ``mode`` is unknown.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8)
        tsm_jit.non_local.make_non_local(net, n_segment=8)
    """
    stages = resnet_stages(net)
    one_of("mode", mode, MODES)
    n_segment = integer("n_segment", n_segment, 1)
    if any(isinstance(module, NL3DWrapper) for module in net.modules()):
        raise ValueError("net must not have non-local blocks yet, got a network that was converted before")
    pools = any(module.halves_clip for module in net.modules() if isinstance(module, ClipModule))
    check_clip_lengths(net, 2 * n_segment if pools else n_segment, n_segment)

    def wrap(block: nn.Module) -> NL3DWrapper:
        return NL3DWrapper(block, n_segment, sub_sample=sub_sample, mode=mode)

    shift_before(net, {block.name: wrap for stage in stages[1:3] for block in stage[::2]})
