"""The base classes of modules that wrap another module and give it shifted frames or clips."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.overrides import has_torch_function

from tsm_jit import ops
from tsm_jit._checks import refuse_scripting
from tsm_jit.ops import recomputation
from tsm_jit.ops.compat import is_exporting

if TYPE_CHECKING:
    from tsm_jit.ops.time_shard import TimeShard

# These modules neither change nor return their input. So they may share it with the backward, which computes it again.
# Subclasses that compute the same as nn.Conv2d may, too: see is_conv2d.
_READ_ONLY_MODULES = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear}

# Subclasses of nn.Conv2d that compute the same. mmcv's also takes empty tensors, for PyTorch 1.4.
_SAME_AS_CONV2D = ("mmcv.cnn.bricks.wrappers.Conv2d",)


class ClipModule(nn.Module):
    """A wrapper around a module. Its input frames form clips of ``n_segment`` frames."""

    n_segment: int
    halves_clip = False  # whether it halves the clip length before it calls its module
    time_shard: TimeShard | None = None  # set by parallelize_time: the part of each clip that this process holds
    name_in_network = ""  # set by parallelize_time
    _forward_length: int | None = None  # of the last forward that could be computed again
    _unmarked_lengths: tuple[int, ...] = ()  # of forwards that save no mark, until one is computed again
    __prepare_scriptable__ = refuse_scripting

    def __init__(self) -> None:
        super().__init__()
        self._forward_length, self._unmarked_lengths = None, ()  # a new attribute would invalidate compiled code

    def split_shard(self) -> TimeShard | None:
        """Returns the part of each clip that this process holds, or None if it holds all frames."""
        shard = self.time_shard
        return shard if shard is not None and shard.ranks > 1 else None

    def checked_n_segment(self, x: Tensor) -> int:
        """``n_segment``, for a forward of ``x``.

        Raises:
            RuntimeError: activation checkpointing computes a forward again, which had another clip length. Its
                gradients would be wrong.
        """
        length = self.n_segment
        if ops.eager():
            phase = recomputation.current_phase()
        elif is_exporting():
            return length
        elif recomputation.saves_marks and x.requires_grad and not recomputation.is_nested:
            phase = "forward"  # of a recomputation, too, since its backward compares marks of the length
        else:
            phase = recomputation.phase
        if phase:
            self._compare_length(length, phase, x)
        return length

    def _compare_length(self, length: int, phase: str, x: Tensor) -> None:
        """Records the clip length of a forward of ``x``, or raises RuntimeError if that of a recomputation differs.

        Of several forwards that save no mark, it is unknown which is computed again: forwards in reentrant checkpoints,
        and forwards without a gradient.
        """
        if phase == "recomputation":
            lengths = {each for each in (self._forward_length, *self._unmarked_lengths) if each not in (None, length)}
            if self._unmarked_lengths:
                self._unmarked_lengths = ()
            if lengths:
                raise recomputation.changed_length(length, lengths)
            return
        self._forward_length = length
        needs_grad = x.requires_grad or any(each.requires_grad for each in self.parameters())
        # Only hooks of checkpoints compute a forward again. Others need no mark.
        saves_mark = phase == "forward" and (needs_grad or not recomputation.saves_marks)
        if not saves_mark and length not in self._unmarked_lengths:
            self._unmarked_lengths = (*self._unmarked_lengths, length)


class ShiftedModule(ClipModule):
    """A wrapper that shifts the input of its module. With ``inplace``, it stores no second activation."""

    inplace: bool = False  # of modules from an older version or another constructor

    def shifted_module(self) -> nn.Module:
        """Returns the wrapped module. Not a property: compiled code would look that up in the class on each call."""
        return next(iter(self._modules.values()))  # type: ignore[return-value]  # children() takes 3 us

    def shift_of(self, x: Tensor) -> str:
        """Returns the encoded shift for an input with the shape and type of ``x``."""
        raise NotImplementedError

    def refuse_split(self, x: Any) -> None:
        """Raises NotImplementedError for a proxy of ``torch.fx`` if this process holds only a part of the frames."""
        if self.split_shard() is not None and has_torch_function((x,)):
            raise NotImplementedError("a network whose clips are split over ranks must not be traced by torch.fx")

    def whole_clips(self, x: Tensor) -> Tensor:
        """Returns ``x``, or a tensor without data in the shape of the whole clips if this process holds a part of them.

        :meth:`shift_of` takes the result.

        Raises:
            ValueError: ``x`` does not have the frames that this rank must hold of each clip.
        """
        shard = self.split_shard()
        if shard is None or not isinstance(x, Tensor):
            return x
        held, dim = shard.check_frames(x, self.n_segment, "x"), 1 if x.dim() == 5 else 0
        frames = x.shape[dim] // held * self.n_segment
        return x.new_empty([*x.shape[:dim], frames, *x.shape[dim + 1 :]], device="meta")

    def call_shifted(self, x: Tensor, shift: str, num_prefix_tokens: int = 0, *, inplace: bool | None = None) -> Tensor:
        """Calls the wrapped module with the shifted ``x``, which is never written.

        The first ``num_prefix_tokens`` tokens are not shifted.
        """
        net = self.shifted_module()
        eager = ops.eager()
        only_reads = eager and only_reads_input(net)
        recomputes = eager and (self.inplace if inplace is None else inplace) and torch.is_grad_enabled()
        shard = self.split_shard()
        if shard is not None and eager:
            shard = shard.in_layer(self.name_in_network)
        if only_reads:
            z = _shifted_layer(net, x, shift, num_prefix_tokens, recomputes, shard)
            if z is not None:
                return z
        temporal_shift: Callable[[Tensor, str], Tensor]
        if shard is not None:
            from tsm_jit.ops import sharded_shift as split  # keeps `import tsm_jit` fast

            # A recomputation in the backward takes the edges that have arrived in the forward.
            edges = split.Edges() if recomputes else None
            temporal_shift = functools.partial(split.sharded_shift, shard=shard, edges=edges)
        else:
            temporal_shift = ops.temporal_shift_for_single_consumer if only_reads else ops.temporal_shift

        def shifted(x: Tensor) -> Tensor:
            return ops.shift_tokens(x, shift, num_prefix_tokens, temporal_shift)

        if recomputes:
            with ops.recomputing_shift(x, shifted) as copy:
                z = net(copy)
        else:
            z = net(shifted(x))
        if x.requires_grad and (eager or shard is None):  # the shift has saved a mark
            return z
        return ops.save_clip_length_mark(z, shift)


def _shifted_layer(
    net: nn.Module, x: Tensor, shift: str, num_prefix_tokens: int, recomputes: bool, shard: TimeShard | None
) -> Tensor | None:
    """Returns ``net(shifted x)`` as one operation, or None where a separate shift is faster or required.

    ``net`` must satisfy :func:`only_reads_input`. With ``recomputes``, no shifted copy is kept for the backward.
    """
    convolution = None
    if isinstance(net, nn.Conv2d):
        if not recomputes and net.kernel_size != (1, 1):  # it is no product
            return None
        if net.padding_mode != "zeros" or isinstance(net.padding, str) or x.dim() != 4:
            return None
        convolution = (net.stride, net.padding, net.dilation, net.groups)
    elif type(net) is not nn.Linear:
        return None
    layer = ops.Layer(shift, num_prefix_tokens, convolution, shard)
    return ops.shifted_layer(x, _parameter(net, "weight"), _parameter(net, "bias"), layer, recomputes)


def _parameter(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, which takes 0.9 us longer for a parameter."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def only_reads_input(net: nn.Module) -> bool:
    """Whether ``net`` only reads its input, and no hook can keep the input or its gradient.

    The backward may write into this gradient, and a kernel may compute the output of ``net`` without calling it.
    """
    return (type(net) in _READ_ONLY_MODULES or is_conv2d(net)) and not has_hooks(net) and not has_global_hooks()


def is_conv2d(module: nn.Module) -> bool:
    """Whether ``module`` computes what ``nn.Conv2d`` computes: it is one, not an instance of an unknown subclass."""
    kind = type(module)
    return kind is nn.Conv2d or (issubclass(kind, nn.Conv2d) and class_name(kind) in _SAME_AS_CONV2D)


def class_name(kind: type) -> str:
    """Returns the full name of a class, such as ``"torchvision.models.resnet.BasicBlock"``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, or its own ``forward`` as set by libraries that offload modules."""
    attributes = module.__dict__
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
    )


def has_global_hooks() -> bool:
    """Whether hooks for all modules are registered."""
    return bool(
        all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    )


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """Returns the module inside a :class:`ClipModule`, or ``module`` itself if it is not wrapped."""
    return next(module.children()) if isinstance(module, ClipModule) else module
