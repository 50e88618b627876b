"""Runs the blocks of a fused network.

A :class:`Stream` passes activations from block to block. The next block's first convolution reads them shifted. Its
identity may be in either layout. Under ``no_grad`` the activations are also shifted between stages. With gradients they
are unshifted there, because the first block of a stage then saves only its unshifted input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils.checkpoint import checkpoint

from tsm_jit import ops
from tsm_jit.fused.autograd import (
    norm_add_relu,
    norm_add_relu_both_layouts,
    norm_of,
    norm_relu,
    norm_relu_,
    norm_relu_max_pool,
)
from tsm_jit.fused.block import Layer, residual_block
from tsm_jit.fused.match import (
    BlockLayers,
    block_layers,
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
from tsm_jit.ops.conv_relu import conv_relu
from tsm_jit.ops.residual import NO_SHIFT, Norm, acc_dtype, has_channel_sums, has_pixel_index
from tsm_jit.plans import decode

_MAX_GROUPS = 32  # the limit of the kernels for a plan, including the group of channels that do not move


def fuses(x: Tensor) -> bool:
    """Whether blocks run fused: not under export, tracing or ``torch.func``, or with global module hooks."""
    compiled = is_dynamo_compiling() and not is_exporting() and not ops.transforms_are_active()
    return isinstance(x, Tensor) and (ops.eager() or compiled) and not has_global_hooks()


class Stream(NamedTuple):
    """The input of a block, for its first convolution and for its identity."""

    first: Tensor
    identity: Tensor
    boundary: Tensor | None = None  # the boundary frames of a shifted identity
    shift: str | None = None  # the shift of `first`; None: unshifted
    step: int = 0  # 0: `identity` has the layout of `first`; else it is unshifted, with every step-th row and column


def run_blocks(blocks: list[nn.Module], stream: Stream) -> Tensor:
    """Runs the blocks, supported ones fused. Returns unshifted activations."""
    supported = [block_layers(block) if why_unsupported(block) is None else None for block in blocks]
    for block, layers, following in zip(blocks, supported, [*supported[1:], None], strict=True):
        if layers is not None:
            stream = _run(layers, following, stream)
        else:
            x = block(stream.identity)
            stream = Stream(x, x)
    return stream.identity


def run_stem(modules: list[nn.Module], x: Tensor, following: nn.Module) -> Stream:
    """Runs the stem of the network. Norm, ReLU and pooling, its last modules, are one kernel if possible."""
    *before, norm, relu, pool = modules
    z = x
    for module in before:
        z = module(z)
    if not is_relu(relu) or not z.is_contiguous(memory_format=torch.channels_last) or z.shape[1] < 2:
        x = pool(relu(norm(z)))
    elif torch.is_grad_enabled():
        normed = None if is_compiling() else _norm(norm, z)  # Inductor fuses them with the pooling
        x = pool(relu(norm(z)) if normed is None else norm_relu(z, normed))
    elif not is_pool(pool) or (normed := _norm(norm, z)) is None:
        x = pool(relu(norm(z)))
    else:
        shift, step = (None, 0) if why_unsupported(following) else _input_layout(block_layers(following), z)
        x, shifted, boundary = norm_relu_max_pool(z, normed, shift, unshifted=shift is None or step > 0)
        if shift is not None:
            return Stream(shifted, x, None, shift, 1) if step else Stream(shifted, shifted, boundary, shift)
    return Stream(x, x)


def _run(block: BlockLayers, following: BlockLayers | None, stream: Stream) -> Stream:
    """Runs one block. Its output has the layout that the following block reads."""
    modules, downsample = block
    if is_folded(block):
        out = _run_folded(block, stream)
        return Stream(out, out)
    in_one = _layers([unshifted_module(modules[0]), *modules[1:]], stream.first)
    identity, identity_norm = stream.identity, None
    identity_shift = None if stream.step or downsample else stream.shift
    downsample_layer = None
    if downsample and in_one is None:
        identity, identity_norm = _downsample(downsample, stream)
    elif downsample:
        identity, downsample_layer = _downsample_but_last_layer(downsample, identity)

    like_output = identity if downsample_layer is None else downsample_layer.like_output(identity)
    next_shift, step = _input_layout(following, like_output)
    if identity_shift is not None and next_shift != identity_shift:
        next_shift = None  # a kernel supports one shift
    boundary = None if identity_shift is None else stream.boundary
    shift = next_shift or identity_shift or NO_SHIFT
    num_consumers = 1 if following is None else 2
    if in_one is not None:
        conv1 = modules[0]
        first_shift = conv1.shift_of(stream.first) if stream.shift is None and is_shifted(conv1) else None
        x, boundary = residual_block(
            *in_one,
            first_shift,
            identity,
            downsample_layer,
            boundary,
            shift,
            next_shift is not None,
            num_consumers,
        )
        return Stream(x[-1], _marked(x[0], first_shift or stream.shift), boundary, next_shift)

    z, z_norm = _branch(modules, stream)
    inputs = (z, z_norm, identity, identity_norm, boundary, shift)
    # Nothing else uses a shifted identity: under no_grad, a convolution does not keep its input.
    owns_identity = identity_shift is not None and is_convolution(unshifted_module(modules[0]))
    if next_shift is not None and step:
        if has_pixel_index(z):
            shifted, unshifted = norm_add_relu_both_layouts(*inputs, step, may_overwrite_identity=owns_identity)
            return Stream(shifted, unshifted, None, next_shift, step)
        next_shift = None
    x, boundary = norm_add_relu(
        *inputs,
        next_shift is not None,
        num_consumers=num_consumers,
        may_overwrite_z=z_norm is not None and is_convolution(modules[-2]),
        may_overwrite_identity=owns_identity,
    )
    return Stream(x[-1], _marked(x[0], stream.shift), boundary, next_shift)


def _marked(x: Tensor, shift: str | None) -> Tensor:
    """Returns the output ``x`` of a block whose first convolution reads its input with ``shift``."""
    return x if shift is None else ops.save_clip_length_mark(x, shift)


def is_folded(block: BlockLayers) -> bool:
    """Whether :func:`_run_folded` can run ``block``: its norms are folded, and it is inference without autocast."""
    if torch.is_grad_enabled() or len(block.branch) % 2 == 0:  # decides for most blocks that have norms, at no cost
        return False
    convolutions = [unshifted_module(module) for module in block.branch[::2]]
    if not all(map(is_relu, block.branch[1::2])) or not all(map(_has_bias, convolutions)):
        return False
    device: Any = convolutions[0].weight.device
    return device.type == "meta" or not torch.is_autocast_enabled(device.type)  # PyTorch raises for "meta"


def _has_bias(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution with a bias and zero padding, given in numbers."""
    if not is_convolution(module) or module.bias is None or module.padding_mode != "zeros":
        return False
    return all(isinstance(each, tuple) for each in (module.stride, module.padding, module.dilation))


