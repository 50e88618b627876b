"""Graphs that leave Python: torch.export, AOTInductor, ONNX, TorchScript; each run on batches of other sizes."""

import io
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from support import assert_same_bits
from torchvision.models.resnet import BasicBlock

import tsm_jit
from tsm_jit.plans import PADDINGS

CLIP = 4


class Net(torch.nn.Module):
    """Shifts of every padding, in place and not, and no arithmetic besides."""

    def __init__(self, inplace=False):
        super().__init__()
        self.shift = tsm_jit.TemporalShift(torch.nn.Identity(), CLIP, 4, inplace=inplace)

    def forward(self, x):
        for padding in PADDINGS:
            x = tsm_jit.shift_groups(x, CLIP, [(2, 1), (3, -2), (1, -9)], padding=padding, n_segment_shifted=3)
        return self.shift(x)


class Plain(torch.nn.Module):
    def forward(self, x):
        return x * 2


def clips(n: int, device) -> torch.Tensor:
    return torch.randn(n * CLIP, 8, 5, 3, device=device)


def exported(net, device) -> torch.export.ExportedProgram:
    batch = CLIP * torch.export.Dim("clips", min=1, max=64)
    return torch.export.export(net, (clips(2, device),), dynamic_shapes={"x": {0: batch}})


@pytest.mark.feature("`torch.export`, AOTInductor")
@pytest.mark.parametrize("inplace", [False, True])
def test_export(device, inplace):
    """The exported program holds the operator, for any number of clips."""
    net = Net(inplace).to(device)
    program = exported(net, device)
    assert torch.ops.tsm_jit.temporal_shift.exported in {node.target for node in program.graph.nodes}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    for n in (1, 2, 5):
        x = clips(n, device)
        assert_same_bits(program.module()(x), net(x))


def compiled_ahead_of_time(net: str, device, folder) -> subprocess.CompletedProcess:
    """In a separate process: with some C++ compilers, the package crashes the process that loads it."""
    code = f"""
import torch
from support import assert_same_bits
from test_export import Net, Plain, clips, exported
net = {net}.to("{device}")
package = torch._inductor.aoti_compile_and_package(exported(net, "{device}"), package_path="net.pt2")
compiled = torch._inductor.aoti_load_package(package)
for n in (1, 2, 5):
    x = clips(n, "{device}")
    assert_same_bits(compiled(x), net(x))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_channels_are_no_variable_of_an_exported_program():
    """The folds are counted in them: for another number a program refuses to run."""
    dynamic = {"x": {1: 8 * torch.export.Dim("folds", min=1, max=64)}}

    class Shift(torch.nn.Module):
        def forward(self, x):
            return tsm_jit.temporal_shift(x, CLIP)

    x = torch.randn(8, 16, 3, 3)
    for strict in (False, True):
        program = torch.export.export(Shift(), (x,), dynamic_shapes=dynamic, strict=strict).module()
        assert_same_bits(program(x), tsm_jit.temporal_shift(x, CLIP))
        with pytest.raises((RuntimeError, AssertionError)):
            program(torch.randn(8, 24, 3, 3))


def test_a_trace_without_channels():
    traced = torch.jit.trace(lambda x: tsm_jit.temporal_shift(x, CLIP), torch.zeros(8, 0, 3))
    assert traced(torch.zeros(4, 0, 3)).shape == (4, 0, 3)


@pytest.mark.feature("`torch.export`, AOTInductor")
def test_aot_inductor(device, tmp_path):
    run = compiled_ahead_of_time("Net()", device, tmp_path)
    if run.returncode < 0 and compiled_ahead_of_time("Plain()", device, tmp_path).returncode < 0:
        pytest.skip("what AOTInductor compiles here crashes, whatever it is")
    assert run.returncode == 0, run.stderr


@pytest.mark.feature("TorchScript trace")
@pytest.mark.parametrize("inplace", [False, True])
def test_trace(device, inplace, tmp_path):
    """A trace runs without tsm_jit, and keeps channels_last."""
    net = Net(inplace).to(device)
    traced = torch.jit.trace(net, clips(2, device).to(memory_format=torch.channels_last))
    traced.save(str(tmp_path / "net.pt"))
    inputs = [clips(n, device) for n in (1, 2, 5)]
    torch.save(([x.cpu() for x in inputs], [net(x).cpu() for x in inputs]), tmp_path / "data.pt")
    code = f"""
import sys, torch
net = torch.jit.load("net.pt", map_location="{device.type}")
inputs, expected = torch.load("data.pt")
for x, y in zip(inputs, expected):
    x = x.to("{device.type}").to(memory_format=torch.channels_last)
    out = net(x)
    assert torch.equal(out.cpu(), y)
    assert out.is_contiguous(memory_format=torch.channels_last)
assert "tsm_jit" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_gradients_of_a_trace(device):
    net = Net().to(device)
    traced = torch.jit.trace(net, clips(2, device))
    weight, grads = clips(3, device), []
    x = clips(3, device)
    for run in (net, traced):
        leaf = x.clone().requires_grad_()
        (run(leaf) * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)  # replicate: sums in another order


def resnet(inplace: bool) -> torch.nn.Module:
    net = torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=7)
    tsm_jit.make_temporal_shift(net, CLIP, inplace=inplace)
    return net.eval()


@pytest.mark.feature("ONNX, opset 17 and up")
@pytest.mark.parametrize("exporter", ["dynamo, opset 18", "TorchScript, opset 17"])
@pytest.mark.parametrize("inplace", [False, True])
def test_onnx_of_a_resnet(device, inplace, exporter):
    onnx = pytest.importorskip("onnx", reason="needs onnx, onnxscript and onnxruntime: pip install 'tsm-jit[test]'")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net = resnet(inplace).to(device)
    example, file = torch.randn(2 * CLIP, 3, 64, 64, device=device), io.BytesIO()
    if exporter.startswith("dynamo"):
        batch = CLIP * torch.export.Dim("clips", min=1, max=64)
        torch.onnx.export(
            net, (example,), file, input_names=["x"], dynamic_shapes={"x": {0: batch}}, dynamo=True, opset_version=18
        )
    else:
        torch.onnx.export(
            net, (example,), file, input_names=["x"], dynamic_axes={"x": {0: "frames"}}, dynamo=False, opset_version=17
        )
    model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    operators = {node.op_type for node in model.graph.node}
    assert {"Slice", "Pad", "Concat"} <= operators
    assert not operators & {"ScatterND", "ScatterElements", "Scatter", "Loop", "If", "Gather"}
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    net.cpu()
    for n in (1, 2, 3):
        x = torch.randn(n * CLIP, 3, 64, 64)
        (actual,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), net(x), rtol=1e-3, atol=1e-4)  # other convolutions


@pytest.mark.parametrize("padding", PADDINGS)
def test_onnx_of_every_padding(padding):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Shifts(torch.nn.Module):
        def forward(self, x):
            x = tsm_jit.temporal_shift(x, CLIP, 8, shift_depth=2, padding=padding, n_segment_shifted=3)
            return tsm_jit.shift_groups(x, CLIP, [(1, 2), (2, -9), (0, 1), (3, 0), (4, -1)], padding=padding)

    net, file = Shifts().eval(), io.BytesIO()
    batch = CLIP * torch.export.Dim("clips", min=1, max=64)
    torch.onnx.export(net, (torch.randn(8, 16, 5),), file, dynamic_shapes={"x": {0: batch}}, dynamo=True)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for n in (1, 3):
        x = torch.randn(n * CLIP, 16, 5)
        (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_same_bits(torch.from_numpy(actual), net(x))
