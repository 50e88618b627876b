"""The network surgery of TSM's non-local blocks (arXiv:1711.07971)."""

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
    """Puts a non-local block behind every other block of ``layer2`` and ``layer3`` of a ResNet, in place, as TSM does.

    Args:
        net: a ResNet of torchvision or timm, converted or not.
        n_segment: the clip length in frames in these stages: half that of the input in a network that pools over time.
        sub_sample, mode: as in :class:`NONLocalBlock3D`.

    Raises:
        TypeError, ValueError: ``net`` is no ResNet, has such blocks already, or blocks without batch normalisation;
            ``n_segment`` is no integer from 1 up, or not the clip length that ``net`` is converted for; an unknown
            ``mode``.
    """
    stages = resnet_stages(net)
    one_of("mode", mode, MODES)
    n_segment = integer("n_segment", n_segment, 1)
    if any(isinstance(module, NL3DWrapper) for module in net.modules()):
        raise ValueError("net must not hold non-local blocks already, but it was converted before")
    pools = any(module.halves for module in net.modules() if isinstance(module, ClipModule))
    check_clip_lengths(net, 2 * n_segment if pools else n_segment, n_segment)

    def wrap(block: nn.Module) -> NL3DWrapper:
        return NL3DWrapper(block, n_segment, sub_sample=sub_sample, mode=mode)

    shift_before(net, {block.name: wrap for stage in stages[1:3] for block in stage[::2]})
