"""The end of a residual block whose stream is kept shifted: operators and autograd for ``residual.py``.

``x = relu(norm(z) + norm(identity))`` in one pass over the memory, where x is written, and the identity read, as itself
or in shifted form: the shifted x, and beside it ``unread``, the frames that the shift does not read. The formulas are
in ``kernels/residual_shift.h``.

- ``residual_shift_(out!, unread_out!, plain!, step, z, z_norm, ..., shift)`` and ``residual_shift_backward_`` write
  into tensors that they are given;
- ``residual_shift`` and ``residual_shift_backward`` make these tensors; the overload ``.again`` of the first is for a
  backward: of the same call in the forward, compilers keep the result;
- ``residual_end_backward`` makes of the latter the gradients of values and norms;
- ``relu_of_norm_backward`` makes those of ``relu(norm(z))``, whose sign it computes again instead of reading it;
- ``channel_statistics_`` are those of a batch normalization;
- ``residual_pool`` is what a ResNet begins with, ``max_pool2d(relu(norm(z)), 3, 2, 1)``, in the forms of x.

All are unknown to autograd; :func:`end_of_block` is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from tsm_jit import reference
from tsm_jit.ops.compat import direct
from tsm_jit.plans import Shift, decode

_library = torch.library.Library("tsm_jit", "FRAGMENT")
_NORMS = (
    "Tensor z, Tensor[] z_norm, float z_epsilon, Tensor? identity, Tensor[] identity_norm, float identity_epsilon, "
    "Tensor? unread, str shift"
)
_GRADS = "Tensor? grad_a, Tensor? grad_b, Tensor? grad_unread, Tensor out, Tensor? unread_out"
_NORMED = (
    "Tensor? z, Tensor[] z_norm, float z_epsilon, Tensor? identity, Tensor[] identity_norm, float identity_epsilon"
)


for _schema in (
    f"residual_shift_(Tensor(a!) out, Tensor(b!)? unread_out, Tensor(c!)? plain, int step, {_NORMS}, bool relu) -> ()",
    "residual_pool(Tensor z, Tensor[] z_norm, float z_epsilon, str shift, bool plain, bool shifted) "
    "-> (Tensor, Tensor, Tensor)",
    f"residual_shift({_NORMS}, bool shifted) -> (Tensor, Tensor)",
    f"residual_shift.again({_NORMS}, bool shifted) -> (Tensor, Tensor)",
    "relu_of_norm_backward(Tensor grad, Tensor z, Tensor[] norm, float epsilon, int[] how) -> (Tensor, Tensor, Tensor)",
    "residual_shift_backward_(Tensor(a!)? grad, Tensor(b!)? grad_shifted, Tensor(c!)? grad_unread_in, "
    f"Tensor(d!)? norm_gradients, {_GRADS}, {_NORMED}, str shift) -> ()",
    "channel_statistics_(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) batches, "
    "float momentum) -> (Tensor, Tensor)",
    f"residual_shift_backward({_GRADS}, {_NORMED}, str shift, bool shifted) -> (Tensor, Tensor, Tensor, Tensor)",
    f"residual_end_backward({_GRADS}, Tensor? z, Tensor[] z_norm, float z_epsilon, int[] z_how, Tensor? identity, "
    "Tensor[] identity_norm, float identity_epsilon, int[] identity_how, str shift, bool shifted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


_new = direct(torch.ops.tsm_jit.residual_shift.default)
_write = direct(torch.ops.tsm_jit.residual_shift_.default)
pool_operator = direct(torch.ops.tsm_jit.residual_pool.default)
_statistics = direct(torch.ops.tsm_jit.channel_statistics_.default)


class Norm(NamedTuple):
    """A batch normalization: ``(value - mean) / sqrt(variance + epsilon) * weight + bias``, all parts ``[C]``."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    epsilon: float
    of_batch: bool = False  # are mean and variance those of the values, so that gradients go through them as well?


def wide(in_type: torch.dtype) -> torch.dtype:
    """The type in which activations of a type are added and their norms computed."""
    return torch.float64 if in_type is torch.float64 else torch.float32


def sums_are_in_kernel(x: Tensor) -> bool:
    """Whether kernels sum up activations like ``x`` by channel: on a GPU, where channels are innermost."""
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1 and x.numel() > 0


