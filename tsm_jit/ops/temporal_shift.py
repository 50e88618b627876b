"""Operators for the temporal shift, and the functions that call them.

Each operator takes a tensor and an encoded :class:`tsm_jit.plans.Shift`:

- ``temporal_shift(x, shift) -> Tensor`` and its adjoint ``temporal_shift_backward(grad, shift) -> Tensor``. Each is the
  derivative of the other, so reverse mode works to any order. Forward-mode AD needs the functions below, because
  PyTorch drops the tangent of an operator with a Python autograd kernel.
- ``temporal_shift_(x!, shift)`` and ``temporal_shift_backward_(grad!, shift)``: in place, without autograd.
- The overload ``.kernel`` of the first two: without autograd. A Python autograd kernel costs 3 to 8 us per call, even
  under ``no_grad``. So eager mode calls this overload from an autograd function, and compiled graphs contain it.
- ``check_clip_length(grad, mark, shift) -> Tensor``: :func:`check_marks` for code that is compiled in an activation
  checkpoint. It returns the gradient of the mark, so compilers keep it. It takes ``grad``, so they keep it in the
  backward.
- The overload ``.exported`` of the first, in exported programs. ``run_decompositions`` and the exporters of ONNX and
  ExecuTorch decompose it into core ATen operators. Anywhere else, AOTInductor included, it calls the default overload.

The compiled kernels (``kernels/bindings``) register for CPU and CUDA and take precedence over the PyTorch fallback.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version, saved_tensors_hooks
from torch.compiler import is_compiling

from tsm_jit import reference
from tsm_jit.ops import recomputation
from tsm_jit.ops.compat import (
    direct,
    direct_apply,
    eager,
    empty_like_real,
    has_saved_tensor_hooks,
    is_batched_gradient,
    is_decomposing,
    is_exporting,
    is_tracing,
    onnx_has_unflatten,
    transforms_are_active,
    undifferentiable_view,
    unwrap_if_dead,
)
from tsm_jit.plans import Shift, decode

_library = torch.library.Library("tsm_jit", "DEF")


for _schema in (
    "temporal_shift(Tensor x, str shift) -> Tensor",
    "temporal_shift.kernel(Tensor x, str shift) -> Tensor",
    "temporal_shift.exported(Tensor x, str shift) -> Tensor",
    "temporal_shift_(Tensor(a!) x, str shift) -> ()",
    "temporal_shift_backward(Tensor grad, str shift) -> Tensor",
    "temporal_shift_backward.kernel(Tensor grad, str shift) -> Tensor",
    "temporal_shift_backward_(Tensor(a!) grad, str shift) -> ()",
    "check_clip_length(Tensor grad, Tensor mark, str shift) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


_forward = torch.ops.tsm_jit.temporal_shift.default
_forward_kernel = direct(torch.ops.tsm_jit.temporal_shift.kernel)
_forward_exported = torch.ops.tsm_jit.temporal_shift.exported
shift_kernel = _forward_kernel  # without autograd
_forward_in_place = direct(torch.ops.tsm_jit.temporal_shift_.default)
_backward = torch.ops.tsm_jit.temporal_shift_backward.default
_backward_kernel = direct(torch.ops.tsm_jit.temporal_shift_backward.kernel)
_backward_in_place = direct(torch.ops.tsm_jit.temporal_shift_backward_.default)


def _linear_function(kernel, forward, adjoint) -> tuple[type[Function], type[Function]]:
    """Returns two autograd functions for a linear map ``forward`` and its ``adjoint``.

    The first is for eager mode. The second supports ``torch.func`` and forward-mode AD and costs 30 us more per call.
    """

    class Eager(Function):
        @staticmethod
        def forward(ctx, x, shift):
            ctx.shift = shift
            save_mark(ctx, x, shift)
            return kernel(x, shift)

        @staticmethod
        def backward(ctx, grad):
            check_saved_mark(ctx, ctx.shift)
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
            return _vmapped(forward, info, in_dims, x, shift)

    for function in (Eager, Transformable):
        function.__name__ = function.__qualname__ = f"{forward.__name__}.{function.__name__}"
    return Eager, Transformable


def save_mark(ctx: Any, x: Tensor, shift: str) -> None:
    """Saves the :func:`_clip_length_mark` in an autograd function that saves nothing else, if hooks need it."""
    ctx.is_marked = has_saved_tensor_hooks()
    if ctx.is_marked:  # saving nothing takes 0.3 us, too
        ctx.save_for_backward(_clip_length_mark(x, shift))


def check_saved_mark(ctx: Any, shift: str) -> None:
    """Calls :func:`check_marks` with what :func:`save_mark` saved."""
    if ctx.is_marked:
        check_marks(ctx.saved_tensors, shift)


def _clip_length_mark(x: Tensor, shift: str) -> Tensor:
    """Returns what to save for the backward if there are hooks for saved tensors: an empty tensor.

    Its shape tells the clip length. Activation checkpointing gives the backward the tensors that its recomputation has
    saved. If that has another clip length, gradients would be wrong: see :func:`check_marks`.
    """
    return x.new_empty(_mark_shape(shift))


def _mark_shape(shift: str) -> tuple[int, int, int]:
    decoded = decode(shift)
    return 0, decoded.n_segment, decoded.n_segment_shifted


def clip_length_marks(x: Tensor, shift: str) -> tuple[Tensor, ...]:
    """Returns the :func:`_clip_length_mark` if there are hooks that need it."""
    return (_clip_length_mark(x, shift),) if has_saved_tensor_hooks() else ()


def check_marks(marks: Sequence[Tensor], shift: str) -> None:
    """Raises RuntimeError in a backward unless its marks are those of its forward."""
    for mark in marks:
        expected = _mark_shape(shift)
        if mark.shape != expected:
            raise recomputation.changed_length(mark.shape[1], [expected[1]])


def _vmapped(function, info, in_dims, x: Tensor, shift: str) -> tuple[Tensor, int]:
    # Flatten the mapped dimension into the clips, which are the outermost dimension of every layout.
    x = x.movedim(in_dims[0], 0)
    return function(x.flatten(0, 1), shift).unflatten(0, x.shape[:2]), 0


def _adjoint_kernel(grad: Tensor, shift: str) -> Tensor:
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    if grad.dtype not in SUMMABLE_DTYPES and decode(shift).needs_sum:  # float8: the reference adds in float32
        return reference.temporal_shift_backward(grad, decode(shift))
    return _backward_kernel(grad, shift)


# The kernels copy every dtype but add only these.
SUMMABLE_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


class _ShiftForSingleConsumer(Function):
    """A shift whose result has a single consumer, so that the backward may overwrite its gradient."""

    @staticmethod
    def forward(ctx, x, shift):
        ctx.shift = shift
        save_mark(ctx, x, shift)
        return _forward_kernel(x, shift)

    @staticmethod
    def backward(ctx, grad):
        check_saved_mark(ctx, ctx.shift)
        creates_graph = grad.requires_grad and torch.is_grad_enabled()
        is_own = type(grad) is Tensor and not is_batched_gradient(grad) and has_no_overlap(grad)
        if creates_graph or not eager() or not is_own:
            return temporal_shift_backward(grad, ctx.shift), None
        temporal_shift_backward_(grad, ctx.shift)
        return grad, None


class _SaveMark(Function):
    """Returns ``z``. The backward compares the clip length of ``shift`` with the length that ``mark`` tells."""

    @staticmethod
    def forward(ctx, z, mark, shift):
        ctx.shift = shift
        ctx.save_for_backward(mark)
        return z.detach()  # autograd would forbid to change a view in place

    @staticmethod
    def backward(ctx, grad):
        if is_compiling():
            return grad, torch.ops.tsm_jit.check_clip_length(grad, *ctx.saved_tensors, ctx.shift), None
        check_marks(ctx.saved_tensors, ctx.shift)
        return grad, None, None


def save_clip_length_mark(z: Any, shift: str | int) -> Any:
    """Returns ``z``, which depends on the clip length. In a checkpoint, its backward also checks the length.

    Args:
        z: the output of a layer.
        shift: the encoded shift, or the clip length if the layer does not shift.
    """
    compiled = is_compiling()
    if not isinstance(z, Tensor) or not z.requires_grad or not (compiled or eager()):
        return z
    if not (recomputation.saves_marks if compiled else has_saved_tensor_hooks()):
        return z
    if not isinstance(shift, str):
        shift = Shift(shift, shift, 1, "zeros", ()).encode()
    if not compiled:
        return _SaveMark.apply(z, _clip_length_mark(z, shift), shift)
    _, n_segment, n_segment_shifted = _mark_shape(shift)
    index = "" if z.device.index is None else z.device.index
    mark = getattr(recomputation, f"mark_{n_segment}_{n_segment_shifted}_{index}_{z.device.type}")
    return _SaveMark.apply(z, mark, shift)


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
    """The shift in place of a leaf that requires grad, for which autograd forbids ``mark_dirty``.

    The result is a new tensor with the storage and the version counter of the leaf, so autograd still detects stale
    saved tensors.
    """

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
    """Applies ``shift`` to ``x``. Supports autograd, forward-mode AD, ``torch.func``, compilers and tracing."""
    if eager():
        if x.requires_grad and torch.is_grad_enabled():
            return _apply_eager_shift(unwrap_if_dead(x), shift)
        return _forward_kernel(x, shift)
    if is_compiling() or is_tracing():
        # ONNX and TorchScript graphs must run without tsm_jit. Under transforms, PyTorch would drop the tangent of an
        # operator with a Python autograd kernel.
        needs_pytorch_ops = torch.onnx.is_in_onnx_export() or is_tracing() or transforms_are_active()
        if needs_pytorch_ops:
            return reference.sliced(x, decode(shift), onnx_has_unflatten())
        if is_exporting():
            return _forward_exported(x, shift)
        return save_clip_length_mark(_forward(x, shift), shift)
    return _TransformableShift.apply(x, shift)


def shift_tokens(x: Tensor, shift: str, num_prefix_tokens: int, function: Callable = temporal_shift) -> Tensor:
    """Shifts tokens ``[N*T, L, C]`` but the first ``num_prefix_tokens`` of each frame."""
    if not num_prefix_tokens:
        return function(x, shift)
    return torch.cat([x[:, :num_prefix_tokens], function(x[:, num_prefix_tokens:], shift)], 1)


def without_prefix(x: Tensor, num_prefix_tokens: int) -> Tensor:
    """The tokens of ``x`` that :func:`shift_tokens` shifts."""
    return x[:, num_prefix_tokens:] if num_prefix_tokens else x


def temporal_shift_for_single_consumer(x: Tensor, shift: str) -> Tensor:
    """:func:`temporal_shift` for a single consumer, which must return a new tensor."""
    if eager() and x.requires_grad and torch.is_grad_enabled() and x.dtype in SUMMABLE_DTYPES:
        return _apply_for_single_consumer(unwrap_if_dead(x), shift)
    return temporal_shift(x, shift)


def temporal_shift_backward(grad: Tensor, shift: str) -> Tensor:
    """The adjoint of :func:`temporal_shift`. It never writes into ``grad``, which another branch may share."""
    if is_compiling():
        return _backward(grad, shift)
    if transforms_are_active():
        return _TransformableAdjoint.apply(grad, shift)
    if grad.requires_grad and torch.is_grad_enabled():
        return _EagerAdjoint.apply(grad, shift)
    return _adjoint_kernel(grad, shift)


def temporal_shift_backward_(grad: Tensor, shift: str) -> None:
    """The adjoint in place of ``grad``: an unshared gradient with a dtype in ``SUMMABLE_DTYPES``."""
    _backward_in_place(grad, shift)


def has_no_overlap(x: Tensor) -> bool:
    """Whether the strides of ``x`` guarantee that no two elements share memory."""
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
    """Applies ``shift`` to ``x`` in place: see :func:`tsm_jit.temporal_shift`."""
    # Under a compiler this check would add guards on the batch size. There copy_ reports expanded tensors.
    if not is_compiling() and not has_no_overlap(x):
        raise ValueError(
            "x must not overlap itself to be shifted in place, "
            f"got sizes {[int(size) for size in x.shape]} with strides {x.stride()}"
        )
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    if not eager():
        # Compilers and transforms support copy_ but not mark_dirty. With mark_dirty on an input of the compiled graph,
        # released versions of PyTorch compute wrong gradients.
        if needs_grad and x.is_leaf:
            shifted = temporal_shift(x, shift)
            x.detach().copy_(shifted.detach())
            return shifted
        return x.copy_(temporal_shift(x, shift))
    if needs_grad:
        _check_view(x)
        return (_InPlaceOnLeaf if x.is_leaf else _InPlace).apply(x, shift)
    _forward_in_place(x, shift)
    if not x.is_inference():
        increment_version(x)
    return x


def _check_view(x: Tensor) -> None:
    """Raises the errors of autograd for views before the kernel has changed ``x``."""
    if not x._is_view():
        return
    base: Any = x._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError("x must not be a view of a leaf Variable that requires grad to be shifted in place")
    if (creation := undifferentiable_view(x)) is not None:
        raise RuntimeError(
            f"x must be a view that autograd can rebase to be shifted in place, got a view with {creation}, created by "
            "a function with several outputs, in a custom function or under no_grad: clone it first"
        )


@contextmanager
def recomputing_shift(x: Tensor, shift: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Context manager that yields ``shift(x)``. If autograd saves this tensor, the backward recomputes it from ``x``.

    If other saved-tensor hooks are active (checkpointing, offloading to the CPU), it adds no hooks. Nor does it for
    subclasses of ``Tensor``, or if ``x`` is a view of a larger storage, which would keep more memory than the copy.
    """
    x = unwrap_if_dead(x)
    shifted = shift(x)
    if type(shifted) is not Tensor:  # it may have no memory, such as a fake tensor
        yield shifted
        return
    copy_storage, dtype = shifted.untyped_storage(), shifted.dtype
    address = copy_storage.data_ptr()
    has_version_and_storage = not x.is_inference() and address != 0  # not so for inference tensors and on meta
    if has_saved_tensor_hooks() or not has_version_and_storage or x.untyped_storage().nbytes() > copy_storage.nbytes():
        yield shifted
        return
    del copy_storage
    version, shifted_version = x._version, shifted._version
    # Autograd keeps `pack` alive, which must keep neither alive: autocast may save another copy, of smaller numbers.
    source_ref: Callable[[], Any] = weakref.ref(x)
    shifted_ref: Callable[[], Any] = weakref.ref(shifted)

    def pack(tensor: Tensor) -> tuple[Tensor, int, tuple | None]:
        is_shifted = (
            tensor.layout is torch.strided
            and tensor.untyped_storage().data_ptr() == address
            and tensor.dtype == dtype  # as_strided cannot recreate such a view
            and not (tensor.is_conj() or tensor.is_neg())
            and shifted_ref()._version == shifted_version  # the module did not write into it
        )
        if is_shifted:
            return source_ref().detach(), version, (tensor.size(), tensor.stride(), tensor.storage_offset())
        return tensor.detach(), tensor._version, None  # an output that is not detached would keep its own graph alive

    def unpack(packed: tuple[Tensor, int, tuple | None]) -> Tensor:
        tensor, saved_version, strided_view = packed
        # Autograd does not check the version of what hooks return. Under compiled autograd a tensor has no version.
        if not is_compiling() and tensor._version != saved_version:
            name = "a tensor" if strided_view is None else "the input of a temporal shift"
            raise RuntimeError(
                f"{name} needed to compute gradients, {tensor.dtype} {list(tensor.shape)}, was modified by an in-place "
                f"operation: it is at version {tensor._version}, expected version {saved_version}"
            )
        return tensor if strided_view is None else shift(tensor).as_strided(*strided_view)

    with saved_tensors_hooks(pack, unpack):
        yield shifted


