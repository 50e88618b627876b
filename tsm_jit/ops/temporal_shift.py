"""The operators ``torch.ops.tsm_jit.*``: schemas, plain-torch implementation, fakes, autograd; and the way to them.

Each takes a tensor and an encoded :class:`tsm_jit.plans.Shift`:

- ``temporal_shift(x, shift) -> Tensor`` and its adjoint ``temporal_shift_backward(grad, shift) -> Tensor``, which are
  each other's derivative, so that any order of derivative exists (in forward mode only through the functions below:
  PyTorch drops the tangent of an operator that Python taught to differentiate);
- ``temporal_shift_(x!, shift)`` and ``temporal_shift_backward_(grad!, shift)``: in place, unknown to autograd;
- ``temporal_shift_save_(x!, shift) -> Tensor`` and ``temporal_shift_restore_(x!, boundary, shift)``: in place for a
  while; the first returns the frames that nothing reads any more, the second takes them to restore every bit;
- the overload ``.kernel`` of the first two: unknown to autograd as well. An operator that Python taught to
  differentiate costs 3 to 8 us more per call even when nothing is recorded, so eager mode records by itself, and what
  is left of the operator in a compiled graph is this overload;
- the overload ``.again`` of the first: for a backward that shifts again. Of the same call in the forward, compilers
  would keep the result for it.

The compiled kernels (``kernels/bindings.cpp``) register themselves for CPU and CUDA and take precedence over the
plain-torch implementation, which serves every device for which none were built.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version, saved_tensors_hooks
from torch.compiler import is_compiling

from tsm_jit import reference
from tsm_jit.ops.compat import (
    direct,
    eager,
    has_saved_tensor_hooks,
    is_batched_gradient,
    is_tracing,
    transforms_are_active,
    undifferentiable_view,
)
from tsm_jit.plans import decode

_library = torch.library.Library("tsm_jit", "DEF")


for _schema in (
    "temporal_shift(Tensor x, str shift) -> Tensor",
    "temporal_shift.kernel(Tensor x, str shift) -> Tensor",
    "temporal_shift.recompute(Tensor x, str shift) -> Tensor",
    "temporal_shift_(Tensor(a!) x, str shift) -> ()",
    "temporal_shift_backward(Tensor grad, str shift) -> Tensor",
    "temporal_shift_backward.kernel(Tensor grad, str shift) -> Tensor",
    "temporal_shift_backward_(Tensor(a!) grad, str shift) -> ()",
    "temporal_shift_save_(Tensor(a!) x, str shift) -> Tensor",
    "temporal_shift_restore_(Tensor(a!) x, Tensor boundary, str shift) -> ()",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


_forward = torch.ops.tsm_jit.temporal_shift.default
_forward_kernel = direct(torch.ops.tsm_jit.temporal_shift.kernel)  # _op: without the Python frame of an OpOverload
_forward_in_place = direct(torch.ops.tsm_jit.temporal_shift_.default)
_backward = torch.ops.tsm_jit.temporal_shift_backward.default
_backward_kernel = direct(torch.ops.tsm_jit.temporal_shift_backward.kernel)
_save = direct(torch.ops.tsm_jit.temporal_shift_save_.default)
_restore = direct(torch.ops.tsm_jit.temporal_shift_restore_.default)
_backward_in_place = direct(torch.ops.tsm_jit.temporal_shift_backward_.default)


def _linear_function(kernel, forward, adjoint) -> tuple[type[Function], type[Function]]:
    """Autograd for a linear map ``forward`` with ``adjoint``: for plain eager mode, and for the transforms of
    ``torch.func`` and forward-mode AD, whose protocol takes 30 us more per call."""

    class Recorded(Function):
        @staticmethod
        def forward(ctx, x, shift):
            ctx.shift = shift
            _mark_clip_length(ctx, x, shift)
            return kernel(x, shift)

        @staticmethod
        def backward(ctx, grad):
            return adjoint(grad, ctx.shift), None

    class Transformable(Function):
        @staticmethod
        def forward(x, shift):
            return kernel(x, shift)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.shift = inputs[1]

        @staticmethod
        def backward(ctx, grad):
            return adjoint(grad, ctx.shift), None

        @staticmethod
        def jvp(ctx, tangent, _):
            return forward(tangent, ctx.shift)

        @staticmethod
        def vmap(info, in_dims, x, shift):
            return _mapped(forward, info, in_dims, x, shift)

    for function in (Recorded, Transformable):
        function.__name__ = function.__qualname__ = f"{forward.__name__}.{function.__name__}"
    return Recorded, Transformable


def _mark_clip_length(ctx, x: Tensor, shift: str) -> None:
    """Saves an empty tensor whose shape tells the clip length.

    Activation checkpointing compares the shapes of saved tensors with the recomputed ones. So it raises an error if the
    recomputation sees another clip length, whose gradients would be wrong.
    """
    if has_saved_tensor_hooks():
        plan = decode(shift)
        ctx.save_for_backward(x.new_empty((0, plan.n_segment, plan.n_segment_shifted)))


def _mapped(function, info, in_dims, x: Tensor, shift: str) -> tuple[Tensor, int]:
    # The mapped dimension joins the clips, the outermost dimension of every layout.
    x = x.movedim(in_dims[0], 0)
    return function(x.flatten(0, 1), shift).unflatten(0, x.shape[:2]), 0


def _adjoint_kernel(grad: Tensor, shift: str) -> Tensor:
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    if grad.dtype not in _ADDED and decode(shift).needs_sum:  # float8: torch converts to add
        return reference.temporal_shift_backward(grad, decode(shift))
    return _backward_kernel(grad, shift)


# The kernels move any type but add only these.
_ADDED = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


class _ShiftForReader(Function):
    """Of a copy that a single operation reads, whose gradient nobody else has: the adjoint overwrites it."""

    @staticmethod
    def forward(ctx, x, shift):
        ctx.shift = shift
        _mark_clip_length(ctx, x, shift)
        return _forward_kernel(x, shift)

    @staticmethod
    def backward(ctx, grad):
        differentiated = grad.requires_grad and torch.is_grad_enabled()
        if (
            differentiated
            or not eager()
            or type(grad) is not Tensor
            or is_batched_gradient(grad)
            or not elements_are_apart(grad)
        ):
            return temporal_shift_backward(grad, ctx.shift), None
        temporal_shift_backward_(grad, ctx.shift)
        return grad, None


class _InPlace(Function):
    @staticmethod
    def forward(ctx, x, shift):
        ctx.shift = shift
        ctx.mark_dirty(x)
        _forward_in_place(x, shift)
        return x

    @staticmethod
    def backward(ctx, grad):
        return temporal_shift_backward(grad, ctx.shift), None


class _InPlaceOnLeaf(Function):
    """Autograd lets no leaf that requires grad be dirtied. The result is a new tensor on the leaf's storage, sharing
    its version counter, so that whoever saved the leaf before is told."""

    @staticmethod
    def forward(ctx, x, shift):
        ctx.shift = shift
        alias = x.detach()
        _forward_in_place(alias, shift)
        increment_version(alias)
        return alias

    @staticmethod
    def backward(ctx, grad):
        return temporal_shift_backward(grad, ctx.shift), None


def temporal_shift(x: Tensor, shift: str) -> Tensor:
    """``shift`` applied to ``x``, differentiable by every means PyTorch has."""
    if eager():
        if x.requires_grad and torch.is_grad_enabled():
            return _RecordedShift.apply(x, shift)
        return _forward_kernel(x, shift)
    if is_compiling() or is_tracing():
        # Graphs for ONNX and of torch.jit.trace are to run where no tsm_jit is. And under transforms a compiler would
        # drop the tangent of an operator that Python taught to differentiate.
        plainly = torch.onnx.is_in_onnx_export() or is_tracing() or transforms_are_active()
        return reference.sliced(x, decode(shift)) if plainly else _forward(x, shift)
    return _TransformableShift.apply(x, shift)


def temporal_shift_for_reader(x: Tensor, shift: str) -> Tensor:
    """:func:`temporal_shift` for a module that returns a new tensor and is all that reads this one."""
    if eager() and x.requires_grad and torch.is_grad_enabled() and x.dtype in _ADDED:
        return _ShiftForReader.apply(x, shift)
    return temporal_shift(x, shift)


def temporal_shift_backward(grad: Tensor, shift: str) -> Tensor:
    """The adjoint of :func:`temporal_shift`. Never writes into ``grad``: it may be shared with another branch."""
    if is_compiling():
        return _backward(grad, shift)
    if transforms_are_active():
        return _TransformableAdjoint.apply(grad, shift)
    if grad.requires_grad and torch.is_grad_enabled():
        return _RecordedAdjoint.apply(grad, shift)
    return _adjoint_kernel(grad, shift)


def temporal_shift_backward_(grad: Tensor, shift: str) -> None:
    """The adjoint in place of ``grad``, a gradient of a type of :data:`_ADDED` that nobody else has."""
    _backward_in_place(grad, shift)


def elements_are_apart(x: Tensor) -> bool:
    """True if it is plain from the strides that no two elements of ``x`` share memory."""
    if x.is_contiguous():
        return True
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride < extent:
                return False
            extent += stride * (size - 1)
    return True


def temporal_shift_(x: Tensor, shift: str) -> Tensor:
    """``shift`` applied to ``x`` in place, by PyTorch's rules: see :func:`tsm_jit.temporal_shift`."""
    # Compiled, the question would mean another graph for another batch size; there copy_ refuses expanded tensors.
    if not is_compiling() and not elements_are_apart(x):
        raise ValueError(
            "x must not overlap itself to be shifted in place, "
            f"got sizes {[int(size) for size in x.shape]} with strides {x.stride()}"
        )
    records = x.requires_grad and torch.is_grad_enabled()
    if not eager():
        # copy_ is an in-place operation that compilers and transforms know. mark_dirty is not: released versions of
        # torch compute wrong gradients when the dirtied tensor is an input of the compiled graph.
        if records and x.is_leaf:
            shifted = temporal_shift(x, shift)
            x.detach().copy_(shifted.detach())
            return shifted
        return x.copy_(temporal_shift(x, shift))
    if records:
        _check_view(x)
        return (_InPlaceOnLeaf if x.is_leaf else _InPlace).apply(x, shift)
    _forward_in_place(x, shift)
    if not x.is_inference():
        increment_version(x)
    return x


