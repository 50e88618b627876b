"""``fuse``, ``unfuse`` and the classes of fused networks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tsm_jit.convert.architectures import RESNET, resnet_stages
from tsm_jit.fused.execute import Stream, fuses, run_blocks, run_stem
from tsm_jit.fused.fold import check_foldable, fold_into_convolutions, stem_layers
from tsm_jit.fused.match import why_unsupported
from tsm_jit.modules.base import ShiftedModule, class_name, has_hooks, unwrapped
from tsm_jit.modules.video import VideoModel


def fuse(net: nn.Module, *, fold_norms: bool = False) -> None:
    """Fuses the temporal shifts (TSM, arXiv:1811.08383) of a ResNet into its other kernels, in place.

    The kernel that adds the identity and applies the ReLU also applies the batch normalization and writes shifted
    activations. So the shift needs no separate pass over memory. Outputs and gradients equal the unfused ones up to
    rounding. State-dict keys do not change. The input of ``net`` stays frames ``[N*T, C, H, W]``, in float64, float32,
    bfloat16 or float16, also under autocast.

    Double backward raises ``RuntimeError``. Under ``torch.export``, tracing and ``torch.func`` the network runs
    unfused. When training on a GPU, a block is one operator for dispatch modes such as selective checkpointing. The
    cast of its weights is another operator. Compiled networks have an operator for each layer of a forward, and one for
    the layers of a block in the backward.

    Args:
        net: a ResNet, ResNeXt, Wide ResNet or ResNet-D of torchvision, timm or mmaction2, converted by
            :func:`tsm_jit.make_temporal_shift` with ``place="blockres"`` or by :func:`tsm_jit.tsam.make_Shift`; or a
            ``ResNetTSM`` that mmaction2 built after the import of :mod:`tsm_jit.mmaction2`. In a subclass with its own
            forward, each stage is fused separately and takes and returns unshifted frames.
            :func:`tsm_jit.n_segment` and :func:`tsm_jit.remove_temporal_shift` still work on the network.
        fold_norms: for inference only: fold the batch normalizations into the convolutions before them, for good. Each
            ReLU and each addition then is part of a convolution. Parameters change and stop to require grad, the keys
            of norms leave the state dict, and :func:`unfuse` does not bring them back: load weights with norms
            before. Scores change by rounding. Norms with hooks stay, and layers that the network uses several times.
            The norm before a max pooling stays too: one kernel computes it, ReLU and pooling.

    Raises:
        TypeError: ``net`` is not a ResNet.
        ValueError: ``net`` has no temporal shifts or no supported blocks, or ``fold_norms`` is set and ``net`` is in
            training mode.

    Warns:
        UserWarning: some blocks are not supported. The message has the reasons. These blocks run unfused.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
        tsm_jit.residual.fuse(net)
    """
    if isinstance(net, VideoModel):
        raise TypeError("net must be a ResNet, got a VideoModel: fuse its backbone")
    resnet_stages(net)
    stages = {name: _stage(net, name) for name in _STAGES}
    if not any(isinstance(module, ShiftedModule) for module in net.modules()):
        raise ValueError(
            "net must have temporal shifts to be fused, got a network without: call make_temporal_shift first"
        )
    blocks = {f"{name}.{i}": block for name, stage in stages.items() for i, block in enumerate(stage)}
    unsupported = {name: reason for name, block in blocks.items() if (reason := why_unsupported(block))}
    names_of: dict[str, list[str]] = {}
    for name, reason in unsupported.items():
        names_of.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in names_of.items())
    if len(unsupported) == len(blocks):
        raise ValueError(f"net must have supported residual blocks, got none ({reasons})")
    if fold_norms:
        check_foldable(net)
    if unsupported:
        warnings.warn(f"tsm_jit.residual.fuse does not fuse some blocks ({reasons})", UserWarning, stacklevel=2)
    for stage in stages.values():
        stage.__class__ = Stage  # a new module would lose hooks, keys and references
    if class_name(type(net)) in RESNET.stems and not isinstance(net, FusedNetwork):
        net.__class__ = _fused_class(type(net))  # type: ignore[arg-type]
    if fold_norms:
        names = RESNET.stems.get(class_name(getattr(net, "network", type(net))), ())
        supported = [block for name, block in blocks.items() if name not in unsupported]
        fold_into_convolutions(net, stem_layers(net, names), supported)


def unfuse(net: nn.Module) -> None:
    """Reverts :func:`fuse`, in place.

    Args:
        net: a fused network.

    Raises:
        TypeError: ``net`` is not a module.
        ValueError: ``net`` is not fused.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
        tsm_jit.residual.fuse(net)
        tsm_jit.residual.unfuse(net)
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
    stage: Any = unwrapped(net.get_submodule(name))  # it may be inside a TemporalPool
    if type(stage) not in (nn.Sequential, Stage):
        raise TypeError(f"net must have torch.nn.Sequential stages, got {type(stage).__name__} for {name}")
    return stage