def pixels_are_known(x: Tensor) -> bool:
    """Whether kernels tell the pixels of activations like ``x`` apart: not on a GPU where each channel has its own."""
    return not x.is_cuda or (x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1)


_NOT_NORMED = (None, [], 0.0)  # values without a norm, or whose norm's gradients nobody wants
NO_SHIFT = Shift(1, 1, 1, "zeros", ()).encode()  # of clips of any length


def write_into(*given) -> None:
    (torch.ops.tsm_jit.residual_shift_.default if is_compiling() else _write)(*given)


def write_new(
    z: Tensor,
    z_norm: Norm | None,
    identity: Tensor | None,
    identity_norm: Norm | None,
    unread: Tensor | None,
    shift: str,
    shifted: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`end_of_block` as new tensors, unknown to autograd."""
    write = torch.ops.tsm_jit.residual_shift.default if is_compiling() else _new
    return write(z, *norm_args(z_norm), identity, *norm_args(identity_norm), unread, shift, shifted)


def norm_args(norm: Norm | None) -> tuple[list[Tensor], float]:
    """As operators take it."""
    return ([], 0.0) if norm is None else (list(norm[:4]), norm.epsilon)


def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel of the activations ``x`` ``[N*T, C, H, W]``, channels_last; updates the
    running ones, of the type :func:`wide`, and the number of batches, as ``torch.nn.BatchNorm2d`` does."""
    statistics = torch.ops.tsm_jit.channel_statistics_.default if is_compiling() else _statistics
    return statistics(x, running_mean, running_var, batches, momentum)


class Operand(NamedTuple):
    """One of the two that the end of a block adds, backward: which of its gradients are wanted."""

    values: Tensor | None = None
    norm: Norm | None = None
    wanted: bool = False
    norm_is_wanted: bool = False

    @classmethod
    def of_kept(
        cls, saved: Sequence[Tensor], how: tuple[float, bool] | None, wanted: bool, norm_is_wanted: bool
    ) -> Operand:
        """Out of what :func:`_kept` made, and the rest of its norm."""
        return cls(saved[0], how and Norm(*saved[1:], None, *how), wanted, norm_is_wanted)

    def summed(self) -> tuple[Tensor | None, list[Tensor], float]:
        """Norm and values, if gradients are made of sums over all but the channels."""
        if self.norm and (self.norm.of_batch or self.norm_is_wanted):
            return self.values, list(self.norm[:3]), self.norm.epsilon
        return _NOT_NORMED

    def flat(self) -> tuple[Tensor | None, list[Tensor], float, list[int]]:
        """As operators take it."""
        how = [self.norm is not None and self.norm.of_batch, self.wanted, self.norm_is_wanted]
        return self.values, list(self.norm[:3]) if self.norm else [], self.norm.epsilon if self.norm else 0.0, how

    @classmethod
    def of_flat(cls, values: Tensor | None, norm: list[Tensor], epsilon: float, how: list[int]) -> Operand:
        of_batch, wanted, norm_is_wanted = map(bool, how)
        return cls.of_kept((values, *norm), (epsilon, of_batch) if norm else None, wanted, norm_is_wanted)


def gradients_of_end(
    grad_a: Tensor | None,
    grad_b: Tensor | None,
    grad_unread: Tensor | None,
    out: Tensor,
    unread_out: Tensor | None,
    z: Operand,
    identity: Operand,
    shift: str,
    identity_is_shifted: bool,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], Tensor | None]:
    """The gradients of z and those of the identity: of the values, and of the norm's weight and bias; and of unread.
    None where not wanted."""
    normed = z.norm is not None or identity.norm is not None  # or else one result may be two of them
    operator = _for_gradients(
        torch.ops.tsm_jit.residual_end_backward.default, _plain_end_backward, out, sums_are_in_kernel(out), normed
    )
    grads = (grad_a, grad_b, grad_unread, out, unread_out)
    found = operator(*grads, *z.flat(), *identity.flat(), shift, identity_is_shifted)
    return found[:3], found[3:6], found[6]


def gradients_of_relu_of_norm(grad: Tensor, z: Operand, in_kernel: bool) -> tuple[Tensor | None, ...]:
    """Those of ``z``, given that of ``relu(norm(z))``: of the values, and of the norm's weight and bias."""
    operator = _for_gradients(
        torch.ops.tsm_jit.relu_of_norm_backward.default, _plain_relu_backward, z.values, in_kernel
    )
    _, norm, epsilon, how = z.flat()
    return operator(grad, z.values, [*norm, z.norm.bias], epsilon, how)