def _run_folded(block: BlockLayers, stream: Stream) -> Tensor:
    """Runs a block whose norms are folded. Each ReLU, and the addition, is part of the convolution before it."""
    identity = stream.identity
    for module in block.downsample:
        identity = module(identity)
    x = stream.first
    convolutions = block.branch[::2]
    for convolution in convolutions:
        shift = convolution.shift_of(x) if is_shifted(convolution) else None
        add = identity if convolution is convolutions[-1] else None
        x = conv_relu(x, unshifted_module(convolution), add, shift)  # type: ignore[arg-type]
    return x


def _input_layout(following: BlockLayers | None, x: Tensor) -> tuple[str | None, int]:
    """Returns ``shift`` and ``step`` of the :class:`Stream` that the following block reads, for a stream like ``x``."""
    if following is None:
        return None, 0
    conv1, *_ = following.branch
    if not is_shifted(conv1) or is_folded(following):
        return None, 0
    shift = conv1.shift_of(x)
    if len(decode(shift).plan) >= _MAX_GROUPS:
        return None, 0
    if not following.downsample:
        return shift, 0
    return (None, 0) if torch.is_grad_enabled() else (shift, _step(following.downsample, x))


def _step(downsample: list[nn.Module], x: Tensor) -> int:
    """Returns the stride with which ``downsample`` reads rows and columns of ``x``.

    It is 1 if the norm of ``downsample`` is not fused. Then results must be bit-identical to the unfused network, but a
    convolution of fewer pixels may add in another order.
    """
    first, last = downsample[0], downsample[-1]
    if not is_convolution(first) or first.kernel_size != (1, 1) or first.padding != (0, 0):
        return 1
    return first.stride[0] if first.stride[0] == first.stride[1] and norm_tensors(last, x.dtype) else 1


# --- the identity ----------------------------------------------------------------------------------------------------


def _downsample(modules: list[nn.Module], stream: Stream) -> tuple[Tensor, Norm | None]:
    """Runs ``downsample``. Returns the identity, and its last norm if ``norm_add_relu`` can apply it."""
    x = stream.identity
    if stream.step > 1:  # the stream only has the pixels that this strided convolution reads
        first: Any = modules[0]
        x = F.conv2d(x, first.weight, first.bias, groups=first.groups)
        modules = modules[1:]
    for module in modules[:-1]:
        x = module(x)
    return _deferred_norm(modules[-1], x)


