"""Graphs of other tools: torch.fx, exported programs, ONNX, streams before their first frame."""

import copy
import io

import pytest
import torch
import torchvision
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

import tsm_jit
from tsm_jit.fused import execute


def short_resnet() -> nn.Module:
    return torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3).eval()


def resnet(**options) -> nn.Module:
    net = short_resnet()
    tsm_jit.make_temporal_shift(net, 4, **options)
    return net


def pooled() -> nn.Module:
    net = short_resnet()
    tsm_jit.make_temporal_pool(net, 4)
    tsm_jit.make_temporal_shift(net, 4, temporal_pool=True)
    return net


def fused() -> nn.Module:
    net = resnet()
    tsm_jit.residual.fuse(net)
    return net


def tsam() -> nn.Module:
    net = short_resnet()
    tsm_jit.tsam.make_Shift(net, 4, 3, 8, 2, 1, 0)
    return net


NETWORKS = {
    "out of place": resnet,
    "in place": lambda: resnet(inplace=True),
    "before blocks": lambda: resnet(place="block"),
    "pooled": pooled,
    "non-local": lambda: resnet(non_local="dot_product"),
    "fused": fused,
    "TSAM": tsam,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fx_traces(name):
    net = NETWORKS[name]()
    x = torch.randn(8, 3, 32, 32)
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-5, atol=1e-5)
    traced.recompile()
    compile(traced.code, "traced", "exec")


def test_fx_traces_clips_and_tokens():
    model = tsm_jit.VideoModel(resnet()).eval()
    clips = torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(clips), model(clips))
    tokens = tsm_jit.TokenShift(nn.Linear(8, 4), 4)
    x = torch.randn(8, 5, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(tokens)(x), tokens(x), rtol=0, atol=0)


def test_the_functions_are_leaves_of_an_fx_graph():
    def both(x):
        return tsm_jit.shift_groups(tsm_jit.temporal_shift(x, 4), 4, [(2, 1)], padding="keep")

    traced = torch.fx.symbolic_trace(both)
    assert {node.target for node in traced.graph.nodes} >= {tsm_jit.temporal_shift, tsm_jit.shift_groups}
    x = torch.randn(8, 16)
    torch.testing.assert_close(traced(x), both(x), rtol=0, atol=0)


def test_products_are_leaves_of_an_fx_graph():
    """With weights of the module and weights that are inputs."""

    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 6, 1)

        def forward(self, x, weight):
            y = tsm_jit.shift_conv1x1(x, self.conv.weight, self.conv.bias, 4, [(2, 1)], stride=2, padding="keep")
            tokens = x.flatten(2).transpose(1, 2)
            return y, tsm_jit.shift_linear(tokens, weight, None, 4, [(3, -1)], num_prefix_tokens=1)

    net, x, weight = Products(), torch.randn(8, 16, 5, 3), torch.randn(6, 16)
    traced = torch.fx.symbolic_trace(net)
    assert {node.target for node in traced.graph.nodes} >= {tsm_jit.shift_conv1x1, tsm_jit.shift_linear}
    for actual, expected in zip(traced(x, weight), net(x, weight), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_feature_extractors():
    net = resnet()
    x = torch.randn(8, 3, 32, 32)
    features = create_feature_extractor(net, ["layer2"])(x)["layer2"]
    stages = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
    torch.testing.assert_close(features, stages(x), rtol=0, atol=0)


def own_operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if "tsm_jit" in str(node.target)}


