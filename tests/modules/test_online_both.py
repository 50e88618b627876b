"""Streams of networks that read later frames: the values of the offline network on the whole video, with a delay."""

import copy
import pickle
import random
import re
from collections import Counter

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tsm_jit
from tsm_jit import online

STREAMS = 2


def with_statistics(net: nn.Module) -> nn.Module:
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):  # not the identity
        nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return net.eval().double()


def resnet(name="resnet18", **options) -> nn.Module:
    net = getattr(torchvision.models, name)(num_classes=7)
    tsm_jit.make_temporal_shift(net, 8, **options)
    return with_statistics(net)


def tsm_shift(layer: nn.Module) -> nn.Module:
    return tsm_jit.TemporalShift(layer, 8, n_div=4)


def past_shift(layer: nn.Module) -> nn.Module:
    return tsm_jit.TemporalShift(layer, 8, n_div=4, direction="past")


def tsam_shift(layer: nn.Module) -> nn.Module:
    return tsm_jit.tsam.TemporalShift(layer, 8, 8, f_div=2, shift_depth=2)


def small(*shifts) -> nn.Module:
    """Two residual blocks, by default with TSM's shift."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return torch.relu_(x + self.bn(self.conv1(x)))

    net = nn.Sequential(nn.Conv2d(3, 8, 1), Block(), Block(), nn.Flatten())
    for block, shift in zip(net[1:3], shifts or (tsm_shift, tsm_shift), strict=True):
        block.conv1 = shift(block.conv1)
    return with_statistics(net)


def videos(frames: int, streams=STREAMS, device="cpu", size=(24, 32)) -> torch.Tensor:
    return torch.randn(streams, frames, 3, *size, device=device, dtype=torch.float64)


def offline(net, x):
    with torch.no_grad(), tsm_jit.n_segment(net, x.shape[1]):
        return net(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def on_stream(stream, x):
    outputs = [stream(x[:, t]) for t in range(x.shape[1])]
    assert [out is None for out in outputs] == [t < stream.latency for t in range(x.shape[1])]
    return torch.stack([*outputs[stream.latency :], *stream.flush()], 1)


def assert_close(actual, expected):
    """Convolutions of another batch size may add in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize(("place", "direction"), [("blockres", "both"), ("block", "both"), ("block", "future")])
def test_equals_the_offline_network(place, direction):
    net = resnet(place=place, direction=direction, inplace=True)
    stream = online.convert(net)
    assert stream.latency == 8
    assert set(stream.net.state_dict()) == set(net.state_dict())
    with torch.no_grad():
        for frames in (10, 3, 1):  # more than the latency, fewer, one
            x = videos(frames)
            assert_close(on_stream(stream, x), offline(net, x))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_video_part_of_tsam(depth):
    net = torchvision.models.resnet18(num_classes=7)
    tsm_jit.tsam.make_Shift(net, 6, 5, f_div=4, shift_depth=depth, n_insert=2, m_insert=1)
    stream = online.convert(with_statistics(net))
    assert stream.latency == 4 * depth
    with torch.no_grad():
        for frames in (2 * depth + 1, 1):
            x, sound = videos(frames), videos(1)
            with tsm_jit.n_segment(net, frames + 1):
                scores = net(torch.cat([x, sound], 1).flatten(0, 1)).unflatten(0, (STREAMS, frames + 1))
            assert_close(on_stream(stream, x), scores[:, :-1])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_networks(layout):
    for net, latency in (
        (resnet("mobilenet_v2"), 10),
        (resnet("regnet_x_400mf", stages=[1, 3], n_div=4), 8),
        (small(past_shift, tsm_shift), 1),
        (small(tsam_shift, past_shift), 2),
        (small(tsm_shift, tsam_shift), 3),
    ):
        x, stream = videos(5), online.convert(net)
        assert stream.latency == latency
        expected = offline(net, x)
        with torch.inference_mode():
            outputs = [stream(x[:, t].contiguous(memory_format=layout)) for t in range(5)]
            assert_close(torch.stack([out for out in outputs if out is not None] + list(stream.flush()), 1), expected)


