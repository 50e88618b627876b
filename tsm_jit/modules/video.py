"""A network of frames as a network of clips: reshape, backbone, head, the mean over the frames."""

from __future__ import annotations

from torch import Tensor, nn
from torch.overrides import has_torch_function

from tsm_jit.modules.base import ClipModule


class VideoModel(nn.Module):
    """Clips ``[N, T, C, H, W]`` in, scores ``[N, K]`` out: the mean of the frames, TSN's consensus (arXiv:1608.00859).

    Args:
        backbone: a network of frames, ``[N*T, C, H, W]`` to ``[N*T, ...]``, or to fewer where it pools over time;
            converted (:func:`tsm_jit.make_temporal_shift` and others) or not. ``backbone`` in the state dict.
        head: what follows for each frame, ``[N*T, F]`` to ``[N*T, K]``, typically an ``nn.Linear`` while the backbone
            ends in ``nn.Identity``; without one, the backbone's output is the scores. ``head`` in the state dict.
        dropout: the part of the head's input that is dropped in training, 0 to 1.

    Raises:
        TypeError, ValueError: on a call, ``clips`` are no tensor, have no five dimensions, or have another length than
            the backbone is converted for: ``tsm_jit.n_segment(model, length)`` changes that.

    Example::

        net = torchvision.models.resnet50()
        net.fc = nn.Identity()
        tsm_jit.make_temporal_shift(net, n_segment=8, inplace=True)
        model = tsm_jit.VideoModel(net, nn.Linear(2048, 400), dropout=0.5)
        scores = model(torch.randn(2, 8, 3, 224, 224))
    """

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
        if clips.dim() != 5:
            raise ValueError(f"clips must be [N, T, C, H, W], got {list(clips.shape)}")
        length = max((each.n_segment for each in self.backbone.modules() if isinstance(each, ClipModule)), default=None)
        if length not in (None, clips.shape[1]):
            raise ValueError(
                f"clips must be as long as n_segment={length}, which the backbone is converted for, got "
                f"{clips.shape[1]} frames: tsm_jit.n_segment(model, {clips.shape[1]}) changes it"
            )
        scores = self.head(self.dropout(self.backbone(clips.flatten(0, 1))))
        frames = scores.shape[0] // max(1, clips.shape[0])
        return scores.reshape(clips.shape[0], frames, *scores.shape[1:]).mean(1)
