"""Traced forwards of streams that read later frames: modes, constants, names, and who owns the memory."""

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tsm_jit
from tsm_jit import online


class Net(nn.Module):
    """A convolution and a shift. Each test sets how they are joined."""

    def __init__(self, join, **members):
        super().__init__()
        self.join = join
        self.first = nn.Conv2d(3, 8, 1)
        self.register_buffer("mean", torch.randn(8))
        self.scale = nn.Parameter(torch.randn(1, 8, 1, 1))
        self.conv = tsm_jit.TemporalShift(nn.Conv2d(8, 8, 3, padding=1), 6, 4)
        for name, module in members.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.join(self, x)


def residual(net, x):
    x = net.first(x)
    return net.conv(x) + x


def make(join=residual, **members) -> nn.Module:
    return Net(join, **members).eval().double()


def video(frames: int = 6) -> torch.Tensor:
    return torch.randn(frames, 1, 3, 5, 7, dtype=torch.float64)


def outputs_of(stream, x):
    return [stream(frame) for frame in x][stream.latency :] + list(stream.flush())


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def dropout(net, x):
    return F.dropout(net.conv(net.first(x)), 0.5, net.training)


def test_training_mode():
    net, x = make(dropout), video()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        online.convert(copy.deepcopy(net).train())
    stream = online.convert(net).train()
    with torch.no_grad():
        assert_close(torch.cat(outputs_of(stream, x)), net(x[:, 0]))
    layers = make(rest=nn.Dropout())
    layers.rest.train()  # a module without shifts is not traced
    assert online.convert(layers).net.rest.training


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_state_in_static_buffers(depth):
    net = tsm_jit.tsam.TemporalShift(nn.Conv2d(16, 16, 1), 9, 9, f_div=2, shift_depth=depth).eval().double()
    stream, x = online.convert(net), torch.randn(9, 1, 16, 3, 4, dtype=torch.float64)
    state, outputs = stream.initial_state(x[0]), []
    with torch.no_grad():
        for t in range(9 + depth):
            state[0][:, 0] = t >= 9
            out, new = stream(x[min(t, 8)], state)
            for old, value in zip(state, new, strict=True):
                old.copy_(value)
            outputs.append(out)
        assert_close(torch.cat(outputs[depth:]), net(x[:, 0]))


@dataclass
class Output:
    late: torch.Tensor
    early: torch.Tensor


@pytest.mark.parametrize("is_explicit", [False, True])
def test_outputs_stay_as_they_are(is_explicit):
    stream, x, outputs = online.convert(make(lambda net, x: Output(net.conv(net.first(x)), x))), video(), []
    state = stream.initial_state(x[0])
    with torch.no_grad():
        for frame in x:
            if is_explicit:
                out, new = stream(frame, state)
                for old, value in zip(state, new, strict=True):
                    old.copy_(value)
            else:
                out = stream(frame)
            outputs.append(out)
    assert torch.equal(torch.stack([out.early for out in outputs[1:]]), x[:-1])


def into_a_parameter(net, x):
    x = net.first(x)
    z = net.scale.expand(x.shape[0], -1, 5, 7).clone()
    z.add_(x)
    return net.conv(x) + z


def into_an_operator(net, x):
    x = net.first(x)
    z = net.scale.expand(x.shape[0], -1, 5, 7).clone()
    z += x
    return net.conv(x) + z


def into_out(net, x):
    x = net.first(x)
    z = net.scale.new_empty((x.shape[0], 8, 5, 7))
    torch.add(x, 1, out=z)
    return net.conv(x) + z


def into_a_constant(net, x):
    x = net.first(x)
    z = torch.zeros(1, 8, 5, 7)
    z[:, :4] = x[:, :4]
    return net.conv(x) + z


@pytest.mark.parametrize("join", [into_a_parameter, into_an_operator, into_out, into_a_constant])
def test_writes_into_what_does_not_depend_on_frames_raise(join):
    with pytest.raises(ValueError, match="model must not write frames into a tensor that does not depend on frames"):
        online.convert(make(join))


def frozen(net, x):
    with torch.no_grad():
        x = net.first(x)
    return net.conv(x)


def count(net, x):
    net.mean += 1
    return net.conv(net.first(x) - net.mean.view(1, -1, 1, 1))


def copy_into_a_buffer(net, x):
    net.mean.copy_(x.mean())
    return net.conv(net.first(x))


def test_changed_buffers_raise():
    for join, message in ((count, "assigns its buffer 'mean'"), (copy_into_a_buffer, "got copy_ into 'mean'")):
        with pytest.raises(ValueError, match=message):
            online.convert(make(join))


def test_no_grad_in_a_forward_raises():
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError, match="switches autocast or gradients"):
            online.convert(make(frozen))


def data_of_a_frame(net, x):
    x = net.first(x)
    out = net.conv(x)
    x.data.mul_(2)
    return out + x


def data_of_a_weight(net, x):
    net.scale.data += x.mean()
    return net.conv(net.first(x)) * net.scale


