"""Files of checkpoints: the weights in them, and the errors of unusable files."""

import argparse
import pickle
import random
import sys
from collections import OrderedDict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from checkpoint_networks import SEGMENTS, TSAM, Around, ours, ours_tsam, tsm
from torch import nn

import tsm_jit
from tsm_jit import checkpoints


def test_files(tmp_path):
    weights, path = {"fc.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth"
    for saved in (weights, {"epoch": 3, "state_dict": weights, "best_prec1": 0.5}):
        torch.save(saved, path)
        assert torch.equal(checkpoints.load(path)["fc.weight"], weights["fc.weight"])
    path.write_bytes(pickle.dumps(weights)[:20])
    with pytest.raises(ValueError, match=r"path must be a file that torch.load"):
        checkpoints.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"path must be a file with a state dict, got .*: .* got list"):
        checkpoints.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "none")


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, tsm_jit.VideoModel])
def test_versions_of_modules(wrap, tmp_path):
    """``load_state_dict`` of MNASNet raises without its version; a batch normalisation accepts older files by its."""
    net = wrap(torchvision.models.mnasnet0_5(num_classes=5))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "weights.pth")
    weights = checkpoints.load(tmp_path / "weights.pth")
    net.load_state_dict(weights)
    mine = torchvision.models.mnasnet0_5(num_classes=5)
    tsm_jit.make_temporal_shift(mine, SEGMENTS)
    for target in (mine, tsm_jit.VideoModel(mine)):
        target.load_state_dict(checkpoints.convert(weights, target=target).state_dict)
    bare = torchvision.models.mnasnet0_5(num_classes=5)
    bare.load_state_dict(checkpoints.convert(weights, target="torchvision").state_dict)
    old = tsm().state_dict()
    for name in [name for name in old if name.endswith("num_batches_tracked")]:
        del old[name]
    for version in old._metadata.values():
        version.pop("version", None)
    ours().load_state_dict(checkpoints.convert(old, target=ours()).state_dict)


WEIGHTS, AVERAGED = {"fc.weight": torch.ones(2, 2)}, {"fc.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "saved",
    [
        *(
            {"epoch": 3, key: WEIGHTS}
            for key in (
                *("state_dict", "model", "model_state", "model_state_dict", "net", "network", "module", "weights"),
                *("params", "ema", "state_dict_ema", "model_ema", "anything"),
            )
        ),
        {"model": {"state_dict": WEIGHTS}, "best": torch.tensor(3.0)},
        {"model": {"epoch": 1, "net": WEIGHTS}},
        {"ema": {"decay": 0.99, "shadow": WEIGHTS}},
        {"ema": AVERAGED, "model": WEIGHTS},
        {"state_dict_ema": AVERAGED, "state_dict": WEIGHTS, "arch": "resnet18", "args": argparse.Namespace(lr=0.1)},
        {"ema_state_dict": AVERAGED, "message_hub": {}, "state_dict": WEIGHTS},
        {"params_ema": AVERAGED, "params": WEIGHTS},
        {"net": AVERAGED, "model": WEIGHTS},
        {"net": "resnet18", "model": "TSN", "state_dict": WEIGHTS},
        {"model": {"ema": AVERAGED, "module": WEIGHTS}},
        {"optimizer": {"state": {0: {"step": torch.tensor(1)}}, "param_groups": []}, "network": WEIGHTS},
    ],
    ids=lambda saved: " ".join(saved),
)
def test_entries_of_files(saved, tmp_path):
    torch.save(saved, tmp_path / "weights.pth")
    weights = checkpoints.load(tmp_path / "weights.pth")
    assert weights.keys() == WEIGHTS.keys()
    assert torch.equal(weights["fc.weight"], WEIGHTS["fc.weight"])


def test_a_file_of_tsam(tmp_path):
    """One state dict for each part of the network; the input has no weights."""
    theirs = TSAM()
    parts = {"nn_input": {}, "nn_backbone": theirs.nn_backbone.state_dict(), "last_fc": theirs.last_fc.state_dict()}
    torch.save({"data_state": {"epoch": 3}, "model_state": parts, "optimizer_state_dict": {}}, tmp_path / "tsam.tar")
    weights = checkpoints.load(tmp_path / "tsam.tar")
    assert weights.keys() == theirs.state_dict().keys()
    converted = checkpoints.convert(weights, target=ours_tsam())
    assert (converted.source, converted.unplaced, converted.missing) == ("tsam", {}, [])


