"""Autograd for the end of a residual block and for a norm with its ReLU; both differentiable once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from tsm_jit.ops.residual import (
    NO_SHIFT,
    Norm,
    Operand,
    batch_statistics,
    gradients_of_end,
    gradients_of_relu_of_norm,
    laid_out_as,
    new_like,
    new_unread,
    norm_args,
    pool_operator,
    sums_are_in_kernel,
    wide,
    write_into,
    write_new,
)
from tsm_jit.plans import decode


def end_of_block(
    z: Tensor,
    z_norm: Norm | None,
    identity: Tensor,
    identity_norm: Norm | None,
    unread: Tensor | None,
    shift: str,
    shifted: bool,
    *,
    readers: int = 2,
    own_z: bool = False,
    own_identity: bool = False,
) -> tuple[list[Tensor], Tensor | None]:
    """``x = relu(z_norm(z) + identity_norm(identity))``, differentiable once.

    Args:
        z, identity: ``[N*T, C, H, W]`` of a floating-point type.
        z_norm, identity_norm: applied on the way, if given.
        unread: the other frames of an identity in shifted form, ``[N, K, H, W]``; of a plain one None.
        shift: an encoded :class:`tsm_jit.plans.Shift`: of the identity, of the result, or of both.
        shifted: whether the result is wanted in shifted form.
        readers: how many there will be of x, 1 or 2.
        own_z, own_identity: whether x may take their place, where nothing is recorded.

    Returns:
        x for each of its readers, so that one kernel receives both gradients and no addition comes before it; and the
        unread frames, None of a plain x.
    """
    z, identity, unread = _alike(z, identity, unread)
    if not torch.is_grad_enabled():
        given = (z, *norm_args(z_norm), identity, *norm_args(identity_norm), unread, shift)
        if own_identity and shifted and unread is not None:
            out, unread_out = identity, unread
        elif own_z and (not shifted or (z.is_cuda and not decode(shift).is_circular)):
            out, unread_out = z, new_unread(z, shift) if shifted else None
        else:
            out, unread_out = write_new(z, z_norm, identity, identity_norm, unread, shift, shifted)
            return [out] * readers, unread_out if shifted else None
        write_into(out, unread_out, None, 1, *given, True)
        return [out] * readers, unread_out
    parts = [part for norm in (z_norm, identity_norm) for part in (norm[:4] if norm else (None,) * 4)]
    how = (z_norm and z_norm[4:], identity_norm and identity_norm[4:], shift, shifted)
    unread_out, *out = _EndOfBlock.apply(z, identity, unread, *parts, how, readers)
    return out, unread_out if shifted else None


def end_in_both_forms(
    z: Tensor,
    z_norm: Norm | None,
    identity: Tensor,
    identity_norm: Norm | None,
    unread: Tensor | None,
    shift: str,
    step: int,
    *,
    own_identity: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`end_of_block` for a block whose convolution reads x shifted, and whose identity is made of a plain x: the
    shifted one, and of the plain one every ``step``-th row and column. Where nothing is recorded and pixels are known.
    """
    z, identity, unread = _alike(z, identity, unread)
    if own_identity and unread is not None:
        out, unread_out = identity, unread
    else:
        out, unread_out = new_like(z, z.shape), new_unread(z, shift)
    rows, columns = (-(-size // step) for size in z.shape[2:])
    plain = new_like(z, (*z.shape[:2], rows, columns))
    given = (z, *norm_args(z_norm), identity, *norm_args(identity_norm), unread, shift)
    write_into(out, unread_out, plain, step, *given, True)
    return out, plain


def pool_of_relu_of_norm(
    z: Tensor, norm: Norm, shift: str | None, plain: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``x = max_pool2d(relu(norm(z)), 3, 2, 1)`` of ``z`` ``[N*T, C, H, W]`` in channels_last. Nothing is recorded.

    Returns:
        x itself if ``plain``; and if ``shift`` is given, x in its form, and the unread frames. Else None.
    """
    pool = torch.ops.tsm_jit.residual_pool.default if is_compiling() else pool_operator
    x, shifted, unread = pool(z, *norm_args(norm), shift or NO_SHIFT, plain, shift is not None)
    return (x if plain else None, *((None, None) if shift is None else (shifted, unread)))


def _alike(z: Tensor, identity: Tensor | None, unread: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All in a layout that kernels take, and of the type of z, as in ``z += identity``."""
    if not z.is_contiguous() and not z.is_contiguous(memory_format=torch.channels_last):
        z = z.contiguous()
    identity, unread = (None if each is None else each.to(z.dtype) for each in (identity, unread))
    if not torch.is_grad_enabled():
        identity, unread = laid_out_as(identity, z), laid_out_as(unread, z)
    return z, identity, unread


def applied_norm(module: nn.BatchNorm2d, parts: Sequence[Tensor], x: Tensor, recorded: bool) -> Norm:
    """The batch normalization of ``x`` by ``module``, whose running statistics, the first two of ``parts``, beside its
    weight and bias, are updated."""
    if not recorded:
        return Norm(*parts, module.eps)
    if module.training:
        statistics = batch_statistics(x.detach(), *parts[:2], module.num_batches_tracked, module.momentum)
        parts = (*statistics, *parts[2:])
    elif not is_compiling():  # the running ones, which may change before the backward
        parts = (parts[0].clone(), parts[1].clone(), *parts[2:])
    in_type = wide(x.dtype)
    return Norm(*(part if part.dtype is in_type else part.to(in_type) for part in parts), module.eps, module.training)


def relu_of_norm(z: Tensor, norm: Norm) -> Tensor:
    """``relu(norm(z))`` of the activations ``z`` ``[N*T, C, H, W]``, differentiable once; it is not kept for that."""
    return _ReluOfNorm.apply(_alike(z, None, None)[0], *norm[:4], norm[4:])


def relu_of_norm_(z: Tensor, norm: Norm) -> Tensor:
    """``relu(norm(z))``, written into the activations ``z`` ``[N*T, C, H, W]``; where nothing is recorded."""
    write_into(z, None, None, 1, z, *norm_args(norm), None, [], 0.0, None, NO_SHIFT, True)
    return z


class _EndOfBlock(Function):
    @staticmethod
    def forward(ctx, z, identity, unread, *rest):
        *parts, how, readers = rest
        z_how, identity_how, shift, shifted = how
        z_norm, identity_norm = z_how and Norm(*parts[:4], *z_how), identity_how and Norm(*parts[4:], *identity_how)
        out, unread_out = write_new(z, z_norm, identity, identity_norm, unread, shift, shifted)
        ctx.how = how
        ctx.identity_is_shifted = unread is not None
        ctx.save_for_backward(out, unread_out if shifted else None, *_kept(z, z_norm), *_kept(identity, identity_norm))
        ctx.set_materialize_grads(False)
        return unread_out, *for_readers(out, readers)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_unread, grad_a, grad_b=None):
        out, unread_out, *saved = ctx.saved_tensors
        *hows, shift, shifted = ctx.how
        needed = ctx.needs_input_grad
        z = Operand.of_kept(saved[:4], hows[0], needed[0], any(needed[5:7]))
        identity = Operand.of_kept(saved[4:], hows[1], needed[1], any(needed[9:11]))
        grads = grad_a, grad_b, grad_unread if shifted else None
        of_z, of_identity, of_unread = gradients_of_end(
            *grads, out, unread_out, z, identity, shift, ctx.identity_is_shifted
        )
        of_norms = (None, None, *of_z[1:], None, None, *of_identity[1:])
        return of_z[0], of_identity[0], of_unread, *of_norms, None, None


class _ReluOfNorm(Function):
    @staticmethod
    def forward(ctx, z, *norm):
        *parts, how = norm
        ctx.how = how
        # Asked here: where a backward asks how a tensor lies in memory, compilers make its gradients contiguous.
        ctx.in_kernel = sums_are_in_kernel(z)
        ctx.save_for_backward(z, *parts)
        return write_new(z, Norm(*parts, *how), None, None, None, NO_SHIFT, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, *parts = ctx.saved_tensors
        if ctx.in_kernel:  # hooks that keep tensors elsewhere may lose their strides
            z = z.contiguous(memory_format=torch.channels_last)
        needed = ctx.needs_input_grad
        of_z = Operand(z, Norm(*parts, *ctx.how), needed[0], any(needed[3:5]))
        of_values, *of_norm = gradients_of_relu_of_norm(grad, of_z, ctx.in_kernel)
        return of_values, None, None, *of_norm, None


def for_readers(out: Tensor, readers: int) -> list[Tensor]:
    """``out`` for each of them. None for nobody: a compiler would fill its gradient with zeros."""
    return [out, *(out.view_as(out) for _ in range(readers - 1))]


def _kept(values: Tensor, norm: Norm | None) -> tuple[Tensor | None, ...]:
    """What the backward needs of an operand: without a norm not its values, and of a norm not its bias."""
    return (values, *norm[:3]) if norm else (None,) * 4
