"""A whole residual block as one autograd function.

With small batches, PyTorch's overhead per operation exceeds the time on the GPU. So a block is one operator in the
forward, ``residual_block``, and two in the backward: ``norm_add_relu_backward``, then ``residual_block_backward`` for
the layers. Tensors that only the first one needs are freed in between. To save memory, the backward of ``downsample``'s
convolution comes last. Under autocast, one ``cast`` converts all weights and another one all their gradients.

Compilers trace the single layers instead (:func:`_in_parts`), as compiled code has little overhead per operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling

from tsm_jit.fused.autograd import for_consumers, norm_add_relu, norm_of, norm_relu, once_differentiable
from tsm_jit.ops import recomputation
from tsm_jit.ops.residual import NO_SHIFT, Norm, NormedInput, norm_add_relu_backward
from tsm_jit.ops.residual_block import (
    ConvParams,
    block_backward,
    block_forward,
    cast_all,
    convolve,
    convolve_backward,
    translating_out_of_memory,
)
from tsm_jit.ops.temporal_shift import check_marks, clip_length_marks


class Layer(NamedTuple):
    """A convolution without bias and the batch normalization of its output."""

    convolution: nn.Conv2d
    weight: Tensor
    norm: nn.BatchNorm2d
    norm_tensors: tuple[Tensor, ...]  # running mean, running variance, weight, bias

    def conv_params(self) -> ConvParams:
        """Returns the parameters of the convolution."""
        c: Any = self.convolution
        return ConvParams(c.stride, c.padding, c.dilation, c.groups)

    def like_output(self, x: Tensor) -> Tensor:
        """Returns a meta tensor with the frames, channels and dtype of this layer's output for ``x``."""
        return x.new_empty((x.shape[0], self.convolution.out_channels, 1, 1), device="meta")


@dataclass(frozen=True)
class BlockConfig:
    """The configuration of a block, except its tensors."""

    layers: list[Layer]  # the layers of the residual branch, then the layer of ``downsample`` if there is one
    has_downsample: bool
    first_shift: str  # the shift of x before the first layer; empty: none
    shift: str  # the shift of the identity, the output or both
    shifted: bool  # whether the output is in the shifted layout
    num_consumers: int

    @property
    def n_branch(self) -> int:
        """The number of layers of the residual branch."""
        return len(self.layers) - self.has_downsample


def residual_block(
    x: Tensor,
    layers: Sequence[Layer],
    first_shift: str | None,
    identity: Tensor,
    downsample: Layer | None,
    boundary: Tensor | None,
    shift: str,
    shifted: bool,
    num_consumers: int,
) -> tuple[list[Tensor], Tensor | None]:
    """Runs a residual block: ``layers``, then :func:`tsm_jit.fused.autograd.norm_add_relu`.

    Args:
        x: ``[N*T, C, H, W]`` in channels_last, in the dtype in which the layers compute.
        layers: the layers of the residual branch, with a ReLU after each except the last.
        first_shift: an encoded shift of ``x`` before the first layer, or None. If given, the backward recomputes the
            shifted x and the first layer's ReLU. This saves as much memory as all boundary frames of a network need.
        identity: the identity, or the input of ``downsample``.
        downsample: the layer that computes the identity, if any.
        boundary, shift, shifted, num_consumers: as in ``norm_add_relu``.

    Returns:
        As ``norm_add_relu``.
    """
    if identity.dtype is not x.dtype:
        identity, boundary = identity.to(x.dtype), None if boundary is None else boundary.to(x.dtype)
    all_layers = [*layers, *([downsample] if downsample is not None else [])]
    config = BlockConfig(all_layers, downsample is not None, first_shift or "", shift, shifted, num_consumers)
    if is_compiling():
        return _in_parts(x, identity, boundary, config)
    parameters = [each for layer in all_layers for each in (layer.weight, *layer.norm_tensors[2:])]
    boundary_out, *out = _Block.apply(x, identity, boundary, config, *parameters)
    return out, boundary_out if shifted else None


# --- eager mode ------------------------------------------------------------------------------------------------------


