"""The non-local block: against sums over all positions, its keys, where the surgery puts it."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import tsm_jit
from tsm_jit.non_local import NL3DWrapper, NONLocalBlock3D, make_non_local


def written_out(block, x, mode, sub_sample):
    """Position by position, from the paper's formula."""

    def embedded(convolution, pool):
        values = torch.einsum("oc,ncthw->nothw", convolution.weight[:, :, 0, 0, 0], x)
        values = values + convolution.bias[:, None, None, None]
        if pool and sub_sample:
            n, c, t, h, w = values.shape
            values = values[..., : h // 2 * 2, : w // 2 * 2].reshape(n, c, t, h // 2, 2, w // 2, 2).amax((4, 6))
        return values.flatten(2)

    first = (lambda module: module[0]) if sub_sample else (lambda module: module)
    theta, phi, g = embedded(block.theta, False), embedded(first(block.phi), True), embedded(first(block.g), True)
    y = torch.zeros_like(theta)
    for n in range(x.shape[0]):
        for i in range(theta.shape[2]):
            f = (theta[n, :, i, None] * phi[n]).sum(0)
            f = f.exp() / f.exp().sum() if mode == "embedded_gaussian" else f / f.shape[0]
            y[n, :, i] = (f * g[n]).sum(1)
    return x + block.W(y.unflatten(2, x.shape[2:]))


@pytest.mark.parametrize("bn_layer", [False, True])
@pytest.mark.parametrize("sub_sample", [False, True])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
def test_against_the_formula(mode, sub_sample, bn_layer):
    block = NONLocalBlock3D(6, 4, sub_sample, bn_layer, mode=mode).double()
    x = torch.randn(2, 6, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(block(x), x)  # at first it adds nothing
    for parameter in block.W.parameters():
        nn.init.normal_(parameter)
    actual, expected = block(x), written_out(block, x, mode, sub_sample)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(x)
    inputs = [x, *block.parameters()]
    # The last bias before a batch normalisation has a gradient of rounding errors.
    for a, e in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product"])
def test_an_option_of_the_surgery(mode):
    """Behind every other block of layer2 and layer3, under TSM's keys, on clips and not on frames."""
    net = torchvision.models.resnet50(num_classes=3).double().eval()
    before, x = copy.deepcopy(net), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    tsm_jit.make_temporal_shift(before, 4)
    tsm_jit.make_temporal_shift(net, 4, non_local=mode)
    assert not any(module.training for module in net.modules())
    where = ["layer2.0", "layer2.2", "layer3.0", "layer3.2", "layer3.4"]
    assert [name for name, module in net.named_modules() if isinstance(module, NL3DWrapper)] == where
    keys = net.state_dict().keys()
    assert {"layer2.0.block.conv1.net.weight", "layer3.1.conv1.net.weight"} <= keys
    own = {key.removeprefix("layer2.0.nl.") for key in keys if key.startswith("layer2.0.nl.")}
    statistics = {f"W.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    layers = ("g.0", "theta", "phi.0", "W.0", "W.1")
    assert own == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | statistics
    with torch.no_grad():
        torch.testing.assert_close(net(x), before(x))  # until W is trained
        for module in net.modules():
            if isinstance(module, NL3DWrapper):
                nn.init.normal_(module.nl.W[1].weight)
        # By hand: each block behind its residual block, on clips [N, C, T, H, W].
        for name in where:
            stage, i = name.split(".")
            block, nl = getattr(before, stage)[int(i)], net.get_submodule(name).nl

            def behind(_, __, out, nl=nl):
                return nl(out.unflatten(0, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)

            block.register_forward_hook(behind)
        torch.testing.assert_close(net(x), before(x))
    tsm_jit.n_segment(net, 8)
    assert {module.n_segment for module in net.modules() if isinstance(module, NL3DWrapper)} == {8}
    tsm_jit.remove_temporal_shift(net)
    assert list(net.state_dict()) == list(torchvision.models.resnet50().state_dict())


def test_in_other_places():
    net = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(net, 8, place="block", temporal_pool=True, non_local="dot_product")
    tsm_jit.make_temporal_pool(net, 8)
    assert net(torch.randn(16, 3, 32, 32)).shape == (8, 1000)
    wrapped = [module for module in net.modules() if isinstance(module, NL3DWrapper)]
    assert [module.n_segment for module in wrapped] == [4, 4]
    assert [module.nl.g[0].in_channels for module in wrapped] == [128, 256]
    plain = torchvision.models.resnet18()
    make_non_local(plain, 8, sub_sample=False)
    with pytest.raises(ValueError, match=r"model must have no temporal modules except .* got .*NL3DWrapper"):
        tsm_jit.online.convert(plain)
    assert "layer2.0.nl.g.weight" in plain.state_dict()
    with pytest.raises(ValueError, match="net must not have non-local blocks yet"):
        make_non_local(plain, 8)
    assert plain(torch.randn(8, 3, 32, 32)).shape == (8, 1000)
    with pytest.raises(ValueError, match=r"n_segment must divide the frames of x, got 8 for \[9, 128, 4, 4\]"):
        plain(torch.randn(9, 3, 32, 32))


def test_errors():
    net = torchvision.models.resnet18()
    for arguments, options, error, message in [
        ((8,), {"mode": "gaussian"}, ValueError, "mode must be one of .*, got 'gaussian'"),
        ((0,), {}, ValueError, "n_segment must be at least 1, got 0"),
        (("8",), {}, TypeError, "n_segment must be an integer, got '8'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            make_non_local(net, *arguments, **options)
    with pytest.raises(ValueError, match="non_local must be one of 'embedded_gaussian', 'dot_product', got True"):
        tsm_jit.make_temporal_shift(net, 8, non_local=True)
    other = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(4, channels))
    before = list(other.state_dict())
    with pytest.raises(TypeError, match=r"block must be a residual block .* got BasicBlock with GroupNorm"):
        tsm_jit.make_temporal_shift(other, 8, non_local="dot_product")
    assert list(other.state_dict()) == before
    assert list(net.state_dict()) == list(torchvision.models.resnet18().state_dict())
    with pytest.raises(TypeError, match="net must be a ResNet"):
        make_non_local(torchvision.models.mobilenet_v2(), 8)
    with pytest.raises(TypeError, match=r"block must be a residual block that ends in .*, got Linear with NoneType"):
        NL3DWrapper(nn.Linear(1, 1), 8)
    with pytest.raises(ValueError, match=r"x must be clips \[N, C, T, H, W\], got \[2, 4\]"):
        NONLocalBlock3D(4)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="in_channels must be at least 1, got 0"):
        NONLocalBlock3D(0)
