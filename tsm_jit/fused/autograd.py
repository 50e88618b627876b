"""Autograd for the operators in ``ops/residual.py``. Double backward raises an error.

Under ``no_grad`` the functions call the operators directly and may overwrite their inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling

from tsm_jit.ops import residual as operators
from tsm_jit.ops.compat import is_batched_gradient
from tsm_jit.ops.residual import NO_SHIFT, Norm, NormedInput, acc_dtype, in_format_of, new_boundary, new_like, norm_args
from tsm_jit.plans import decode


def norm_add_relu(
    z: Tensor,
    z_norm: Norm | None,
    identity: Tensor,
    identity_norm: Norm | None,
    boundary: Tensor | None,
    shift: str,
    shifted: bool,
    *,
    num_consumers: int = 2,
    may_overwrite_z: bool = False,
    may_overwrite_identity: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """Computes ``x = relu(norm(z) + norm(identity))``.

    Args:
        z: ``[N*T, C, H, W]``, floating point.
        z_norm: the norm of ``z``, if any.
        identity: like ``z``. It is in the shifted layout if ``boundary`` is given, otherwise in the unshifted one.
        identity_norm: the norm of the identity, if any.
        boundary: the boundary frames of a shifted identity, ``[N, K, H, W]``.
        shift: an encoded :class:`tsm_jit.plans.Shift`, for the identity, x or both.
        shifted: whether to return x in the shifted layout.
        num_consumers: the number of operations that read x, 1 or 2.
        may_overwrite_z: whether x may use the memory of ``z``, under ``no_grad``.
        may_overwrite_identity: whether x may use the memory of ``identity``, under ``no_grad``.

    Returns:
        x once for each consumer, and the boundary frames of x, None if x is unshifted. With separate outputs, autograd
        passes both gradients to the backward, whose kernel adds them.
    """
    z, identity, boundary = _same_format(z, identity, boundary)
    boundary_out: Tensor | None
    if not torch.is_grad_enabled():
        if may_overwrite_identity and shifted and boundary is not None:
            out, boundary_out = identity, boundary
        elif may_overwrite_z and (not shifted or (z.is_cuda and not decode(shift).is_circular)):
            out, boundary_out = z, new_boundary(z, shift) if shifted else None
        else:
            x, boundary_out = operators.norm_add_relu(z, z_norm, identity, identity_norm, boundary, shift, shifted)
            return [x] * num_consumers, boundary_out if shifted else None
        inputs = (z, *norm_args(z_norm), identity, *norm_args(identity_norm), boundary)
        operators.norm_add_relu_(out, boundary_out, None, 1, *inputs, shift, True)
        return [out] * num_consumers, boundary_out
    norm_tensors = [part for norm in (z_norm, identity_norm) for part in (norm[:4] if norm else (None,) * 4)]
    if is_compiling():
        norm_tensors = distinct(norm_tensors)
    meta = (z_norm and z_norm[4:], identity_norm and identity_norm[4:], shift, shifted)
    boundary_out, *outs = _NormAddRelu.apply(z, identity, boundary, *norm_tensors, meta, num_consumers)
    return outs, boundary_out if shifted else None


def norm_add_relu_both_layouts(
    z: Tensor,
    z_norm: Norm | None,
    identity: Tensor,
    identity_norm: Norm | None,
    boundary: Tensor | None,
    shift: str,
    step: int,
    *,
    may_overwrite_identity: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`norm_add_relu` under ``no_grad``, for a next block with ``downsample``.

    It returns x in the shifted layout, and every ``step``-th row and column of x in the unshifted layout. The strided
    convolution of ``downsample`` reads only these pixels.
    """
    z, identity, boundary = _same_format(z, identity, boundary)
    if may_overwrite_identity and boundary is not None:
        out, boundary_out = identity, boundary
    else:
        out, boundary_out = new_like(z, z.shape), new_boundary(z, shift)
    rows, columns = (-(-size // step) for size in z.shape[2:])
    unshifted_out = new_like(z, (*z.shape[:2], rows, columns))
    inputs = (z, *norm_args(z_norm), identity, *norm_args(identity_norm), boundary)
    operators.norm_add_relu_(out, boundary_out, unshifted_out, step, *inputs, shift, True)
    return out, unshifted_out


def norm_relu_max_pool(z: Tensor, norm: Norm, shift: str | None, unshifted: bool) -> tuple[Any, Any, Any]:
    """Computes ``x = max_pool2d(relu(norm(z)), 3, 2, 1)`` under ``no_grad``, from ``z`` ``[N*T, C, H, W]``.

    Returns:
        x if ``unshifted``, otherwise None. Then x in the shifted layout and its boundary frames if ``shift`` is given,
        otherwise None and None.
    """
    shifted = shift is not None
    x, out, boundary = operators.norm_relu_max_pool(z, *norm_args(norm), shift or NO_SHIFT, unshifted, shifted)
    return (x if unshifted else None, *((out, boundary) if shifted else (None, None)))


def norm_relu(z: Tensor, norm: Norm) -> Tensor:
    """Returns ``relu(norm(z))`` of ``z`` ``[N*T, C, H, W]``. The backward saves ``z``, not the result."""
    return _NormRelu.apply(_same_format(z, None, None)[0], *norm[:4], norm[4:])


def norm_relu_(z: Tensor, norm: Norm) -> Tensor:
    """:func:`norm_relu` in place of ``z``, under ``no_grad``."""
    operators.norm_add_relu_(z, None, None, 1, z, *norm_args(norm), None, [], 0.0, None, NO_SHIFT, True)
    return z


def norm_of(module: nn.BatchNorm2d, tensors: Sequence[Tensor], x: Tensor, requires_grad: bool) -> Norm:
    """Returns the norm that ``module`` applies to ``x``, and updates the running statistics of the module.

    Args:
        module: the batch normalization, in eval mode unless ``requires_grad``.
        tensors: running mean, running variance, weight and bias of the module.
        x: the input of the module.
        requires_grad: whether a backward follows.
    """
    mean, variance, weight, bias = tensors
    if not requires_grad:
        return Norm(mean, variance, weight, bias, module.eps)
    if module.training:
        batches = module.num_batches_tracked
        mean, variance = operators.batch_norm_stats_(x.detach(), mean, variance, batches, module.momentum)
    elif not is_compiling():  # copies, since running statistics may change before the backward
        mean, variance = mean.clone(), variance.clone()
    dtype = acc_dtype(x.dtype)
    mean, variance, weight, bias = [
        each if each.dtype is dtype else each.to(dtype) for each in (mean, variance, weight, bias)
    ]
    return Norm(mean, variance, weight, bias, module.eps, module.training)


def distinct(tensors: list[Any]) -> list[Any]:
    """Returns a view of each tensor that is there twice. Dynamo 2.11 drops one gradient of such an input."""
    return [
        x.view_as(x) if x is not None and any(x is before for before in tensors[:k]) else x
        for k, x in enumerate(tensors)
    ]


def for_consumers(out: Tensor, num_consumers: int) -> list[Tensor]:
    """Returns ``out`` once per consumer. For unused outputs, compilers would fill gradients with zeros."""
    return [out, *(out.view_as(out) for _ in range(num_consumers - 1))]


def _same_format(z: Tensor, identity: Tensor | None, boundary: Tensor | None) -> tuple[Tensor, Any, Any]:
    """Converts the tensors to a memory format that kernels support, and to the dtype of ``z``."""
    if not z.is_contiguous() and not z.is_contiguous(memory_format=torch.channels_last):
        z = z.contiguous()
    identity, boundary = (None if each is None else each.to(z.dtype) for each in (identity, boundary))
    if not torch.is_grad_enabled():
        identity, boundary = in_format_of(z, identity), in_format_of(z, boundary)
    return z, identity, boundary


def _saved(values: Tensor, norm: Norm | None) -> tuple[Tensor | None, ...]:
    """Returns the tensors to save: none for a summand without a norm, and never the bias of the norm."""
    return (values, *norm[:3]) if norm else (None,) * 4


def _restored(
    saved: Sequence[Tensor], meta: tuple[float, bool] | None, needs_grad: bool, norm_needs_grad: bool
) -> NormedInput:
    norm = None if meta is None else Norm(saved[1], saved[2], saved[3], None, *meta)
    return NormedInput(saved[0], norm, needs_grad, norm_needs_grad)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a ``backward``: a second derivative through it raises ``RuntimeError``.

    PyTorch's decorator of this name cuts the graph, so ``torch.autograd.grad`` finds no path to its error and returns
    wrong values. Here the error is on every path from the gradients to the inputs of the backward.
    """

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if is_compiling() or not torch.is_grad_enabled():  # AOTAutograd refuses second derivatives itself
            with torch.no_grad():
                return backward(ctx, *grads)
        once = _SavedOnce(ctx)
        with torch.no_grad():
            outputs = backward(once, *grads)
        sources = [each for each in (*grads, *once.saved_tensors) if each is not None and each.requires_grad]
        return _NotTwice.apply(outputs, *sources) if sources else outputs

    return checked


class _SavedOnce:
    """A ``ctx`` whose saved tensors can be read again. Hooks of checkpointing unpack them only once."""

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _NotTwice(Function):
    """Returns first derivatives, which depend on ``sources``. Its backward raises."""

    @staticmethod
    def forward(ctx, grads, *sources):
        return tuple(None if grad is None else grad.detach() for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("a fused network must not be differentiated twice: call residual.unfuse first")


def check_gradient(grad: Tensor | None) -> None:
    """Raises ``RuntimeError`` for the batched gradients of ``torch.autograd.grad(..., is_grads_batched=True)``."""
    if grad is not None and not is_compiling() and is_batched_gradient(grad):
        raise RuntimeError("is_grads_batched must be False for a fused network, got True: call residual.unfuse first")


class _NormAddRelu(Function):
    @staticmethod
    def forward(ctx, z, identity, boundary, *rest):
        *norm_tensors, meta, num_consumers = rest
        z_meta, identity_meta, shift, shifted = meta
        z_norm = z_meta and Norm(*norm_tensors[:4], *z_meta)
        identity_norm = identity_meta and Norm(*norm_tensors[4:], *identity_meta)
        out, boundary_out = operators.norm_add_relu(z, z_norm, identity, identity_norm, boundary, shift, shifted)
        ctx.meta = meta
        ctx.identity_is_shifted = boundary is not None
        ctx.in_kernel = operators.has_norm_kernels(z)
        saved = (*_saved(z, z_norm), *_saved(identity, identity_norm))
        ctx.save_for_backward(out, boundary_out if shifted else None, *saved)
        ctx.set_materialize_grads(False)
        return boundary_out, *for_consumers(out, num_consumers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_boundary, grad_a, grad_b=None):
        check_gradient(grad_a)
        out, boundary_out, *saved = ctx.saved_tensors
        z_meta, identity_meta, shift, shifted = ctx.meta
        needs_grad = ctx.needs_input_grad
        z = _restored(saved[:4], z_meta, needs_grad[0], any(needs_grad[5:7]))
        identity = _restored(saved[4:], identity_meta, needs_grad[1], any(needs_grad[9:11]))
        grads = (grad_a, grad_b, grad_boundary if shifted else None)
        (grad_z, *z_grads), (grad_identity, *identity_grads), grad_boundary = operators.norm_add_relu_backward(
            grads, out, boundary_out, z, identity, shift, ctx.identity_is_shifted, ctx.in_kernel
        )
        grads_norms = (None, None, *z_grads, None, None, *identity_grads)
        return grad_z, grad_identity, grad_boundary, *grads_norms, None, None


class _NormRelu(Function):
    @staticmethod
    def forward(ctx, z, *rest):
        *norm_tensors, meta = rest
        ctx.meta = meta
        ctx.in_kernel = operators.has_norm_kernels(z)
        ctx.is_channels_last = z.is_contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(z, *norm_tensors)
        return operators.norm_add_relu(z, Norm(*norm_tensors, *meta), None, None, None, NO_SHIFT, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        check_gradient(grad)
        z, *norm_tensors = ctx.saved_tensors
        if ctx.is_channels_last:  # saved-tensor hooks may change the strides
            z = z.contiguous(memory_format=torch.channels_last)
        needs_grad = ctx.needs_input_grad
        z = NormedInput(z, Norm(*norm_tensors, *ctx.meta), needs_grad[0], any(needs_grad[3:5]))
        grad_z, *grads_norm = operators.norm_relu_backward(grad, z, ctx.in_kernel)
        return grad_z, None, None, *grads_norm, None
