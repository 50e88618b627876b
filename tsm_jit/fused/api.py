"""``fuse`` and ``unfuse``, and the classes of a fused network."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tsm_jit.convert.architectures import RESNET, resnet_stages
from tsm_jit.fused.execute import Stream, fuses, run_blocks, run_stem
from tsm_jit.fused.match import class_name, name_of_class, why_unsupported
from tsm_jit.modules.base import ShiftedModule, has_hooks, unwrapped


def fuse(net: nn.Module) -> None:
    """Keeps the stream between the residual blocks of a converted ResNet in shifted form, in place on the network.

    Outputs and gradients are those of the network before, to rounding; keys of the state dict stay. Where a block's
    last batch normalization can be applied in the same pass, it is. Gradients exist to the first order. What is
    exported, traced or transformed by ``torch.func`` is the network before. Dispatch modes, as of selective
    checkpointing, see a block that is recorded as a whole as one operator, and the cast of its weights as another
    (compiled, they see its parts).

    Args:
        net: a ResNet, ResNeXt, Wide ResNet or ResNet-D of torchvision or timm, converted by
            :func:`tsm_jit.make_temporal_shift` with ``place="blockres"`` or by :func:`tsm_jit.tsam.make_Shift`. A
            subclass of these with a forward of its own is fused stage by stage: each takes and returns plain frames.
            There ``inplace=True`` saves the first shift a second activation where nothing is recorded. Later changes of
            the network, such as :func:`tsm_jit.n_segment` or :func:`tsm_jit.remove_temporal_shift`, work.

    Raises:
        TypeError, ValueError: ``net`` is no such ResNet, holds no temporal shift, or none of its blocks is understood.

    Warns:
        UserWarning: some blocks are not understood, and why. They compute what they did.
    """
    resnet_stages(net)
    stages = {name: _stage(net, name) for name in _STAGES}
    if not any(isinstance(module, ShiftedModule) for module in net.modules()):
        raise ValueError("net must hold temporal shifts to be fused, got one without: call make_temporal_shift first")
    blocks = {f"{name}.{i}": block for name, stage in stages.items() for i, block in enumerate(stage)}
    refused = {name: reason for name, block in blocks.items() if (reason := why_unsupported(block))}
    said = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    if len(refused) == len(blocks):
        raise ValueError(f"net must hold residual blocks that are understood, got none ({said})")
    if refused:
        warnings.warn(f"tsm_jit.residual.fuse left some blocks as they were ({said})", UserWarning, stacklevel=2)
    for stage in stages.values():
        stage.__class__ = Stage  # and not a new module: hooks, keys and references stay
    if class_name(net) in _NETWORKS and not isinstance(net, FusedNetwork):
        net.__class__ = _fused_class(type(net))


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
        stage.__class__ = nn.Sequential
    for module in net.modules():
        if isinstance(module, FusedNetwork):
            module.__class__ = module.network


def _stage(net: nn.Module, name: str) -> nn.Module:
    stage = unwrapped(net.get_submodule(name))  # of a TemporalPool
    if type(stage) not in (nn.Sequential, Stage):
        raise TypeError(f"net must hold its stages as torch.nn.Sequential, got {type(stage).__name__} for {name}")
    return stage


class Stage(nn.Sequential):
    """A stage of a ResNet, its blocks and their keys as they were, that keeps the stream between them shifted.

    Frames ``[N*T, C, H, W]`` in and out. A block that is not understood, or has hooks, is called as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not fuses(x):
            return super().forward(x)
        return run_blocks(list(self), Stream(x, x))


class FusedNetwork(nn.Module):
    """Base of the classes of fused networks whose own forward is known: the stream is shifted between stages, too."""

    network: type[nn.Module]  # the class before

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _new_fused, (self.network,), *rest

    def _fused_features(self, x: Tensor) -> Tensor | None:
        """What the last stage returns; None if stages are to be called one by one, as something watches them."""
        stages = [getattr(self, name) for name in _STAGES]
        if not fuses(x) or any(type(stage) is not Stage or has_hooks(stage) for stage in stages):
            return None
        blocks = [block for stage in stages for block in stage]
        conv, norm, relu, pool = (getattr(self, name) for name in RESNET.stems[name_of_class(self.network)])
        return run_blocks(blocks, run_stem(conv, norm, relu, pool, x, blocks[0]))


class _FusedTorchvision(FusedNetwork):
    def _forward_impl(self, x: Tensor) -> Tensor:
        features = self._fused_features(x)
        if features is None:
            return super()._forward_impl(x)
        seen = why_unsupported(self.layer4[-1]) is not None
        return self.fc(torch.flatten(self.avgpool(features) if seen else _pooled(self.avgpool, features), 1))


class _FusedTimm(FusedNetwork):
    def forward_features(self, x: Tensor) -> Tensor:
        features = None if self.grad_checkpointing else self._fused_features(x)
        return super().forward_features(x) if features is None else features


def _pooled(pool: nn.Module, x: Tensor) -> Tensor:
    """What is called as it is, but for the mean over all pixels where it is recorded: the gradient that PyTorch makes
    of it is as large as x, at the very moment when all activations are kept. For an x that no hook sees."""
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
    return type(network.__name__, (_NETWORKS[name_of_class(network)], network), {"network": network})


def _new_fused(network: type[nn.Module]) -> nn.Module:
    """For copies and pickles, which know no class that was made here."""
    kind = _fused_class(network)
    return kind.__new__(kind)
