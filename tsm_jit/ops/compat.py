"""All private names of PyTorch that this package uses. A PyTorch version without one of them is not supported."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import BackwardCFunction
from torch.compiler import is_compiling

try:
    from torch._C import _are_functorch_transforms_active as functorch_is_active
    from torch._C import _get_tracing_state as _tracing_state
    from torch._C._autograd import CreationMeta, _get_creation_meta, _top_saved_tensors_default_hooks

    _hooks_are_allowed = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
    unwrap_if_dead = torch._C._functorch.unwrap_if_dead  # of a tensor that a transform has left behind: its value
    count_dispatch_modes = torch._C._len_torch_dispatch_stack  # tracers and others that must see all operators
    is_batched_gradient = torch._C._functorch.is_legacy_batchedtensor  # by autograd.grad(..., is_grads_batched=True)
    _needed = (
        forward_ad._current_level,
        torch.compiler._is_exporting_flag,
        torch._C._current_graph_task_id,
        torch._C._is_fwd_grad_enabled,
        torch._C.DispatchKey.CompositeImplicitAutograd,
        torch.ops.aten.clone.default.py_kernels,
        Tensor._version,
    )
except (ImportError, AttributeError) as error:
    raise ImportError(f"tsm_jit does not support PyTorch {torch.__version__}, which lacks a private name: {error}")


def direct(overload: Any) -> Callable[..., Any]:
    """Returns a function that calls the C++ operator of an ``OpOverload``, whose Python frame takes a microsecond.

    Kernels of this library cannot raise OutOfMemoryError, which PyTorch's stable C interface lacks. The function does.
    """
    operator = overload._op
    if overload.namespace != "tsm_jit":
        return operator

    def call(*args: Any) -> Any:
        try:
            return operator(*args)
        except RuntimeError as error:
            _raise_if_out_of_memory(str(error))
            raise

    return call


_seen_ooms = 0  # failed allocations of GPU memory, counted by PyTorch, at the last error without a reason


def _raise_if_out_of_memory(message: str) -> None:
    """Raises OutOfMemoryError if this error of a kernel means it, also where PyTorch before 2.13 gives no reason."""
    global _seen_ooms
    if not torch.cuda.is_initialized():
        return
    if "CUDA out of memory" in message:
        raise torch.OutOfMemoryError(message)
    if not re.search("PyTorch could not [a-z ]*$", message):
        return  # another error, or another reason
    devices = range(torch.cuda.device_count())
    try:
        ooms = sum(torch.cuda.memory_stats(device).get("num_ooms", 0) for device in devices)
    except RuntimeError:  # an allocator that counts nothing
        return
    before, _seen_ooms = _seen_ooms, ooms
    if ooms not in (0, before):
        raise torch.OutOfMemoryError(
            f"{message}. PyTorch gave no reason, but allocations of GPU memory have failed: CUDA out of memory."
        )


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """Returns ``function.apply`` for eager mode, without a Python frame: in PyTorch 2.11, it costs 4 us per call.

    The caller must unwrap tensors, as that frame does: see ``unwrap_if_dead``.
    """
    return super(Function, function).apply  # type: ignore[misc]


def eager() -> bool:
    """Whether no compiler, tracer or ``torch.func`` transform is active. Only then may callers skip the dispatcher."""
    return not (  # inlined, since every call of the library runs it
        is_compiling() or _tracing_state() is not None or functorch_is_active() or forward_ad._current_level >= 0
    )


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` is active."""
    return _tracing_state() is not None


def onnx_has_unflatten() -> bool:
    """Whether ``unflatten`` can be exported: opset 13 and later have an operator for it."""
    if not torch.onnx.is_in_onnx_export():
        return True
    from torch.onnx._internal.torchscript_exporter._globals import GLOBALS  # takes 15 ms

    return GLOBALS.export_onnx_opset_version >= 13


def transforms_are_active() -> bool:
    """Whether ``torch.func`` transforms or forward-mode AD are active."""
    return functorch_is_active() or forward_ad._current_level >= 0