def _downsample_but_last_layer(modules: list[nn.Module], x: Tensor) -> tuple[Tensor, Layer | None]:
    """Returns the input of the last layer of ``downsample`` and this layer, or the identity and None if unsupported."""
    for module in modules[:-2]:
        x = module(x)
    last = modules[-2:]
    in_one = _layers(last, x)
    if in_one is not None:
        x, (layer,) = in_one
        return x, layer
    for module in last:
        x = module(x)
    return x, None


# --- the residual branch ---------------------------------------------------------------------------------------------


def _layers(modules: list[nn.Module], x: Tensor) -> tuple[Tensor, list[Layer]] | None:
    """Returns ``x`` in the dtype in which ``modules`` compute, and the layers for ``residual_block``.

    Returns None if ``residual_block`` cannot be used. It needs autograd, kernels for sums per channel, and modules that
    alternate as convolution, norm, ReLU.
    """
    if not torch.is_grad_enabled() or not has_channel_sums(x) or x.shape[0] < 2:
        return None
    device, dtype = x.device.type, x.dtype
    autocast = torch.is_autocast_enabled(device) and dtype is not torch.float64
    if autocast:
        dtype = torch.get_autocast_dtype(device)
    if len(modules) % 3 != 2 or not all(map(is_relu, modules[2::3])):
        return None
    layers: list[Layer] = []
    for c, norm in zip(modules[::3], modules[1::3], strict=True):
        if not is_convolution(c) or c.bias is not None or c.padding_mode != "zeros" or c.out_channels < 2:
            return None
        if any(isinstance(each, (int, str)) for each in (c.stride, c.padding, c.dilation)):  # set by hand, or "same"
            return None
        tensors = norm_tensors(norm, dtype)
        if tensors is None or tensors[0].dtype is not acc_dtype(dtype):
            return None
        if not (c.weight.dtype is dtype or (autocast and c.weight.dtype is torch.float32)):
            return None
        layers.append(Layer(c, c.weight, norm, tensors))  # type: ignore[arg-type]
    return x if x.dtype is dtype else x.to(dtype), layers


def _branch(modules: list[nn.Module], stream: Stream) -> tuple[Tensor, Norm | None]:
    """Runs the residual branch. Returns its output, and its last norm if ``norm_add_relu`` can apply it."""
    conv1, *modules, last = modules
    z = _first(conv1, stream)
    before = unshifted_module(conv1)
    may_overwrite = not torch.is_grad_enabled()
    relu_is_done = False
    for module, after in zip(modules, [*modules, last][1:], strict=True):
        norm = _norm(module, z) if may_overwrite and is_relu(after) and is_convolution(before) else None
        if norm is not None:
            z = norm_relu_(z, norm)
        elif not relu_is_done:
            z = module(z)
        relu_is_done = norm is not None
        before = module
    return _deferred_norm(last, z)


def _first(conv1: nn.Module, stream: Stream) -> Tensor:
    """Calls the first convolution of a block. Shifts its input first if the stream is unshifted."""
    if stream.shift is not None:
        return conv1.shifted_module()(stream.first)  # type: ignore[operator]
    if not is_shifted(conv1):
        return conv1(stream.first)
    shift = conv1.shift_of(stream.first)
    if torch.is_grad_enabled() and is_compiling():  # compilers would save both the input and the shifted input
        first = checkpoint(ops.temporal_shift, stream.first, shift, use_reentrant=False, preserve_rng_state=False)
        return ops.save_clip_length_mark(conv1.shifted_module()(first), shift)
    inplace = True if torch.is_grad_enabled() else None  # saves no second activation
    return conv1.call_shifted(stream.first, shift, inplace=inplace)


# --- batch normalization ---------------------------------------------------------------------------------------------


def _deferred_norm(norm: nn.Module, x: Tensor) -> tuple[Tensor, Norm | None]:
    """Returns ``x`` and a norm for ``norm_add_relu`` to apply, or the normalized ``x`` and None."""
    deferred = _norm(norm, x)
    return (norm(x), None) if deferred is None else (x, deferred)


def _norm(norm: nn.Module, x: Tensor) -> Norm | None:
    """Returns the batch normalization of ``x`` and updates its running statistics; None if kernels lack support."""
    tensors = norm_tensors(norm, x.dtype)
    if tensors is None:
        return None
    requires_grad = torch.is_grad_enabled()
    if requires_grad and not has_channel_sums(x):  # the gradient needs sums per channel
        return None
    if norm.training and x.numel() == x.shape[1]:  # PyTorch raises an error for statistics of one value
        return None
    return norm_of(norm, tensors, x, requires_grad)  # type: ignore[arg-type]
