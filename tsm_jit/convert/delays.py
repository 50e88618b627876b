"""Inserts the delays of a network whose shifts read later frames.

A shift that reads ``d`` frames ahead returns a frame ``d`` frames after it arrived. Other inputs of a later layer, such
as the skip branch of a residual block, must wait for it::

    newest frame x[t] --+-- shift --> y[t-1] -- conv -- ... --+
                        |                                     |
                        +-- delay --> x[t-1] -----------------+--> sum of frame t-1

The graph of torch.fx shows all such joins. A module without a shift is one node of the graph and runs unchanged.
"""

from __future__ import annotations

import functools
import operator
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsm_jit.functional import shift_conv1x1, shift_groups, shift_linear, temporal_shift
from tsm_jit.modules.online import Delay, FrameShift, FrameState, OnlineShift

# Properties that do not differ between frames: layers may read them at any time.
_METADATA = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad")
_METADATA_METHODS = ("size", "dim", "ndimension", "numel", "stride", "is_floating_point", "get_device", "is_contiguous")
_AUGMENTED = ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


def insert_delays(net: nn.Module, frame: FrameState) -> fx.GraphModule:
    """Returns a graph of ``net`` whose joins wait for shifts that read later frames. Sets the latency of ``frame``.

    Raises:
        ValueError: the modules around the shifts are in training mode, or torch.fx cannot trace them. They do not call
            each shift exactly once. They write frames into a tensor that does not depend on frames.
    """
    _check_mode(net)
    graph = _trace(net)
    modules = dict(net.named_modules())
    shifts = {
        node: module
        for node in graph.nodes
        if node.op == "call_module" and isinstance(module := modules[node.target], FrameShift)
    }
    _check(graph, modules, shifts)
    schedule = _Schedule(graph, shifts)
    _check_writes(schedule)
    delays: dict[tuple[fx.Node, int], fx.Node] = {}

    def delayed(value: fx.Node, by: int, user: fx.Node) -> fx.Node:
        if by == 0:
            return value
        if (value, by) not in delays:
            previous = delayed(value, by - 1, user)
            name = _free_name(net, f"delay_{len(delays)}")
            net.add_module(name, Delay(_name_of(value), frame))
            with graph.inserting_before(user):
                delays[value, by] = graph.call_module(name, (previous,))
        return delays[value, by]

    for node, age in schedule.age.items():
        for value in [each for each in node.all_input_nodes if each in schedule.age]:
            if node in shifts:
                node.args = tuple(delayed(value, by, node) for by in range(shifts[node].ahead + 1))
            else:
                node.replace_input_with(value, delayed(value, age - schedule.age[value], node))
    for node, shift in shifts.items():
        shift.delay = schedule.age[node]
    frame.latency = schedule.latency
    frame.reach = max(schedule.latency + 1, *(shift.delay + shift.behind for shift in shifts.values()))
    return _GraphModule(net, graph, type(net).__name__)


class _Schedule:
    """When each node runs: ``age[node]`` is how many frames have arrived after the frame that it computes.

    Nodes that do not depend on the frames are not in ``age``.
    """

    def __init__(self, graph: fx.Graph, shifts: dict[fx.Node, FrameShift]):
        earliest: dict[fx.Node, int] = {}
        for node in graph.nodes:
            ages = [earliest[each] for each in node.all_input_nodes if each in earliest]
            if node.op == "placeholder" or (ages and not _is_metadata(node)):
                earliest[node] = max(ages, default=0) + _ahead(node, shifts)
        latest = dict(earliest)
        for node in reversed(earliest):
            users = [latest[user] - _ahead(user, shifts) for user in node.users if user in earliest]
            latest[node] = min(users, default=earliest[node])
        # Either a node waits, and its inputs are stored until then, or it runs at once, and its output is stored. A
        # shift stores its input in any case. So the skip branch of a block, which reads this input too, waits.
        stored_by_shifts: dict[fx.Node, int] = {}  # for how many frames
        for node, shift in shifts.items():
            for value in node.all_input_nodes:
                stored_by_shifts[value] = max(stored_by_shifts.get(value, 0), shift.ahead)
        self.latency = earliest[next(node for node in graph.nodes if node.op == "output")]
        self.age: dict[fx.Node, int] = {}
        for node in earliest:
            inputs = [each for each in node.all_input_nodes if each in earliest]
            begin = max((self.age[each] for each in inputs), default=0) + _ahead(node, shifts)
            wait = min((self.age[each] + stored_by_shifts.get(each, 0) for each in inputs), default=0)
            self.age[node] = begin if node in shifts else max(begin, min(latest[node], wait))


def _ahead(node: fx.Node, shifts: dict[fx.Node, FrameShift]) -> int:
    """Returns how many later frames a node reads."""
    return shifts[node].ahead if node in shifts else 0


def _name_of(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "get_attr") else node.name


def _is_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in _METADATA