class Stage(nn.Sequential):
    """A fused stage of a ResNet. It takes and returns unshifted frames ``[N*T, C, H, W]``.

    Between its blocks the activations are shifted. Unsupported blocks run unfused. :func:`fuse` creates it from an
    ``nn.Sequential`` with the same modules and state-dict keys.

    Example::

        net = torchvision.models.resnet18()
        tsm_jit.make_temporal_shift(net, n_segment=8)
        tsm_jit.residual.fuse(net)
        assert isinstance(net.layer1, tsm_jit.residual.Stage)
    """

    def forward(self, x: Tensor) -> Tensor:
        if not fuses(x):
            return super().forward(x)
        return run_blocks(list(self), Stream(x, x))


class FusedNetwork(nn.Module):
    """The base class of fused networks that call all stages together, with shifted activations between stages.

    :func:`fuse` makes a ResNet of torchvision, timm or mmaction2 an instance of it, unless a subclass has its own
    forward.

    Example::

        net = torchvision.models.resnet18()
        tsm_jit.make_temporal_shift(net, n_segment=8)
        tsm_jit.residual.fuse(net)
        assert isinstance(net, tsm_jit.residual.FusedNetwork)
    """

    network: type[nn.Module]  # the class of the unfused network

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return _new_fused, (self.network,), *rest

    def _fused_features(self, x: Tensor) -> Tensor | None:
        """Returns the output of the last stage, or None if hooks require separate calls of the stages."""
        stages = [getattr(self, name) for name in _STAGES]
        if not fuses(x) or any(type(stage) is not Stage or has_hooks(stage) for stage in stages):
            return None
        blocks = [block for stage in stages for block in stage]
        stem = stem_layers(self, RESNET.stems[class_name(self.network)])
        if len(stem) < 4:  # no norm, no ReLU, or hooks on all of them
            return None
        return run_blocks(blocks, run_stem(stem, x, blocks[0]))


class _FusedTorchvision(FusedNetwork):
    layer4: nn.Sequential
    avgpool: nn.Module
    fc: nn.Module

    def _forward_impl(self, x: Tensor) -> Tensor:
        features = self._fused_features(x)
        if features is None:
            return super()._forward_impl(x)  # type: ignore[misc]
        has_other_consumer = why_unsupported(self.layer4[-1]) is not None
        pooled = self.avgpool(features) if has_other_consumer else _global_pool(self.avgpool, features)
        return self.fc(torch.flatten(pooled, 1))


class _FusedTimm(FusedNetwork):
    def forward_features(self, x: Tensor) -> Tensor:
        features = None if self.grad_checkpointing else self._fused_features(x)
        return super().forward_features(x) if features is None else features  # type: ignore[misc]


class _FusedMmaction2(FusedNetwork):
    out_indices: Sequence[int]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = self._fused_features(x) if tuple(self.out_indices) == (3,) else None
        return super().forward(x) if features is None else features


def _global_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """Returns ``pool(x)``. The gradient of a mean over all pixels is one expanded value for each frame and channel.

    The gradient of PyTorch's own pooling is as large as x, and exists when memory is at its peak. Other consumers of x
    might not accept an expanded gradient, so x must have none.
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
        return (grad / (ctx.sizes[2] * ctx.sizes[3])).expand(ctx.sizes)  # one value for all pixels of a channel


_STAGES = ("layer1", "layer2", "layer3", "layer4")
_FORWARDS = {"torchvision": _FusedTorchvision, "timm": _FusedTimm, "mmaction": _FusedMmaction2}  # by package


@functools.cache
def _fused_class(network: type[nn.Module]) -> type[nn.Module]:
    package = class_name(network).split(".")[0]
    return type(network.__name__, (_FORWARDS[package], network), {"network": network, "__module__": __name__})


def _new_fused(network: type[nn.Module]) -> nn.Module:
    """Creates an instance for copies and pickles, which cannot import a class created at run time."""
    kind = _fused_class(network)  # type: ignore[arg-type]
    return kind.__new__(kind)