@dataclass
class _BlockMeta:
    """The values that the backward of a block needs, except tensors."""

    n_branch: int
    first_shift: str
    shift: str
    shifted: bool
    conv_params: list[int]  # 8 for each layer, as for the operators
    epsilons: list[float]
    autocast: bool  # whether the weights were cast
    has_downsample: bool  # whether a gradient flows through ``downsample``
    identity_is_shifted: bool
    n_marks: int  # of the clip length, after the other saved tensors


class _BlockSaved(NamedTuple):
    """The tensors that the backward of a block needs."""

    x: Tensor
    downsample_input: Tensor | None
    out: Tensor
    boundary_out: Tensor | None
    weights: list[Tensor]
    layers: list[Tensor]  # 5 for each layer: output of the convolution, mean, variance, weight, bias
    relus: list[Tensor]

    def flat(self) -> tuple[Tensor | None, ...]:
        """Returns the tensors for ``save_for_backward``."""
        return (*self[:4], *self.weights, *self.layers, *self.relus)

    @classmethod
    def of_flat(cls, saved: Sequence[Any], n_layers: int) -> _BlockSaved:
        """The inverse of :meth:`flat`."""
        x, downsample_input, out, boundary_out, *rest = saved
        tensors = (x, downsample_input, out, boundary_out)
        return cls(*tensors, rest[:n_layers], rest[n_layers : 6 * n_layers], rest[6 * n_layers :])


class _Block(Function):
    @staticmethod
    def forward(ctx, x, identity, boundary, config, *parameters):
        layers = config.layers
        weights = [layer.weight for layer in layers]
        autocast = any(weight.dtype is not x.dtype for weight in weights)
        if autocast:
            weights = cast_all(weights, x.dtype)
        conv_params = [each for layer in layers for each in (*layer.conv_params().flat(), layer.norm.training)]
        norms = [each for layer in layers for each in layer.norm_tensors]
        counters = [layer.norm._buffers["num_batches_tracked"] for layer in layers if layer.norm.training]
        norm_params = [each for layer in layers for each in (layer.norm.eps, layer.norm.momentum or 0.0)]
        out, boundary_out, outputs = translating_out_of_memory(
            block_forward, x, config.first_shift, weights, conv_params, norms, counters, norm_params, identity,
            config.has_downsample, boundary, config.shift, config.shifted,
        )  # fmt: skip
        saved_layers, relus = _saved_by_layer(config, outputs)
        if config.first_shift:
            del relus[:1]  # the backward recomputes it
        _, needs_identity, _, _, *needs_parameters = ctx.needs_input_grad
        has_downsample = config.has_downsample and (needs_identity or any(needs_parameters[-3:]))
        if config.has_downsample and not has_downsample:
            weights, saved_layers = weights[:-1], saved_layers[:-5]
        needs_input = has_downsample and (needs_identity or needs_parameters[-3])
        saved = _BlockSaved(
            x, identity if needs_input else None, out, boundary_out if config.shifted else None, weights, saved_layers,
            relus,
        )  # fmt: skip
        marks = clip_length_marks(x, config.first_shift) if config.first_shift else ()
        epsilons = norm_params[: 2 * len(weights) : 2]
        ctx.meta = _BlockMeta(
            config.n_branch, config.first_shift, config.shift, config.shifted, conv_params, epsilons, autocast,
            has_downsample, boundary is not None, len(marks),
        )  # fmt: skip
        ctx.save_for_backward(*saved.flat(), *marks)
        ctx.set_materialize_grads(False)
        return boundary_out, *for_consumers(out, config.num_consumers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_boundary, grad_a, grad_b=None):
        meta = ctx.meta  # a _BlockMeta
        n_branch = meta.n_branch
        saved = _BlockSaved.of_flat(_in_channels_last(_unmarked(ctx)), len(meta.epsilons))
        ctx.maybe_clear_saved_tensors()
        needs_x, needs_identity, _, _, *needs_parameters = ctx.needs_input_grad
        needs_grad = [needs_x]
        for k in range(0, 3 * n_branch, 3):
            needs_grad += [needs_parameters[k], needs_parameters[k + 1] or needs_parameters[k + 2]]

        # norm_add_relu. The tensors that only this part needs are freed after it.
        z = _normed_input(meta, saved, n_branch - 1, any(needs_grad[:-1]), needs_grad[-1])
        identity = NormedInput(needs_grad=needs_identity)
        if meta.has_downsample:
            needs_conv, needs_norm = needs_identity or needs_parameters[-3], any(needs_parameters[-2:])
            identity = _normed_input(meta, saved, n_branch, needs_conv, needs_norm)
        (grad_z, *z_grads), (grad_identity, *identity_grads), grad_boundary = norm_add_relu_backward(
            (grad_a, grad_b, grad_boundary if meta.shifted else None),
            saved.out,
            saved.boundary_out,
            z,
            identity,
            meta.shift,
            meta.identity_is_shifted,
            in_kernel=True,
        )
        x, downsample_input, weights = saved.x, saved.downsample_input, saved.weights
        branch_saved = saved.layers[: 5 * (n_branch - 1)] + saved.relus
        del saved, z, identity, grad_a, grad_b

        # The layers, then the convolution of downsample.
        grad_x, *grads = [None] * (1 + 3 * n_branch)
        if grad_z is not None:
            grad_x, *grads = translating_out_of_memory(
                block_backward, grad_z, x, meta.first_shift, weights[:n_branch], meta.conv_params[: 8 * n_branch],
                branch_saved, meta.epsilons[:n_branch], needs_grad,
            )  # fmt: skip
        grads[-2:] = z_grads
        del grad_z, x, branch_saved
        if meta.has_downsample:
            grad_weight = None
            if grad_identity is not None:
                params = ConvParams.of_flat(meta.conv_params[-8:])
                needs = (needs_identity, needs_parameters[-3])
                grad_identity, grad_weight = convolve_backward(
                    grad_identity, downsample_input, weights[-1], params, needs
                )
            grads += [grad_weight, *identity_grads]
        del downsample_input, weights
        if meta.autocast:
            indices = [k for k in range(0, len(grads), 3) if needs_parameters[k]]
            for k, grad in zip(indices, cast_all([grads[k] for k in indices], torch.float32), strict=True):
                grads[k] = grad
        unused = [None] * (len(needs_parameters) - len(grads))
        return grad_x, grad_identity, grad_boundary, None, *grads, *unused


