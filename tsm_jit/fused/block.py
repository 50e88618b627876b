"""A whole residual block as one autograd function.

With small batches, PyTorch's overhead per operation exceeds the time on the GPU. So a block is one operator in the
forward, ``residual_block``, and two in the backward: ``norm_add_relu_backward``, then ``residual_block_backward`` for
the layers. Tensors that only the first one needs are freed in between. To save memory, the backward of ``downsample``'s
convolution comes last. Under autocast, one ``cast`` converts all weights and another one all their gradients. Compiled
graphs hold the same operators, but the forward in parts: see ``ops/residual_block.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling

from tsm_jit.fused.autograd import check_gradient, distinct, for_consumers, once_differentiable
from tsm_jit.ops.residual import Norm, NormedInput, norm_add_relu_backward
from tsm_jit.ops.residual_block import (
    ConvParams,
    block_backward,
    block_forward,
    cast_all,
    convolve_backward,
    to_channels_last,
)


class Layer(NamedTuple):
    """A convolution without bias and the batch normalization of its output."""

    convolution: nn.Conv2d
    weight: Tensor
    norm: nn.BatchNorm2d
    norm_tensors: tuple[Tensor, ...]  # running mean, running variance, weight, bias

    def conv_params(self) -> list[int]:
        """Returns the ``conv_params`` of this layer, as the operators take them."""
        c: Any = self.convolution
        return [*ConvParams(c.stride, c.padding, c.dilation, c.groups).flat(), int(self.norm.training)]

    def running(self) -> list[Tensor]:
        """Returns the running statistics of this layer, as the operators take them."""
        buffers: Any = self.norm._buffers
        return [*self.norm_tensors[:2], *([buffers["num_batches_tracked"]] if self.norm.training else [])]

    def like_output(self, x: Tensor) -> Tensor:
        """Returns a meta tensor with the frames, channels and dtype of this layer's output for ``x``."""
        return x.new_empty((x.shape[0], self.convolution.out_channels, 1, 1), device="meta")


class _Config(NamedTuple):
    """The arguments of a block, except its tensors."""

    first_shift: str  # the shift of x before the first layer; empty: none
    conv_params: list[int]  # 8 for each layer, as for the operators
    norm_params: list[float]  # 2 for each layer
    has_downsample: bool
    shift: str  # the shift of the identity, the output or both
    shifted: bool  # whether the output is in the shifted layout
    num_consumers: int

    @property
    def n_layers(self) -> int:
        """The number of layers, with the one of ``downsample``."""
        return len(self.norm_params) // 2

    @property
    def n_branch(self) -> int:
        """The number of layers of the residual branch."""
        return self.n_layers - self.has_downsample

    def uses_batch_stats(self, k: int) -> bool:
        """Whether the norm of layer k uses the statistics of the batch."""
        return bool(self.conv_params[8 * k + 7])


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
    config = _Config(
        first_shift or "",
        [each for layer in all_layers for each in layer.conv_params()],
        [each for layer in all_layers for each in (layer.norm.eps, layer.norm.momentum or 0.0)],
        downsample is not None,
        shift,
        shifted,
        num_consumers,
    )
    tensors = [each for layer in all_layers for each in (layer.weight, *layer.norm_tensors[2:])]  # parameters
    tensors += [each for layer in all_layers for each in layer.running()]
    if is_compiling():
        x, identity, *tensors = distinct([x, identity, *tensors])
    boundary_out, *out = _Block.apply(x, identity, boundary, config, *tensors)
    return out, boundary_out if shifted else None


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
    def forward(ctx, x, identity, boundary, config, *tensors):
        n_parameters = 3 * config.n_layers
        weights, affine = tensors[:n_parameters:3], [t for k, t in enumerate(tensors[:n_parameters]) if k % 3]
        running = tensors[n_parameters:]
        ctx.autocast = any(weight.dtype is not x.dtype for weight in weights)  # whether it casts the weights
        if ctx.autocast:
            weights = cast_all(weights, x.dtype)
        out, boundary_out, outputs = block_forward(
            x, config.first_shift, weights, config.conv_params, affine, running, config.norm_params, identity,
            config.has_downsample, boundary, config.shift, config.shifted,
        )  # fmt: skip
        statistics = _running_statistics(config, running)
        if statistics and not is_compiling():  # they may change before the backward
            statistics = cast_all(statistics, statistics[0].dtype)
        layers, relus = _saved_by_layer(config, outputs, affine, statistics)
        if config.first_shift:
            del relus[:1]  # the backward recomputes it
        _, needs_identity, _, _, *needs_parameters = ctx.needs_input_grad[: 4 + n_parameters]
        ctx.downsample_needs_grad = config.has_downsample and (needs_identity or any(needs_parameters[-3:]))
        if config.has_downsample and not ctx.downsample_needs_grad:
            weights, layers = weights[:-1], layers[:-5]
        needs_input = ctx.downsample_needs_grad and (needs_identity or needs_parameters[-3])
        saved = _BlockSaved(
            x, identity if needs_input else None, out, boundary_out if config.shifted else None, weights, layers, relus
        )
        ctx.config, ctx.identity_is_shifted = config, boundary is not None
        ctx.save_for_backward(*saved.flat())
        ctx.set_materialize_grads(False)
        return boundary_out, *for_consumers(out, config.num_consumers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_boundary, grad_a, grad_b=None):
        check_gradient(grad_a)
        config = ctx.config
        n_branch = config.n_branch
        n_layers = n_branch + ctx.downsample_needs_grad
        saved = _BlockSaved.of_flat(_in_channels_last(ctx.saved_tensors), n_layers)
        if not is_compiling():
            ctx.maybe_clear_saved_tensors()
        n_parameters = 3 * config.n_layers
        needs_x, needs_identity, _, _, *needs_parameters = ctx.needs_input_grad[: 4 + n_parameters]
        needs_grad = [needs_x]
        for k in range(0, 3 * n_branch, 3):
            needs_grad += [needs_parameters[k], needs_parameters[k + 1] or needs_parameters[k + 2]]

        # norm_add_relu. The tensors that only this part needs are freed after it.
        z = _normed_input(config, saved, n_branch - 1, any(needs_grad[:-1]), needs_grad[-1])
        identity = NormedInput(needs_grad=needs_identity)
        if ctx.downsample_needs_grad:
            needs_conv, needs_norm = needs_identity or needs_parameters[-3], any(needs_parameters[-2:])
            identity = _normed_input(config, saved, n_branch, needs_conv, needs_norm)
        (grad_z, *z_grads), (grad_identity, *identity_grads), grad_boundary = norm_add_relu_backward(
            (grad_a, grad_b, grad_boundary if config.shifted else None),
            saved.out,
            saved.boundary_out,
            z,
            identity,
            config.shift,
            ctx.identity_is_shifted,
            in_kernel=True,
        )
        x, downsample_input, weights = saved.x, saved.downsample_input, saved.weights
        branch_saved = saved.layers[: 5 * (n_branch - 1)] + saved.relus
        del saved, z, identity, grad_a, grad_b

        # The layers, then the convolution of downsample.
        grad_x, *grads = [None] * (1 + 3 * n_branch)
        if grad_z is not None:
            grad_x, *grads = block_backward(
                grad_z, x, config.first_shift, weights[:n_branch], config.conv_params[: 8 * n_branch], branch_saved,
                config.norm_params[: 2 * n_branch : 2], [int(each) for each in needs_grad],
            )  # fmt: skip
        grads = [*grads[:-2], *z_grads]
        del grad_z, x, branch_saved
        if ctx.downsample_needs_grad:
            grad_weight = None
            if grad_identity is not None:
                params = ConvParams.of_flat(config.conv_params[-8:])
                needs = (needs_identity, needs_parameters[-3])
                grad_identity, grad_weight = convolve_backward(
                    grad_identity, downsample_input, weights[-1], params, needs
                )
            grads += [grad_weight, *identity_grads]
        del downsample_input, weights
        if ctx.autocast:
            indices = [k for k in range(0, len(grads), 3) if needs_parameters[k]]
            for k, grad in zip(indices, cast_all([grads[k] for k in indices], torch.float32), strict=True):
                grads[k] = grad
        unused = [None] * (len(ctx.needs_input_grad) - 4 - len(grads))
        return grad_x, grad_identity, grad_boundary, None, *grads, *unused


