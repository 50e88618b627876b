"""Which modules ``fuse`` supports, and why others are called as they are."""

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
    """Why ``block`` must be called as it is; None if it can run fused."""
    kind = class_name(type(block))
    if kind not in RESNET.fusable_blocks:
        return f"{kind} is not a supported block"
    if has_hooks(block):
        return "it has hooks, or its own forward"
    for name, what in _UNSUPPORTED.items():
        if block._modules.get(name, block.__dict__.get(name)) is not None:  # getattr is slow if there is none
            return f"it has {what}"
    activation = getattr(block, RESNET.fusable_blocks[kind].activation)
    if not is_relu(activation):
        return f"it ends in {type(activation).__name__}, not in a ReLU without hooks"
    downsample = block.downsample
    if downsample is not None and (type(downsample) is not nn.Sequential or has_hooks(downsample) or not downsample):
        return "its downsample is not a torch.nn.Sequential of modules without hooks"
    return None


def class_name(kind: type) -> str:
    """As the table of architectures has it: ``"torchvision.models.resnet.BasicBlock"``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def branch_modules(block: nn.Module) -> list[nn.Module]:
    """The modules of a supported block's residual branch, in order."""
    names = RESNET.fusable_blocks[class_name(type(block))].branch
    modules: list[Any] = [block._modules[name] for name in names]
    return [module for module in modules if type(module) is not nn.Identity]


def norm_tensors(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
    """Running mean, running variance, weight and bias of ``norm`` if kernels can apply it to activations of ``dtype``.

    None if it must be called: another class, hooks, missing or mixed tensors, training without gradients.
    """
    if type(norm) is not nn.BatchNorm2d or has_hooks(norm):
        return None
    # From the dictionaries, as attributes of modules are slow; but replicas of DataParallel have only attributes.
    buffers, parameters = norm._buffers, norm._parameters
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or bias is None:
        weight, bias = norm.weight, norm.bias
    if mean is None or variance is None or weight is None or bias is None:
        return None
    own = mean.dtype
    if variance.dtype is not own or weight.dtype is not own or bias.dtype is not own:
        return None
    if own is not dtype and own is not torch.float32:
        return None
    if norm.training:
        batches = buffers.get("num_batches_tracked")
        if batches is None or batches.dtype is not torch.int64 or batches.device != mean.device:
            return None
        tracked = norm.momentum is not None and norm.track_running_stats
        if not tracked or not torch.is_grad_enabled() or own is not acc_dtype(dtype):
            return None
    return mean, variance, weight, bias


def unshifted_module(module: nn.Module) -> nn.Module:
    """The module inside a temporal shift; any other is itself."""
    return module.shifted_module() if is_shifted(module) else module


def is_shifted(module: nn.Module) -> TypeGuard[ShiftedModule]:
    """Whether ``module`` is a temporal shift without hooks."""
    return type(module) in (tsm.TemporalShift, tsam.TemporalShift) and not has_hooks(module)


def is_relu(module: nn.Module) -> TypeGuard[nn.ReLU]:
    """Whether ``module`` is a ReLU without hooks."""
    return type(module) is nn.ReLU and not has_hooks(module)


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` is a two-dimensional convolution without hooks."""
    return type(module) is nn.Conv2d and not has_hooks(module)


def is_pool(module: nn.Module) -> bool:
    """Whether ``module`` is the pooling of a ResNet without hooks: windows of 3x3 pixels, stride 2."""
    if type(module) is not nn.MaxPool2d or has_hooks(module) or module.return_indices or module.ceil_mode:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(own in (size, (size, size)) for own, size in zip(sizes, (3, 2, 1, 1), strict=True))
