"""A whole residual block that is recorded, for ``residual.py``: its layers, and its end. One function of autograd.

What PyTorch records operation by operation costs the host more than a small batch costs the GPU; so does a block that
Python puts together, which is why its parts are operators:

- ``residual_block`` is the forward; it returns what the backward needs as well. The convolution and the norm that end
  ``downsample`` are one of its layers, if they are as those of the residual branch;
- ``residual_end_backward`` (of ``_residual_ops.py``) and ``residual_block_backward`` are the backward of its end and of
  the residual branch. Two, so that in between what only the end needs is freed; and for the same reason the convolution
  of ``downsample`` is differentiated after them;
- ``cast``, under autocast: all weights of a block by one launch, and their gradients by another.

And a norm with its ReLU is one pass here, as the end of a block is; backward, its sign is computed again, and not read.
Compilers are given the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from tsm_jit.fused.autograd import applied_norm, end_of_block, for_readers, relu_of_norm
from tsm_jit.ops.residual import NO_SHIFT, Norm, Operand, gradients_of_end
from tsm_jit.ops.residual_block import (
    block_backward,
    block_forward,
    cast_all,
    convolve,
    convolve_backward,
    raising_out_of_memory,
)


class Layer(NamedTuple):
    """A convolution without bias, and the batch normalization of what it makes; with the tensors of both."""

    convolution: nn.Conv2d
    weight: Tensor
    norm: nn.BatchNorm2d
    norm_parts: tuple[Tensor, ...]  # running mean and variance, weight and bias

    def like_output(self, x: Tensor) -> Tensor:
        """Of the frames, channels and type that it makes of the activations ``x``; without values."""
        return x.new_empty((x.shape[0], self.convolution.out_channels, 1, 1), device="meta")


def block_of_layers(
    x: Tensor,
    layers: Sequence[Layer],
    first_shift: str | None,
    identity: Tensor,
    downsample: Layer | None,
    unread: Tensor | None,
    shift: str,
    shifted: bool,
    readers: int,
) -> tuple[list[Tensor], Tensor | None]:
    """:func:`tsm_jit._residual_ops.end_of_block` of what ``layers`` make of ``x``, differentiable once.

    Args:
        x: ``[N*T, C, H, W]`` in channels_last, of the type in which the layers compute.
        layers: all but the last are followed by a ReLU.
        first_shift: of ``x``, encoded. Then x itself is what is kept, and it is shifted again for the backward; and the
            first layer's ReLU is made again as well, which pays for all unread frames of a network.
        identity: or what ``downsample`` makes it of.
        unread, shift, shifted, readers: as there.
    """
    if identity.dtype is not x.dtype:
        identity, unread = identity.to(x.dtype), None if unread is None else unread.to(x.dtype)
    if downsample is not None:
        layers = [*layers, downsample]
    how = (layers, downsample is not None, first_shift or "", shift, shifted, readers)
    if is_compiling():
        return _in_parts(x, identity, unread, how)
    parameters = [part for layer in layers for part in (layer.weight, *layer.norm_parts[2:])]
    unread_out, *out = _Block.apply(x, identity, unread, how, *parameters)
    return out, unread_out if shifted else None


def _in_parts(x: Tensor, identity: Tensor, unread: Tensor | None, how: tuple) -> tuple[list[Tensor], Tensor | None]:
    """:class:`_Block` for compilers: their code costs the host nothing between two operators, and has no Python to
    save."""
    layers, downsample, first_shift, shift, shifted, readers = how
    weights = _cast_like(x, [layer.weight for layer in layers])

    def convolved(k: int, x: Tensor, relu_of: tuple[Tensor, Norm] | None = None) -> tuple[Tensor, Norm]:
        c, _, module, parts = layers[k]
        how = (*c.stride, *c.padding, *c.dilation, c.groups)
        if k == 0 and first_shift:
            z = _ConvolutionOfShift.apply(x, first_shift, weights[k], how)
        elif relu_of is not None:
            z, norm = relu_of
            z = _ConvolutionOfRelu.apply(x, weights[k], how, norm.epsilon, z, *norm[:4])
        else:
            z = convolve(x, weights[k], how)
        z = z.contiguous(memory_format=torch.channels_last)
        return z, applied_norm(module, parts, z, recorded=True)

    last = len(layers) - 1 - downsample
    made_again = None
    for k in range(last):
        z, norm = convolved(k, x, made_again)
        x = relu_of_norm(z, norm)
        made_again = (z, norm) if k == 0 and first_shift else None
    z, norm = convolved(last, x, made_again)
    identity, identity_norm = convolved(last + 1, identity) if downsample else (identity, None)
    return end_of_block(z, norm, identity, identity_norm, unread, shift, shifted, readers=readers)


def _cast_like(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    if all(weight.dtype is x.dtype for weight in weights):
        return weights
    trained = [weight for weight in weights if weight.requires_grad]
    made = iter(_Cast.apply(x.dtype, *trained) if trained else ())
    return [next(made) if weight.requires_grad else weight.to(x.dtype) for weight in weights]


class _Cast(Function):
    @staticmethod
    def forward(ctx, dtype, *weights):
        return tuple(torch.ops.tsm_jit.cast.default(weights, dtype))

    @staticmethod
    def backward(ctx, *grads):
        return None, *torch.ops.tsm_jit.cast.default(grads, torch.float32)  # what autocast casts is of that type


class _ConvolutionOfShift(Function):
    """Of ``x``, which is kept, and shifted again backward; and the adjoint overwrites the gradient, which is new."""

    @staticmethod
    def forward(ctx, x, shift, weight, how):
        ctx.how = shift, how
        ctx.save_for_backward(x, weight)
        return convolve(torch.ops.tsm_jit.temporal_shift.kernel(x, shift), weight, how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        shift, how = ctx.how
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if wanted[1]:  # or else nobody reads its values
            x = torch.ops.tsm_jit.temporal_shift.again(x, shift)
        of_x, of_weight = convolve_backward(grad, x, weight, how, *wanted)
        if of_x is not None:
            torch.ops.tsm_jit.temporal_shift_backward_.default(of_x, shift)
        return of_x, None, of_weight, None


class _ConvolutionOfRelu(Function):
    """Of ``x``, which is ``relu(norm(z))``, and not kept, but made of z again backward."""

    @staticmethod
    def forward(ctx, x, weight, how, epsilon, z, *norm):
        ctx.how = how, epsilon
        ctx.save_for_backward(weight, z, *norm)
        return convolve(x, weight, how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, x, *norm = ctx.saved_tensors
        how, epsilon = ctx.how
        if ctx.needs_input_grad[1]:  # or else nobody reads its values
            x, _ = torch.ops.tsm_jit.residual_shift.again(x, norm, epsilon, None, [], 0.0, None, NO_SHIFT, False)
        gradients = convolve_backward(grad, x, weight, how, *ctx.needs_input_grad[:2])
        return *gradients, *[None] * (len(ctx.needs_input_grad) - 2)


class _Block(Function):
    @staticmethod
    def forward(ctx, x, identity, unread, how, *parameters):
        layers, downsample, first_shift, shift, shifted, readers = how
        weights, convolutions, norms, batches, factors = [], [], [], [], []
        for c, weight, norm, parts in layers:
            weights.append(weight)
            convolutions += (*c.stride, *c.padding, *c.dilation, c.groups, norm.training)
            norms += parts
            factors += [norm.eps, norm.momentum or 0.0]
            if norm.training:
                batches.append(norm._buffers["num_batches_tracked"])
        in_float = any(weight.dtype is not x.dtype for weight in weights)  # what autocast casts
        if in_float:
            weights = cast_all(weights, x.dtype)
        out, unread_out, made = raising_out_of_memory(
            block_forward,
            x,
            first_shift,
            weights,
            convolutions,
            norms,
            batches,
            factors,
            identity,
            downsample,
            unread,
            shift,
            shifted,
        )
        made, of_layers, relus = iter(made), [], []
        last = len(layers) - 1 - downsample
        running = [part for layer in layers if not layer.norm.training for part in layer.norm_parts[:2]]
        running = iter(cast_all(running, running[0].dtype) if running else ())  # which may change before the backward
        for k, layer in enumerate(layers):
            z = next(made)
            source = made if layer.norm.training else running
            statistics = next(source), next(source)
            of_layers += (z, *statistics, *layer.norm_parts[2:])
            if k < last:
                relus.append(next(made))
        if first_shift:
            del relus[:1]
        needed = ctx.needs_input_grad
        convolved = identity if downsample and (needed[1] or needed[-3]) else None
        if downsample and not (needed[1] or any(needed[-3:])):  # nothing of it is needed
            downsample, weights, of_layers = False, weights[:-1], of_layers[:-5]
        ctx.how = (first_shift, convolutions, factors[: 2 * len(weights) : 2], downsample, in_float, shift, shifted)
        ctx.identity_is_shifted = unread is not None
        ctx.save_for_backward(x, convolved, out, unread_out if shifted else None, *weights, *of_layers, *relus)
        ctx.set_materialize_grads(False)
        return unread_out, *for_readers(out, readers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_unread, grad_a, grad_b=None):
        first_shift, convolutions, epsilons, downsample, in_float, shift, shifted = ctx.how
        x, convolved, out, unread_out, *saved = _in_channels_last(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        of_x_wanted, of_identity_wanted, _, _, *needed = ctx.needs_input_grad
        layers = len(epsilons)
        branch = layers - downsample
        weights, of_layers, relus = saved[:layers], saved[layers : 6 * layers], saved[6 * layers :]
        wanted = [of_x_wanted]
        for k in range(0, 3 * branch, 3):
            wanted += [needed[k], needed[k + 1] or needed[k + 2]]

        # The end. What it alone needs is freed after it.
        end = 5 * (branch - 1)
        z_how = epsilons[branch - 1], bool(convolutions[8 * branch - 1])
        z = Operand.of_kept(of_layers[end : end + 4], z_how, any(wanted[:-1]), wanted[-1])
        identity = Operand(wanted=of_identity_wanted)
        if downsample:
            how = epsilons[-1], bool(convolutions[-1])
            kept = of_layers[end + 5 : end + 9]
            identity = Operand.of_kept(kept, how, of_identity_wanted or needed[-3], needed[-2] or needed[-1])
            del kept
        grads = grad_a, grad_b, grad_unread if shifted else None
        (of_z, *of_norm), (of_identity, *of_identity_norm), of_unread = gradients_of_end(
            *grads, out, unread_out, z, identity, shift, ctx.identity_is_shifted
        )
        kept = of_layers[:end] + relus
        del saved, of_layers, relus, out, unread_out, z, identity, grads, grad_a, grad_b, grad_unread

        of_x, *of_layers = [None] * (1 + 3 * branch)
        if of_z is not None:
            given = x, first_shift, weights[:branch], convolutions[: 8 * branch], kept, epsilons[:branch], wanted
            of_x, *of_layers = raising_out_of_memory(block_backward, of_z, *given)
            del given
        of_layers[-2:] = of_norm
        del of_z, x, kept
        if downsample:
            of_weight = None
            if of_identity is not None:
                *how, _ = convolutions[-8:]
                masks = of_identity_wanted, needed[-3]
                of_identity, of_weight = convolve_backward(of_identity, convolved, weights[-1], how, *masks)
            of_layers += [of_weight, *of_identity_norm]
        del convolved, weights
        if in_float:
            at = [k for k in range(0, 3 * layers, 3) if needed[k]]
            for k, of_weight in zip(at, cast_all([of_layers[k] for k in at], torch.float32), strict=True):
                of_layers[k] = of_weight
        return of_x, of_identity, of_unread, None, *of_layers, *[None] * (len(needed) - len(of_layers))


def _in_channels_last(saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """As they were saved: hooks that keep them elsewhere, as ``save_on_cpu(pin_memory=True)``, may lose their strides.
    The first one, what the block was given, has no fewer pixels than any other."""
    if saved[0].is_contiguous(memory_format=torch.channels_last):
        return saved
    return [
        each.contiguous(memory_format=torch.channels_last) if each is not None and each.dim() == 4 else each
        for each in saved
    ]