_EagerShift, _TransformableShift = _linear_function(_forward_kernel, temporal_shift, temporal_shift_backward)
_apply_eager_shift, _apply_for_single_consumer = direct_apply(_EagerShift), direct_apply(_ShiftForSingleConsumer)
_EagerAdjoint, _TransformableAdjoint = _linear_function(_adjoint_kernel, temporal_shift_backward, temporal_shift)


def _register(differentiable, kernel_overload, in_place, compute, function: type[Function]) -> None:
    kernel = direct(kernel_overload)

    def fallback(x: Tensor, shift: str) -> Tensor:
        return compute(x, decode(shift))

    def fallback_in_place(x: Tensor, shift: str) -> None:
        x.copy_(compute(x, decode(shift)))

    # Fake implementations are registered as Meta kernels. torch.library.register_fake inspects every loaded module,
    # which takes a third of the import time of tsm_jit.
    for op in (differentiable, kernel_overload):
        _library.impl(op, fallback, "CompositeExplicitAutograd")
        _library.impl(op, lambda x, shift: empty_like_real(x), "Meta")

    def copy_based(x: Tensor, shift: str) -> None:
        x.copy_(kernel_overload(x, shift))

    _library.impl(in_place, fallback_in_place, "CompositeExplicitAutograd")
    _library.impl(in_place, lambda x, shift: None, "Meta")
    for lazy_view in ("Conjugate", "Negative"):  # the kernel writes padding as +0 bits, which such a view negates
        _library.impl(in_place, copy_based, lazy_view)

    def autograd_kernel(x: Tensor, shift: str) -> Tensor:
        return function.apply(x, shift) if x.requires_grad and torch.is_grad_enabled() else kernel(x, shift)

    _library.impl(differentiable, autograd_kernel, "Autograd")
    torch.library.register_vmap(differentiable, functools.partial(_vmapped, differentiable), lib=_library)


_schemas = torch.ops.tsm_jit

_register(
    _schemas.temporal_shift.default,
    _schemas.temporal_shift.kernel,
    _schemas.temporal_shift_.default,
    reference.temporal_shift,
    _EagerShift,
)


_register(
    _schemas.temporal_shift_backward.default,
    _schemas.temporal_shift_backward.kernel,
    _schemas.temporal_shift_backward_.default,
    reference.temporal_shift_backward,
    _EagerAdjoint,
)


def _checked(grad: Tensor, mark: Tensor, shift: str) -> Tensor:
    check_marks([mark], shift)
    return torch.empty_like(mark)


_library.impl(_schemas.check_clip_length.default, _checked, "CompositeExplicitAutograd")
_library.impl(_schemas.check_clip_length.default, lambda grad, mark, shift: torch.empty_like(mark), "Meta")


def _compute_exported(x: Tensor, shift: str) -> Tensor:
    return reference.sliced(x, decode(shift)) if is_decomposing(_forward_exported) else _forward(x, shift)


# A composite operator without kernels. Only such operators are decomposed without an entry in a table.
_library.impl(_forward_exported, _compute_exported, "CompositeImplicitAutograd")
