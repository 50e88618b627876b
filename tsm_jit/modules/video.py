"""A video classifier from an image network: backbone and head for each frame, then the mean over the frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function

from tsm_jit._checks import refuse_scripting
from tsm_jit.modules.base import ClipModule

if TYPE_CHECKING:
    from tsm_jit.ops.time_shard import TimeShard


class VideoModel(nn.Module):
    """Computes scores ``[N, K]`` of clips ``[N, T, C, H, W]``: the mean of the scores of the frames.

    This mean is the average consensus of TSN (arXiv:1608.00859).

    Args:
        backbone: an image network, ``[N*T, C, H, W]`` to ``[N*T, F]``. It may be converted, for example by
            :func:`tsm_jit.make_temporal_shift`, and may pool over time. Its state-dict prefix is ``backbone``.
        head: the layer after the backbone, ``[N*T, F]`` to ``[N*T, K]``, usually an ``nn.Linear``. By default the
            output of the backbone is the scores. Its state-dict prefix is ``head``.
        dropout: the dropout probability before the head, 0 to 1.

    Raises:
        TypeError: in ``forward``: ``clips`` is not a tensor.
        ValueError: in ``forward``: ``clips`` is not five-dimensional or has no frames, or its length differs from the
            ``n_segment`` of its shifts. ``tsm_jit.n_segment(model, length)`` changes it.

    If :func:`tsm_jit.distributed.parallelize_time` splits the clips over ranks, the input is the frames of this rank,
    ``[N*L, C, H, W]`` or ``[N, L, C, H, W]``. The scores are the mean over the frames of all ranks.

    Example::

        net = torchvision.models.resnet50()
        net.fc = torch.nn.Identity()
        tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
        model = tsm_jit.VideoModel(net, torch.nn.Linear(2048, 400), dropout=0.5)
        scores = model(torch.randn(2, 8, 3, 112, 112))
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(self, backbone: nn.Module, head: nn.Module | None = None, dropout: float = 0.0):
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Identity() if head is None else head

    def forward(self, clips: Tensor) -> Tensor:
        if not isinstance(clips, Tensor):
            if not has_torch_function((clips,)):
                raise TypeError(f"clips must be a tensor, got {type(clips).__name__}")
            # A proxy of torch.fx: no checks.
            scores = self.head(self.dropout(self.backbone(clips.flatten(0, 1))))
            return scores.unflatten(0, (clips.shape[0], -1)).mean(1)
        shifts = [each for each in self.modules() if isinstance(each, ClipModule)]
        shard = next((each.time_shard for each in shifts if each.time_shard is not None), None)
        length = max([each.n_segment for each in shifts]) if shifts else None
        if shard is not None and length is not None:
            if any(each.time_shard != shard or (shard.ranks > 1 and each.n_segment != length) for each in shifts):
                shard.refuse(
                    "all shifts of a split VideoModel must be split by one call of parallelize_time and have one "
                    f"n_segment, got n_segment {[each.n_segment for each in shifts]}, split "
                    f"{[each.time_shard is not None for each in shifts]}",
                    clips,
                )
            return self._mean_over_ranks(clips, length, shard)
        if clips.dim() != 5:
            raise ValueError(f"clips must be [N, T, C, H, W], got {list(clips.shape)}")
        if clips.shape[1] == 0:
            raise ValueError(f"clips must have at least one frame, got {list(clips.shape)}")
        if length not in (None, clips.shape[1]):
            remedy = (
                "clips must be [N, T, C, H, W], not [N, C, T, H, W]"
                if clips.shape[2] == length
                else f"tsm_jit.n_segment(model, {clips.shape[1]}) changes it, unless a pool or audio segments forbid "
                "that length"
            )
            raise ValueError(
                f"clips must have n_segment={length} frames, as its shifts are made for, got {clips.shape[1]} "
                f"frames in {list(clips.shape)}: {remedy}"
            )
        scores = self.head(self.dropout(self.backbone(clips.flatten(0, 1))))
        frames = scores.shape[0] // (clips.shape[0] if clips.shape[0] > 0 else 1)  # max() would be constant in traces
        return scores.reshape(clips.shape[0], frames, *scores.shape[1:]).mean(1)

    def _mean_over_ranks(self, clips: Tensor, n_segment: int, shard: TimeShard) -> Tensor:
        """The scores of split clips. The frames of this rank are ``[N, L, C, H, W]`` or ``[N*L, C, H, W]``."""
        from tsm_jit.ops.sharded_shift import sum_over_ranks  # keeps `import tsm_jit` fast

        if clips.dim() not in (4, 5):
            shard.refuse(f"clips must be split, [N, L, C, H, W] or [N*L, C, H, W], got {list(clips.shape)}", clips)
        held = shard.check_frames(clips, n_segment, "clips")
        scores = self.head(self.dropout(self.backbone(clips.flatten(0, 1) if clips.dim() == 5 else clips)))
        scores = scores.reshape(scores.shape[0] // held, held, *scores.shape[1:])
        if shard.ranks == 1:
            return scores.mean(1)
        total = scores.sum(1, dtype=torch.promote_types(scores.dtype, torch.float32))  # rounds once, at the end
        return (sum_over_ranks(total, shard) / n_segment).to(scores.dtype)
