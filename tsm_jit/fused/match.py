"""Checks which modules ``fuse`` supports."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from tsm_jit.convert.architectures import LAYER_GROUPS, RESNET
from tsm_jit.modules import mmaction2, tsam, tsm
from tsm_jit.modules.base import ShiftedModule, class_name, has_hooks, is_conv2d
from tsm_jit.ops.residual import acc_dtype

_SHIFTS = (tsm.TemporalShift, tsam.TemporalShift, mmaction2.TemporalShift)
_UNSUPPORTED = {
    "se": "an attention, such as squeeze and excitation",
    "drop_path": "stochastic depth",
    "with_cp": "activation checkpointing",
}


class BlockLayers(NamedTuple):
    """The modules of a supported block, in forward order."""

    branch: list[nn.Module]
    downsample: list[nn.Module]  # empty: the identity is the input of the block


def why_unsupported(block: nn.Module) -> str | None:
    """Returns None if ``block`` can run fused, otherwise the reason why not."""
    kind = class_name(type(block))
    if isinstance(block, ShiftedModule):
        return "its shift is before the whole block, not inside as with place='blockres'"
    if kind not in RESNET.fusable_blocks:
        return f"{kind} is not a supported block"
    if has_hooks(block):
        return "it has hooks, or its own forward"
    for name, feature in _UNSUPPORTED.items():
        value = block._modules.get(name, block.__dict__.get(name))  # getattr is slow for missing attributes
        if value is not None and value is not False:
            return f"it has {feature}"
    activation = getattr(block, RESNET.fusable_blocks[kind].activation)
    if not is_relu(activation):
        return f"it ends in {type(activation).__name__}, not in a ReLU without hooks"
    downsample: Any = block.downsample
    if downsample is not None and layers_of(downsample) == [downsample]:
        return "its downsample is not a torch.nn.Sequential, or another sequence of layers, without hooks"
    return None


def block_layers(block: nn.Module) -> BlockLayers:
    """Returns the modules of a supported block."""
    branch: list[nn.Module] = []
    for name in RESNET.fusable_blocks[class_name(type(block))].branch:
        module: Any = block._modules[name]
        branch += layers_of(module) if module._modules else (module,)  # calls cost time in every forward
    downsample: Any = block.downsample
    return BlockLayers(
        [module for module in branch if not is_identity(module)],
        [] if downsample is None else layers_of(downsample),
    )


def layers_of(module: nn.Module) -> list[nn.Module]:
    """Returns the modules that a ``nn.Sequential`` or a layer group calls, or ``module`` itself for another module."""
    children: Any = module._modules
    if not children or has_hooks(module):
        return [module]
    if type(module) is nn.Sequential:
        return list(children.values())
    group = LAYER_GROUPS.get(class_name(type(module)))
    if group is None or any(getattr(module, name, None) != value for name, value in group.attributes.items()):
        return [module]
    names = [name for name, flag in group.children.items() if flag is None or getattr(module, flag)]
    return [children[name] for name in names] if children.keys() >= set(names) else [module]


def norm_tensors(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
    """Returns running mean, running variance, weight and bias if kernels can apply ``norm`` to ``dtype`` activations.

    Returns None for another class, hooks, missing tensors, mixed dtypes, and for training mode under ``no_grad``.
    """
    if type(norm) is not nn.BatchNorm2d or has_hooks(norm):
        return None
    # Dictionaries are faster than attributes of modules. But replicas of DataParallel only have attributes.
    buffers, parameters = norm._buffers, norm._parameters
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or bias is None:
        weight, bias = norm.weight, norm.bias
    if mean is None or variance is None or weight is None or bias is None:
        return None
    norm_dtype = mean.dtype
    if variance.dtype is not norm_dtype or weight.dtype is not norm_dtype or bias.dtype is not norm_dtype:
        return None
    if norm_dtype is not dtype and norm_dtype is not torch.float32:
        return None
    if norm.training:
        batches = buffers.get("num_batches_tracked")
        if batches is None or batches.dtype is not torch.int64 or batches.device != mean.device:
            return None
        tracked = norm.momentum is not None and norm.track_running_stats
        if not tracked or not torch.is_grad_enabled() or norm_dtype is not acc_dtype(dtype):
            return None
    return mean, variance, weight, bias


def unshifted_module(module: nn.Module) -> nn.Module:
    """Returns the module inside a temporal shift, or ``module`` itself if it is not a shift."""
    return module.shifted_module() if is_shifted(module) else module


def is_shifted(module: nn.Module) -> TypeGuard[ShiftedModule]:
    """Whether ``module`` is a temporal shift without hooks, whose frames are all in this process."""
    if type(module) not in _SHIFTS or has_hooks(module):
        return False
    return module.split_shard() is None  # type: ignore[operator]


def is_identity(module: nn.Module) -> bool:
    """Whether ``module`` is an identity without hooks."""
    return type(module) is nn.Identity and not has_hooks(module)


def is_relu(module: nn.Module) -> TypeGuard[nn.ReLU]:
    """Whether ``module`` is a ReLU without hooks."""
    return type(module) is nn.ReLU and not has_hooks(module)


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a two-dimensional convolution without hooks."""
    return is_conv2d(module) and not has_hooks(module)


def is_pool(module: nn.Module) -> bool:
    """Whether ``module`` is the max pooling of a ResNet, with 3x3 windows and stride 2, without hooks."""
    if type(module) is not nn.MaxPool2d or has_hooks(module) or module.return_indices or module.ceil_mode:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(size in (value, (value, value)) for size, value in zip(sizes, (3, 2, 1, 1), strict=True))