def _for_gradients(operator, plain: Callable, like: Tensor, in_kernel: bool, apart: bool = True) -> Callable:
    """``operator``, of activations like these, or what is ``plain`` where no kernel sums up or a compiler must not have
    it: they rely on results being ``apart`` in memory, and aligned to 16 bytes. Gradients of norms are rows of one
    tensor."""
    if in_kernel and not is_compiling():
        return direct(operator)
    return operator if in_kernel and apart and like.shape[1] % 4 == 0 else plain


def _plain_gradients_of_end(
    grad_a, grad_b, grad_unread, out, unread_out, z, identity, shift, identity_is_shifted
) -> tuple[Tensor | None, ...]:
    of_z, of_identity = z.summed(), identity.summed()
    grad, grad_shifted, grad_unread_in, made = _new_gradients(
        grad_a, grad_b, grad_unread, out, unread_out, *of_z, *of_identity, shift, identity_is_shifted
    )
    zero, *rows = made.unbind(0) if made.numel() else [None]
    found = []
    for k, (each, summed) in enumerate(((z, of_z), (identity, of_identity))):
        of_weight, of_bias, *beside = rows[4 * k : 4 * k + 4] if summed[1] else (None,) * 4
        of_values = grad_shifted if k == 1 and identity_is_shifted else grad
        if each.norm is not None and each.wanted:
            # The last one that reads `grad`, where that is nobody's gradient itself.
            last = z.norm is not None if k == 1 else identity_is_shifted or not identity.wanted
            of_values = _through_norm(grad, each.values, each.norm, zero, beside, last)
        found.append((of_values if each.wanted else None, of_weight, of_bias))
    return *found[0], *found[1], grad_unread_in if identity_is_shifted else None


def _through_norm(
    grad: Tensor, values: Tensor, norm: Norm, zero: Tensor | None, beside: list[Tensor], overwrite: bool
) -> Tensor:
    """The gradient of ``values``, of which ``grad`` is that of their norm; ``overwrite`` allows to write it there.

    That is ``grad * weight / sqrt(variance + epsilon)`` and, where mean and variance are of these values, beside it a
    norm of them, of other weights and biases: the sum that ends a block, without its ReLU. See ``NormGradients`` in
    ``kernels/residual_shift.h``.
    """
    values_norm = [norm.mean, norm.variance, *beside] if norm.of_batch else []
    zero = torch.zeros_like(norm.weight) if zero is None else zero
    out = grad if overwrite else torch.empty_like(grad)
    values = laid_out_as(values, grad) if values_norm else None
    grad_norm = [zero, norm.variance, norm.weight, zero]
    write_into(
        out, None, None, 1, grad, grad_norm, norm.epsilon, values, values_norm, norm.epsilon, None, NO_SHIFT, False
    )
    return out


