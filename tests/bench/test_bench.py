"""The benchmark: the values of all implementations, the numbers of bytes, and the files that the command writes."""

import gc
import io
import json
import multiprocessing
import re
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torchvision
from matplotlib.container import BarContainer

from tsm_jit import cli, reference
from tsm_jit.bench import network, operator, peers, report, streams, time_parallel, timing
from tsm_jit.bench.rows import Mismatch

CPU = torch.device("cpu")
SHAPE = operator.Shape(2, 8, 32, 3, 2, 4)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("depth", range(5))
def test_bytes_moved_are_those_of_what_is_read_and_written(depth, frames, adjoint):
    """Counted in the matrix of the shift along time, channel by channel."""
    shift = operator.Shape(1, frames, 32, 1, 1, 4).shift(depth)
    identity = torch.eye(frames).view(frames, 1, frames).expand(frames, 32, frames)
    oracle = reference.temporal_shift_backward if adjoint else reference.temporal_shift
    x = torch.zeros(frames, 32, dtype=torch.float64)
    out_of_place = in_place = 0
    for matrix in oracle(identity, shift).unbind(1):
        changed = matrix[(matrix != torch.eye(frames)).any(1)]
        out_of_place += matrix.any(0).sum().item() + frames
        in_place += changed.any(0).sum().item() + len(changed)
    assert peers.bytes_moved(x, shift, False, adjoint) == 8 * out_of_place
    assert peers.bytes_moved(x, shift, True, adjoint) == 8 * in_place


