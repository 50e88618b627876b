"""Streams: frame by frame the values of the offline network; state, reset, export, graphs, refusals."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn

import tsm_jit
from tsm_jit import online

STREAMS, FRAMES = 3, 5


def offline_network(device="cpu", dtype=torch.float64, place="blockres", **options) -> nn.Module:
    net = torchvision.models.resnet18(num_classes=7)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):  # not the identity
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    tsm_jit.make_temporal_shift(net, FRAMES, place=place, direction="past", **options)
    return net.eval().to(device, dtype)


def clips(device="cpu", dtype=torch.float64) -> torch.Tensor:
    return torch.randn(STREAMS, FRAMES, 3, 32, 48, device=device, dtype=dtype)


def offline(net, x):
    with torch.no_grad():
        return net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def assert_close(actual, expected):
    """Convolutions of another batch size may add in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("place", ["block", "blockres"])
def test_equals_the_offline_network_frame_by_frame(place, inplace, layout):
    net, x = offline_network(place=place, inplace=inplace), clips()
    expected, keys = offline(net, x), list(net.state_dict())
    stream = online.convert(net)
    assert list(stream.net.state_dict()) == list(net.state_dict()) == keys
    with torch.no_grad():
        for _ in range(2):
            for t in range(FRAMES):
                assert_close(stream(x[:, t].contiguous(memory_format=layout)), expected[:, t])
            stream.reset()
    assert torch.equal(offline(net, x), expected)


def test_the_first_fold_of_each_shift_is_that_of_the_frame_before():
    """The formula, against hand-picked values: one shift, four channels, a fold of one."""
    stream = online.convert(tsm_jit.TemporalShift(nn.Identity(), 3, n_div=4, direction="past"))
    frames = torch.arange(12.0).view(3, 1, 4, 1, 1)
    seen = [stream(frame).flatten().tolist() for frame in frames]
    assert seen == [[0, 1, 2, 3], [0, 5, 6, 7], [4, 9, 10, 11]]
    assert stream.state[0].flatten().tolist() == [8]


def test_reset_of_some_streams():
    net, x = offline_network(), clips()
    stream = online.convert(net)
    with torch.no_grad():
        for t in range(2):
            stream(x[:, t])
        stream.reset(torch.tensor([True, False, True]))
        out = stream(x[:, 2])
    assert_close(out[1], offline(net, x)[1, 2])
    with tsm_jit.n_segment(net, FRAMES - 2):
        assert_close(out[::2], offline(net, x[::2, 2:])[:, 0])
    for mask in (torch.ones(2, dtype=torch.bool), torch.ones(STREAMS), torch.tensor(True)):
        with pytest.raises(
            ValueError, match=f"mask must be torch.bool with one value for each of {STREAMS} streams, got"
        ):
            stream.reset(mask)
    with pytest.raises(TypeError, match=r"mask must be a tensor .* got list"):
        stream.reset([True])


def test_state_passed_along_and_set():
    net, x = offline_network(), clips()
    expected, stream = offline(net, x), online.convert(net)
    with pytest.raises(ValueError, match="state must not be read before the first frame"):
        stream.state  # noqa: B018
    state = stream.initial_state(x[:, 0])
    assert all(not each.any() for each in state)
    with torch.no_grad():
        for t in range(3):
            out, state = stream(x[:, t], state)
            assert_close(out, expected[:, t])
        stream(x[:, 0])  # has a state of its own, which the calls above have not touched
        assert_close(stream(x[:, 1]), expected[:, 1])
        stream.state = state
        assert_close(stream(x[:, 3]), expected[:, 3])
        saved = [each.clone() for each in stream.state]
        stream(x[:, 4])
        stream.state = saved
        assert_close(stream(x[:, 4]), expected[:, 4])
    with pytest.raises(ValueError, match=r"state must hold 8 tensors, as initial_state\(\) does, got 2"):
        stream(x[:, 0], state[:2])
    with pytest.raises(ValueError, match=r"state must hold 8 tensors, as initial_state\(\) does, got 0"):
        stream.state = []
    for wrong in ([1] * 8, 5, x):
        with pytest.raises(TypeError, match="state must be a list of tensors, got"):
            stream(x[:, 0], wrong)


def test_gradients_through_time_with_a_state_of_ones_own():
    net, x = offline_network(), clips()
    stream, leaf = online.convert(net), clips().requires_grad_()
    out, state = stream(leaf[:, 0], stream.initial_state(x[:, 0]))
    out, state = stream(leaf[:, 1], state)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    again = leaf.detach().requires_grad_()
    (expected,) = torch.autograd.grad(net(again.flatten(0, 1)).unflatten(0, x.shape[:2])[:, 1].sum(), again)
    assert_close(grad, expected)
    assert grad[:, 0].any()
    stream(leaf[:, 0])
    assert not any(each.requires_grad for each in stream.state)


def test_copies_and_moves_keep_the_state():
    net, x = offline_network(), clips()
    stream = online.convert(net)
    with torch.no_grad():
        stream(x[:, 0])
        other = copy.deepcopy(stream)
        stream.reset()
        assert_close(other(x[:, 1]), offline(net, x)[:, 1])
        assert {each.dtype for each in other.float().state} == {torch.float32}


