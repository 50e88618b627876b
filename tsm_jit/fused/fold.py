"""Folds the batch normalizations of a network into its convolutions, for inference."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tsm_jit.fused.match import block_layers, is_convolution, is_pool, is_relu, layers_of, unshifted_module
from tsm_jit.modules.base import has_hooks


def check_foldable(net: nn.Module) -> None:
    """Raises ValueError if ``net`` is in training mode, whose norms compute statistics."""
    if any(module.training for module in net.modules()):
        raise ValueError("net must be in evaluation mode to fold its norms, got training mode: call net.eval() first")


def fold_into_convolutions(net: nn.Module, stem: list[nn.Module], blocks: list[nn.Module]) -> None:
    """Folds each norm that follows a convolution in ``stem`` or in the supported ``blocks`` into this convolution.

    The weights and biases of the convolutions change, and ``nn.Identity`` takes the place of the norms. Norms with
    hooks stay. So do layers that ``net`` has in several places, since another place may need the unfolded layer. The
    norm before the max pooling of ``stem`` stays too, as one kernel computes norm, ReLU and pooling.
    """
    places = Counter(module for _, module in net.named_modules(remove_duplicate=False))
    has_pooling = len(stem) > 2 and is_relu(stem[-2]) and is_pool(stem[-1])
    sequences: list[list[list[Any]]] = [
        [[unshifted_module(module) for module in layers] for layers in block_layers(block)] for block in blocks
    ]
    folded = {}
    for modules in [stem[:-3] if has_pooling else stem, *itertools.chain(*sequences)]:
        for conv, norm in itertools.pairwise(modules):
            if is_convolution(conv) and _is_foldable(norm) and places[conv] == places[norm] == 1:
                _fold(conv, norm)
                folded[norm] = nn.Identity().eval()
    for branch, downsample in sequences:
        if downsample and branch[-1] in folded and downsample[-1] in folded:
            branch[-2].bias.data += downsample[-2].bias.data
            downsample[-2].bias = None  # saves the pass that adds it
    for parent in list(net.modules()):
        for name, child in parent._modules.items():
            if child in folded:
                parent._modules[name] = folded[child]


def _is_foldable(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return type(norm) is nn.BatchNorm2d and norm.running_mean is not None and not has_hooks(norm)


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    statistics: list[Any] = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    mean, variance, weight, bias = (None if each is None else each.double() for each in statistics)
    conv_bias = None if conv.bias is None else conv.bias.double()
    new = fuse_conv_bn_weights(conv.weight.double(), conv_bias, mean, variance, norm.eps, weight, bias)  # type: ignore
    dense = torch.empty_like(conv.weight).copy_(new[0])  # in the memory format and dtype of the weight
    conv.weight = nn.Parameter(dense, requires_grad=False)
    conv.bias = nn.Parameter(new[1].to(dense.dtype), requires_grad=False)


def stem_layers(net: Any, names: tuple[str, ...]) -> list[nn.Module]:
    """Returns the layers before the first block of ``net``, from the names of its modules."""
    if not names:
        return []
    first, *others = (getattr(net, name) for name in names)
    return [*layers_of(first), *others]
