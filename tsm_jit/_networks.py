"""What modules and surgery of every family share: a module around one that sees shifted frames, ResNet stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsm_jit import ops
from tsm_jit._checks import integer

# Modules that read their input and neither change nor return it: before these a shift may be made in place and undone.
_READ_ONLY_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class ClipModule(nn.Module):
    """A module around another one that takes its frames for clips of ``n_segment``."""

    n_segment: int
    halves = False  # the clip, before its module


class ShiftedModule(ClipModule):
    """One that lets its module see the input shifted; with ``inplace``, without a second activation."""

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


class n_segment:
    """Sets the clip length of a whole converted network, at once; as a context manager, for as long as its block runs.

    A pooled network (:func:`tsm_jit.make_temporal_pool`) keeps halving, and of TSAM's segments as many stay sound.

    Args:
        net: a network with modules of :mod:`tsm_jit.tsm` or :mod:`tsm_jit.tsam`; it is changed in place.
        n_segment: the clip length in frames at its input.

    Raises:
        TypeError, ValueError: ``net`` holds no such module; ``n_segment`` is no integer from 1 up, cannot be halved
            where the network pools, or leaves no segment to shift beside TSAM's sound. The network is then as it was.

    Example::

        tsm_jit.n_segment(net, 16)  # from here on
        with tsm_jit.n_segment(net, 32):  # only here
            net(long_clips)
    """

    def __init__(self, net: nn.Module, n_segment: int):
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        new = integer("n_segment", n_segment, 1)
        modules = [module for module in net.modules() if isinstance(module, ClipModule)]
        if not modules:
            raise ValueError(f"net must hold temporal shifts or pools to have a clip length, got {type(net).__name__}")
        old = max(module.n_segment for module in modules)
        changes: list[tuple[nn.Module, str, int]] = []
        for module in modules:
            if old % module.n_segment != 0:
                raise ValueError(f"net must hold one clip length and parts of it, got {old} and {module.n_segment}")
            part = old // module.n_segment  # 2 after a pool
            factor = 2 * part if module.halves else part
            if new % factor != 0:
                raise ValueError(f"n_segment must be a multiple of {factor} for a network that pools, got {new}")
            changes.append((module, "n_segment", new // part))
            shifted = getattr(module, "n_segment_shifted", None)
            if shifted is not None:
                sound = module.n_segment - shifted
                if new // part <= sound:
                    raise ValueError(f"n_segment must be more than {sound}, the segments that never shift, got {new}")
                changes.append((module, "n_segment_shifted", new // part - sound))
        self._before = [(module, name, getattr(module, name)) for module, name, _ in changes]
        _assign(changes)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _assign(self._before)


def _assign(changes: list[tuple[nn.Module, str, int]]) -> None:
    for module, name, value in changes:
        setattr(module, name, value)


def remove_temporal_shift(net: nn.Module) -> None:
    """Takes the temporal shifts and pools of every family out of a converted network, in place.

    The network is then as before :func:`tsm_jit.make_temporal_shift` or :func:`tsm_jit.tsam.make_Shift`, its weights as
    they are now, its keys without ``net`` or ``layer``. Hooks on the shifts go with them.

    Raises:
        TypeError, ValueError: ``net`` is no module, holds no temporal shift or pool, or is one itself.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if isinstance(net, ClipModule):
        raise ValueError(f"net must hold temporal shifts, and not be one itself, got {type(net).__name__}")
    places = [
        (parent, name)
        for parent in net.modules()
        for name, child in parent._modules.items()
        if isinstance(child, ClipModule)
    ]
    if not places:
        raise ValueError(f"net must hold temporal shifts or pools to remove, got {type(net).__name__}")
    for parent, name in reversed(places):  # the innermost first: each then holds what is left of its module
        parent._modules[name] = _unwrapped(parent._modules[name])


def refuse_converted(net: nn.Module) -> None:
    """Raises ValueError if ``net`` holds a temporal shift of any family."""
    if any(isinstance(module, ShiftedModule) for module in net.modules()):
        raise ValueError("net must not hold temporal shifts already, but it was converted before")


def residual_stages(net: nn.Module) -> list[nn.Sequential]:
    """The four stages of a ResNet of torchvision or timm, of blocks with a ``conv1``. Raises TypeError for others."""
    names = ("layer1", "layer2", "layer3", "layer4")
    stages = [getattr(net, name, None) for name in names]
    # A stage or a block may be wrapped already, by TemporalPool or a shift before the whole block.
    stages = [_unwrapped(stage) for stage in stages]
    for stage in stages:
        if not isinstance(stage, nn.Sequential) or not all(isinstance(_first_convolution(b), nn.Module) for b in stage):
            raise TypeError(
                f"net must be a ResNet with stages {', '.join(names)} of blocks with a conv1, got {type(net).__name__}"
            )
    return stages


def _first_convolution(block: nn.Module) -> nn.Module | None:
    return getattr(_unwrapped(block), "conv1", None)


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    return next(module.children()) if isinstance(module, ClipModule) else module
