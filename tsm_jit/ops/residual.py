"""Operators for residual blocks with shifted activations.

A residual block ends in ``x = relu(norm(z) + norm(identity))``, and the next block starts with ``shift(x)``. So x has
two layouts:

- *unshifted*: ``x [N*T, C, H, W]``;
- *shifted*: ``shift(x)``, and the boundary frames ``boundary [N, K, H, W]``, which the shift drops. For each channel
  group these are the first ``|offset|`` frames if ``offset > 0``, otherwise the last ones. They are concatenated as
  channels.

A norm is a batch normalization, ``(v - mean) / sqrt(variance + epsilon) * weight + bias``, with one value of each per
channel. Operators take it as a ``Tensor[]`` of mean, variance, weight and bias, and a ``float epsilon``. An empty list
means no norm. A backward takes mean, variance and weight.

- ``norm_add_relu(_)``: computes x in either layout, from an identity in either layout.
- ``norm_relu_max_pool``: the stem of a ResNet.
- ``norm_add_relu_backward``: the gradients of ``z``, of the identity and of both norms. ``add_relu_backward(_)`` is its
  first part, the gradient of the sum.
- ``norm_relu_backward``: recomputes the ReLU mask instead of loading it.
- ``batch_norm_stats_``: mean and variance per channel. It also updates the running statistics.

The kernels (``kernels/residual``) take precedence over the PyTorch fallback at the end of this file. These operators
have no autograd: ``tsm_jit/fused/autograd.py`` has the autograd functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from tsm_jit import reference
from tsm_jit.ops.compat import direct
from tsm_jit.plans import Shift, decode

_library = torch.library.Library("tsm_jit", "FRAGMENT")
_INPUTS = (
    "Tensor z, Tensor[] z_norm, float z_epsilon, Tensor? identity, Tensor[] identity_norm, float identity_epsilon, "
    "Tensor? boundary, str shift"
)
_GRADS = "Tensor? grad_a, Tensor? grad_b, Tensor? grad_boundary, Tensor out, Tensor? boundary_out"
_NORMED = (
    "Tensor? z, Tensor[] z_norm, float z_epsilon, Tensor? identity, Tensor[] identity_norm, float identity_epsilon"
)
for _schema in (
    f"norm_add_relu_(Tensor(a!) out, Tensor(b!)? boundary_out, Tensor(c!)? unshifted_out, int step, {_INPUTS}, "
    "bool relu) -> ()",
    f"norm_add_relu({_INPUTS}, bool shifted) -> (Tensor, Tensor)",
    "norm_relu_max_pool(Tensor z, Tensor[] z_norm, float z_epsilon, str shift, bool unshifted, bool shifted) "
    "-> (Tensor, Tensor, Tensor)",
    "add_relu_backward_(Tensor(a!)? grad, Tensor(b!)? grad_shifted, Tensor(c!)? grad_boundary_in, "
    f"Tensor(d!)? norm_gradients, {_GRADS}, {_NORMED}, str shift) -> ()",
    f"add_relu_backward({_GRADS}, {_NORMED}, str shift, bool shifted) -> (Tensor, Tensor, Tensor, Tensor)",
    f"norm_add_relu_backward({_GRADS}, Tensor? z, Tensor[] z_norm, float z_epsilon, int[] z_flags, Tensor? identity, "
    "Tensor[] identity_norm, float identity_epsilon, int[] identity_flags, str shift, bool shifted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "norm_relu_backward(Tensor grad, Tensor z, Tensor[] norm, float epsilon, int[] flags) -> (Tensor, Tensor, Tensor)",
    "batch_norm_stats_(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, "
    "float momentum) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

NO_SHIFT = Shift(1, 1, 1, "zeros", ()).encode()  # for clips of any length


class Norm(NamedTuple):
    """A batch normalization, all parts ``[C]``."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor | None  # None: not needed, in a backward
    epsilon: float
    uses_batch_stats: bool = False  # mean and variance depend on the values, so gradients flow through them

    def args(self) -> tuple[list[Tensor], float]:
        """Returns the arguments of an operator."""
        return [part for part in self[:4] if part is not None], self.epsilon


class NormedInput(NamedTuple):
    """One of the two summands of ``norm_add_relu``, as its backward needs it."""

    values: Tensor | None = None  # needed only under a norm
    norm: Norm | None = None
    needs_grad: bool = False
    norm_needs_grad: bool = False

    def args(self) -> tuple[Tensor | None, list[Tensor], float, list[int]]:
        """Returns the arguments of an operator. The last is the flags uses_batch_stats, needs_grad, norm_needs_grad."""
        uses_batch_stats = self.norm is not None and self.norm.uses_batch_stats
        return self.values, *norm_args(self.norm), [uses_batch_stats, self.needs_grad, self.norm_needs_grad]