def test_one_shift_against_values_by_hand():
    """Channels: next, previous, own frame. Frame t has the values 10 t, 10 t + 1, 10 t + 2."""
    stream = online.convert(tsm_jit.TemporalShift(nn.Identity(), 3, n_div=3))
    frames = [torch.arange(3.0).view(1, 3, 1, 1) + 10 * t for t in range(3)]
    for _ in range(2):  # the second video does not see the first
        outputs = [stream(frame) for frame in frames]
        assert outputs[0] is None
        values = [out.flatten().tolist() for out in (*outputs[1:], *stream.flush())]
        assert values == [[10, 0, 2], [20, 1, 12], [0, 11, 22]]
    keep = online.convert(tsm_jit.tsam.TemporalShift(nn.Identity(), 3, 3, f_div=3, shift_depth=1))
    outputs = [keep(frame) for frame in frames]
    values = [out.flatten().tolist() for out in (*outputs[1:], *keep.flush())]
    assert values == [[10, 1, 2], [20, 1, 12], [20, 11, 22]]


def test_modules_in_two_places_and_nested_ones():
    shift = tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 5, 4).eval().double()
    for model in (nn.Sequential(shift, nn.ReLU(), shift).eval(), tsm_jit.TemporalShift(shift, 5, 4)):
        x = torch.randn(STREAMS, 5, 8, 2, 3, dtype=torch.float64)
        stream = online.convert(model)
        assert stream.latency == 2
        with torch.no_grad():
            assert_close(on_stream(stream, x), offline(model, x))


