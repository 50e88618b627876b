"""Checks which modules ``fuse`` supports."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tsm_jit.convert.architectures import RESNET
from tsm_jit.modules import tsam, tsm
from tsm_jit.modules.base import ShiftedModule, has_hooks
from tsm_jit.ops.residual import acc_dtype

_UNSUPPORTED = {"se": "an attention, such as squeeze and excitation", "drop_path": "stochastic depth"}


def why_unsupported(block: nn.Module) -> str | None:
    """Returns None if ``block`` can run fused, otherwise the reason why not."""
    kind = class_name(type(block))
    if kind not in RESNET.fusable_blocks:
        return f"{kind} is not a supported block"
    if has_hooks(block):
        return "it has hooks, or its own forward"
    for name, feature in _UNSUPPORTED.items():
        if block._modules.get(name, block.__dict__.get(name)) is not None:  # getattr is slow for missing attributes
            return f"it has {feature}"
    activation = getattr(block, RESNET.fusable_blocks[kind].activation)
    if not is_relu(activation):
        return f"it ends in {type(activation).__name__}, not in a ReLU without hooks"
    downsample = block.downsample
    if downsample is not None and (type(downsample) is not nn.Sequential or has_hooks(downsample) or not downsample):
        return "its downsample is not a torch.nn.Sequential of modules without hooks"
    return None


def class_name(kind: type) -> str:
    """Returns the name in the table of architectures, such as ``"torchvision.models.resnet.BasicBlock"``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def branch_modules(block: nn.Module) -> list[nn.Module]:
    """Returns the modules of a supported block's residual branch, in forward order."""
    names = RESNET.fusable_blocks[class_name(type(block))].branch
    modules: list[Any] = [block._modules[name] for name in names]
    return [module for module in modules if type(module) is not nn.Identity]


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
    if type(module) not in (tsm.TemporalShift, tsam.TemporalShift) or has_hooks(module):
        return False
    return module.split_shard() is None  # type: ignore[operator]


def is_relu(module: nn.Module) -> TypeGuard[nn.ReLU]:
    """Whether ``module`` is a ReLU without hooks."""
    return type(module) is nn.ReLU and not has_hooks(module)


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a two-dimensional convolution without hooks."""
    return type(module) is nn.Conv2d and not has_hooks(module)


def is_pool(module: nn.Module) -> bool:
    """Whether ``module`` is the max pooling of a ResNet, with 3x3 windows and stride 2, without hooks."""
    if type(module) is not nn.MaxPool2d or has_hooks(module) or module.return_indices or module.ceil_mode:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(size in (value, (value, value)) for size, value in zip(sizes, (3, 2, 1, 1), strict=True))
