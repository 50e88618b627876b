"""What modules and surgery of every family share: a module around one that sees shifted frames, ResNet stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsm_jit import ops

# Modules that read their input and neither change nor return it: before these a shift may be made in place and undone.
_READ_ONLY_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class ShiftedModule(nn.Module):
    """A module around another one that sees the input shifted; with ``inplace``, without a second activation."""

    inplace: bool

    def call_shifted(self, net: nn.Module, x: Tensor, shift: str) -> Tensor:
        """``net`` of the shifted ``x``, which holds the same bits afterwards."""
        if not self.inplace or not ops.eager():
            return net(ops.temporal_shift(x, shift))
        if torch.is_grad_enabled():
            with ops.shifting_again(x, shift) as shifted:
                return net(shifted)
        if _only_reads_its_input(net) and ops.elements_are_apart(x):
            with ops.shift_undone(x, shift):
                return net(x)
        return net(ops.temporal_shift(x, shift))


def _only_reads_its_input(net: nn.Module) -> bool:
    """Nor may a hook see the input: one that keeps it would find it unshifted afterwards."""
    hooks = (net._forward_hooks, net._forward_pre_hooks)
    return type(net) in _READ_ONLY_MODULES and not any(hooks)


def refuse_converted(net: nn.Module) -> None:
    """Raises ValueError if ``net`` holds a temporal shift of any family."""
    if any(isinstance(module, ShiftedModule) for module in net.modules()):
        raise ValueError("net must not hold temporal shifts already, but it was converted before")


def residual_stages(net: nn.Module) -> list[nn.Sequential]:
    """The four stages of a ResNet of torchvision or timm, of blocks with a ``conv1``. Raises TypeError for others."""
    names = ("layer1", "layer2", "layer3", "layer4")
    stages = [getattr(net, name, None) for name in names]
    # A stage or a block may be wrapped already, by TemporalPool or a shift before the whole block.
    stages = [stage if isinstance(stage, nn.Sequential) else getattr(stage, "net", None) for stage in stages]
    for stage in stages:
        if not isinstance(stage, nn.Sequential) or not all(isinstance(_first_convolution(b), nn.Module) for b in stage):
            raise TypeError(
                f"net must be a ResNet with stages {', '.join(names)} of blocks with a conv1, got {type(net).__name__}"
            )
    return stages


def _first_convolution(block: nn.Module) -> nn.Module | None:
    return getattr(block.net if isinstance(block, ShiftedModule) else block, "conv1", None)
