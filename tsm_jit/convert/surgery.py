"""Network surgery: inserts temporal modules, removes them, and sets the clip length."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torch.compiler import is_compiling

from tsm_jit._checks import integer
from tsm_jit.modules.base import ClipModule, ShiftedModule, unwrapped


class n_segment:
    """Sets the clip length of a converted network (TSM, arXiv:1811.08383), permanently or as a context manager.

    As a context manager it restores the previous clip length on exit. In a network with a temporal pool the stages
    after it get half the clip length. In a TSAM network the number of audio segments does not change.

    Activation checkpointing computes forwards again in the backward. Call ``backward()`` before the clip length
    changes. Otherwise the backward raises ``RuntimeError``. examples/README.md lists exceptions for compiled code.

    Args:
        net: a network with temporal modules. It is changed in place.
        n_segment: the clip length in frames at the input of the network.

    Raises:
        TypeError: ``net`` is not a module, or ``n_segment`` is not an integer.
        ValueError: ``net`` has no temporal modules; ``n_segment`` is below 1; ``n_segment`` is odd and the network
            pools; or ``n_segment`` leaves no segment for video. The network is then unchanged.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8)
        long_clips = torch.randn(32, 3, 64, 64)
        tsm_jit.n_segment(net, 16)  # permanently
        with tsm_jit.n_segment(net, 32):  # only in this block
            net(long_clips)
    """

    def __init__(self, net: nn.Module, n_segment: int):
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        new = integer("n_segment", n_segment, 1)
        modules = [module for module in net.modules() if isinstance(module, ClipModule)]
        if not modules:
            raise ValueError(f"net must have temporal shifts or pools to set a clip length, got {type(net).__name__}")
        old = max(module.n_segment for module in modules)
        changes: list[tuple[nn.Module, str, int]] = []
        for module in modules:
            if old % module.n_segment != 0:
                raise ValueError(f"net must have one clip length and fractions of it, got {old} and {module.n_segment}")
            divisor = old // module.n_segment  # 2 after a temporal pool
            factor = 2 * divisor if module.halves_clip else divisor
            if new % factor != 0:
                raise ValueError(f"n_segment must be a multiple of {factor} for a network that pools, got {new}")
            changes.append((module, "n_segment", new // divisor))
            shifted = getattr(module, "n_segment_shifted", None)
            if shifted is not None:
                fixed = module.n_segment - shifted  # the audio segments
                if new // divisor <= fixed:
                    raise ValueError(
                        f"n_segment must be more than {fixed}, the number of segments that are not shifted, got {new}"
                    )
                changes.append((module, "n_segment_shifted", new // divisor - fixed))
        self._before = [(module, name, getattr(module, name)) for module, name, _ in changes]
        self._lengths = old, new
        _assign(changes)

    def __repr__(self) -> str:
        return "n_segment: {1} frames per clip, before {0}".format(*self._lengths)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _assign(self._before)


def _assign(changes: list[tuple[nn.Module, str, int]]) -> None:
    for module, name, value in changes:
        setattr(module, name, value)


def remove_temporal_shift(net: nn.Module) -> None:
    """Removes all temporal shifts, temporal pools and non-local blocks from a network, in place.

    This is the inverse of :func:`tsm_jit.make_temporal_shift` (TSM, arXiv:1811.08383), :func:`tsm_jit.tsam.make_Shift`
    and related functions. Weights do not change, and the state dict gets its original keys again. Hooks on the removed
    modules are lost.

    Args:
        net: a converted network.

    Raises:
        TypeError: ``net`` is not a module.
        ValueError: ``net`` has no temporal modules, or is a temporal module itself.

    Example::

        net = torchvision.models.resnet50()
        tsm_jit.make_temporal_shift(net, n_segment=8)
        tsm_jit.remove_temporal_shift(net)
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if isinstance(net, ClipModule):
        raise ValueError(f"net must have temporal shifts and not be one itself, got {type(net).__name__}")
    places = [
        (parent, name)
        for parent in net.modules()
        for name, child in parent._modules.items()
        if isinstance(child, ClipModule)
    ]
    if not places:
        raise ValueError(f"net must have temporal shifts or pools to remove, got {type(net).__name__}")
    for parent, name in reversed(places):  # inner modules first, so that nested ones are all removed
        parent._modules[name] = unwrapped(parent._modules[name])
    NeedsPool.remove(net)


