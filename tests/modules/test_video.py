"""The network of clips: the mean over its frames' scores, its head, its errors."""

import re

import pytest
import torch
import torchvision
from torch import nn

import tsm_jit


def converted(n_segment: int, pool: bool = False) -> nn.Module:
    net = torchvision.models.resnet18(num_classes=7).eval()
    tsm_jit.make_temporal_shift(net, n_segment, temporal_pool=pool)
    if pool:
        tsm_jit.make_temporal_pool(net, n_segment)
    return net


@pytest.mark.parametrize("pool", [False, True])
def test_scores_are_the_mean_over_the_frames(pool):
    net, clips = converted(4, pool), torch.randn(3, 4, 3, 32, 32)
    with torch.no_grad():
        expected = torch.stack([net(clip).mean(0) for clip in clips])
        torch.testing.assert_close(tsm_jit.VideoModel(net)(clips), expected, rtol=1e-4, atol=1e-5)  # other batches
        assert tsm_jit.VideoModel(net)(clips[:0]).shape == (0, 7)


def test_head_and_dropout():
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = tsm_jit.VideoModel(backbone, nn.Linear(3, 5), dropout=1.0)
    clips = torch.randn(2, 6, 3, 4, 4)
    assert set(model.state_dict()) == {"head.weight", "head.bias"}
    torch.testing.assert_close(model(clips), model.head.bias.expand(2, 5))  # all of the head's input is dropped
    expected = model.head(clips.mean((3, 4))).mean(1)
    torch.testing.assert_close(model.eval()(clips), expected)


def test_clips_of_another_length():
    model = tsm_jit.VideoModel(converted(8))
    message = "clips must have n_segment=8 frames, as its shifts are made for, got 16 frames"
    with pytest.raises(ValueError, match=re.escape(message)):
        model(torch.randn(1, 16, 3, 32, 32))
    with tsm_jit.n_segment(model, 16):
        assert model(torch.randn(1, 16, 3, 32, 32)).shape == (1, 7)
    with pytest.raises(ValueError, match=re.escape("clips must be [N, T, C, H, W], got [8, 3, 32, 32]")):
        model(torch.randn(8, 3, 32, 32))
    for each in (model, tsm_jit.VideoModel(nn.Identity())):
        with pytest.raises(ValueError, match=re.escape("clips must have at least one frame, got [1, 0, 3, 32, 32]")):
            each(torch.randn(1, 0, 3, 32, 32))
    with pytest.raises(ValueError, match=re.escape("[N, T, C, H, W], not [N, C, T, H, W]")):
        model(torch.randn(1, 3, 8, 32, 32))
    with pytest.raises(TypeError, match="clips must be a tensor, got list"):
        model([1])
