"""``fuse`` and ``unfuse``, and the classes of a fused network."""

from __future__ import annotations

import functools
import warnings
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tsm_jit.convert.architectures import RESNET, resnet_stages
from tsm_jit.fused.execute import Stream, fuses, run_blocks, run_stem
from tsm_jit.fused.match import class_name, why_unsupported
from tsm_jit.modules.base import ShiftedModule, has_hooks, unwrapped


def fuse(net: nn.Module) -> None:
    """Runs a converted ResNet without separate passes for the shift, in place on the network.

    Outputs and gradients equal those of the unfused network to rounding. Keys of the state dict stay the same. Between
    blocks the activations are kept shifted; the same kernels apply the batch normalizations at the end of blocks.

    Double backward is not supported. Under ``torch.export``, tracing and ``torch.func`` the network runs unfused. In
    training on a GPU, dispatch modes such as selective checkpointing see a block as one operator and the cast of its
    weights as another; compiled, they see the parts.

    Args:
        net: a ResNet, ResNeXt, Wide ResNet or ResNet-D of torchvision or timm, converted by
            :func:`tsm_jit.make_temporal_shift` with ``place="blockres"`` or by :func:`tsm_jit.tsam.make_Shift`. A
            subclass with its own forward is fused stage by stage: each stage takes and returns unshifted frames.
            :func:`tsm_jit.n_segment` and :func:`tsm_jit.remove_temporal_shift` still work on the network.

    Raises:
        TypeError, ValueError: ``net`` is another network, holds no temporal shift, or has no supported block.

    Warns:
        UserWarning: some blocks are not supported, and why. They are called as they are.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
        tsm_jit.residual.fuse(net)
    """
    resnet_stages(net)
    stages = {name: _stage(net, name) for name in _STAGES}
    if not any(isinstance(module, ShiftedModule) for module in net.modules()):
        raise ValueError("net must hold temporal shifts to be fused, got one without: call make_temporal_shift first")
    blocks = {f"{name}.{i}": block for name, stage in stages.items() for i, block in enumerate(stage)}
    unsupported = {name: reason for name, block in blocks.items() if (reason := why_unsupported(block))}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in unsupported.items())
    if len(unsupported) == len(blocks):
        raise ValueError(f"net must hold residual blocks that are supported, got none ({reasons})")
    if unsupported:
        warnings.warn(f"tsm_jit.residual.fuse left some blocks as they were ({reasons})", UserWarning, stacklevel=2)
    for stage in stages.values():
        stage.__class__ = Stage  # not a new module: hooks, keys and references stay valid
    if class_name(type(net)) in _NETWORKS and not isinstance(net, FusedNetwork):
        net.__class__ = _fused_class(type(net))  # type: ignore[arg-type]


def unfuse(net: nn.Module) -> None:
    """Undoes :func:`fuse`, in place on the network.

    Raises:
        TypeError, ValueError: ``net`` is no module, or not fused.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    stages = [module for module in net.modules() if isinstance(module, Stage)]
    if not stages:
        raise ValueError(f"net must be fused to be unfused, got {type(net).__name__} without a fused stage")
    for stage in stages:
        stage.__class__ = nn.Sequential  # type: ignore[assignment]
    for module in net.modules():
        if isinstance(module, FusedNetwork):
            module.__class__ = module.network  # type: ignore[assignment]


def _stage(net: nn.Module, name: str) -> nn.Sequential:
    stage: Any = unwrapped(net.get_submodule(name))  # of a TemporalPool
    if type(stage) not in (nn.Sequential, Stage):
        raise TypeError(f"net must hold its stages as torch.nn.Sequential, got {type(stage).__name__} for {name}")
    return stage


class Stage(nn.Sequential):
    """A stage of a ResNet that keeps the activations between its blocks shifted. Its modules and keys stay the same.

    It takes and returns unshifted frames ``[N*T, C, H, W]``. Unsupported blocks are called as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not fuses(x):
            return super().forward(x)
        return run_blocks(list(self), Stream(x, x))


class FusedNetwork(nn.Module):
    """The base class of fused networks whose forward is known: activations are shifted between stages, too."""

    network: type[nn.Module]  # the class of the unfused network

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return _new_fused, (self.network,), *rest

    def _fused_features(self, x: Tensor) -> Tensor | None:
        """The output of the last stage; None if hooks need the stages to be called one by one."""
        stages = [getattr(self, name) for name in _STAGES]
        if not fuses(x) or any(type(stage) is not Stage or has_hooks(stage) for stage in stages):
            return None
        blocks = [block for stage in stages for block in stage]
        conv, norm, relu, pool = (getattr(self, name) for name in RESNET.stems[class_name(self.network)])
        return run_blocks(blocks, run_stem(conv, norm, relu, pool, x, blocks[0]))


class _FusedTorchvision(FusedNetwork):
    layer4: nn.Sequential
    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        features = self._fused_features(x)
        if features is None:
            return super()._forward_impl(x)  # type: ignore[misc]
        has_other_reader = why_unsupported(self.layer4[-1]) is not None
        pooled = self.avgpool(features) if has_other_reader else _global_pool(self.avgpool, features)
        return self.fc(torch.flatten(pooled, 1))


class _FusedTimm(FusedNetwork):
    def forward_features(self, x: Tensor) -> Tensor:
        features = None if self.grad_checkpointing else self._fused_features(x)
        return super().forward_features(x) if features is None else features  # type: ignore[misc]


def _global_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """``pool(x)``. The gradient of a mean over all pixels is expanded from one value per frame and channel.

    PyTorch's own gradient is as large as x, and is made when memory is at its peak. A hook on x would see it expanded,
    so x must have no other reader.
    """
    is_mean = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)) and not has_hooks(pool)
    if not is_mean or not (torch.is_grad_enabled() and x.requires_grad):
        return pool(x)
    return _MeanOverPixels.apply(x)


class _MeanOverPixels(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.sizes = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        return (grad / (ctx.sizes[2] * ctx.sizes[3])).expand(ctx.sizes)  # one value for all pixels


_STAGES = ("layer1", "layer2", "layer3", "layer4")
_NETWORKS = {"torchvision.models.resnet.ResNet": _FusedTorchvision, "timm.models.resnet.ResNet": _FusedTimm}


@functools.cache
def _fused_class(network: type[nn.Module]) -> type[nn.Module]:
    return type(network.__name__, (_NETWORKS[class_name(network)], network), {"network": network})


def _new_fused(network: type[nn.Module]) -> nn.Module:
    """For copies and pickles, which cannot import a class that was made at run time."""
    kind = _fused_class(network)  # type: ignore[arg-type]
    return kind.__new__(kind)
