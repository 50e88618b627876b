"""What training jobs do to a module: DDP, FSDP2, DataParallel, pickling, copying, saving, threads."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from processes import gradients, train
from support import assert_same_bits
from torch import nn
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel, parallel_apply, replicate
from torch.utils.checkpoint import checkpoint

import tsm_jit
from tsm_jit import reference
from tsm_jit.plans import Shift, temporal

CLIP = 4


class Block(nn.Module):
    """A residual block, the place where shifting in place goes wrong."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.conv1 = tsm_jit.TemporalShift(nn.Conv2d(16, 16, 3, padding=1), CLIP, 4, inplace=inplace)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


def network(inplace: bool) -> nn.Module:
    return nn.Sequential(Block(inplace), Block(inplace)).double()


def train_shifts(wrapper, device, inplace, folder, compiled=False) -> None:
    net, x = network(inplace), torch.randn(4 * CLIP, 16, 5, 5, dtype=torch.float64)
    expected = gradients(copy.deepcopy(net), x)
    train(wrapper, device, net, x, expected, folder, compiled)


@pytest.mark.feature("DDP")
@pytest.mark.parametrize("inplace", [False, True])
def test_ddp(device, inplace, tmp_path):
    train_shifts("DDP", device, inplace, tmp_path)


@pytest.mark.feature("FSDP2")
@pytest.mark.parametrize("inplace", [False, True])
def test_fsdp2(device, inplace, tmp_path):
    train_shifts("FSDP2", device, inplace, tmp_path)


@pytest.mark.feature("DDP", column="compiled")
def test_ddp_compiled(device, tmp_path):
    train_shifts("DDP", device, True, tmp_path, compiled=True)


@pytest.mark.feature("FSDP2", column="compiled")
def test_fsdp2_compiled(device, tmp_path):
    train_shifts("FSDP2", device, True, tmp_path, compiled=True)


@pytest.mark.feature("DataParallel, threads")
@pytest.mark.parametrize("inplace", [False, True])
def test_data_parallel(device, inplace):
    if device.type == "cpu" and torch.cuda.is_available():
        pytest.skip("DataParallel takes the GPUs where there are any")
    net, x = network(inplace).to(device), torch.randn(2 * CLIP, 16, 5, 5, dtype=torch.float64, device=device)
    expected = gradients(copy.deepcopy(net), x)
    actual = gradients(nn.DataParallel(net), x)
    torch.testing.assert_close({name.removeprefix("module."): grad for name, grad in actual.items()}, expected)


def test_replicas_on_one_gpu(cuda):
    """What DataParallel does for each GPU: replicas of a module, run in threads."""
    net, x = network(True).to(cuda), torch.randn(2 * CLIP, 16, 5, 5, dtype=torch.float64, device=cuda)
    outs = parallel_apply(replicate(net, [0, 0]), [(half,) for half in x.chunk(2)], devices=[0, 0])
    torch.testing.assert_close(torch.cat(outs), net(x))


@pytest.mark.feature("`pickle`, `deepcopy`, `torch.save`")
@pytest.mark.parametrize("inplace", [False, True])
def test_copies(device, inplace):
    net, x = network(inplace).to(device), torch.randn(2 * CLIP, 16, 5, 5, dtype=torch.float64, device=device)
    expected = gradients(net, x)
    net.zero_grad()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    ):
        torch.testing.assert_close(gradients(copied, x), expected)
        assert repr(copied) == repr(net)


@pytest.mark.feature("DataParallel, threads")
def test_threads(device):
    """Every thread its own tensors, shapes and plans at once, forward and backward."""

    def work(k: int) -> None:
        n_segment, channels = 2 + k % 5, 8 + k
        shift = Shift(n_segment, n_segment, 1, "keep", temporal(channels))
        for _ in range(20):
            leaf = torch.randn(2 * n_segment, channels, 3, 3, device=device, requires_grad=True)
            weight = torch.randn_like(leaf)
            out = tsm_jit.temporal_shift(leaf * 1.0, n_segment, padding="keep", inplace=k % 2 == 1)
            (out * weight).sum().backward()
            assert_same_bits(out, reference.temporal_shift(leaf, shift))
            assert_same_bits(leaf.grad, reference.temporal_shift_backward(weight, shift))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(32)))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Checkpointed(nn.Module):
    """A residual block whose backward computes its forward again."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.block, self.reentrant = Block(True), reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def two_lengths(reentrant: bool) -> tuple[nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    """A network for clips of 4 frames, frames, and its gradients for clips of 2."""
    net = nn.Sequential(Checkpointed(reentrant), Block(True)).double()
    x = torch.randn(4 * CLIP, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = copy.deepcopy(net)
    with tsm_jit.n_segment(expected, 2):
        return net, x, gradients(expected, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_static_graph_of_ddp(one_process, reentrant):
    net, x, expected = two_lengths(reentrant)
    wrapped = DistributedDataParallel(net, static_graph=True)
    for _ in range(2):  # the first step records the graph
        net.zero_grad()
        with tsm_jit.n_segment(net, 2):
            actual = gradients(wrapped, x)
        torch.testing.assert_close({name.removeprefix("module."): grad for name, grad in actual.items()}, expected)
    with tsm_jit.n_segment(net, 2):
        y = wrapped(x)
    with pytest.raises(RuntimeError, match=r"n_segment must be the clip length of the forward .* got 4 .* 2"):
        y.sum().backward()


SCHEDULES = ("ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")


@pytest.mark.parametrize("name", SCHEDULES)
def test_pipeline_stages(one_process, name):
    """Of microbatches, the gradients of inputs and weights may be computed apart."""
    net, x, expected = two_lengths(False)
    stages = [pipelining.PipelineStage(stage, i, 2, torch.device("cpu")) for i, stage in enumerate(net)]
    schedule = getattr(pipelining, name)(stages, 4, loss_fn=lambda y, _: y.square().mean())
    with tsm_jit.n_segment(net, 2):
        schedule.step(x.detach(), target=torch.zeros(len(x)))
    torch.testing.assert_close({name: weight.grad for name, weight in net.named_parameters()}, expected)


def test_microbatches_of_parts_of_clips_are_an_error(one_process):
    net, x, _ = two_lengths(False)
    stages = [pipelining.PipelineStage(stage, i, 2, torch.device("cpu")) for i, stage in enumerate(net)]
    schedule = pipelining.ScheduleInterleaved1F1B(stages, 8, loss_fn=lambda y, _: y.square().mean())
    with pytest.raises((RuntimeError, ValueError), match="n_segment must divide the 2 frames of x, got 4"):
        schedule.step(x.detach(), target=torch.zeros(len(x)))