def _unmarked(ctx: Any) -> Sequence[Any]:
    """Returns the saved tensors without marks of the clip length, which it checks."""
    saved, n_marks = ctx.saved_tensors, ctx.meta.n_marks
    check_marks(saved[len(saved) - n_marks :], ctx.meta.first_shift)
    return saved[: len(saved) - n_marks]


def _saved_by_layer(config: BlockConfig, outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Splits the outputs of ``residual_block`` into ``layers`` and ``relus`` of :class:`_BlockSaved`."""
    each: Iterator[Tensor] = iter(outputs)
    layers, relus = [], []
    # Copies, since running statistics may change before the backward.
    running = [t for layer in config.layers if not layer.norm.training for t in layer.norm_tensors[:2]]
    copies: Iterator[Tensor] = iter(cast_all(running, running[0].dtype) if running else ())
    for k, layer in enumerate(config.layers):
        z = next(each)
        statistics = each if layer.norm.training else copies
        layers += [z, next(statistics), next(statistics), *layer.norm_tensors[2:]]
        if k < config.n_branch - 1:
            relus.append(next(each))
    return layers, relus


def _normed_input(meta: _BlockMeta, saved: _BlockSaved, k: int, needs_grad: bool, norm_needs_grad: bool) -> NormedInput:
    """Returns the output of the k-th convolution and its norm."""
    values, mean, variance, weight, _ = saved.layers[5 * k : 5 * k + 5]
    norm = Norm(mean, variance, weight, None, meta.epsilons[k], bool(meta.conv_params[8 * k + 7]))
    return NormedInput(values, norm, needs_grad, norm_needs_grad)


def _in_channels_last(saved: Sequence[Any]) -> Sequence[Any]:
    """Restores the memory format of saved tensors. Hooks such as ``save_on_cpu(pin_memory=True)`` may change it.

    It checks only the first tensor, the block's input, since a tensor of one pixel is contiguous in both formats. No
    other saved tensor has more pixels.
    """
    if saved[0].is_contiguous(memory_format=torch.channels_last):
        return saved
    return [
        each.contiguous(memory_format=torch.channels_last) if each is not None and each.dim() == 4 else each
        for each in saved
    ]


# --- for compilers ---------------------------------------------------------------------------------------------------


def _in_parts(
    x: Tensor, identity: Tensor, boundary: Tensor | None, config: BlockConfig
) -> tuple[list[Tensor], Tensor | None]:
    """Computes the same as :class:`_Block`, with separate operators for the layers."""
    weights = _cast_like(x, [layer.weight for layer in config.layers])

    def layer(k: int, x: Tensor, recomputed: tuple[Tensor, Norm] | None = None) -> tuple[Tensor, Norm]:
        params = config.layers[k].conv_params()
        if k == 0 and config.first_shift:
            z = _ConvOfShift.apply(x, config.first_shift, weights[k], params)
        elif recomputed is not None:
            z, norm = recomputed
            z = _ConvOfRelu.apply(x, weights[k], params, norm.epsilon, z, *norm[:4])
        else:
            z = convolve(x, weights[k], params)
        z = z.contiguous(memory_format=torch.channels_last)
        return z, norm_of(config.layers[k].norm, config.layers[k].norm_tensors, z, requires_grad=True)

    last = config.n_branch - 1
    recomputed = None
    for k in range(last):
        z, norm = layer(k, x, recomputed)
        x = norm_relu(z, norm)
        recomputed = (z, norm) if k == 0 and config.first_shift else None
    z, norm = layer(last, x, recomputed)
    identity, identity_norm = layer(last + 1, identity) if config.has_downsample else (identity, None)
    return norm_add_relu(
        z, norm, identity, identity_norm, boundary, config.shift, config.shifted, num_consumers=config.num_consumers
    )


def _cast_like(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    if all(weight.dtype is x.dtype for weight in weights):
        return weights
    trained = [weight for weight in weights if weight.requires_grad]
    cast = iter(_Cast.apply(x.dtype, *trained) if trained else ())
    return [next(cast) if weight.requires_grad else weight.to(x.dtype) for weight in weights]


class _Cast(Function):
    @staticmethod
    def forward(ctx, dtype, *weights):
        return tuple(torch.ops.tsm_jit.cast.default(weights, dtype))

    @staticmethod
    def backward(ctx, *grads):
        return None, *torch.ops.tsm_jit.cast.default(grads, torch.float32)  # autocast casts float32 weights


class _ConvOfShift(Function):
    """``conv(shift(x))``. It saves x and shifts it again in the backward, where the adjoint runs in place."""

    @staticmethod
    def forward(ctx, x, shift, weight, params):
        ctx.meta = shift, params
        if recomputation.saves_marks:
            y, *marks = torch.ops.tsm_jit.marked_temporal_shift(x, shift)
        else:
            y, marks = torch.ops.tsm_jit.temporal_shift.kernel(x, shift), []
        ctx.save_for_backward(x, weight, *marks)
        return convolve(y, weight, params)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, *marks = ctx.saved_tensors
        shift, params = ctx.meta
        needs_x, _, needs_weight, _ = ctx.needs_input_grad
        if needs_weight:  # otherwise the backward needs only the shape of x
            x = torch.ops.tsm_jit.temporal_shift.recompute(x, shift)
        grad_x, grad_weight = convolve_backward(grad, x, weight, params, (needs_x, needs_weight))
        if grad_x is not None and marks:
            grad_x = torch.ops.tsm_jit.marked_temporal_shift_backward(grad_x, shift, *marks)
        elif grad_x is not None:
            torch.ops.tsm_jit.temporal_shift_backward_.default(grad_x, shift)
        return grad_x, None, grad_weight, None


class _ConvOfRelu(Function):
    """``conv(x)`` for ``x = relu(norm(z))``. The backward recomputes x from ``z``."""

    @staticmethod
    def forward(ctx, x, weight, params, epsilon, z, *norm):
        ctx.meta = params, epsilon
        ctx.save_for_backward(weight, z, *norm)
        return convolve(x, weight, params)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, x, *norm = ctx.saved_tensors
        params, epsilon = ctx.meta
        needs_x, needs_weight, *rest = ctx.needs_input_grad
        if needs_weight:  # otherwise the backward needs only the shape of x
            x, _ = torch.ops.tsm_jit.norm_add_relu.recompute(x, norm, epsilon, None, [], 0.0, None, NO_SHIFT, False)
        return *convolve_backward(grad, x, weight, params, (needs_x, needs_weight)), *[None] * len(rest)
