"""TSAM's module and surgery: placement, keys, depth, the segments of sound, against a plain re-creation."""

import copy
import pickle

import pytest
import torch
import torchvision
from support import assert_same_bits
from torch import nn

import tsm_jit
from tsm_jit import tsam

N_SEGMENT, VIDEO = 5, 4


class PlainShift(nn.Module):
    """TSAM's shift, written from its description: every fold of a copy is assigned from the frame at its distance."""

    def __init__(self, layer, f_div, shift_depth):
        super().__init__()
        self.layer, self.f_div, self.shift_depth = layer, f_div, shift_depth

    def forward(self, x):
        clips = x.view(-1, N_SEGMENT, *x.shape[1:])
        out = clips.clone()
        fold = x.shape[1] // self.f_div // self.shift_depth
        for depth in range(1, self.shift_depth + 1):
            ahead = slice(2 * (depth - 1) * fold, (2 * depth - 1) * fold)
            behind = slice((2 * depth - 1) * fold, 2 * depth * fold)
            out[:, : VIDEO - depth, ahead] = clips[:, depth:VIDEO, ahead]
            out[:, depth:VIDEO, behind] = clips[:, : VIDEO - depth, behind]
        return self.layer(out.view(x.shape))


def gradients(net, x, weight):
    x = x.clone().requires_grad_()
    out = net(x)
    (out * weight).sum().backward()
    return [out, x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("name", "f_div", "shift_depth", "n_insert", "m_insert"),
    [("resnet18", 8, 1, 1, 0), ("resnet18", 4, 3, 2, 1), ("resnet50", 8, 4, 2, 0), ("resnext50_32x4d", 8, 2, 3, 2)],
)
def test_networks_against_a_plain_conversion(device, name, f_div, shift_depth, n_insert, m_insert, inplace):
    torch.backends.cudnn.deterministic = True
    net = getattr(torchvision.models, name)(num_classes=3).double().to(device)
    plain = copy.deepcopy(net)
    for stage in (plain.layer1, plain.layer2, plain.layer3, plain.layer4):
        for i, block in enumerate(stage):
            if i % n_insert == m_insert:
                block.conv1 = PlainShift(block.conv1, f_div, shift_depth)
    tsam.make_Shift(net, N_SEGMENT, VIDEO, f_div, shift_depth, n_insert, m_insert, inplace=inplace)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert f"layer2.{m_insert}.conv1.layer.weight" in net.state_dict()
    x = torch.randn(2 * N_SEGMENT, 3, 32, 32, dtype=torch.float64, device=device)
    weight = torch.randn(2 * N_SEGMENT, 3, dtype=torch.float64, device=device)
    for actual, expected in zip(gradients(net, x, weight), gradients(plain, x, weight), strict=True):
        torch.testing.assert_close(actual, expected)  # where a frame is read twice, sums in another order
    net.eval(), plain.eval()
    with torch.inference_mode():
        assert_same_bits(net(x), plain(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_segments_of_sound_pass_as_they_are(device, inplace):
    module = tsam.TemporalShift(nn.Identity(), N_SEGMENT, VIDEO, 4, 2, inplace=inplace)
    x = torch.randn(2 * N_SEGMENT, 16, 3, 3, device=device)
    before = x.clone()
    with torch.no_grad():
        clips, shifted = x.unflatten(0, (-1, N_SEGMENT)), module(x).unflatten(0, (-1, N_SEGMENT))
    assert_same_bits(x, before)
    assert_same_bits(shifted[:, VIDEO:], clips[:, VIDEO:])
    assert_same_bits(shifted[:, 0, 0:2], clips[:, 1, 0:2])
    assert_same_bits(shifted[:, VIDEO - 1, 0:2], clips[:, VIDEO - 1, 0:2])  # `keep`
    assert_same_bits(shifted[:, 2, 6:8], clips[:, 0, 6:8])


def test_the_module():
    module = tsam.TemporalShift(nn.Conv2d(16, 4, 1), 9, 8, 8, 2)
    assert list(module.state_dict()) == ["layer.weight", "layer.bias"]
    assert "n_segment=9, n_segment_shifted=8, f_div=8, shift_depth=2" in repr(module)
    x = torch.randn(9, 16, 3, 3)
    assert_same_bits(pickle.loads(pickle.dumps(module))(x), module(x))
    with pytest.raises(ValueError, match="n_segment must divide the 8 frames of x, got 9"):
        module(torch.randn(8, 16, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((8, 9, 8, 1, 1, 0), ValueError, "n_segment_shifted must be at most n_segments=8, got 9"),
        ((0, 9, 8, 1, 1, 0), ValueError, "n_segments must be at least 1, got 0"),
        ((8, 8, 0, 1, 1, 0), ValueError, "f_div must be at least 2, got 0"),
        ((8, 8, 8, 1.0, 1, 0), TypeError, "shift_depth must be an integer, got 1.0"),
        ((8, 8, 8, 1, 0, 0), ValueError, "n_insert must be at least 1, got 0"),
        ((8, 8, 8, 1, 2, 2), ValueError, "m_insert must be less than n_insert=2, got 2"),
    ],
)
def test_surgery_errors(arguments, error, message):
    net = torchvision.models.resnet18()
    with pytest.raises(error) as raised:
        tsam.make_Shift(net, *arguments)
    assert str(raised.value) == message
    assert "layer1.0.conv1.weight" in net.state_dict()


def test_networks_that_cannot_be_converted():
    with pytest.raises(ValueError, match="f_div must be at least 2, got 1"):
        tsam.TemporalShift(nn.Identity(), 8, 8, 1, 1)
    net = torchvision.models.resnet18()
    net.layer1[0] = tsam.TemporalShift(net.layer1[0], 8, 8, 8, 1)
    with pytest.raises(ValueError, match="must not have temporal shifts yet"):
        tsam.make_Shift(net, 8, 8, 8, 1, 1, 0)
    with pytest.raises(TypeError, match="net must be a ResNet with stages layer1 to layer4"):
        tsam.make_Shift(torchvision.models.mobilenet_v2(), 8, 8, 8, 1, 1, 0)
    net = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(net, 8)
    with pytest.raises(ValueError, match="must not have temporal shifts yet"):
        tsam.make_Shift(net, 8, 8, 8, 1, 1, 0)
    net = torchvision.models.resnet18()
    tsam.make_Shift(net, 8, 8, 8, 1, 1, 0)
    with pytest.raises(ValueError, match="must not have temporal shifts yet"):
        tsm_jit.make_temporal_shift(net, 8)


def test_another_clip_length_has_as_many_segments_of_sound():
    net = torchvision.models.resnet18()
    tsam.make_Shift(net, 9, 8, 8, 2, 1, 0)
    with tsm_jit.n_segment(net, 17):
        assert {(b.conv1.n_segment, b.conv1.n_segment_shifted) for b in net.layer3} == {(17, 16)}
    assert {(b.conv1.n_segment, b.conv1.n_segment_shifted) for b in net.layer3} == {(9, 8)}
    with pytest.raises(
        ValueError, match="n_segment must be more than 1, the number of segments that are not shifted, got 1"
    ):
        tsm_jit.n_segment(net, 1)
