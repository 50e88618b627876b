"""Which residual blocks are supported by ``fuse``, and why others are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsm_jit.convert.architectures import RESNET
from tsm_jit.modules import tsam, tsm
from tsm_jit.modules.base import has_hooks
from tsm_jit.ops.residual import wide

_NOT_UNDERSTOOD = {"se": "an attention, such as squeeze and excitation", "drop_path": "stochastic depth"}


def why_unsupported(block: nn.Module) -> str | None:
    """Why ``block`` has to be called as it is; None if what it does is known."""
    kind = class_name(block)
    if kind not in RESNET.fusable_blocks:
        return f"{kind} is no block that is known"
    if has_hooks(block):
        return "it has hooks, or a forward of its own"
    for name, what in _NOT_UNDERSTOOD.items():
        if block._modules.get(name, block.__dict__.get(name)) is not None:  # getattr is slow where there is none
            return f"it has {what}"
    activation = getattr(block, RESNET.fusable_blocks[kind].activation)
    if not is_relu(activation):
        return f"it ends in {type(activation).__name__}, not in a ReLU without hooks"
    downsample = block.downsample
    if downsample is not None and (type(downsample) is not nn.Sequential or has_hooks(downsample) or not downsample):
        return "its downsample is not a torch.nn.Sequential of modules without hooks"
    return None


def class_name(module: nn.Module) -> str:
    return name_of_class(type(module))


def name_of_class(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def branch_modules(block: nn.Module) -> list[nn.Module]:
    modules = [block._modules[name] for name in RESNET.fusable_blocks[class_name(block)].branch]
    return [module for module in modules if type(module) is not nn.Identity]


def norm_tensors(norm: nn.Module, in_type: torch.dtype) -> tuple[Tensor, ...] | None:
    """Running mean and variance, weight and bias of ``norm`` if it need not be called for activations of a type: it is
    a batch normalization as they all are."""
    if type(norm) is not nn.BatchNorm2d or has_hooks(norm):
        return None
    # Out of the dictionaries, as attributes of modules take their time; but replicas of DataParallel have no others.
    buffers, parameters = norm._buffers, norm._parameters
    mean, variance = buffers.get("running_mean"), buffers.get("running_var")
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or bias is None:
        weight, bias = norm.weight, norm.bias
    if mean is None or variance is None or weight is None or bias is None:
        return None
    kind = mean.dtype
    if variance.dtype is not kind or weight.dtype is not kind or bias.dtype is not kind:
        return None
    if kind is not in_type and kind is not torch.float32:
        return None
    if norm.training:
        batches = buffers.get("num_batches_tracked")
        if batches is None or batches.dtype is not torch.int64 or batches.device != mean.device:
            return None
        tracked = norm.momentum is not None and norm.track_running_stats
        if not tracked or not torch.is_grad_enabled() or kind is not wide(in_type):
            return None
    return mean, variance, weight, bias


def unshifted_module(module: nn.Module) -> nn.Module:
    return module.shifted_module() if is_shifted(module) else module


def is_shifted(module: nn.Module) -> bool:
    return type(module) in (tsm.TemporalShift, tsam.TemporalShift) and not has_hooks(module)


def is_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not has_hooks(module)


def is_pool(module: nn.Module) -> bool:
    """That of a ResNet, whose window of 3x3 pixels moves by two."""
    if type(module) is not nn.MaxPool2d or has_hooks(module) or module.return_indices or module.ceil_mode:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(given in (size, (size, size)) for given, size in zip(sizes, (3, 2, 1, 1), strict=True))


def is_convolution(module: nn.Module) -> bool:
    """One whose input and output nobody else sees."""
    return type(module) is nn.Conv2d and not has_hooks(module)