def _running_statistics(config: _Config, running: Sequence[Tensor]) -> list[Tensor]:
    """Returns mean and variance of each norm that does not use the statistics of the batch."""
    statistics: list[Tensor] = []
    each = iter(running)
    for k in range(config.n_layers):
        mean_and_variance = [next(each), next(each)]
        if config.uses_batch_stats(k):
            next(each)  # num_batches_tracked
        else:
            statistics += mean_and_variance
    return statistics


def _saved_by_layer(
    config: _Config, outputs: Sequence[Tensor], affine: Sequence[Tensor], statistics: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Splits the outputs of ``residual_block`` into ``layers`` and ``relus`` of :class:`_BlockSaved`."""
    each, kept = iter(outputs), iter(statistics)
    layers, relus = [], []
    for k in range(config.n_layers):
        z = next(each)
        mean_and_variance = each if config.uses_batch_stats(k) else kept
        layers += [z, next(mean_and_variance), next(mean_and_variance), *affine[2 * k : 2 * k + 2]]
        if k < config.n_branch - 1:
            relus.append(next(each))
    return layers, relus


def _normed_input(config: _Config, saved: _BlockSaved, k: int, needs_grad: bool, norm_needs_grad: bool) -> NormedInput:
    """Returns the output of the k-th convolution and its norm."""
    values, mean, variance, weight, _ = saved.layers[5 * k : 5 * k + 5]
    norm = Norm(mean, variance, weight, None, config.norm_params[2 * k], config.uses_batch_stats(k))
    return NormedInput(values, norm, needs_grad, norm_needs_grad)


def _in_channels_last(saved: Sequence[Any]) -> Sequence[Any]:
    """Restores the memory format of saved tensors. Hooks such as ``save_on_cpu(pin_memory=True)`` may change it.

    It checks only the first tensor, the block's input, since a tensor of one pixel is contiguous in both formats. No
    other saved tensor has more pixels.
    """
    if is_compiling() or saved[0].is_contiguous(memory_format=torch.channels_last):
        return saved
    return [each if each is None else to_channels_last(each) for each in saved]
