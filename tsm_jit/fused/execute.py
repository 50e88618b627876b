"""How the stream of activations runs through fused residual blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils.checkpoint import checkpoint

from tsm_jit import ops
from tsm_jit.fused.autograd import (
    applied_norm,
    end_in_both_forms,
    end_of_block,
    pool_of_relu_of_norm,
    relu_of_norm,
    relu_of_norm_,
)
from tsm_jit.fused.block import Layer, block_of_layers
from tsm_jit.fused.match import (
    branch_modules,
    is_convolution,
    is_pool,
    is_relu,
    is_shifted,
    norm_tensors,
    unshifted_module,
    why_unsupported,
)
from tsm_jit.modules.base import has_global_hooks
from tsm_jit.ops.compat import is_exporting
from tsm_jit.ops.residual import NO_SHIFT, Norm, pixels_are_known, sums_are_in_kernel, wide
from tsm_jit.plans import decode

_MOST_GROUPS = 31  # of a plan, that the kernels take


def fuses(x: Tensor) -> bool:
    """Not what is exported, traced, transformed, or watched by hooks of all modules."""
    compiled = is_dynamo_compiling() and not is_exporting() and not ops.transforms_are_active()
    return isinstance(x, Tensor) and (ops.eager() or compiled) and not has_global_hooks()


class Stream(NamedTuple):
    """What a block receives: the same activations for its first convolution, and for its sum or a convolution."""

    first: Tensor
    identity: Tensor
    unread: Tensor | None = None
    shift: str | None = None  # of `first`; None: plain
    step: int = 0  # 0: `identity` is in the form of `first`, else it is plain, every step-th row and column


def run_blocks(blocks: list[nn.Module], stream: Stream) -> Tensor:
    understood = [block if why_unsupported(block) is None else None for block in blocks]
    for block, same, following in zip(blocks, understood, [*understood[1:], None], strict=True):
        if same is not None:
            stream = _run(block, following, stream)
        else:
            x = block(stream.identity)
            stream = Stream(x, x)
    return stream.identity


def run_stem(
    conv: nn.Module, norm: nn.Module, relu: nn.Module, pool: nn.Module, x: Tensor, following: nn.Module
) -> Stream:
    """What comes before the first block: norm, ReLU and pooling in one pass, into the forms that this block wants."""
    z = conv(x)
    if not is_relu(relu) or not z.is_contiguous(memory_format=torch.channels_last) or z.shape[1] < 2:
        x = pool(relu(norm(z)))
    elif torch.is_grad_enabled():
        normed = None if is_compiling() else _norm(norm, z)  # compilers make one pass of them and of the pooling
        x = pool(relu(norm(z)) if normed is None else relu_of_norm(z, normed))
    elif not is_pool(pool) or (normed := _norm(norm, z)) is None:
        x = pool(relu(norm(z)))
    else:
        shift, step = (None, 0) if why_unsupported(following) else _wanted(following, z)
        x, shifted, unread = pool_of_relu_of_norm(z, normed, shift, plain=shift is None or step > 0)
        if shift is not None:
            return Stream(shifted, x, None, shift, 1) if step else Stream(shifted, shifted, unread, shift)
    return Stream(x, x)


def _run(block: nn.Module, following: nn.Module | None, stream: Stream) -> Stream:
    modules = branch_modules(block)
    recorded = _recorded_layers([unshifted_module(modules[0]), *modules[1:]], stream.first)
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
        if stream.shift is None and is_shifted(modules[0]):
            first_shift = modules[0].shift_of(stream.first)
        x, unread = block_of_layers(*recorded, first_shift, identity, layer, unread, shift, wanted is not None, readers)
        return Stream(x[-1], x[0], unread, wanted)
    end = (identity, identity_norm, unread, shift)
    z, z_norm = _branch(modules, stream)
    # A shifted stream is nobody else's, unless a module before kept it; a convolution keeps and returns nothing of its.
    own_identity = identity_shift is not None and is_convolution(unshifted_module(modules[0]))
    if wanted is not None and step:
        if pixels_are_known(z):
            shifted, x = end_in_both_forms(z, z_norm, *end, step, own_identity=own_identity)
            return Stream(shifted, x, None, wanted, step)
        wanted = None
    own_z = z_norm is not None and is_convolution(modules[-2])
    x, unread = end_of_block(
        z, z_norm, *end, wanted is not None, readers=readers, own_z=own_z, own_identity=own_identity
    )
    return Stream(x[-1], x[0], unread, wanted)


def _downsampled(downsample: nn.Sequential, stream: Stream) -> tuple[Tensor, Norm | None]:
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
    if not is_convolution(first) or first.kernel_size != (1, 1) or first.padding != (0, 0):
        return 1
    return first.stride[0] if first.stride[0] == first.stride[1] and norm_tensors(last, x.dtype) else 1


def _recorded_layers(modules: list[nn.Module], x: Tensor) -> tuple[Tensor, list[Layer]] | None:
    """``x``, of the type in which ``modules`` compute, and their layers. None if the modules are to be called: nothing
    is recorded, no kernel sums by channel, or they are not convolution, norm and ReLU, again and again."""
    if not torch.is_grad_enabled() or not sums_are_in_kernel(x) or x.shape[0] < 2:
        return None
    device, in_type = x.device.type, x.dtype
    autocast = torch.is_autocast_enabled(device) and in_type is not torch.float64
    if autocast:
        in_type = torch.get_autocast_dtype(device)
    if len(modules) % 3 != 2 or not all(map(is_relu, modules[2::3])):
        return None
    layers = []
    for c, norm in zip(modules[::3], modules[1::3], strict=True):
        if not is_convolution(c) or c.bias is not None or c.padding_mode != "zeros" or c.out_channels < 2:
            return None
        if any(isinstance(each, (int, str)) for each in (c.stride, c.padding, c.dilation)):  # set by hand, or "same"
            return None
        weight, parts = c.weight, norm_tensors(norm, in_type)
        if parts is None or parts[0].dtype is not wide(in_type):
            return None
        if not (weight.dtype is in_type or (autocast and weight.dtype is torch.float32)):
            return None
        layers.append(Layer(c, weight, norm, parts))
    return x if x.dtype is in_type else x.to(in_type), layers


def _branch(modules: list[nn.Module], stream: Stream) -> tuple[Tensor, Norm | None]:
    """The residual branch of these modules without its last norm, and that norm; or the branch with it, and None."""
    conv1, *modules, last = modules
    if stream.shift is not None:
        z = conv1.shifted_module()(stream.first)
    elif is_shifted(conv1) and torch.is_grad_enabled() and is_compiling():
        # A compiler keeps what it is not told to compute again: here the shifted input, beside the input.
        shift = conv1.shift_of(stream.first)
        first = checkpoint(ops.temporal_shift, stream.first, shift, use_reentrant=False, preserve_rng_state=False)
        z = conv1.shifted_module()(first)
    elif is_shifted(conv1):  # in the first block of a stage: recorded, as in place, it keeps no second activation
        recorded = True if torch.is_grad_enabled() else None
        z = conv1.call_shifted(stream.first, conv1.shift_of(stream.first), inplace=recorded)
    else:
        z = conv1(stream.first)
    before = unshifted_module(conv1)
    in_place = not torch.is_grad_enabled()
    relu_is_done = False
    for module, after in zip(modules, (*modules[1:], last), strict=True):
        norm = _norm(module, z) if in_place and is_relu(after) and is_convolution(before) else None
        if norm is not None:
            z = relu_of_norm_(z, norm)
        elif not relu_is_done:
            z = module(z)
        relu_is_done = norm is not None
        before = module
    return _deferred(last, z)


def _wanted(following: nn.Module | None, x: Tensor) -> tuple[str | None, int]:
    """The shift in whose form the next block, if understood, reads a stream like ``x``; None if it reads it plain. And
    if its identity is made of the plain one as well, of which rows and columns; else 0."""
    if following is None or not is_shifted(following.conv1):
        return None, 0
    shift = following.conv1.shift_of(x)
    if len(decode(shift).plan) > _MOST_GROUPS:
        return None, 0
    if following.downsample is None:
        return shift, 0
    # Recorded, x alone is kept, and shifted again backward.
    return (None, 0) if torch.is_grad_enabled() else (shift, _step(following.downsample, x))


def _deferred(norm: nn.Module, x: Tensor) -> tuple[Tensor, Norm | None]:
    """``x`` and the norm that the end of the block is to apply to it; or the normalized ``x``, and None."""
    parts = _norm(norm, x)
    return (norm(x), None) if parts is None else (x, parts)


def _norm(norm: nn.Module, x: Tensor) -> Norm | None:
    """The batch normalization ``norm`` of ``x``, its running statistics updated; None if it has to be called."""
    parts = norm_tensors(norm, x.dtype)
    if parts is None:
        return None
    recorded = torch.is_grad_enabled()
    if recorded and not sums_are_in_kernel(x):  # which its gradient takes
        return None
    if norm.training and x.numel() == x.shape[1]:  # of which there are no statistics: an error, when called
        return None
    return applied_norm(norm, parts, x, recorded)