def test_frames_in_and_out_of_inference_mode():
    net, x = offline_network(), clips()
    expected, stream = offline(net, x), online.convert(net)
    for t, mode in enumerate((torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode)):
        with mode():
            assert_close(stream(x[:, t]), expected[:, t])
        with torch.inference_mode():
            stream.double().state = [each.clone() for each in stream.state]
    copy.deepcopy(stream)  # holds no graph of the frame that was recorded
    where = [each.data_ptr() for each in stream.state]
    for mask in (torch.ones(STREAMS, dtype=torch.bool), None):
        stream(x[:, 0])
        stream.reset(mask)
        assert not any(each.any() for each in stream.state)
    assert [each.data_ptr() for each in stream.state] == where


class Twice(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return self.shift(self.shift(x))


class Never(Twice):
    def forward(self, x):
        return x


def test_each_shift_is_called_once_a_frame():
    """In two places a module is two shifts; called twice in one place, or not at all, it cannot keep its state."""
    shift = tsm_jit.TemporalShift(nn.Identity(), FRAMES, 4, direction="past")
    nested = tsm_jit.TemporalShift(shift, FRAMES, 4, direction="past")
    x = torch.randn(FRAMES, 8, 2, 2)
    for model in (nn.Sequential(shift, nn.ReLU(), shift), nested):
        stream = online.convert(model)
        assert_close(torch.cat([stream(frame[None]) for frame in x]), model(x))
    with pytest.raises(ValueError, match="model must call each shift once per frame, got a second call at 'shift'"):
        online.convert(Twice(shift))(x)
    with pytest.raises(ValueError, match="model must call each shift once per frame, got no call at 'shift'"):
        online.convert(Never(shift))(x)
    with pytest.raises(ValueError, match=re.escape("frames must be [S, C, H, W], got [1, 5, 8, 2, 2] at ''")):
        online.convert(shift)(x[None])


def test_a_checkpointed_shift_is_an_error_and_no_wrong_gradient():
    class Checkpointed(Twice):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.shift, x, use_reentrant=False)

    shift = tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), FRAMES, 4, direction="past")
    stream, x = online.convert(Checkpointed(shift)), torch.randn(1, 8, 2, 2)
    out, _ = stream(x, stream.initial_state(x))
    with pytest.raises(RuntimeError, match="must be called by its OnlineNetwork, not again in backward"):
        out.sum().backward()


def test_frames_that_do_not_fit_the_state():
    x = clips()
    with torch.no_grad():
        expected = offline(stream_net := offline_network(), x)
        stream = online.convert(stream_net)
        stream(x[:, 0])
        message = (
            "frames must match the state in the number of streams, size and dtype, got values of [2, 8, 8, 12] "
            "torch.float64 at 'layer1.0.conv1', where the state is [3, 8, 8, 12] torch.float64: reset() starts new "
            "streams"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            stream(x[:2, 1])
        assert_close(stream(x[:, 1]), expected[:, 1])  # and the state is as it was
        stream.reset()
        assert_close(stream(x[:2, 0]), expected[:2, 0])


def test_networks_that_cannot_run_on_a_stream():
    pooled = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(pooled, 8, temporal_pool=True, direction="past")
    tsm_jit.make_temporal_pool(pooled, 8)
    for model, kind, message in (
        (pooled, ValueError, "got tsm_jit.modules.tsm.TemporalPool at 'layer2'"),
        (offline_network().train(), ValueError, "got BatchNorm2d at 'bn1' in training mode or without running_mean"),
        (torchvision.models.resnet18(), ValueError, "model must have temporal shifts, got ResNet"),
        (tsm_jit.VideoModel(offline_network()), ValueError, "got a VideoModel at '': convert its backbone"),
        (None, TypeError, "model must be a torch.nn.Module, got NoneType"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            online.convert(model)
    with pytest.raises(ValueError, match="direction must be one of"):
        tsm_jit.make_temporal_shift(torchvision.models.resnet18(), 8, direction="sideways")


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = offline_network(dtype=torch.float32), clips(dtype=torch.float32)
    stream = online.convert(net)
    state = stream.initial_state(x[:, 0])
    program = torch.onnx.export(stream, (x[:, 0], state), dynamo=True, verbose=False)
    program.save(tmp_path / "stream.onnx")
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "stream.onnx", providers=["CPUExecutionProvider"])
    names, expected = [each.name for each in session.get_inputs()], offline(net, x)
    values = [each.numpy() for each in state]
    for t in range(FRAMES):
        scores, *values = session.run(None, dict(zip(names, [x[:, t].numpy(), *values], strict=True)))
        # float32, and ONNX Runtime's own convolutions
        torch.testing.assert_close(torch.from_numpy(scores), expected[:, t], rtol=1e-3, atol=1e-4)


def test_cuda_graphs(cuda):
    """The state lies where it lay, so a captured frame goes on from the one before."""
    net, x = offline_network(cuda), clips(cuda)
    expected, stream, frame = offline(net, x), online.convert(net), clips(cuda)[:, 0]
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        stream(frame)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = stream(frame)
        stream.reset()
        for t in range(FRAMES):
            frame.copy_(x[:, t])
            graph.replay()
            assert_close(out, expected[:, t])
