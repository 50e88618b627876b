"""Network surgery that every family shares: insert temporal modules, remove them, set the clip length."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from tsm_jit._checks import integer
from tsm_jit.modules.base import ClipModule, ShiftedModule, unwrapped


class n_segment:
    """Sets the clip length of a whole converted network, at once; as a context manager, for as long as its block runs.

    A pooled network (:func:`tsm_jit.make_temporal_pool`) keeps halving, and of TSAM's segments as many stay sound.

    Args:
        net: a network with modules of :mod:`tsm_jit` or :mod:`tsm_jit.tsam`; it is changed in place.
        n_segment: the clip length in frames at its input.

    Raises:
        TypeError, ValueError: ``net`` holds no such module; ``n_segment`` is no integer from 1 up, cannot be halved
            where the network pools, or leaves no segment to shift beside TSAM's sound. The network is then as it was.

    Example::

        tsm_jit.n_segment(net, 16)  # from here on
        with tsm_jit.n_segment(net, 32):  # only here
            net(long_clips)
    """

    def __init__(self, net: nn.Module, n_segment: int):
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        new = integer("n_segment", n_segment, 1)
        modules = [module for module in net.modules() if isinstance(module, ClipModule)]
        if not modules:
            raise ValueError(f"net must hold temporal shifts or pools to have a clip length, got {type(net).__name__}")
        old = max(module.n_segment for module in modules)
        changes: list[tuple[nn.Module, str, int]] = []
        for module in modules:
            if old % module.n_segment != 0:
                raise ValueError(f"net must hold one clip length and parts of it, got {old} and {module.n_segment}")
            part = old // module.n_segment  # 2 after a pool
            factor = 2 * part if module.halves else part
            if new % factor != 0:
                raise ValueError(f"n_segment must be a multiple of {factor} for a network that pools, got {new}")
            changes.append((module, "n_segment", new // part))
            shifted = getattr(module, "n_segment_shifted", None)
            if shifted is not None:
                sound = module.n_segment - shifted
                if new // part <= sound:
                    raise ValueError(f"n_segment must be more than {sound}, the segments that never shift, got {new}")
                changes.append((module, "n_segment_shifted", new // part - sound))
        self._before = [(module, name, getattr(module, name)) for module, name, _ in changes]
        _assign(changes)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        _assign(self._before)


def _assign(changes: list[tuple[nn.Module, str, int]]) -> None:
    for module, name, value in changes:
        setattr(module, name, value)


def remove_temporal_shift(net: nn.Module) -> None:
    """Takes the temporal shifts, pools and non-local blocks of every family out of a converted network, in place.

    The network is then as before :func:`tsm_jit.make_temporal_shift` or :func:`tsm_jit.tsam.make_Shift`, its weights as
    they are now, its keys without ``net``, ``layer`` or ``block``. Hooks on these modules go with them.

    Raises:
        TypeError, ValueError: ``net`` is no module, holds no temporal shift or pool, or is one itself.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if isinstance(net, ClipModule):
        raise ValueError(f"net must hold temporal shifts, and not be one itself, got {type(net).__name__}")
    places = [
        (parent, name)
        for parent in net.modules()
        for name, child in parent._modules.items()
        if isinstance(child, ClipModule)
    ]
    if not places:
        raise ValueError(f"net must hold temporal shifts or pools to remove, got {type(net).__name__}")
    for parent, name in reversed(places):  # the innermost first: each then holds what is left of its module
        parent._modules[name] = unwrapped(parent._modules[name])
    NeedsPool.remove(net)


class NeedsPool:
    """A hook before the first forward of a network that was converted with ``temporal_pool=True``."""

    def __call__(self, net: nn.Module, args: tuple) -> None:
        if not any(isinstance(module, ClipModule) and module.halves for module in net.modules()):
            raise ValueError(
                "net must pool over time, as make_temporal_shift was called with temporal_pool=True: later stages "
                "expect half of the frames; call make_temporal_pool as well"
            )
        self.remove(net)

    @staticmethod
    def remove(net: nn.Module) -> None:
        """Removes the hook from ``net``, if it is there."""
        for key, hook in list(net._forward_pre_hooks.items()):
            if isinstance(hook, NeedsPool):
                del net._forward_pre_hooks[key]


def shift_before(net: nn.Module, places: Mapping[str, Callable[[nn.Module], nn.Module]]) -> None:
    """Puts a temporal shift before modules of any network, in place: what all surgery here is built on.

    Args:
        net: the network; as it was if anything below is raised.
        places: for the name of each module that is to see shifted frames (``net.named_modules()`` lists them), what to
            call with it: a :class:`tsm_jit.TemporalShift`, or another temporal module, without its first argument.

    Raises:
        TypeError, ValueError: ``net`` is no module; ``places`` is no mapping, names no module of ``net``, or one that
            is shifted already; its values make no temporal module.

    Example::

        shift = functools.partial(tsm_jit.TemporalShift, n_segment=8, inplace=True)
        tsm_jit.shift_before(net, {"layer3.0.conv1": shift, "layer4.0.conv1": shift})
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if not isinstance(places, Mapping):
        raise TypeError(f"places must be a mapping from names of modules, got {type(places).__name__}")
    wrapped = []
    for place, around in places.items():
        parent, child = _place(net, place)
        module = parent.get_submodule(child)
        if isinstance(module, ShiftedModule):
            raise ValueError(f"places must not be shifted already, but {place!r} is")
        if not callable(around):
            raise TypeError(f"places must map to what makes a temporal module, got {around!r:.80} for {place!r}")
        new = around(module)
        if not isinstance(new, ClipModule):
            raise TypeError(f"places must map to what makes a temporal module, got {type(new).__name__} for {place!r}")
        new.training = module.training
        wrapped.append((parent, child, new))
    for parent, child, new in wrapped:
        parent._modules[child] = new


def _place(net: nn.Module, place: str) -> tuple[nn.Module, str]:
    """The module that holds the one named ``place``, and the name there."""
    if not isinstance(place, str):
        raise TypeError(f"places must map from names of modules, got {place!r:.80}")
    above, _, child = place.rpartition(".")
    try:
        parent = net.get_submodule(above)
    except AttributeError:
        parent = None
    if parent is None or parent._modules.get(child) is None:
        raise ValueError(f"places must name modules of net, got {place!r}, which {type(net).__name__} does not have")
    return parent, child


def check_clip_lengths(net: nn.Module, first: int, later: int) -> None:
    """Raises ValueError unless what a ResNet holds is for clips of ``first``, and of ``later`` from layer2 on."""
    for name, module in net.named_modules():
        if isinstance(module, ClipModule):
            expected = first if module.halves or name.startswith("layer1.") else later
            if module.n_segment != expected:
                raise ValueError(
                    f"n_segment must fit what net already holds, got {first} frames, {later} from layer2 on, where "
                    f"{name!r} is for clips of {module.n_segment} and would get {expected}"
                )


def refuse_converted(net: nn.Module) -> None:
    """Raises ValueError if ``net`` holds a temporal shift of any family."""
    if any(isinstance(module, ShiftedModule) for module in net.modules()):
        raise ValueError("net must not hold temporal shifts already, but it was converted before")