def norm_args(norm: Norm | None) -> tuple[list[Tensor], float]:
    """Returns the arguments of an operator for a norm, or for no norm."""
    return ([], 0.0) if norm is None else norm.args()


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels add and normalize activations of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def has_channel_sums(x: Tensor) -> bool:
    """Whether kernels can sum activations like ``x`` per channel: only on a GPU, in channels_last."""
    return x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1 and x.numel() > 0


def has_norm_kernels(x: Tensor) -> bool:
    """Whether operators compute gradients of norms of ``x``.

    Forwards ask. In a backward, compilers would make gradients contiguous, as the answer reads the memory format.
    """
    return not x.is_cuda or has_channel_sums(x)


def has_pixel_index(x: Tensor) -> bool:
    """Whether kernels know the row and column of each value of ``x``: on a GPU only in channels_last."""
    return not x.is_cuda or (x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1)


# --- calls of the operators ------------------------------------------------------------------------------------------


def caller(name: str) -> Any:
    """Returns a function that calls the operator, in eager mode by :func:`direct`."""
    overload = getattr(torch.ops.tsm_jit, name).default
    eager_op = direct(overload)

    def call(*args: Any) -> Any:
        return overload(*args) if is_compiling() else eager_op(*args)

    return call


norm_add_relu_ = caller("norm_add_relu_")
add_relu_backward = caller("add_relu_backward")
_norm_add_relu = caller("norm_add_relu")
_norm_add_relu_backward = caller("norm_add_relu_backward")
_norm_relu_backward = caller("norm_relu_backward")
norm_relu_max_pool = caller("norm_relu_max_pool")
batch_norm_stats_ = caller("batch_norm_stats_")


def norm_add_relu(
    z: Tensor,
    z_norm: Norm | None,
    identity: Tensor | None,
    identity_norm: Norm | None,
    boundary: Tensor | None,
    shift: str,
    shifted: bool,
) -> tuple[Tensor, Tensor]:
    """Returns ``x = relu(norm(z) + norm(identity))``, shifted if ``shifted``, and the boundary frames of x."""
    return _norm_add_relu(z, *norm_args(z_norm), identity, *norm_args(identity_norm), boundary, shift, shifted)


def norm_add_relu_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    out: Tensor,
    boundary_out: Tensor | None,
    z: NormedInput,
    identity: NormedInput,
    shift: str,
    identity_is_shifted: bool,
    in_kernel: bool,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Tensor | None]:
    """The backward of :func:`norm_add_relu`. Gradients that are not needed are None.

    Args:
        grads: the gradients of x from its two consumers, and of the boundary frames.
        out, boundary_out: the outputs of the forward.
        z, identity: the summands.
        shift: the shift of ``out`` and of the identity.
        identity_is_shifted: whether the identity is in the shifted layout.
        in_kernel: :func:`has_norm_kernels` of ``z`` in the forward.

    Returns:
        For ``z`` and for the identity: the gradients of the values and of the norm's weight and bias. Then the gradient
        of the identity's boundary frames.
    """
    if z.norm is None and identity.norm is None:
        grad, grad_shifted, grad_boundary, _ = add_relu_backward(
            *grads, out, boundary_out, None, [], 0.0, None, [], 0.0, shift, identity_is_shifted
        )
        grad_identity = grad_shifted if identity_is_shifted else grad
        return (
            (grad if z.needs_grad else None, None, None),
            (grad_identity if identity.needs_grad else None, None, None),
            grad_boundary if identity_is_shifted else None,
        )
    backward = _norm_add_relu_backward if in_kernel else _reference_norm_add_relu_backward
    grads_out = backward(*grads, out, boundary_out, *z.args(), *identity.args(), shift, identity_is_shifted)
    return grads_out[:3], grads_out[3:6], grads_out[6]


def norm_relu_backward(grad: Tensor, z: NormedInput, in_kernel: bool) -> tuple[Tensor | None, ...]:
    """The backward of ``relu(norm(z))``: gradients of ``z`` and of the norm's weight and bias, None if not needed.

    ``in_kernel`` is :func:`has_norm_kernels` of ``z`` in the forward.
    """
    backward = _norm_relu_backward if in_kernel else _reference_norm_relu_backward
    return backward(grad, *z.args())


# --- layouts ---------------------------------------------------------------------------------------------------------