def test_files_without_weights(tmp_path):
    path = tmp_path / "weights.pth"
    for saved, message in (
        ({}, "state_dict must hold weights, got none"),
        ({"epoch": 3}, "got int for 'epoch'"),
        ({"state_dict": WEIGHTS | {"decay": 0.9}}, "got float for 'decay'"),
        (WEIGHTS | {"more": AVERAGED}, "got dict for 'more'"),
        ({1: {2: WEIGHTS}}, "got dict for 1"),
        (torch.zeros(2), "got Tensor"),
    ):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=rf"path must be a file with a state dict, got .*: .*{message}"):
            checkpoints.load(path)


class Log:
    """As mmengine's HistoryBuffer: arrays, and functions by name."""

    def __init__(self):
        self.values, self.functions = np.arange(3.0), {"mean": Log.mean}

    def mean(self):
        return self.values.mean()


class Attack:
    def __reduce__(self):
        return exec, ("import tsm_jit; tsm_jit.attacked = True",)


OTHERS = {
    "numbers": {"best_prec1": np.float64(0.5), "history": np.arange(3)},
    "a log": {"message_hub": {"log_scalars": OrderedDict(loss=Log())}},
    "a path": {"cfg": {"folder": Path("runs"), "time": datetime.now()}},
    "a loss": {"criterion": nn.CrossEntropyLoss()},
    "a generator": {"random": random.Random()},
    "options": {"args": argparse.Namespace(lr=1, device=Path("x"))},
    "an attack": {"optimizer": Attack(), "meta": [Attack()]},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_objects_are_skipped(kind, tmp_path):
    """And nothing of them runs."""
    path, allowed = tmp_path / "weights.pth", set(torch.serialization.get_safe_globals())
    for key in ("state_dict", "model"):
        torch.save({**OTHERS[kind], key: WEIGHTS}, path)
        weights = checkpoints.load(path)
        assert weights.keys() == WEIGHTS.keys()
        assert torch.equal(weights["fc.weight"], WEIGHTS["fc.weight"])
    assert not hasattr(tsm_jit, "attacked")
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    "saved",
    [
        nn.Linear(2, 2),
        {"model": nn.Linear(2, 2), "epoch": 3},
        {"model": nn.Linear(2, 2), "ema": AVERAGED},  # other weights than those of the first key
        {"encoder": nn.Linear(2, 2), "decoder": WEIGHTS},
        {"model": {"fc.weight": np.zeros((2, 2))}},
        {"state_dict": WEIGHTS | {"fc.bias": np.zeros(2)}},
    ],
    ids=["network", "model", "model, ema", "encoder, decoder", "arrays", "an array"],
)
def test_weights_that_need_code(saved, tmp_path):
    torch.save(saved, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"contains .*, which could run code.* weights_only=False\) .*\.safe_globals\("
    ):
        checkpoints.load(tmp_path / "weights.pth")


def test_files_that_need_code(tmp_path):
    """What the caller allows is read."""
    path = tmp_path / "weights.pth"
    allowed = set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": WEIGHTS, "case": Around, "args": argparse.Namespace(lr=1)}, path)
    with torch.serialization.safe_globals([Around, argparse.Namespace]):
        assert checkpoints.load(path).keys() == WEIGHTS.keys()
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert set(torch.serialization.get_safe_globals()) == allowed
    for damaged in (b"", b"\x80", b"PK\x03\x04" + bytes(40), b"text", bytes(200)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path must be a file that torch.load"):
            checkpoints.load(path)


def test_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ImportError, match="is a safetensors file: pip install safetensors"):
            checkpoints.load(path)
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors: pip install safetensors")
    with pytest.raises(ValueError, match="path must be a file that safetensors reads, got "):
        checkpoints.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "none.safetensors")
    safetensors.save_file(WEIGHTS, path)
    assert torch.equal(checkpoints.load(str(path))["fc.weight"], WEIGHTS["fc.weight"])