def _check_mode(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if _is_traced(module) and module.training and not isinstance(module, OnlineShift):
            raise ValueError(
                "model must be in eval mode, since a trace keeps the mode of modules with shifts, got "
                f"{type(module).__name__} at {name!r} in training mode: call model.eval()"
            )


def _check_writes(schedule: _Schedule) -> None:
    """Raises ValueError if frames are written into a tensor without an age: its other consumers would not wait."""
    for node in schedule.age:
        target = _written(node)
        if target is not None and target not in schedule.age:
            raise ValueError(
                "model must not write frames into a tensor that does not depend on frames, got "
                f"{getattr(node.target, '__name__', node.target)} into {_name_of(target)!r}"
            )


def _written(node: fx.Node) -> fx.Node | None:
    """Returns the tensor that a node changes in place."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = str(getattr(node.target, "__name__", node.target))
    is_operator = getattr(node.target, "__module__", "") == "_operator"  # operator.and_ does not write
    if name.strip("_") in (*_AUGMENTED, "setitem") or (re.search("[^_]_$", name) and not is_operator):
        target = node.args[0] if node.args else node.kwargs.get("input")
    else:
        target = node.kwargs.get("out")
    return target if isinstance(target, fx.Node) else None


def _check(graph: fx.Graph, modules: dict[str, nn.Module], shifts: dict[fx.Node, FrameShift]) -> None:
    calls = Counter(shifts.values())
    for name, module in modules.items():
        if isinstance(module, FrameShift) and calls[module] != 1:
            place, got = name.rpartition(".")[0], "no call" if calls[module] == 0 else "a second call"
            raise ValueError(f"model must call each shift once per frame, got {got} at {place!r}")
    for node in graph.nodes:
        if node.target in (temporal_shift, shift_groups, shift_conv1x1, shift_linear):
            raise ValueError(f"model must shift by modules such as TemporalShift, got a call of {node.target.__name__}")


class _Proxy(fx.Proxy):
    """Records ``x += y`` in place. fx would record ``x = x + y``, which does not change other names of ``x``.

    Refuses changes that neither the graph nor the check of the first frame would see.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise ValueError("a module with shifts uses the attribute 'data' of a tensor: its changes go unseen")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # fx does not record it
            raise ValueError(f"a module with shifts assigns the attribute {name!r} of a tensor")
        super().__setattr__(name, value)

    def _in_place(self, function: Callable, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in _AUGMENTED:
    setattr(_Proxy, f"__{_name}__", functools.partialmethod(_Proxy._in_place, getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Traces only modules that contain shifts."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:  # fx does not record it
            raise ValueError("a module with shifts switches autocast or gradients in its forward")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not _is_traced(module)


def _is_traced(module: nn.Module) -> bool:
    return not isinstance(module, FrameShift) and any(isinstance(each, FrameShift) for each in module.modules())


def _modes() -> list[bool]:
    return [torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))]


class _Caller(nn.Module):
    """Calls a network with frames alone, so that its other parameters keep their defaults in the trace."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, frames: Tensor) -> Any:
        return self.net(frames)


def _trace(net: nn.Module) -> fx.Graph:
    caller = _Caller(net)
    try:
        with torch.enable_grad():
            graph = _Tracer().trace(caller)
        for name, buffer in net.named_buffers():
            if isinstance(buffer, fx.Proxy):  # the graph would not assign it
                raise ValueError(f"a module with shifts assigns its buffer {name!r} in its forward")
    except Exception as error:
        raise ValueError(
            "model must have a forward that torch.fx can trace, to delay what its shifts wait for, got "
            f"{type(error).__name__}: {error}"
        ) from error
    for node in graph.nodes:
        node.type = None  # annotations as strings could not be pickled before PyTorch 2.13
        if node.op in ("call_module", "get_attr"):
            if not node.target.startswith("net."):  # a tensor that the forward creates
                name = _free_name(net, node.target)
                net.register_buffer(name, getattr(caller, node.target), persistent=False)
                node.target = name
            node.target = node.target.removeprefix("net.")
    return graph


def _free_name(net: nn.Module, name: str) -> str:
    while hasattr(net, name):
        name = f"_{name}"
    return name


class _GraphModule(fx.GraphModule):
    """A graph with all attributes and state-dict keys of its network, also those that the graph does not read."""

    def __init__(self, net: nn.Module, graph: fx.Graph, class_name: str = "GraphModule"):
        super().__init__(net, graph, class_name)
        _complete(self, net, {})

    def _deepcopy_init(self) -> Callable[..., None]:
        return _GraphModule.__init__

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _rebuild, super().__reduce__()


def _rebuild(rebuild: Callable, arguments: tuple) -> fx.GraphModule:
    net = nn.Module()
    traced = rebuild(*arguments)
    net.__dict__.update(arguments[0])
    return _GraphModule(net, traced.graph, type(traced).__name__)


def _complete(result: nn.Module, net: nn.Module, copies: dict[nn.Module, nn.Module]) -> None:
    """Adds the modules, buffers and attributes of ``net`` that fx left out to ``result``, in the order of ``net``."""
    copies[net] = result
    result.training = net.training
    for name, value in vars(net).items():  # such as num_classes
        if not hasattr(result, name):
            vars(result)[name] = value
    others = {name: value for name, value in result._buffers.items() if name not in net._buffers}
    result._parameters = dict(net._parameters)
    result._buffers = {**net._buffers, **others}
    result._non_persistent_buffers_set = net._non_persistent_buffers_set | set(others)
    modules, result._modules = result._modules, {}
    for name, child in net._modules.items():
        copied = modules.get(name)
        if child is not None and copied is not None and copied is not child:
            _complete(copied, child, copies)
        result._modules[name] = None if child is None else copies.get(child, child)