def assigned_data(net, x):
    net.scale.data = x.mean((0, 2, 3)).view(1, 3, 1, 1)
    return net.conv(net.first(x)) * net.scale.mean()


def assigned_view(net, x):
    x = net.first(x)
    x.mT += 1
    return net.conv(x)


@pytest.mark.parametrize("join", [data_of_a_frame, data_of_a_weight, assigned_data, assigned_view])
def test_changes_that_a_trace_does_not_see_raise(join):
    with pytest.raises(ValueError, match=r"a module with shifts (uses|assigns) the attribute '(data|mT)' of a tensor"):
        online.convert(make(join))


CONSTANTS = {
    "a view of a buffer": lambda net, x: net.conv(net.first(x) - net.mean.view(1, -1, 1, 1)),
    "torch.tensor": lambda net, x: net.conv(net.first(x) - torch.tensor([0.5] * 8).view(1, -1, 1, 1)),
    "torch.arange": lambda net, x: net.conv(torch.arange(8.0).view(8, 1, 1) + net.first(x)),
    "written without frames": lambda net, x: net.conv(net.first(x) * net.scale.abs().add_(1)),
    "a mask": lambda net, x: net.conv(net.first(x) * ((net.mean > 0).view(8, 1, 1) & (x.sum(1, keepdim=True) > 0))),
}


class Constant:
    """Can be pickled, unlike a lambda."""

    def __init__(self, name):
        self.name = name

    def __call__(self, net, x):
        return CONSTANTS[self.name](net, x)


@pytest.mark.parametrize("name", CONSTANTS)
def test_tensors_that_do_not_depend_on_frames(name):
    net, x = make(Constant(name)), video()
    for stream in (online.convert(net), pickle.loads(pickle.dumps(online.convert(net)))):
        assert list(stream.net.state_dict()) == list(net.state_dict())
        with torch.no_grad():
            assert_close(torch.cat(outputs_of(stream, x)), net(x[:, 0]))


class Twice(nn.Sequential):
    def __init__(self):
        shared = nn.Sequential(nn.Conv2d(8, 8, 1), tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 6, 4))
        shared[0].register_buffer("scratch", torch.zeros(1), persistent=False)
        super().__init__(nn.Conv2d(3, 8, 1), shared, nn.ReLU())
        self.again = shared
        self.nested = nn.ModuleDict({"unused": nn.BatchNorm2d(8), "none": nn.Identity()})

    def forward(self, x):
        return self[2](self[1](self[0](x)))


@pytest.mark.parametrize(
    "copied", [lambda stream: stream, copy.deepcopy, lambda stream: pickle.loads(pickle.dumps(copy.deepcopy(stream)))]
)
def test_keys_of_the_state_dict_and_attributes(copied):
    net, x = Twice().eval().double(), video()
    net.num_classes, net[1].stride = 8, (1, 1)
    stream = copied(copied(online.convert(net)))
    assert (stream.net.num_classes, stream.net.get_submodule("1").stride) == (8, (1, 1))
    assert list(stream.net.state_dict()) == list(net.state_dict())
    assert [name for name, _ in stream.net.named_parameters()] == [name for name, _ in net.named_parameters()]
    other = Twice().eval().double()
    stream.net.load_state_dict(other.state_dict())
    assert not any(stream.net.get_submodule(name).training for name, _ in net.named_modules())
    with torch.no_grad():
        assert_close(torch.cat(outputs_of(stream, x)), other(x[:, 0]))


def test_one_flush_at_a_time():
    net, x = make(lambda net, x: net.other(net.conv(net.first(x))), other=nn.Identity()), video()
    net.other = tsm_jit.TemporalShift(nn.Conv2d(8, 8, 1), 6, 4).eval().double()
    stream = online.convert(net)
    with torch.no_grad():
        expected = net(x[:, 0])
        for frame in x:
            stream(frame)
        old = stream.flush()
        next(old)
        with pytest.raises(RuntimeError, match="before another flush"):
            next(stream.flush())
        stream.reset()
        outputs = [stream(frame) for frame in x][stream.latency :]
        rest = stream.flush()
        outputs.append(next(rest))
        old.close()  # it does not reset the new video
        outputs += rest
    assert_close(torch.cat(outputs), expected)


def test_gradients_of_one_frame():
    """Backward of a frame reads what waited for it, which is in the state until the end of the frame."""
    net, x = make(lambda net, x: net.conv(x := net.first(x)) + net.skip(x), skip=nn.Conv2d(8, 8, 1)), video(3)
    stream = online.convert(net)
    stream(x[0])
    for t in (1, 2):
        stream(x[t]).sum().backward()
        with torch.no_grad():
            waited = net.first(x[t - 1]).sum((0, 2, 3)).view(1, 8, 1, 1)  # all outputs have the gradient 1
        assert_close(stream.net.skip.weight.grad, waited.expand(8, -1, -1, -1))
        stream.zero_grad()


def test_flush_after_a_change_of_dtype():
    stream, x = online.convert(make().float()), video(3).float()
    for frame in x:
        stream(frame)
    (out,) = stream.double().flush()
    assert out.dtype == torch.float64