class Random(nn.Module):
    """Layers that read any earlier values, often the last one. Most of them shift."""

    def __init__(self, layers: int):
        super().__init__()
        shifts = [
            tsm_shift,
            *(random.choice([tsm_shift, past_shift, tsam_shift, nn.Sequential]) for _ in range(layers)),
        ]
        self.layers = nn.ModuleList([shift(nn.Conv2d(8, 8, 3, padding=1)) for shift in shifts])
        self.inputs = [[random.choice([i, random.randrange(i + 1)]) for _ in range(2)] for i in range(layers + 1)]

    def forward(self, x):
        values = [x]
        for layer, (first, second) in zip(self.layers, self.inputs, strict=True):
            values.append(values[first] - layer(values[second]))
        return {"last": values[-1], "other": values[len(values) // 2]}


def test_random_networks():
    for _ in range(6):
        net, frames = Random(random.randrange(8)).eval().double(), random.randrange(1, 9)
        x, stream = torch.randn(STREAMS, frames, 8, 3, 4, dtype=torch.float64), online.convert(net)
        with torch.no_grad(), tsm_jit.n_segment(net, frames):
            expected = net(x.flatten(0, 1))
            outputs = [out for out in (*map(stream, x.unbind(1)), *stream.flush()) if out is not None]
        for key, values in expected.items():
            assert_close(torch.stack([out[key] for out in outputs], 1), values.unflatten(0, (STREAMS, frames)))


class Convolutions(TorchDispatchMode):
    """Counts the convolutions and the frames that they compute."""

    def __init__(self):
        super().__init__()
        self.frames = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.frames[args[1].data_ptr()] += args[0].shape[0]
        return func(*args, **(kwargs or {}))


def test_each_frame_is_computed_once():
    net, x = resnet(), videos(3)
    stream = online.convert(net)
    with torch.no_grad():
        for frame in x.unbind(1):
            with Convolutions() as counted:
                stream(frame)
            assert len(counted.frames) == sum(isinstance(module, nn.Conv2d) for module in net.modules())
            assert set(counted.frames.values()) == {STREAMS}


def test_skip_branches_share_the_frames_that_wait():
    """The state is the input of each block, once, and a fold of it; the downsampling runs on the input that waits."""
    net, x = resnet(), videos(1)
    stream = online.convert(net)
    blocks = [block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]
    inputs: list[int] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].numel())) for block in blocks]
    offline(net, x)
    for hook in hooks:
        hook.remove()
    sizes = sorted(each.numel() for each in stream.initial_state(x[:, 0])[1:])
    assert sizes == sorted([*inputs, *(count // 8 for count in inputs)])


@pytest.mark.parametrize("shift", [tsm_shift, tsam_shift])
def test_reset_of_some_streams(shift):
    """Results of their earlier frames are dropped. Their rows are valid again after `latency` frames."""
    net, streams = small(shift, shift), 3
    stream, first, second = online.convert(net), 6, 7
    mask, old, new = torch.tensor([False, True, False]), videos(first, streams), videos(second, streams)
    x = torch.cat([old, new], 1)
    with torch.no_grad():
        outputs, valid = [], []
        for t in range(first + second):
            if t == first:
                stream.reset(mask)
            outputs.append(stream(x[:, t]))
            valid.append(stream.valid)
        for out in stream.flush():
            outputs.append(out)
            valid.append(stream.valid)
    outputs, valid = torch.stack(outputs[stream.latency :], 1), torch.stack(valid[stream.latency :], 1)
    assert_close(outputs[~mask], offline(net, x[~mask]))
    assert valid[~mask].all()
    dropped = range(first - stream.latency, first)
    assert valid[mask][0].tolist() == [t not in dropped for t in range(first + second)]
    assert_close(outputs[mask][:, first:], offline(net, new[mask]))
    assert_close(outputs[mask][:, : dropped.start], offline(net, old[mask])[:, : dropped.start])
    for wrong in (torch.ones(2, dtype=torch.bool), torch.ones(streams)):
        stream(x[:, 0])
        with pytest.raises(ValueError, match=f"mask must be torch.bool with one value for each of {streams} streams"):
            stream.reset(wrong)


def test_reset_of_all_streams():
    net, x = small(), videos(6)
    stream = online.convert(net)
    with pytest.raises(ValueError, match="valid must not be read before the first frame"):
        stream.valid  # noqa: B018
    with torch.no_grad():
        for t in range(4):
            stream(x[:, t])
        stream.reset()
        assert list(stream.flush()) == []
        other = videos(4, 3, size=(16, 24))
        assert_close(on_stream(stream, other), offline(net, other))


def test_a_flush_that_is_not_finished():
    net, x = small(), videos(5)
    stream = online.convert(net)
    with torch.no_grad():
        for t in range(4):
            stream(x[:, t])
        rest = stream.flush()
        next(rest)
        with pytest.raises(RuntimeError, match=r"flush\(\) must be iterated to its end, or reset\(\) called"):
            stream(x[:, 4])
        stream.reset()
        stream(x[:, 0])
        assert list(rest) == []  # and it does not reset the new streams
        assert_close(torch.stack([*map(stream, x[:, 1:].unbind(1))][1:], 1), offline(net, x)[:, :3])
        for _ in stream.flush():
            break  # resets
        assert_close(on_stream(stream, x), offline(net, x))


def test_state_passed_along_and_set():
    net, x = small(), videos(7)
    expected, stream = offline(net, x), online.convert(net)
    state = stream.initial_state(x[:, 0])
    assert all(not each.any() for each in state)
    outputs, valid = [], []
    with torch.no_grad():
        for t in range(7 + stream.latency):
            if t >= 7:
                state[0][:, 0] = True  # this frame does not exist
            before = [each.clone() for each in state]
            out, new = stream(x[:, min(t, 6)], state)
            assert all(map(torch.equal, state, before))
            outputs.append(out)
            state = new
            valid.append(state[0][:, stream.latency + 1])
        assert_close(torch.stack(outputs[stream.latency :], 1), expected)
        assert torch.stack(valid, 1).tolist() == [[False] * stream.latency + [True] * 7] * STREAMS
        for t in range(4):
            stream(x[:, t])
        saved = [each.clone() for each in stream.state]
        stream(x[:, 4])
        stream.state = saved
        rest = [stream(frame) for frame in x[:, 4:].unbind(1)]
        assert_close(torch.stack([*rest, *stream.flush()], 1), expected[:, 2:])
        stream.state = stream.initial_state(x[:, 0])
        assert_close(on_stream(stream, x), expected)
        other = online.convert(net)
        other.state = saved
        with pytest.raises(ValueError, match=r"flush\(\) must follow a frame"):
            list(other.flush())
        assert_close(other(x[:, 4]), expected[:, 2])


def test_gradients_through_time_with_a_state_of_ones_own():
    net, x = small(), videos(4)
    stream, leaf = online.convert(net), videos(4).requires_grad_()
    state = stream.initial_state(x[:, 0])
    for t in range(4):
        out, state = stream(leaf[:, t], state)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    again = leaf.detach().requires_grad_()
    with tsm_jit.n_segment(net, 4):
        scores = net(again.flatten(0, 1)).unflatten(0, (STREAMS, 4))[:, 1]
    (expected,) = torch.autograd.grad(scores.square().sum(), again)
    assert_close(grad, expected)
    stream(leaf[:, 0])
    assert not any(each.requires_grad for each in stream.state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(stream))])
def test_copies_keep_the_state(copied):
    net, x = resnet(stages=[2]), videos(5)
    stream = online.convert(net)
    with torch.inference_mode():
        for t in range(4):
            stream(x[:, t])
        other = copied(stream)
        stream.reset()
        assert_close(other(x[:, 4]), offline(net, x)[:, 2])


def test_state_stays_in_place_in_and_out_of_inference_mode():
    net, x = small(), videos(6)
    expected, stream, where = offline(net, x), online.convert(net), set()
    for t, mode in enumerate((torch.inference_mode, torch.no_grad, torch.enable_grad) * 2):
        with mode():
            out = stream(x[:, t])
        where.add(tuple(each.data_ptr() for each in stream.state))
        if t >= 2:
            assert_close(out, expected[:, t - 2])
    assert len(where) == 1


def test_the_host_reads_no_values():
    """Tensors on the meta device have none. So the device works on while the host prepares the next frame."""
    net, x = (
        small(tsm_shift, tsam_shift).to("meta"),
        torch.empty(STREAMS, 3, 24, 32, dtype=torch.float64, device="meta"),
    )
    stream, mask = online.convert(net), torch.empty(STREAMS, dtype=torch.bool, device="meta")
    for _ in range(5):
        stream(x)
        stream.reset(mask)
    assert len(list(stream.flush())) == stream.latency == 3
    stream(x, stream.initial_state(x))


class Joined(nn.Module):
    """A branch with a shift and one without, joined in a way that each test sets."""

    def __init__(self, join, mid=None):
        super().__init__()
        self.join, self.mid = join, mid
        self.first, self.skip = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True))
        self.conv = tsm_jit.TemporalShift(nn.Conv2d(8, 8, 3, padding=1), 8, 4)

    def forward(self, x, scale=None):
        x = self.first(x) if scale is None else x * scale
        out = self.conv(x)
        if self.mid is not None:
            self.mid(x)
        return self.join(self, x, out)