@pytest.mark.slow
def test_every_peer_is_checked_and_a_wrong_one_is_not_timed(monkeypatch, tmp_path, capsys):
    x = SHAPE.tensor(torch.float32, "NCHW", CPU)
    for depth in (0, 2):
        for operation, name, _, call in operator.operations(x.clone(), SHAPE.shift(depth), with_compiled=depth == 2):
            operator.check(operation, name, call, x, SHAPE.shift(depth))
    monkeypatch.setattr(peers, "split_cat", lambda x, shift: x * 1)
    assert cli.main(["bench", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "forward of split and cat differs from the reference" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_quick(tmp_path, capsys):
    assert cli.main(["bench", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err  # neither is a terminal, so there is no progress bar between the rows
    tables = [table.splitlines()[1:] for table in out.split("\n\n")[1:-1]]
    assert len(tables) == 4
    for heads, *rows in tables:  # two spaces separate columns, in the heads as in the rows
        assert {len(re.split(r" {2,}", row.strip())) for row in rows} == {len(re.split(r" {2,}", heads.strip()))}
        assert {len(row) for row in rows} == {len(heads)}
    results = json.loads((tmp_path / "bench.json").read_text())
    assert {"torch", "commit", "device", "kernels"} <= set(results["environment"])
    names = {row["who"] for row in results["peers"]}
    assert names == {"copy", "eager", "split and cat", "tsm_jit", "tsm_jit in place"}
    assert all(row["milliseconds"] > 0 for row in results["peers"])
    assert [row["mebibytes"] for row in results["sweep"]] == [0.0625, 0.25, 1, 4]
    assert all(row["forward in place"]["of_floor"] > 0 for row in results["floor"] + results["sweep"])
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "sweep.png", "peers.png"}


def test_networks(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="needs timm for a tiny network")
    small = [
        network.Case("timm/test_resnet", method, 1, training, False, 32)
        for method, training in (("TSM", True), ("TSAM", False))
    ]
    monkeypatch.setattr(network, "cases", lambda cuda, quick: small)
    monkeypatch.setattr(network, "family_cases", lambda cuda, quick, names: small[:1])
    assert cli.main(["bench", "--network", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "network.json").read_text())
    training = ["no shift", "stock", "drop-in", "fused"]
    assert [row["who"] for row in results["network"]] == [*training, *training, "folded"]
    assert [row["who"] for row in results["families"]] == FAMILY_VARIANTS
    assert all(row["milliseconds"] > 0 for row in results["network"] + results["families"])
    assert {path.name for path in tmp_path.iterdir()} == {"network.json", "network.png", "families.png"}


FAMILY_VARIANTS = ["no shift", "stock", "drop-in, out of place", "drop-in", "fused"]


@pytest.mark.slow
def test_networks_of_every_architecture(device, monkeypatch):
    """With shifts of frames and of tokens. A network is freed before the next one is built."""
    pytest.importorskip("timm", reason="needs timm for tiny networks")
    names = ["timm/test_resnet", "timm/test_vit"]
    selected = [case._replace(size=32) for case in network.family_cases(device.type == "cuda", True, names)]
    built: list[weakref.ref] = []

    def networks(*arguments):
        gc.collect()
        assert all(net() is None for net in built)
        nets = make(*arguments)
        built.extend(map(weakref.ref, nets.values()))
        return nets

    make = network.networks
    monkeypatch.setattr(network, "networks", networks)
    measured = [row for rows in network.rows(device, selected, 2, network.EVERY_FAMILY) for row in rows]
    modes = [(True, False), (True, True), (False, True)] if device.type == "cuda" else [(True, False), (False, False)]
    expected = [
        (name, *mode, who)
        for name, variants in zip(names, (FAMILY_VARIANTS, FAMILY_VARIANTS[:-1]), strict=True)
        for mode in modes
        for who in variants
    ]
    assert [(row["network"], row["training"], row["graph"], row["who"]) for row in measured] == expected
    assert all(row["milliseconds"] > 0 for row in measured)
    assert {row["peak_mebibytes"] is None for row in measured} == {device.type == "cpu"}
    assert not torch.backends.cudnn.benchmark


def invented_rows(device, selected, repeats, protocol):
    """Yields rows as network.rows does, with another time for each mode of a case."""
    for case in selected:
        milliseconds = 1.0 if not case.training else 4.0 if case.graph else 2.0
        numbers = {"milliseconds": milliseconds, "of_no_shift": milliseconds / 8}
        numbers |= {"peak_mebibytes": 9.0, "of_no_shift_memory": 1.25}
        names = ["no shift", "stock", "fused"] if case.network == "resnet18" else ["no shift", "stock"]
        yield [{**case._asdict(), "who": who, **numbers} for who in names]


def test_the_table_of_architectures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(network, "rows", invented_rows)
    monkeypatch.setitem(sys.modules, "timm", None)  # it is not installed
    options = ["--families", "timm/regnety_008,mobilenet_v2,resnet18", "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main(["bench", *options]) == 0
    assert "timm/regnety_008 is skipped: it needs timm" in capsys.readouterr().err
    results = json.loads((tmp_path / "families.json").read_text())
    assert {row["network"] for row in results["families"]} == {"mobilenet_v2", "resnet18"}
    assert {path.name for path in tmp_path.iterdir()} == {"families.json", "families.png"}
    cases = network.family_cases(True, False, ["mobilenet_v2", "resnet18"])  # as on a GPU
    results["environment"]["driver"] = "1"
    results["families"] = [row for rows in invented_rows(CPU, cases, 50, network.EVERY_FAMILY) for row in rows]
    (path := tmp_path / "gpu.json").write_text(json.dumps(results))
    assert cli.main(["bench", "--report", str(path)]) == 0
    table, no_shift, shift = capsys.readouterr().out, "2.0 ms / 4.0 ms / 1.0 ms / 9 MiB", "0.25 / 0.50 / 0.12 / 1.25"
    assert "24 clips" in table
    assert f"| mobilenet_v2 | {no_shift} | {shift} | - |" in table
    assert f"| resnet18 | {no_shift} | {shift} | {shift} |" in table


@pytest.mark.parametrize("names", ["", "resnet", "resnet18,", "vit_small_patch16_224"])
def test_wrong_families(names, capsys):
    assert cli.main(["bench", "--families", names]) == 2
    assert f"--families {names}: a network must be one of resnet18, " in capsys.readouterr().err


@pytest.mark.parametrize("training", [False, True])
def test_a_network_that_computes_something_else_is_not_timed(training):
    case = network.Case("resnet18", "TSM", 1, training, False, 32)
    nets = network.networks(case, CPU)
    network.check(nets, case, CPU)
    nets["fused"].layer3[1].conv1.fold_div = 4
    with pytest.raises(Mismatch, match=r"fused: .* does not have the outputs and gradients of stock"):
        network.check(nets, case, CPU)


def test_a_shape_of_the_command_line_and_the_progress_bar_of_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    options = ["--quick", "--device", "cpu", "--output", str(tmp_path), "--shape", "1,4,16,2,2"]
    assert cli.main(["bench", *options]) == 0
    assert {row["shape"] for row in json.loads((tmp_path / "bench.json").read_text())["peers"]} == {
        "(1, 4, 16, 2, 2)/8"
    }
    assert re.search(r" 6/7 \[\d+:\d+<\d+:\d+", terminal.getvalue())  # measurements, time so far, time to come
    assert "(1, 4, 16, 2, 2)/8" not in terminal.getvalue()
    assert "\r" not in capsys.readouterr().out


@pytest.mark.parametrize("largest", [2**16, 2**22, 2**28, 2**33, 2**33 + 1, 2**34 - 1])
def test_the_sweep_ends_at_the_largest_power_of_two(largest):
    sizes = [4 * s.batch * s.frames * s.channels * s.height * s.width for s in operator.sweep(largest)]
    assert sizes[0] == 2**16
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= largest < 2 * sizes[-1]


RESULTS = Path(__file__).parents[2] / "examples" / "results"


def test_the_picture_of_streams_has_every_value():
    results = json.loads((RESULTS / "h200" / "streams.json").read_text())
    rows = results["online"]
    columns = ("median_milliseconds", "latency_frames", "state_mebibytes", "peak_mebibytes")
    names = list(dict.fromkeys(row["who"] for row in rows))
    for axis, column in zip(report.draw_streams(rows, results["environment"]).axes, columns, strict=True):
        bars = {each.get_label(): each for each in axis.containers if isinstance(each, BarContainer)}
        drawn = {
            (streams, names[int(bar.get_y())]): bar.get_width()
            for streams, label in ((1, "1 stream"), (8, "8 streams"))
            for bar in bars[label]
        }
        assert drawn == {(row["streams"], row["who"]): row[column] for row in rows if row[column] is not None}


def test_report_of_an_earlier_run(tmp_path, capsys):
    path = shutil.copy(RESULTS / "h100" / "bench.json", tmp_path)
    assert cli.main(["bench", "--report", str(path)]) == 0
    assert "| (8, 8, 256, 56, 56)/8 |" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"bench.json", "sweep.png", "peers.png"}
    for other in ("{}", "[]", "no JSON", '{"environment": {"driver": null}}'):
        Path(path).write_text(other)
        assert cli.main(["bench", "--report", str(path)]) == 2
        assert f"--report {path}: not the JSON of a full run on a GPU" in capsys.readouterr().err


def test_processes_end_with_the_benchmark():
    before = set(multiprocessing.active_children())
    rows = time_parallel.rows(CPU, [1, 2], time_parallel.QUICK)
    next(rows)
    assert set(multiprocessing.active_children()) > before
    rows.close()
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("other", [["--time-parallel"], ["--network"], ["--streams"], ["--families", "resnet18"]])
def test_a_shape_for_another_benchmark(other, capsys):
    assert cli.main(["bench", "--shape", "1,4,16,2,2", *other]) == 2
    assert "--shape: only the benchmark of the operator takes it" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert cli.main(["bench", "--device", "cpu", "--output", str(path)]) == 2
        assert f"--output {path}: " in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["", "1,2,3", "1,8,16,2,2,4,4", "1,8,x,2,2", "1,8,16,0,2", "1,8,16,2,2,1"])
def test_wrong_shapes(shape, capsys):
    assert cli.main(["bench", "--shape", shape]) == 2
    assert "a shape must be B,T,C,H,W or B,T,C,H,W,DIV" in capsys.readouterr().err


def test_streams(device):
    """Every way is timed for 1 stream and for 8, once its scores are right."""

    def make():
        return torchvision.models.resnet18(num_classes=3)

    measured = [row for rows in streams.rows(device, 2, make=make, size=32) for row in rows]
    streaming = [f"{name}{graph}" for name in ("online", "both directions") for graph in ("", ", CUDA graph")]
    streaming = [name for name in streaming if device.type == "cuda" or not name.endswith("graph")]
    names = ["without shift", *streaming, "the last 8 frames again"]
    assert [(row["streams"], row["who"]) for row in measured] == [(s, name) for s in (1, 8) for name in names]
    assert all(0 < row["median_milliseconds"] <= row["p99_milliseconds"] for row in measured)
    state = {row["who"]: row["state_mebibytes"] for row in measured if row["streams"] == 1}
    assert [name for name, size in state.items() if size is not None] == streaming
    assert 0 < state["online"] < state["both directions"]
    assert {(row["latency_frames"], row["who"].startswith("both")) for row in measured} == {(0, False), (8, True)}

    def make_noisy():
        net = make()
        net.fc.register_forward_hook(lambda module, inputs, scores: scores + torch.randn_like(scores))
        return net

    with pytest.raises(Mismatch, match="online: 1 streams do not have the scores of their videos"):
        list(streams.rows(CPU, 2, make=make_noisy, size=32))


def test_streams_of_the_command_line(tmp_path, monkeypatch, capsys):
    row = {"streams": 1, "who": "both directions", "median_milliseconds": 1.5, "p99_milliseconds": 2.0}
    row |= {"latency_frames": 16, "state_mebibytes": 25.0, "peak_mebibytes": None}
    monkeypatch.setattr(streams, "rows", lambda device, frames, counts: ([row | {"streams": n}] for n in counts))
    assert cli.main(["bench", "--streams", "--device", "cpu", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "streams.json").read_text())
    assert [each["streams"] for each in results["online"]] == [1, 8]
    assert {file.name for file in tmp_path.iterdir()} == {"streams.json", "streams.png"}
    results["environment"]["driver"] = "1"  # as on a GPU
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(results))
    capsys.readouterr()
    assert cli.main(["bench", "--report", str(path)]) == 0
    cells = "1.50 | 2.00 | 25.00 | -"
    assert f"| both directions | 16 | {cells} | {cells} |" in capsys.readouterr().out


@pytest.mark.parametrize("layout", operator.LAYOUTS)
@pytest.mark.parametrize("depth", [0, 3])
def test_a_row_of_the_floor(device, depth, layout):
    row = operator.floor_row(operator.Shape(1, 8, 32, 16, 16), torch.bfloat16, layout, depth, device)
    for operation in ("forward", "backward", "forward in place", "backward in place"):
        assert row[operation]["microseconds"] > 0
        assert row[operation]["of_floor"] > 0


@pytest.mark.slow
def test_time_parallel(tmp_path, capsys):
    assert cli.main(["bench", "--time-parallel", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "time_parallel.json").read_text())["time_parallel"]
    assert [(row["ranks"], row["training"], row["graph"]) for row in rows] == [
        (ranks, training, False) for ranks in (1, 2) for training in (False, True)
    ]
    for one, two in zip(rows[:2], rows[2:], strict=True):
        assert one["efficiency"] == 1
        assert two["efficiency"] == pytest.approx(one["milliseconds"] / two["milliseconds"] / 2)
    assert {path.name for path in tmp_path.iterdir()} == {"time_parallel.json", "time_parallel.png"}
    results = {"environment": {"driver": "1", "device": "GPU", "torch": "2", "commit": "0"}, "time_parallel": rows}
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert cli.main(["bench", "--report", str(tmp_path / "gpu.json")]) == 0
    assert re.search(r"\| training, eager \| [\d.]+ \| [\d.]+ \([\d.]+%\) \|", capsys.readouterr().out)


def test_memory_is_measured(device):
    peak = timing.peak_memory(device)
    held = torch.ones(64 * 2**20, dtype=torch.uint8, device=device)
    del held
    measured = peak()
    if measured is None:
        pytest.skip("this system does not report peak memory")
    assert measured >= 48 * 2**20  # less than 64, as the system may take memory back during the measurement