class NeedsPool:
    """A hook before the first forward of a network that was converted with ``temporal_pool=True``."""

    def __call__(self, net: nn.Module, args: tuple) -> None:
        if not any(isinstance(module, ClipModule) and module.halves_clip for module in net.modules()):
            raise ValueError(
                "net must pool over time, as make_temporal_shift was called with temporal_pool=True: later stages "
                "expect half of the frames; call make_temporal_pool as well"
            )
        if not is_compiling():  # compilers cannot change hooks
            self.remove(net)

    @staticmethod
    def remove(net: nn.Module) -> None:
        """Removes the hook from ``net``, if it is there."""
        for key, hook in list(net._forward_pre_hooks.items()):
            if isinstance(hook, NeedsPool):
                del net._forward_pre_hooks[key]


def shift_before(net: nn.Module, places: Mapping[str, Callable[[nn.Module], nn.Module]]) -> None:
    """Inserts temporal shifts before given modules of any network, in place (TSM, arXiv:1811.08383).

    Args:
        net: the network. If an error is raised, it is unchanged.
        places: maps the name of each module (see ``net.named_modules()``) to a function. The function takes the module
            and returns a temporal module around it, for example a ``functools.partial`` of
            :class:`tsm_jit.TemporalShift`.

    Raises:
        TypeError: ``net`` is not a module; ``places`` is not a mapping; or one of its functions does not return a
            temporal module.
        ValueError: ``places`` names a module that ``net`` does not have, or one with a shift; or
            :func:`tsm_jit.distributed.parallelize_time` has split the clips of ``net``.

    Example::

        net = torchvision.models.resnet50()
        shift = functools.partial(tsm_jit.TemporalShift, n_segment=8, inplace=True)
        tsm_jit.shift_before(net, {"layer3.0.conv1": shift, "layer4.0.conv1": shift})
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if not isinstance(places, Mapping):
        raise TypeError(f"places must be a mapping from module names, got {type(places).__name__}")
    if any(isinstance(module, ClipModule) and module.time_shard is not None for module in net.modules()):
        raise ValueError(
            "net must get its shifts before parallelize_time splits its clips, got a network that is split"
        )
    wrapped = []
    for place, wrap in places.items():
        parent, child = _place(net, place)
        module = parent.get_submodule(child)
        if isinstance(module, ShiftedModule):
            raise ValueError(f"places must name modules without a shift, got {place!r}, which has one")
        if not callable(wrap):
            raise TypeError(f"places must map to functions, got {wrap!r:.80} for {place!r}")
        new = wrap(module)
        if not isinstance(new, ClipModule):
            raise TypeError(
                f"places must map to functions that return a temporal module, got {type(new).__name__} for {place!r}"
            )
        new.training = module.training
        wrapped.append((parent, child, new))
    for parent, child, new in wrapped:
        parent._modules[child] = new


def _place(net: nn.Module, place: str) -> tuple[nn.Module, str]:
    """Returns the parent of the module named ``place``, and the name of the module in its parent."""
    if not isinstance(place, str):
        raise TypeError(f"places must map from module names, got {place!r:.80}")
    parent_name, _, child = place.rpartition(".")
    try:
        parent = net.get_submodule(parent_name)
    except AttributeError:
        parent = None
    if parent is None or parent._modules.get(child) is None:
        raise ValueError(f"places must name modules of net, got {place!r}, which {type(net).__name__} does not have")
    return parent, child


def check_clip_lengths(net: nn.Module, first: int, later: int) -> None:
    """Raises ValueError unless a ResNet's temporal modules have clip length ``first``, or ``later`` from layer2 on."""
    for name, module in net.named_modules():
        if isinstance(module, ClipModule):
            expected = first if module.halves_clip or name.startswith("layer1.") else later
            if module.n_segment != expected:
                raise ValueError(
                    f"n_segment must match the temporal modules of net, got {first} frames and {later} from layer2 on, "
                    f"where {name!r} has n_segment={module.n_segment} and would get {expected}"
                )


def refuse_converted(net: nn.Module) -> None:
    """Raises ValueError if ``net`` has temporal shifts."""
    if any(isinstance(module, ShiftedModule) for module in net.modules()):
        raise ValueError("net must not have temporal shifts yet, got a network that was converted before")