def in_place(x, y):
    x += y
    return x


JOINS = {
    "the skip branch is computed": lambda net, x, out: out + net.skip(x),
    "concatenation": lambda net, x, out: torch.cat([x, out, x[:, :1]], 1),
    "shape": lambda net, x, out: (out.flatten(1) - x.reshape(x.shape[0], -1)).view(x.size(0), x.shape[1], -1),
    "views": lambda net, x, out: torch.stack(x.chunk(2, 1)[::-1], 1).flatten(1, 2) * out,
    "in place on the branch": lambda net, x, out: in_place(out, x).relu_(),
    "a dictionary": lambda net, x, out: {"late": out, "early": x},
    "no skip branch": lambda net, x, out: torch.relu_(net.skip(out)),
    "the last layer reads the first frame again": lambda net, x, out: net.conv.net(out) + x.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", JOINS)
def test_joins_wait(name):
    net = with_statistics(Joined(JOINS[name]))
    stream, x = online.convert(net), videos(5)
    assert stream.latency == 1
    with torch.no_grad(), tsm_jit.n_segment(net, 5):
        expected = net(x.flatten(0, 1))
    with torch.inference_mode():
        outputs = [stream(x[:, t]) for t in range(5)][1:] + list(stream.flush())
    if not isinstance(expected, dict):
        expected, outputs = {"": expected}, [{"": out} for out in outputs]
    for key, values in expected.items():
        assert_close(torch.stack([out[key] for out in outputs], 1), values.unflatten(0, (STREAMS, 5)))


@pytest.mark.parametrize(
    ("join", "mid"),
    [(lambda net, x, out: in_place(x, out), None), (JOINS["concatenation"], lambda x: x[:, 2:].relu_())],
)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_changes_of_waiting_frames_raise(mode, join, mid):
    stream, x = online.convert(with_statistics(Joined(join, mid))), videos(1)
    message = "model must not change activations in place that later frames read, got a change of 'first'"
    with mode():
        for call in (stream, stream.initial_state):
            with pytest.raises(ValueError, match=message):
                call(x[:, 0])


def branch_on_values(net, x, out):
    return out if x.sum() > 0 else x


def in_autocast(net, x, out):
    with torch.autocast("cpu", torch.bfloat16):
        return out + net.skip(x)


def shift_by_a_function(net, x, out):
    return tsm_jit.temporal_shift(out, 8)


def shift_in_a_product(net, x, out):
    return tsm_jit.shift_conv1x1(out, net.conv.net.weight, None, 8, [(1, 1)])


def test_networks_that_cannot_run_on_a_stream():
    pooled = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(pooled, 8, temporal_pool=True)
    tsm_jit.make_temporal_pool(pooled, 8)
    non_local = torchvision.models.resnet18()
    tsm_jit.make_temporal_shift(non_local, 8, non_local="dot_product")
    batch_statistics = nn.Sequential(small(), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    twice = Joined(lambda net, x, out: net.conv(out)).eval()
    never = Joined(lambda net, x, out: x).eval()
    never.other = tsm_jit.TemporalShift(nn.Identity(), 8)
    for model, message in (
        (pooled, "since others need the whole clip, got tsm_jit.modules.tsm.TemporalPool at 'layer2'"),
        (non_local, "since others need the whole clip, got tsm_jit.modules.non_local.NL3DWrapper at 'layer2.0'"),
        (resnet().train(), "got BatchNorm2d at 'bn1' in training mode or without running_mean: call model.eval()"),
        (batch_statistics, "got BatchNorm2d at '1' in training mode or without running_mean"),
        (Joined(branch_on_values).eval(), "model must have a forward that torch.fx can trace"),
        (
            Joined(shift_by_a_function).eval(),
            "model must shift by modules such as TemporalShift, got a call of temporal_shift",
        ),
        (
            Joined(shift_in_a_product).eval(),
            "model must shift by modules such as TemporalShift, got a call of shift_conv1x1",
        ),
        (twice, "model must call each shift once per frame, got a second call at 'conv'"),
        (never, "model must call each shift once per frame, got no call at 'other'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            online.convert(model)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_compiled(mode):
    net, x = small(), videos(5)
    torch.compiler.reset()
    stream = online.convert(net)
    compiled = torch.compile(stream, backend="aot_eager")
    with mode():
        outputs = [compiled(frame) for frame in x.unbind(1)][stream.latency :] + list(stream.flush())
    assert_close(torch.stack(outputs, 1), offline(net, x))
    in_place = online.convert(with_statistics(Joined(JOINS["concatenation"], lambda x: x[:, 2:].relu_())))
    with mode(), pytest.raises(ValueError, match="model must not change activations in place"):
        torch.compile(in_place, backend="aot_eager")(x[:, 0])


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = small().float(), videos(5).float()
    stream = online.convert(net)
    state = stream.initial_state(x[:, 0])
    program = torch.onnx.export(stream, (x[:, 0], state), dynamo=True, verbose=False)
    program.save(tmp_path / "stream.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "stream.onnx", providers=["CPUExecutionProvider"])
    names, expected = [each.name for each in session.get_inputs()], offline(net, x)
    values, outputs = [each.numpy() for each in state], []
    for t in range(5 + stream.latency):
        values[0][:, 0] = t >= 5  # the frame does not exist
        out, *values = session.run(None, dict(zip(names, [x[:, min(t, 4)].numpy(), *values], strict=True)))
        outputs.append(torch.from_numpy(out))
    torch.testing.assert_close(torch.stack(outputs[stream.latency :], 1), expected, rtol=1e-3, atol=1e-4)


def test_cuda_graphs(cuda):
    """A graph that was captured after the first output goes on, also after a reset of some streams."""
    net, x = resnet().to(cuda), videos(12, 3, device=cuda)
    stream, frame, mask = online.convert(net), x[:, 0].clone(), torch.tensor([True, False, True], device=cuda)
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(stream.latency + 1):
            stream(frame)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, valid = stream(frame), stream.valid
        stream.reset(torch.ones_like(mask))
        whole, late = offline(net, x), offline(net, x[mask, 2:])
        for t in range(12):
            if t == 2:
                stream.reset(mask)
            frame.copy_(x[:, t])
            graph.replay()
            assert valid.tolist() == [t >= 10, t >= 8, t >= 10]
            if t >= 8:
                assert_close(out[~mask], whole[~mask, t - 8])
            if t >= 10:
                assert_close(out[mask], late[:, t - 10])
        rest = torch.stack(list(stream.flush()), 1)
        assert_close(rest[~mask], whole[~mask, 4:])
        assert_close(rest[mask], late[:, 2:])