def new_boundary(like: Tensor, shift: str) -> Tensor:
    """Allocates the boundary frames of activations like ``like``."""
    decoded = decode(shift)
    return new_like(like, (like.shape[0] // decoded.n_segment, decoded.boundary_channels(), *like.shape[2:]))


def new_like(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Allocates a tensor of ``shape`` in the memory format of ``like``.

    It calls ``torch.empty_strided``, since compiled code would fill the result of ``torch.empty``.
    """
    channels_last = not like.is_contiguous()
    strides, stride = [0] * len(shape), 1
    for d in (1, *range(len(shape) - 1, 1, -1), 0) if channels_last else range(len(shape) - 1, -1, -1):
        strides[d] = stride
        stride *= shape[d] if channels_last else max(shape[d], 1)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


def in_format_of(like: Tensor, x: Tensor | None) -> Tensor | None:
    """Returns ``x`` in the memory format of ``like``."""
    memory_format = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return None if x is None else x.contiguous(memory_format=memory_format)


# --- PyTorch fallback and fake implementations -----------------------------------------------------------------------


def _norm(values: Tensor, norm: Sequence[Tensor], epsilon: float) -> Tensor:
    if not norm:
        return values
    mean, variance, weight, bias = (part.to(acc_dtype(values.dtype)) for part in norm)
    scale = torch.rsqrt(variance + epsilon) * weight
    return values.to(scale.dtype) * scale[:, None, None] + (bias - mean * scale)[:, None, None]


def _norm_backward(grad: Tensor, values: Tensor, norm: Sequence[Tensor], epsilon: float, flags: Sequence[int]):
    """Returns the gradients of values, weight and bias, None if not needed."""
    uses_batch_stats, needs_grad, norm_needs_grad = map(bool, flags)
    mean, variance, weight = norm[:3]
    dtype = acc_dtype(grad.dtype)
    grads = torch.ops.aten.native_batch_norm_backward(
        grad.to(dtype), values.to(dtype), weight, mean, variance, mean, torch.rsqrt(variance + epsilon),
        uses_batch_stats, epsilon, [needs_grad, True, True],
    )  # fmt: skip
    has_norm_grads = uses_batch_stats or norm_needs_grad  # like the kernels, which compute them in any case
    grad_norm = grads[1:] if has_norm_grads else (None, None)
    return in_format_of(values, grads[0].to(values.dtype)) if needs_grad else None, *grad_norm


def _write(out, boundary_out, x, shift) -> None:
    if boundary_out is None:
        out.copy_(x)
    else:
        out.copy_(reference.temporal_shift(x, decode(shift)))
        boundary_out.copy_(reference.boundary_frames(x, decode(shift)))


def _reference_norm_add_relu_in_place(
    out, boundary_out, unshifted_out, step, z, z_norm, z_epsilon, identity, identity_norm, identity_epsilon, boundary,
    shift, relu,
) -> None:  # fmt: skip
    z = _norm(z, z_norm, z_epsilon)
    if identity is not None:
        identity = _norm(identity, identity_norm, identity_epsilon)
    if not relu:
        out.copy_(z if identity is None else z + identity)
        return
    x = reference.add_relu(z, identity, boundary, decode(shift)).to(out.dtype)
    if unshifted_out is not None:
        unshifted_out.copy_(x[:, :, ::step, ::step])
    _write(out, boundary_out, x, shift)


def _fake_norm_add_relu(z, z_norm, z_epsilon, identity, identity_norm, identity_epsilon, boundary, shift, shifted):
    return torch.empty_like(z), new_boundary(z, shift) if shifted else z.new_empty(0)


def _reference_norm_add_relu(*args):
    *inputs, shift, shifted = args
    out, boundary_out = _fake_norm_add_relu(*args)
    _reference_norm_add_relu_in_place(out, boundary_out if shifted else None, None, 1, *inputs, shift, True)
    return out, boundary_out


def _fake_pool(z, z_norm, z_epsilon, shift, unshifted, shifted):
    sizes = (*z.shape[:2], (z.shape[2] + 1) // 2, (z.shape[3] + 1) // 2)
    x, out = (new_like(z, sizes) if needed else z.new_empty(0) for needed in (unshifted, shifted))
    return x, out, new_boundary(out, shift) if shifted else z.new_empty(0)


def _reference_pool(z, z_norm, z_epsilon, shift, unshifted, shifted):
    x = F.max_pool2d(torch.relu(_norm(z, z_norm, z_epsilon)), 3, 2, 1).to(z.dtype)
    outputs = _fake_pool(z, z_norm, z_epsilon, shift, unshifted, shifted)
    if unshifted:
        outputs[0].copy_(x)
    if shifted:
        _write(*outputs[1:], x, shift)
    return outputs


def _reference_add_relu_backward_in_place(
    grad, grad_shifted, grad_boundary_in, norm_gradients, grad_a, grad_b, grad_boundary, out, boundary_out, *rest
) -> None:
    if norm_gradients is not None:
        raise RuntimeError("norm_gradients must be None on a device without kernels")
    shift = decode(rest[-1])
    grads = [each for each in (grad_a, grad_b) if each is not None]
    masked = reference.add_relu_backward(grads, grad_boundary, out, boundary_out, shift)
    if grad is not None:
        grad.copy_(masked)
    if grad_shifted is not None:
        zero_padded = shift if shift.is_circular else shift._replace(padding="zeros")
        grad_shifted.copy_(reference.temporal_shift(masked, zero_padded))
        grad_boundary_in.copy_(reference.boundary_frames(masked, shift))


def _fake_add_relu_backward(grad_a, grad_b, grad_boundary, out, boundary_out, *rest):
    z_norm, identity_norm, shift, shifted = rest[1], rest[4], rest[-2], rest[-1]
    norm = z_norm or identity_norm
    return (
        torch.empty_like(out),
        torch.empty_like(out) if shifted else out.new_empty(0),
        new_boundary(out, shift) if shifted else out.new_empty(0),
        norm[0].new_empty((9, out.shape[1])) if norm else out.new_empty(0),
    )


def _reference_add_relu_backward(*args):
    *inputs, shift, shifted = args
    outputs = _fake_add_relu_backward(*args)
    needed = (True, shifted, shifted, outputs[3].numel() > 0)
    _reference_add_relu_backward_in_place(
        *(each if need else None for each, need in zip(outputs, needed, strict=True)), *inputs, shift
    )
    return outputs


def _reference_norm_add_relu_backward(
    grad_a, grad_b, grad_boundary, out, boundary_out, z, z_norm, z_epsilon, z_flags, identity, identity_norm,
    identity_epsilon, identity_flags, shift, shifted,
):  # fmt: skip
    grad, grad_shifted, grad_boundary_in, _ = add_relu_backward(
        grad_a, grad_b, grad_boundary, out, boundary_out, None, [], 0.0, None, [], 0.0, shift, shifted
    )
    grads = []
    for values, norm, epsilon, flags, unnormed in (
        (z, z_norm, z_epsilon, z_flags, grad),
        (identity, identity_norm, identity_epsilon, identity_flags, grad_shifted if shifted else grad),
    ):
        if norm:
            grads += _norm_backward(grad, values, norm, epsilon, flags)
        else:
            grads += [unnormed.clone() if flags[1] else None, None, None]
    return *grads, grad_boundary_in if shifted else None


def _fake_norm_backward(values_like: Tensor, norm: Sequence[Tensor], flags: Sequence[int]) -> list[Tensor | None]:
    uses_batch_stats, needs_grad, norm_needs_grad = map(bool, flags)
    has_norm_grads = len(norm) > 0 and (uses_batch_stats or norm_needs_grad)
    norm_grads = [torch.empty_like(norm[0]) if has_norm_grads else None for _ in range(2)]
    return [torch.empty_like(values_like) if needs_grad else None, *norm_grads]


def _fake_norm_add_relu_backward(grad_a, grad_b, grad_boundary, out, boundary_out, *rest):
    _, z_norm, _, z_flags, _, identity_norm, _, identity_flags, shift, shifted = rest
    grads = _fake_norm_backward(out, z_norm, z_flags) + _fake_norm_backward(out, identity_norm, identity_flags)
    return *grads, new_boundary(out, shift) if shifted else None


def _reference_norm_relu_backward(grad, z, norm, epsilon, flags):
    x = torch.relu(_norm(z, norm, epsilon)).to(z.dtype)
    return _norm_backward(torch.where(x <= 0, 0, grad), z, norm, epsilon, flags)


def _reference_stats(x, running_mean, running_var, num_batches_tracked, momentum) -> tuple[Tensor, Tensor]:
    num_batches_tracked.add_(1)
    count = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x.to(acc_dtype(x.dtype)), (0, 2, 3), correction=0)
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)
    return mean, variance


def _fake_stats(x, running_mean, running_var, *_):
    return torch.empty_like(running_mean), torch.empty_like(running_var)


_ops = torch.ops.tsm_jit
for _operator, _compute, _fake in (
    (_ops.norm_add_relu_.default, _reference_norm_add_relu_in_place, lambda *_: None),
    (_ops.norm_add_relu.default, _reference_norm_add_relu, _fake_norm_add_relu),
    (_ops.norm_relu_max_pool.default, _reference_pool, _fake_pool),
    (_ops.add_relu_backward_.default, _reference_add_relu_backward_in_place, lambda *_: None),
    (_ops.add_relu_backward.default, _reference_add_relu_backward, _fake_add_relu_backward),
    (_ops.norm_add_relu_backward.default, _reference_norm_add_relu_backward, _fake_norm_add_relu_backward),
    (
        _ops.norm_relu_backward.default,
        _reference_norm_relu_backward,
        lambda grad, z, norm, epsilon, flags: tuple(_fake_norm_backward(z, norm, flags)),
    ),
    (_ops.batch_norm_stats_.default, _reference_stats, _fake_stats),
):
    _library.impl(_operator, _compute, "CompositeExplicitAutograd")
    _library.impl(_operator, _fake, "Meta")