def _check_view(x: Tensor) -> None:
    """What autograd would refuse after the kernel has run, refused before."""
    if not x._is_view():
        return
    base: Any = x._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError("x must not be a view of a leaf Variable that requires grad to be shifted in place")
    if (creation := undifferentiable_view(x)) is not None:
        raise RuntimeError(
            f"x must be a view whose base autograd can rebase to be shifted in place, got one made in {creation}: "
            "by a function that returns several views, in a custom function, or without recording; clone it first"
        )


@contextmanager
def shifted_in_place(x: Tensor, shift: str) -> Iterator[None]:
    """Within, ``x`` holds its shifted self; after, the bits it held before. Only without autograd.

    Frames that nothing reads any more are kept aside meanwhile: ``|offset|`` of each clip and group. ``x.data`` keeps
    this from the version counter: for any other reader nothing happened.
    """
    x = x.data
    boundary = _save(x, shift)
    try:
        yield
    finally:
        _restore(x, boundary, shift)


@contextmanager
def recomputing_shift(x: Tensor, shift: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Gives ``shift(x)``, a shifted copy of ``x``. What autograd would keep of it within, it computes from ``x`` again.

    Where someone else's saved-tensor hooks are at work (checkpointing, offloading to the CPU), theirs decide.
    """
    shifted = shift(x)
    storage, dtype = shifted.untyped_storage().data_ptr(), shifted.dtype
    others_decide = has_saved_tensor_hooks()
    if others_decide or x.is_inference() or not storage:  # neither versions nor memory to go by
        yield shifted
        return
    source, version, shifted_version = x.detach(), x._version, shifted._version
    watched: Callable[[], Any] = weakref.ref(shifted)  # autograd keeps these functions, which must not keep the copy

    def pack(tensor: Tensor) -> Tensor | tuple:
        if tensor.layout is not torch.strided or tensor.untyped_storage().data_ptr() != storage:
            return tensor
        if tensor.dtype != dtype or tensor.is_conj() or tensor.is_neg():  # a view that strides do not describe
            return tensor
        if watched()._version != shifted_version:  # `net` wrote into it: that could not be computed again
            return tensor
        return tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if source._version != version:
            raise RuntimeError(
                "the input of a temporal shift, needed to compute gradients, was modified by an in-place operation: "
                f"it is at version {source._version}, expected version {version}"
            )
        return shift(source).as_strided(*packed)

    with saved_tensors_hooks(pack, unpack):
        yield shifted


_RecordedShift, _TransformableShift = _linear_function(_forward_kernel, temporal_shift, temporal_shift_backward)
_RecordedAdjoint, _TransformableAdjoint = _linear_function(_adjoint_kernel, temporal_shift_backward, temporal_shift)


def _register(differentiable, kernels: tuple, in_place, compute, recorded: type[Function]) -> None:
    kernel = direct(kernels[0])

    def plain(x: Tensor, shift: str) -> Tensor:
        return compute(x, decode(shift))

    def plain_in_place(x: Tensor, shift: str) -> None:
        x.copy_(compute(x, decode(shift)))

    # Fakes are registered as kernels for Meta: torch.library.register_fake looks for its caller in every module there
    # is, a third of the time that importing tsm_jit takes.
    for op in (differentiable, *kernels):
        _library.impl(op, plain, "CompositeExplicitAutograd")
        _library.impl(op, lambda x, shift: torch.empty_like(x), "Meta")

    def through_a_copy(x: Tensor, shift: str) -> None:
        x.copy_(kernels[0](x, shift))

    _library.impl(in_place, plain_in_place, "CompositeExplicitAutograd")
    _library.impl(in_place, lambda x, shift: None, "Meta")
    for view_of_other_values in ("Conjugate", "Negative"):  # +0 there is not +0 in memory
        _library.impl(in_place, through_a_copy, view_of_other_values)

    def recording(x: Tensor, shift: str) -> Tensor:
        return recorded.apply(x, shift) if x.requires_grad and torch.is_grad_enabled() else kernel(x, shift)

    _library.impl(differentiable, recording, "Autograd")
    torch.library.register_vmap(differentiable, functools.partial(_mapped, differentiable), lib=_library)


def _plain_save(x: Tensor, shift: str) -> Tensor:
    boundary = torch.cat([x.new_empty(0), *(frames.flatten() for frames in reference.boundary_views(x, decode(shift)))])
    _forward_in_place(x, shift)
    return boundary


def _fake_save(x: Tensor, shift: str) -> Tensor:
    there = decode(shift)
    channels = x.shape[there.channel_dim]
    return x.new_empty(x.numel() // (there.n_segment * channels) * there.boundary_channels() if x.numel() else 0)


def _plain_restore(x: Tensor, boundary: Tensor, shift: str) -> None:
    there = decode(shift)
    _forward_in_place(x, there.inverse().encode())
    lost = list(reference.boundary_views(x, there))
    for frames, values in zip(lost, boundary.split([frames.numel() for frames in lost]), strict=True):
        frames.copy_(values.view(frames.shape))


_schemas = torch.ops.tsm_jit
for _op, _compute, _fake in (
    (_schemas.temporal_shift_save_.default, _plain_save, _fake_save),
    (_schemas.temporal_shift_restore_.default, _plain_restore, lambda *_: None),
):
    _library.impl(_op, _compute, "CompositeExplicitAutograd")
    _library.impl(_op, _fake, "Meta")


_register(
    _schemas.temporal_shift.default,
    (_schemas.temporal_shift.kernel, _schemas.temporal_shift.recompute),
    _schemas.temporal_shift_.default,
    reference.temporal_shift,
    _RecordedShift,
)


_register(
    _schemas.temporal_shift_backward.default,
    (_schemas.temporal_shift_backward.kernel,),
    _schemas.temporal_shift_backward_.default,
    reference.temporal_shift_backward,
    _RecordedAdjoint,
)
for _op in (_schemas.temporal_shift.default, _schemas.temporal_shift.kernel):
    # What exported programs decompose into. Elsewhere the registrations above take precedence.
    _library.impl(_op, lambda x, shift: reference.sliced(x, decode(shift)), "CompositeImplicitAutograd")