@pytest.mark.parametrize("padding", ["zeros", "keep", "replicate", "circular"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_programs_decompose_to_aten(padding, dynamic):
    class Shift(nn.Module):
        def forward(self, x):
            return tsm_jit.shift_groups(x, 4, [(3, 1), (2, -2)], padding=padding, n_segment_shifted=3)

    x = torch.randn(8, 7, 2, 3)
    shapes = ({0: 4 * Dim("clips", min=2, max=9)},) if dynamic else None
    program = export(Shift(), (x,), dynamic_shapes=shapes)
    decomposed = program.run_decompositions()
    assert own_operators(program.graph)
    assert not own_operators(decomposed.graph)
    for clips in (2, 5) if dynamic else (2,):
        x = torch.randn(4 * clips, 7, 2, 3)
        torch.testing.assert_close(decomposed.module()(x), Shift()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["pooled", "fused"])
def test_exported_networks_decompose_to_aten(name):
    net = NETWORKS[name]()
    x = torch.randn(8, 3, 32, 32)
    decomposed = export(net, (x,)).run_decompositions()
    assert not own_operators(decomposed.graph)
    torch.testing.assert_close(decomposed.module()(x), net(x), rtol=1e-5, atol=1e-5)


def test_an_operator_without_a_decomposition_stays():
    x = torch.randn(8, 7)
    program = export(tsm_jit.TemporalShift(nn.Identity(), 4), (x,))
    table = torch.export.default_decompositions()
    del table[torch.ops.tsm_jit.temporal_shift.exported]
    for each in ({}, table):
        assert own_operators(program.run_decompositions(each).graph) == {"tsm_jit.temporal_shift.exported"}


def test_compilers_of_exported_programs_use_the_kernels():
    x = torch.randn(8, 7, requires_grad=True)
    module = export(tsm_jit.TemporalShift(nn.Identity(), 4, 2), (x,)).module()
    operators = []

    def compiler(graph, inputs):
        operators.append(own_operators(graph.graph))
        return graph

    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler))
    weight = torch.randn(8, 7)
    (grad,) = torch.autograd.grad((compiled(x) * weight).sum(), x)
    assert operators == [{"tsm_jit.temporal_shift.kernel"}, {"tsm_jit.temporal_shift_backward.kernel"}]
    expected = torch.autograd.grad((tsm_jit.temporal_shift(x, 4, 2) * weight).sum(), x)[0]
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def test_onnx_of_an_exported_program():
    onnxruntime = pytest.importorskip("onnxruntime")
    net = resnet(inplace=True)
    x = torch.randn(8, 3, 32, 32)
    program = torch.onnx.export(export(net, (x,)), (), dynamo=True)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (scores,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), net(x), rtol=1e-4, atol=1e-4)


def test_pooled_networks_before_their_first_call():
    net, x = pooled(), torch.randn(8, 3, 32, 32)
    graph = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-5)


def small() -> tuple[nn.Module, torch.Tensor]:
    shift = tsm_jit.TemporalShift(nn.Conv2d(16, 8, 3, padding=1), 4, inplace=True)
    pool = tsm_jit.TemporalPool(nn.ReLU(), 4)
    return nn.Sequential(shift, pool, nn.AdaptiveAvgPool2d(1)).eval(), torch.randn(8, 16, 5, 7)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_traces_of_operators(mode):
    net, x = small()
    for grads in (torch.enable_grad(), torch.no_grad()):
        with grads:
            traced = make_fx(net, tracing_mode=mode, _allow_non_fake_inputs=mode != "real")(x)
            torch.testing.assert_close(traced(2 * x), net(2 * x), rtol=1e-5, atol=1e-5)


