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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from tsm_jit import ops
from tsm_jit._residual_ops import (
    NO_SHIFT,
    Norm,
    Operand,
    applied_norm,
    batch_statistics,
    end_of_block,
    for_readers,
    gradients_of_end,
    gradients_of_relu_of_norm,
    relu_of_norm,
    sums_are_in_kernel,
    write_new,
)

_library = torch.library.Library("tsm_jit", "FRAGMENT")
# Of each layer `weights` has the weight of the convolution, `convolutions` its stride, padding and dilation, two each,
# its groups, and whether the norm is of the batch; `norms` running mean and variance (which are written), weight and
# bias, `factors` epsilon and momentum, `batches` the number of batches, if the norm is of the batch. With `downsample`
# the last layer makes the identity of what is given for it.
#
# Returned, beside x and its unread frames: of each layer what it convolved, mean and variance if the norm is of the
# batch, and its ReLU if there is one.
for _schema in (
    "residual_block(Tensor x, str first_shift, Tensor[] weights, int[] convolutions, Tensor(a!)[] norms, "
    "Tensor(b!)[] batches, float[] factors, Tensor identity, bool downsample, Tensor? unread, str shift, bool shifted) "
    "-> (Tensor, Tensor, Tensor[])",
    # `kept` has of each layer but the last what it convolved, mean, variance, weight and bias of its norm; then their
    # ReLUs, of which that of the first layer may be missing: it is made again. `wanted` tells of x, and of each layer's
    # convolution and norm, whether gradients are.
    "residual_block_backward(Tensor grad, Tensor x, str first_shift, Tensor[] weights, int[] convolutions, "
    "Tensor[] kept, float[] epsilons, int[] wanted) -> Tensor[]",
    "cast(Tensor[] tensors, ScalarType dtype) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_forward = torch.ops.tsm_jit.residual_block.default._op
_backward = torch.ops.tsm_jit.residual_block_backward.default._op
_cast = torch.ops.tsm_jit.cast.default._op


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
            z = _convolved(x, weights[k], how)
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
        return _convolved(torch.ops.tsm_jit.temporal_shift.kernel(x, shift), weight, how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        shift, how = ctx.how
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if wanted[1]:  # or else nobody reads its values
            x = torch.ops.tsm_jit.temporal_shift.again(x, shift)
        of_x, of_weight = _convolved_backward(grad, x, weight, how, *wanted)
        if of_x is not None:
            torch.ops.tsm_jit.temporal_shift_backward_.default(of_x, shift)
        return of_x, None, of_weight, None


class _ConvolutionOfRelu(Function):
    """Of ``x``, which is ``relu(norm(z))``, and not kept, but made of z again backward."""

    @staticmethod
    def forward(ctx, x, weight, how, epsilon, z, *norm):
        ctx.how = how, epsilon
        ctx.save_for_backward(weight, z, *norm)
        return _convolved(x, weight, how)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, x, *norm = ctx.saved_tensors
        how, epsilon = ctx.how
        if ctx.needs_input_grad[1]:  # or else nobody reads its values
            x, _ = torch.ops.tsm_jit.residual_shift.again(x, norm, epsilon, None, [], 0.0, None, NO_SHIFT, False)
        gradients = _convolved_backward(grad, x, weight, how, *ctx.needs_input_grad[:2])
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
            weights = _cast(weights, x.dtype)
        out, unread_out, made = _called(
            _forward,
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
        running = iter(_cast(running, running[0].dtype) if running else ())  # which may change before the backward
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
            of_x, *of_layers = _called(_backward, of_z, *given)
            del given
        of_layers[-2:] = of_norm
        del of_z, x, kept
        if downsample:
            of_weight = None
            if of_identity is not None:
                *how, _ = convolutions[-8:]
                masks = of_identity_wanted, needed[-3]
                of_identity, of_weight = _convolved_backward(of_identity, convolved, weights[-1], how, *masks)
            of_layers += [of_weight, *of_identity_norm]
        del convolved, weights
        if in_float:
            at = [k for k in range(0, 3 * layers, 3) if needed[k]]
            for k, of_weight in zip(at, _cast([of_layers[k] for k in at], torch.float32), strict=True):
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


def _convolved(x: Tensor, weight: Tensor, how: Sequence[int]) -> Tensor:
    """``how`` is stride, padding, dilation and groups."""
    return F.conv2d(x, weight, None, how[:2], how[2:4], how[4:6], how[6])


def _convolved_backward(
    grad: Tensor, x: Tensor, weight: Tensor, how: Sequence[int], x_wanted: bool, weight_wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of what is convolved and of the weight."""
    masks = [x_wanted, weight_wanted, False]
    return torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, how[:2], how[2:4], how[4:6], False, [0, 0], how[6], masks
    )[:2]


def _called(operator, *args):
    """What ``operator`` returns; its convolutions may find no memory, for which PyTorch's C interface has no error."""
    try:
        return operator(*args)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


# --- the operators, for devices without kernels ----------------------------------------------------------------------


def _plain_forward(
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
):
    made, batches = [], iter(batches)

    def convolve(k: int, x: Tensor) -> tuple[Tensor, Norm]:
        *how, of_batch = convolutions[8 * k : 8 * k + 8]
        mean, variance, *affine = norms[4 * k : 4 * k + 4]
        epsilon, momentum = factors[2 * k : 2 * k + 2]
        z = _convolved(x, weights[k], how).contiguous(memory_format=torch.channels_last)
        made.append(z)
        if of_batch:
            mean, variance = batch_statistics(z, mean, variance, next(batches), momentum)
            made.extend([mean, variance])
        return z, Norm(mean, variance, *affine, epsilon)

    last = len(weights) - 1 - downsample
    if first_shift:
        x = ops.temporal_shift(x, first_shift)
    for k in range(last):
        x = write_new(*convolve(k, x), None, None, None, NO_SHIFT, False)[0]
        made.append(x)
    z, norm = convolve(last, x)
    identity, identity_norm = convolve(last + 1, identity) if downsample else (identity, None)
    return *write_new(z, norm, identity, identity_norm, unread, shift, shifted), made


def _plain_backward(grad, x, first_shift, weights, convolutions, kept, epsilons, wanted):
    layers = len(weights)
    found = [x.new_empty(0)] * (1 + 3 * layers)  # not wanted
    relus = [None] * (6 * (layers - 1) - len(kept)) + kept[5 * (layers - 1) :]
    for k in reversed(range(layers)):
        *how, _ = convolutions[8 * k : 8 * k + 8]
        before = any(wanted[: 1 + 2 * k])
        weight_wanted = bool(wanted[1 + 2 * k])  # or else nobody reads the values of what is given
        if k == 0:
            given = ops.temporal_shift(x, first_shift) if first_shift and weight_wanted else x
        else:
            z_how = epsilons[k - 1], bool(convolutions[8 * k - 1])
            given, *parts = kept[5 * k - 5 : 5 * k]
            z = Operand(given, Norm(*parts, *z_how), any(wanted[: 2 * k]), bool(wanted[2 * k]))
            if weight_wanted:
                given = relus[k - 1]
                if given is None:
                    given = write_new(z.values, z.norm, None, None, None, NO_SHIFT, False)[0]
        of_x, of_weight = _convolved_backward(grad, given, weights[k], how, before, weight_wanted)
        if weight_wanted:
            found[1 + 3 * k] = of_weight
        if not before:
            break
        if k == 0:
            if first_shift:
                ops.temporal_shift_backward_(of_x, first_shift)
            found[0] = of_x
            break
        grad, *of_norm = gradients_of_relu_of_norm(of_x, z, sums_are_in_kernel(z.values))
        if z.summed()[1]:
            found[3 * k - 1 : 3 * k + 1] = of_norm
        if grad is None:
            break
    return found


def _plain_cast(tensors, dtype):
    return [each.to(dtype, copy=True) for each in tensors]


_library.impl(torch.ops.tsm_jit.residual_block.default, _plain_forward, "CompositeExplicitAutograd")
_library.impl(torch.ops.tsm_jit.residual_block_backward.default, _plain_backward, "CompositeExplicitAutograd")
_library.impl(torch.ops.tsm_jit.cast.default, _plain_cast, "CompositeExplicitAutograd")