def current_trace() -> Any:
    """Returns an object that stands for the graph into which operators are being traced, None if there is none."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # import tsm_jit must not import torch.fx

    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def never_recompute(trace: Any, operator: Any) -> None:
    """Lets the backward of the graph save what the last call of ``operator`` returns, also in a checkpoint."""
    call = next(node for node in reversed(trace.graph.nodes) if node.target is operator)
    for node in (call, *call.users):  # the users take one of several results
        node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE


def is_exporting() -> bool:
    """Whether ``torch.export`` is active. PyTorch 2.11's own ``is_exporting`` is also true under ``torch.compile``."""
    return torch.compiler._is_exporting_flag


def is_decomposing(overload: Any) -> bool:
    """Whether ``run_decompositions`` is running for a composite operator: it then replaces the operator's kernel."""
    return torch._C.DispatchKey.CompositeImplicitAutograd in overload.py_kernels


def has_saved_tensor_hooks() -> bool:
    """Whether default hooks for saved tensors are set, for example by checkpointing or offloading, or are forbidden."""
    return _top_saved_tensors_default_hooks(True) is not None or not _hooks_are_allowed()


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return torch._C._current_graph_task_id() != -1


def in_reentrant_checkpoint() -> bool:
    """Whether a reentrant checkpoint, or any autograd function with a backward, runs this code in its forward."""
    if torch.is_grad_enabled() or torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled():
        return False  # in a function's forward, both kinds of gradients are disabled
    frame = sys._getframe().f_back
    while frame is not None:
        function = frame.f_locals.get("ctx") if "ctx" in frame.f_code.co_varnames else None
        if isinstance(function, BackwardCFunction) and function.next_functions:  # empty if it is under no_grad
            return True
        frame = frame.f_back
    return False


def non_reentrant_checkpoint() -> str:
    """Returns ``"forward"`` or ``"recomputation"`` if the innermost checkpoint is a non-reentrant one, else ``""``."""
    hooks = _top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint":
        return ""
    return "recomputation" if "_recomputation_hook" in hooks[0].__qualname__ else "forward"


def undifferentiable_view(x: Tensor) -> str | None:
    """Returns None if autograd can rebase the history of the view ``x``, otherwise the name of its ``CreationMeta``."""
    creation = _get_creation_meta(x)
    return None if creation == CreationMeta.DEFAULT else creation.name


def empty_like_real(x: Tensor) -> Tensor:
    """Returns a tensor for a fake kernel, with the strides that ``torch.empty_like`` gives real tensors.

    Of fake tensors, ``torch.empty_like`` itself gives dimensions of size 1 other strides. A convolution then takes
    another memory format than compilers expect.
    """
    return x.clone()


def version(x: Tensor) -> int:
    """The number of changes of ``x`` and its views in place. Raises RuntimeError for tensors of ``inference_mode``."""
    return x._version


def collectives() -> Any:
    """Returns the collective operators that neither block the host nor need a ``Work`` object.

    ``wait_tensor`` waits for their result, on a GPU by its stream alone.
    """
    return torch.ops._c10d_functional


@functools.cache
def _resolve_process_group() -> Callable[[str], Any]:
    from torch.distributed import distributed_c10d  # not in every build of PyTorch

    return distributed_c10d._resolve_process_group  # type: ignore[return-value]


def process_group(name: str) -> Any:
    """Returns the process group with this name. The collective operators take its name, others take the group."""
    return _resolve_process_group()(name)


def current_device() -> int:
    """Returns the index of the current GPU, of a process that has used one."""
    return torch._C._cuda_getDevice()


def current_stream_handle(device: torch.device) -> int:
    """Returns the handle of the current stream of a GPU, without the Python object of the stream."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator such as ``"tsm_jit::send_edges"`` has a kernel for a dispatch key such as ``"CUDA"``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def time_out(group: Any, device: torch.device) -> timedelta:
    """Returns how long an operation of a process group may wait for other ranks."""
    return group._get_backend(device).options._timeout