def test_openvino_runs_exported_programs():
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    net, x = small()
    model = openvino.Core().compile_model(
        openvino.convert_model(export(net, (x,))), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    torch.testing.assert_close(torch.from_numpy(model(x.numpy())[0]), net(x), rtol=1e-4, atol=1e-5)


def test_executorch_runs_exported_programs():
    exir = pytest.importorskip("executorch.exir", reason="needs executorch")
    runtime = pytest.importorskip("executorch.runtime", reason="needs executorch").Runtime.get()
    net, x = small()
    program = exir.to_edge(export(net, (x,))).to_executorch()
    (y,) = runtime.load_program(program.buffer).load_method("forward").execute([x])
    torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("pool", [False, True])
def test_onnx_by_tracing(opset, pool):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, file = pooled() if pool else resnet(inplace=True), io.BytesIO()
    x = torch.randn(8, 3, 32, 32)
    axes = {"x": {0: "frames"}}
    torch.onnx.export(net, (x,), file, opset_version=opset, dynamo=False, input_names=["x"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    x = torch.randn(12, 3, 32, 32)
    (scores,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), net(x), rtol=1e-4, atol=1e-4)


class Step(nn.Module):
    """A stream with explicit state."""

    def __init__(self, stream: nn.Module):
        super().__init__()
        self.stream = stream

    def forward(self, frame, *state):
        scores, new = self.stream(frame, list(state))
        return (scores, *new)


@pytest.mark.parametrize("direction", ["past", "both"])
@pytest.mark.parametrize("tracer", ["jit.trace", "export"])
def test_streams_before_their_first_frame(tracer, direction):
    stream = tsm_jit.online.convert(resnet(direction=direction))
    assert not hasattr(stream, "state")
    frame = torch.randn(1, 3, 32, 32)
    step, inputs = Step(stream).eval(), (frame, *stream.initial_state(frame))
    graph = torch.jit.trace(step, inputs) if tracer == "jit.trace" else export(step, inputs).module()
    for _ in range(3):  # frames, each with the state of the one before
        inputs = (torch.randn_like(frame), *inputs[1:])
        outputs = step(*inputs)
        for ours, expected in zip(graph(*inputs), outputs, strict=True):
            torch.testing.assert_close(ours, expected)
        inputs = (frame, *outputs[1:])
    with pytest.raises(ValueError, match="state must not be read before the first frame"):
        stream.state  # noqa: B018


@pytest.mark.parametrize("inplace", [False, True])
def test_batched_gradients(device, inplace):
    shift = tsm_jit.TemporalShift(nn.Conv2d(16, 4, 1), 8, inplace=inplace).to(device)
    x = torch.randn(8, 16, 4, 4, device=device, requires_grad=True)
    y = shift(x)
    grads = torch.randn(3, *y.shape, device=device)
    (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for ours, grad in zip(batched, grads, strict=True):
        torch.testing.assert_close(ours, torch.autograd.grad(y, x, grad, retain_graph=True)[0])


@pytest.mark.parametrize("sums", [False, True], ids=["as on the CPU", "as on a GPU"])
def test_batched_gradients_of_fused_networks_raise(sums, monkeypatch):
    monkeypatch.setattr(execute, "has_channel_sums", lambda x: sums and x.shape[1] > 1)
    net = fused().train().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = net(x)
    with pytest.raises(RuntimeError, match="is_grads_batched must be False"):
        torch.autograd.grad(y, x, torch.randn(2, *y.shape), is_grads_batched=True)


def test_a_network_that_should_pool_and_does_not_is_an_error():
    net = short_resnet()
    tsm_jit.make_temporal_shift(net, 8, temporal_pool=True)
    x = torch.randn(16, 3, 32, 32)
    with pytest.raises(ValueError, match="make_temporal_pool"):
        copy.deepcopy(net)(x)
    tsm_jit.make_temporal_pool(net, 8)
    assert net(x).shape == (8, 3)
    assert not net._forward_pre_hooks
    other = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(other, 8, temporal_pool=True)
    tsm_jit.remove_temporal_shift(other)
    assert not other._forward_pre_hooks


def calls_shift_groups(x):
    return tsm_jit.shift_groups(x, 4, [(1, 1)])


SCRIPTED = {
    **NETWORKS,
    "tokens": lambda: tsm_jit.TokenShift(nn.Linear(8, 8), 4),
    "clips": lambda: tsm_jit.VideoModel(nn.Conv2d(3, 3, 1)),
    "stream": lambda: tsm_jit.online.convert(resnet(direction="past")),
    "a function": lambda: tsm_jit.temporal_shift,
    "a function that calls it": lambda: calls_shift_groups,
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripting_raises(name):
    with pytest.raises(NotImplementedError, match=r"torch.jit.script does not support .* use torch.jit.trace"):
        torch.jit.script(SCRIPTED[name]())