def _new_gradients(
    grad_a,
    grad_b,
    grad_unread,
    out,
    unread_out,
    z,
    z_norm,
    z_epsilon,
    identity,
    identity_norm,
    identity_epsilon,
    shift,
    shifted,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last: see ``NormGradients`` in ``kernels/residual_shift.h``. A norm is its mean, variance and weight."""
    norms = (z, z_norm, z_epsilon, identity, identity_norm, identity_epsilon)
    in_kernel = sums_are_in_kernel(out)
    operator = torch.ops.tsm_jit.residual_shift_backward.default
    made = (operator if is_compiling() else direct(operator))(
        grad_a, grad_b, grad_unread, out, unread_out, *(norms if in_kernel else _NOT_NORMED * 2), shift, shifted
    )
    return made if in_kernel or not (z_norm or identity_norm) else (*made[:3], _norm_gradients(made[0], *norms))


def _norm_gradients(grad, z, z_norm, z_epsilon, identity, identity_norm, identity_epsilon) -> Tensor:
    """What kernels make of sums by channel, by PyTorch."""
    wide_grad = grad.to((z_norm or identity_norm)[0].dtype)
    of_bias = wide_grad.sum((0, 2, 3))
    made = of_bias.new_zeros((9, of_bias.numel()))
    for k, (values, norm, epsilon) in enumerate(((z, z_norm, z_epsilon), (identity, identity_norm, identity_epsilon))):
        if norm:
            mean, variance, weight = norm
            deviation = torch.rsqrt(variance + epsilon)
            of_weight = (wide_grad * (values - mean[:, None, None])).sum((0, 2, 3)) * deviation
            of_parts = torch.stack([of_weight, of_bias])
            factor = weight * deviation * (-of_bias.numel() / max(grad.numel(), 1))
            made[1 + 4 * k : 5 + 4 * k] = torch.cat([of_parts, of_parts * factor])
    return made


def new_unread(like: Tensor, shift: str) -> Tensor:
    shift = decode(shift)
    return new_like(like, (like.shape[0] // shift.n_segment, shift.unread_channels(), *like.shape[2:]))


def new_like(like: Tensor, shape: Sequence[int]) -> Tensor:
    """In the memory format of ``like``. By strides: a compiler fills what ``torch.empty`` makes before we write it."""
    channels_last = not like.is_contiguous()
    strides, stride = [0] * len(shape), 1
    for d in (1, *range(len(shape) - 1, 1, -1), 0) if channels_last else range(len(shape) - 1, -1, -1):
        strides[d] = stride
        stride *= shape[d] if channels_last else max(shape[d], 1)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def laid_out_as(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=_memory_format(like))


def _plain_statistics(x, running_mean, running_var, batches, momentum) -> tuple[Tensor, Tensor]:
    batches.add_(1)
    count = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x.to(wide(x.dtype)), (0, 2, 3), correction=0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)
    return mean, variance


def _plain_write(
    out,
    unread_out,
    plain,
    step,
    z,
    z_norm,
    z_epsilon,
    identity,
    identity_norm,
    identity_epsilon,
    unread,
    shift,
    relu,
) -> None:
    z = _normed(z, z_norm, z_epsilon)
    if identity is not None:
        identity = _normed(identity, identity_norm, identity_epsilon)
    if not relu:
        out.copy_(z if identity is None else z + identity)
        return
    x = reference.residual_shift(z, identity, unread, decode(shift)).to(out.dtype)
    if plain is not None:
        plain.copy_(x[:, :, ::step, ::step])
    _write_forms(out, unread_out, x, shift)


def _write_forms(out, unread_out, x, shift) -> None:
    if unread_out is None:
        out.copy_(x)
    else:
        out.copy_(reference.temporal_shift(x, decode(shift)))
        unread_out.copy_(reference.unread_frames(x, decode(shift)))


def _plain_pool(z, z_norm, z_epsilon, shift, plain, shifted):
    x = F.max_pool2d(torch.relu(_normed(z, z_norm, z_epsilon)), 3, 2, 1).to(z.dtype)
    made = _like_new_pool(z, z_norm, z_epsilon, shift, plain, shifted)
    if plain:
        made[0].copy_(x)
    if shifted:
        _write_forms(*made[1:], x, shift)
    return made


def _like_new_pool(z, z_norm, z_epsilon, shift, plain, shifted):
    none = z.new_empty(0)
    x, out = (
        new_like(z, (*z.shape[:2], (z.shape[2] + 1) // 2, (z.shape[3] + 1) // 2)) if wanted else none
        for wanted in (plain, shifted)
    )
    return x, out, new_unread(out, shift) if shifted else none


def _normed(values: Tensor, norm: Sequence[Tensor], epsilon: float) -> Tensor:
    if not norm:
        return values
    parts = [part.to(wide(values.dtype)) for part in norm]
    scale = torch.rsqrt(parts[1] + epsilon) * parts[2]
    return values.to(wide(values.dtype)) * scale[:, None, None] + (parts[3] - parts[0] * scale)[:, None, None]


def _plain_write_gradients(
    grad,
    grad_shifted,
    grad_unread_in,
    norm_gradients,
    grad_a,
    grad_b,
    grad_unread,
    out,
    unread_out,
    z,
    z_norm,
    z_epsilon,
    identity,
    identity_norm,
    identity_epsilon,
    shift,
) -> None:
    shift = decode(shift)
    given = [each for each in (grad_a, grad_b) if each is not None]
    masked = reference.residual_shift_backward(given, grad_unread, out, unread_out, shift)
    if grad is not None:
        grad.copy_(masked)
    if grad_shifted is not None:
        without_padding = shift if shift.padding == "circular" else shift._replace(padding="zeros")
        grad_shifted.copy_(reference.temporal_shift(masked, without_padding))
        grad_unread_in.copy_(reference.unread_frames(masked, shift))
    if norm_gradients is not None:
        made = _norm_gradients(masked, z, z_norm, z_epsilon, identity, identity_norm, identity_epsilon)
        norm_gradients.copy_(made)


def _plain_end_backward(grad_a, grad_b, grad_unread, out, unread_out, *given):
    *operands, shift, shifted = given
    z, identity = Operand.of_flat(*operands[:4]), Operand.of_flat(*operands[4:])
    return _plain_gradients_of_end(grad_a, grad_b, grad_unread, out, unread_out, z, identity, shift, shifted)


def _plain_relu_backward(grad, z, norm, epsilon, how):
    x, _ = torch.ops.tsm_jit.residual_shift.again(z, norm, epsilon, None, [], 0.0, None, NO_SHIFT, False)
    of_z = Operand.of_flat(z, norm[:3], epsilon, how)
    return _plain_gradients_of_end(grad, None, None, x, None, of_z, Operand(), NO_SHIFT, False)[:3]


def _like_new(z, z_norm, z_epsilon, identity, identity_norm, identity_epsilon, unread, shift, shifted):
    return torch.empty_like(z), new_unread(z, shift) if shifted else z.new_empty(0)


def _like_new_gradients(
    grad_a,
    grad_b,
    grad_unread,
    out,
    unread_out,
    z,
    z_norm,
    z_epsilon,
    identity,
    identity_norm,
    identity_epsilon,
    shift,
    shifted,
):
    norm = z_norm or identity_norm
    return (
        torch.empty_like(out),
        torch.empty_like(out) if shifted else out.new_empty(0),
        new_unread(out, shift) if shifted else out.new_empty(0),
        norm[0].new_empty((9, out.shape[1])) if norm else out.new_empty(0),
    )


def _like_new_end_gradients(grad_a, grad_b, grad_unread, out, unread_out, *given):
    *operands, shift, shifted = given
    found = (_like_gradients_of(Operand.of_flat(*each), out) for each in (operands[:4], operands[4:]))
    return *itertools.chain(*found), new_unread(out, shift) if shifted else None


def _like_new_relu_gradients(grad, z, norm, epsilon, how):
    return tuple(_like_gradients_of(Operand.of_flat(z, norm[:3], epsilon, how), z))


def _like_gradients_of(operand: Operand, values: Tensor) -> list[Tensor | None]:
    _, norm, _ = operand.summed()
    of_norm = [torch.empty_like(norm[0]) if norm else None for _ in range(2)]
    return [torch.empty_like(values) if operand.wanted else None, *of_norm]


def _plain_new(*given):
    *parts, shift, shifted = given
    out, unread_out = _like_new(*given)
    _plain_write(out, unread_out if shifted else None, None, 1, *parts, shift, True)
    return out, unread_out


def _plain_new_gradients(*given):
    *parts, shift, shifted = given
    made = _like_new_gradients(*given)
    wanted = (True, shifted, shifted, made[3].numel() > 0)
    _plain_write_gradients(*(each if want else None for each, want in zip(made, wanted, strict=True)), *parts, shift)
    return made


_schemas = torch.ops.tsm_jit


for _operator, _compute, _fake in (
    (_schemas.residual_shift_.default, _plain_write, lambda *_: None),
    (_schemas.residual_shift_backward_.default, _plain_write_gradients, lambda *_: None),
    (
        _schemas.channel_statistics_.default,
        _plain_statistics,
        lambda x, mean, variance, *_: (torch.empty_like(mean), torch.empty_like(variance)),
    ),
    (_schemas.residual_shift.default, _plain_new, _like_new),
    (_schemas.residual_shift.again, _plain_new, _like_new),
    (_schemas.relu_of_norm_backward.default, _plain_relu_backward, _like_new_relu_gradients),
    (_schemas.residual_pool.default, _plain_pool, _like_new_pool),
    (_schemas.residual_shift_backward.default, _plain_new_gradients, _like_new_gradients),
    (_schemas.residual_end_backward.default, _plain_end_backward, _like_new_end_gradients),
):
    _library.impl(_operator, _compute, "CompositeExplicitAutograd")
    _library.impl(_operator, _fake, "Meta")
