"""Temporal shift for free: a converted ResNet whose stream between residual blocks is kept in shifted form.

A residual block ends in ``x = relu(z + identity)`` and the next one begins with ``shift(x)``: a pass over the memory
that reads all of x and writes it again. But a shift moves whole values, so it commutes with what works value by value::

    shift(relu(z + identity)) = relu(shift(z) + shift(identity))

So the pass that is made anyway writes ``shift(x)`` in place of x. The few frames that the shift does not read (one of T
frames, of the channels that move) go to a tensor of their own, and both together are the next block's identity. The
same pass applies the batch normalization before it and, without gradients at the end of a stage, writes what the next
one's ``downsample`` reads, too. See README, "Shift for free".

Example::

    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
    tsm_jit.residual.fuse(net)  # same outputs, gradients and keys
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils.checkpoint import checkpoint

from tsm_jit import ops, tsam, tsm
from tsm_jit._families import resnet_stages
from tsm_jit._networks import ShiftedModule, has_global_hooks, has_hooks, unwrapped
from tsm_jit._residual_block import Layer, block_of_layers
from tsm_jit._residual_ops import (
    NO_SHIFT,
    Norm,
    applied_norm,
    end_in_both_forms,
    end_of_block,
    pixels_are_known,
    pool_of_relu_of_norm,
    relu_of_norm,
    relu_of_norm_,
    sums_are_in_kernel,
    wide,
)

# Of the blocks that are understood: the residual branch, as their forward calls it, to the norm that ends it; and the
# activation after the sum.
_BLOCKS = {
    "torchvision.models.resnet.BasicBlock": (("conv1", "bn1", "relu", "conv2", "bn2"), "relu"),
    "torchvision.models.resnet.Bottleneck": (("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"), "relu"),
    "timm.models.resnet.BasicBlock": (("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2"), "act2"),
    "timm.models.resnet.Bottleneck": (
        ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"),
        "act3",
    ),
}
_MOST_GROUPS = 31  # of a plan, that the kernels take
_NOT_UNDERSTOOD = {"se": "an attention, such as squeeze and excitation", "drop_path": "stochastic depth"}


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
    refused = {name: reason for name, block in blocks.items() if (reason := _refusal(block))}
    said = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    if len(refused) == len(blocks):
        raise ValueError(f"net must hold residual blocks that are understood, got none ({said})")
    if refused:
        warnings.warn(f"tsm_jit.residual.fuse left some blocks as they were ({said})", UserWarning, stacklevel=2)
    for stage in stages.values():
        stage.__class__ = Stage  # and not a new module: hooks, keys and references stay
    if _kind(net) in _NETWORKS and not isinstance(net, FusedNetwork):
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
        if not _fuses(x):
            return super().forward(x)
        return _run_all(list(self), _Stream(x, x))


class FusedNetwork(nn.Module):
    """Base of the classes of fused networks whose own forward is known: the stream is shifted between stages, too."""

    network: type[nn.Module]  # the class before
    stem: tuple[str, ...]

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _new_fused, (self.network,), *rest

    def _fused_features(self, x: Tensor) -> Tensor | None:
        """What the last stage returns; None if stages are to be called one by one, as something watches them."""
        stages = [getattr(self, name) for name in _STAGES]
        if not _fuses(x) or any(type(stage) is not Stage or has_hooks(stage) for stage in stages):
            return None
        blocks = [block for stage in stages for block in stage]
        return _run_all(blocks, _run_stem(*(getattr(self, name) for name in self.stem), x, blocks[0]))


class _FusedTorchvision(FusedNetwork):
    stem = ("conv1", "bn1", "relu", "maxpool")

    def _forward_impl(self, x: Tensor) -> Tensor:
        features = self._fused_features(x)
        if features is None:
            return super()._forward_impl(x)
        seen = _refusal(self.layer4[-1]) is not None
        return self.fc(torch.flatten(self.avgpool(features) if seen else _pooled(self.avgpool, features), 1))


class _FusedTimm(FusedNetwork):
    stem = ("conv1", "bn1", "act1", "maxpool")

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
    return type(network.__name__, (_NETWORKS[_kind_of(network)], network), {"network": network})


def _new_fused(network: type[nn.Module]) -> nn.Module:
    """For copies and pickles, which know no class that was made here."""
    kind = _fused_class(network)
    return kind.__new__(kind)


def _fuses(x: Tensor) -> bool:
    """Not what is exported, traced, transformed, or watched by hooks of all modules."""
    # Not torch.compiler.is_exporting, which is true of all that PyTorch 2.11 compiles.
    exporting = torch.compiler._is_exporting_flag
    compiled = is_dynamo_compiling() and not exporting and not ops.transforms_are_active()
    return isinstance(x, Tensor) and (ops.eager() or compiled) and not has_global_hooks()


class _Stream(NamedTuple):
    """What a block receives: the same activations for its first convolution, and for its sum or a convolution."""

    first: Tensor
    identity: Tensor
    unread: Tensor | None = None
    shift: str | None = None  # of `first`; None: plain
    step: int = 0  # 0: `identity` is in the form of `first`, else it is plain, every step-th row and column


def _run_all(blocks: list[nn.Module], stream: _Stream) -> Tensor:
    understood = [block if _refusal(block) is None else None for block in blocks]
    for block, same, following in zip(blocks, understood, [*understood[1:], None], strict=True):
        if same is not None:
            stream = _run(block, following, stream)
        else:
            x = block(stream.identity)
            stream = _Stream(x, x)
    return stream.identity


def _run_stem(
    conv: nn.Module, norm: nn.Module, relu: nn.Module, pool: nn.Module, x: Tensor, following: nn.Module
) -> _Stream:
    """What comes before the first block: norm, ReLU and pooling in one pass, into the forms that this block wants."""
    z = conv(x)
    if not _is_relu(relu) or not z.is_contiguous(memory_format=torch.channels_last) or z.shape[1] < 2:
        x = pool(relu(norm(z)))
    elif torch.is_grad_enabled():
        normed = None if is_compiling() else _norm(norm, z)  # compilers make one pass of them and of the pooling
        x = pool(relu(norm(z)) if normed is None else relu_of_norm(z, normed))
    elif not _is_pool(pool) or (normed := _norm(norm, z)) is None:
        x = pool(relu(norm(z)))
    else:
        shift, step = (None, 0) if _refusal(following) else _wanted(following, z)
        x, shifted, unread = pool_of_relu_of_norm(z, normed, shift, plain=shift is None or step > 0)
        if shift is not None:
            return _Stream(shifted, x, None, shift, 1) if step else _Stream(shifted, shifted, unread, shift)
    return _Stream(x, x)


def _run(block: nn.Module, following: nn.Module | None, stream: _Stream) -> _Stream:
    modules = _branch_modules(block)
    recorded = _recorded_layers([_unshifted(modules[0]), *modules[1:]], stream.first)
    identity, identity_norm, identity_shift = stream.identity, None, None if stream.step else stream.shift
    layer = None  # that makes the identity of what it is here
    if block.downsample is not None:
        identity_shift = None
        if recorded is None:
            identity, identity_norm = _downsampled(block.downsample, stream)
        else:
            identity, layer = _recorded_downsample(list(block.downsample), identity)
    wanted, step = _wanted(following, identity if layer is None else layer.like_output(identity))
    if identity_shift is not None and wanted != identity_shift:
        wanted = None  # one pass knows one shift
    unread = None if identity_shift is None else stream.unread
    shift = wanted or identity_shift or NO_SHIFT
    readers = 1 if following is None else 2
    if recorded is not None:
        first_shift = None
        if stream.shift is None and _is_shifted(modules[0]):
            first_shift = modules[0].shift_of(stream.first)
        x, unread = block_of_layers(*recorded, first_shift, identity, layer, unread, shift, wanted is not None, readers)
        return _Stream(x[-1], x[0], unread, wanted)
    end = (identity, identity_norm, unread, shift)
    z, z_norm = _branch(modules, stream)
    # A shifted stream is nobody else's, unless a module before kept it; a convolution keeps and returns nothing of its.
    own_identity = identity_shift is not None and _is_convolution(_unshifted(modules[0]))
    if wanted is not None and step:
        if pixels_are_known(z):
            shifted, x = end_in_both_forms(z, z_norm, *end, step, own_identity=own_identity)
            return _Stream(shifted, x, None, wanted, step)
        wanted = None
    own_z = z_norm is not None and _is_convolution(modules[-2])
    x, unread = end_of_block(
        z, z_norm, *end, wanted is not None, readers=readers, own_z=own_z, own_identity=own_identity
    )
    return _Stream(x[-1], x[0], unread, wanted)


def _downsampled(downsample: nn.Sequential, stream: _Stream) -> tuple[Tensor, Norm | None]:
    """The identity of a block without the norm that ends its ``downsample``, and that norm; as :func:`_deferred`."""
    x = stream.identity
    *before, last = downsample
    if stream.step > 1:  # the pixels that this convolution reads
        first, *before = before
        x = F.conv2d(x, first.weight, first.bias, groups=first.groups)
    for module in before:
        x = module(x)
    return _deferred(last, x)


def _recorded_downsample(modules: list[nn.Module], x: Tensor) -> tuple[Tensor, Layer | None]:
    """The identity of a recorded block, made of the plain stream ``x``, but for the layer that ends the ``modules`` of
    its ``downsample``, and this layer; or all of it, and None."""
    for module in modules[:-2]:
        x = module(x)
    last = modules[-2:]
    recorded = _recorded_layers(last, x)
    if recorded is not None:
        x, (layer,) = recorded
        return x, layer
    for module in last:
        x = module(x)
    return x, None


def _step(downsample: nn.Sequential, x: Tensor) -> int:
    """Which rows and columns of the stream ``x`` it reads: every so many-th. All of them where it has no norm to apply,
    and is the same to the bit: a convolution of fewer pixels may add in another order."""
    first, last = downsample[0], downsample[-1]
    if not _is_convolution(first) or first.kernel_size != (1, 1) or first.padding != (0, 0):
        return 1
    return first.stride[0] if first.stride[0] == first.stride[1] and _applied_parts(last, x.dtype) else 1


def _recorded_layers(modules: list[nn.Module], x: Tensor) -> tuple[Tensor, list[Layer]] | None:
    """``x``, of the type in which ``modules`` compute, and their layers. None if the modules are to be called: nothing
    is recorded, no kernel sums by channel, or they are not convolution, norm and ReLU, again and again."""
    if not torch.is_grad_enabled() or not sums_are_in_kernel(x) or x.shape[0] < 2:
        return None
    device, in_type = x.device.type, x.dtype
    autocast = torch.is_autocast_enabled(device) and in_type is not torch.float64
    if autocast:
        in_type = torch.get_autocast_dtype(device)
    if len(modules) % 3 != 2 or not all(map(_is_relu, modules[2::3])):
        return None
    layers = []
    for c, norm in zip(modules[::3], modules[1::3], strict=True):
        if not _is_convolution(c) or c.bias is not None or c.padding_mode != "zeros" or c.out_channels < 2:
            return None
        if any(isinstance(each, (int, str)) for each in (c.stride, c.padding, c.dilation)):  # set by hand, or "same"
            return None
        weight, parts = c.weight, _applied_parts(norm, in_type)
        if parts is None or parts[0].dtype is not wide(in_type):
            return None
        if not (weight.dtype is in_type or (autocast and weight.dtype is torch.float32)):
            return None
        layers.append(Layer(c, weight, norm, parts))
    return x if x.dtype is in_type else x.to(in_type), layers


def _branch(modules: list[nn.Module], stream: _Stream) -> tuple[Tensor, Norm | None]:
    """The residual branch of these modules without its last norm, and that norm; or the branch with it, and None."""
    conv1, *modules, last = modules
    if stream.shift is not None:
        z = conv1.shifted_module()(stream.first)
    elif _is_shifted(conv1) and torch.is_grad_enabled() and is_compiling():
        # A compiler keeps what it is not told to compute again: here the shifted input, beside the input.
        shift = conv1.shift_of(stream.first)
        first = checkpoint(ops.temporal_shift, stream.first, shift, use_reentrant=False, preserve_rng_state=False)
        z = conv1.shifted_module()(first)
    elif _is_shifted(conv1):  # in the first block of a stage: recorded, as in place, it keeps no second activation
        recorded = True if torch.is_grad_enabled() else None
        z = conv1.call_shifted(stream.first, conv1.shift_of(stream.first), inplace=recorded)
    else:
        z = conv1(stream.first)
    before = _unshifted(conv1)
    in_place = not torch.is_grad_enabled()
    relu_is_done = False
    for module, after in zip(modules, (*modules[1:], last), strict=True):
        norm = _norm(module, z) if in_place and _is_relu(after) and _is_convolution(before) else None
        if norm is not None:
            z = relu_of_norm_(z, norm)
        elif not relu_is_done:
            z = module(z)
        relu_is_done = norm is not None
        before = module
    return _deferred(last, z)


def _branch_modules(block: nn.Module) -> list[nn.Module]:
    modules = [block._modules[name] for name in _BLOCKS[_kind(block)][0]]
    return [module for module in modules if type(module) is not nn.Identity]


def _wanted(following: nn.Module | None, x: Tensor) -> tuple[str | None, int]:
    """The shift in whose form the next block, if understood, reads a stream like ``x``; None if it reads it plain. And
    if its identity is made of the plain one as well, of which rows and columns; else 0."""
    if following is None or not _is_shifted(following.conv1):
        return None, 0
    shift = following.conv1.shift_of(x)
    if shift.count(",") >= _MOST_GROUPS:
        return None, 0
    if following.downsample is None:
        return shift, 0
    # Recorded, x alone is kept, and shifted again backward.
    return (None, 0) if torch.is_grad_enabled() else (shift, _step(following.downsample, x))


# --- batch normalization ---------------------------------------------------------------------------------------------


def _deferred(norm: nn.Module, x: Tensor) -> tuple[Tensor, Norm | None]:
    """``x`` and the norm that the end of the block is to apply to it; or the normalized ``x``, and None."""
    parts = _norm(norm, x)
    return (norm(x), None) if parts is None else (x, parts)


def _norm(norm: nn.Module, x: Tensor) -> Norm | None:
    """The batch normalization ``norm`` of ``x``, its running statistics updated; None if it has to be called."""
    parts = _applied_parts(norm, x.dtype)
    if parts is None:
        return None
    recorded = torch.is_grad_enabled()
    if recorded and not sums_are_in_kernel(x):  # which its gradient takes
        return None
    if norm.training and x.numel() == x.shape[1]:  # of which there are no statistics: an error, when called
        return None
    return applied_norm(norm, parts, x, recorded)


def _applied_parts(norm: nn.Module, in_type: torch.dtype) -> tuple[Tensor, ...] | None:
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


# --- what is understood ----------------------------------------------------------------------------------------------


def _refusal(block: nn.Module) -> str | None:
    """Why ``block`` has to be called as it is; None if what it does is known."""
    kind = _kind(block)
    if kind not in _BLOCKS:
        return f"{kind} is no block that is known"
    if has_hooks(block):
        return "it has hooks, or a forward of its own"
    for name, what in _NOT_UNDERSTOOD.items():
        if block._modules.get(name, block.__dict__.get(name)) is not None:  # getattr is slow where there is none
            return f"it has {what}"
    activation = getattr(block, _BLOCKS[kind][1])
    if not _is_relu(activation):
        return f"it ends in {type(activation).__name__}, not in a ReLU without hooks"
    downsample = block.downsample
    if downsample is not None and (type(downsample) is not nn.Sequential or has_hooks(downsample) or not downsample):
        return "its downsample is not a torch.nn.Sequential of modules without hooks"
    return None


def _kind(module: nn.Module) -> str:
    return _kind_of(type(module))


def _kind_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _unshifted(module: nn.Module) -> nn.Module:
    return module.shifted_module() if _is_shifted(module) else module


def _is_shifted(module: nn.Module) -> bool:
    return type(module) in (tsm.TemporalShift, tsam.TemporalShift) and not has_hooks(module)


def _is_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not has_hooks(module)


def _is_pool(module: nn.Module) -> bool:
    """That of a ResNet, whose window of 3x3 pixels moves by two."""
    if type(module) is not nn.MaxPool2d or has_hooks(module) or module.return_indices or module.ceil_mode:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(given in (size, (size, size)) for given, size in zip(sizes, (3, 2, 1, 1), strict=True))


def _is_convolution(module: nn.Module) -> bool:
    """One whose input and output nobody else sees."""
    return type(module) is nn.Conv2d and not has_hooks(module)
