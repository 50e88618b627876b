"""The real mmaction2 for tests that need it: pip install 'tsm-jit[mmaction2]'."""

import importlib.util
import sys
import types
import warnings

import pytest
from torch import nn

# Two parts of mmaction2 1.2.0 that have nothing to do with shifts cannot be imported: its wheel lacks a package, and
# its language models need an old version of transformers. Empty modules stand for them.
_PACKAGE = importlib.util.find_spec("mmaction")
_DRN = "mmaction.models.localizers.drn"
if _PACKAGE is not None:
    for name in (_DRN, f"{_DRN}.drn", "mmaction.models.multimodal"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[f"{_DRN}.drn"].DRN = type("DRN", (), {})


def models() -> types.ModuleType:
    """Returns ``mmaction.models``, or skips the test without mmaction2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mmcv-lite says that it has no operators
        pytest.importorskip("mmaction", reason="needs mmaction2: pip install 'tsm-jit[mmaction2]'")
        import mmaction.models
    return mmaction.models


def small_resnet() -> nn.Module:
    """mmaction2's ResNet of four blocks, without shifts. Unlike in its class, ``train`` returns the network."""
    resnet = models().backbones.resnet

    class Backbone(resnet.ResNet):
        arch_settings = {18: (resnet.BasicBlock, (1, 1, 1, 1))}

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            return self

    return Backbone(18)
