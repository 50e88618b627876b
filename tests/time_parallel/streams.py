"""Cases of CUDA graphs and streams of GPUs."""

import copy
import random

import pytest
import torch
from support import assert_same_bits
from torch import nn

import tsm_jit
from time_parallel.cases import average, case, close, loss_of, model_of, new_clips, share
from tsm_jit.distributed import parallelize_time, shard_frames

CAPTURABLE = ("NCCL", "peer memory")  # a CUDA graph cannot contain sums by gloo


def captured(function, *arguments):
    """Captures ``function`` as a CUDA graph. Returns a function that takes the values of other arguments."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*arguments)

    def replay(*new):
        for argument, value in zip(arguments, new, strict=True):
            argument.copy_(value)
        graph.replay()
        return out.clone()

    return replay


class Delays:
    """Lets each rank be late at other times than the others."""

    def __init__(self, rank: int):
        self.random = random.Random(random.random() + rank)

    def __call__(self) -> None:
        if self.random.random() < 0.5:
            torch.cuda._sleep(self.random.randrange(500_000))  # up to about 300 us


@case((2, 3, 4), on=("peer memory, one GPU", *CAPTURABLE))
def buffers_are_read_before_they_are_written_again(mesh):
    """Eager calls, graphs of one and of three exchanges, larger clips, two streams: the host never waits."""
    delay, shift, results = Delays(mesh.get_local_rank()), tsm_jit.TemporalShift(nn.Identity(), 7, 4), []
    parallelize_time(shift, mesh)

    def three(x):
        return shift(shift(shift(x)))

    def new(size=5):
        return torch.randn(1, 7, 8, size, 3)

    def expected(x, times):
        for _ in range(times):
            x = tsm_jit.temporal_shift(x, fold_div=4)
        return share(x, mesh)

    with torch.no_grad():
        graphs = [captured(shift, shard_frames(new(), mesh)), captured(three, shard_frames(new(), mesh))]
        other = torch.cuda.Stream()
        for _ in range(100):
            which, x = random.randrange(5), new()
            delay()
            if which < 2:
                for _ in range(random.randint(1, 3)):
                    x = new()
                    results.append((graphs[which](shard_frames(x, mesh)), x, (1, 3)[which]))
                    delay()
            elif which == 2:
                results.append((three(shard_frames(x, mesh)), x, 3))
            elif which == 3:
                x = new(100_000 if random.random() < 0.2 else 7)
                results.append((shift(shard_frames(x, mesh)), x, 1))
            else:
                mine = shard_frames(x, mesh)
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    delay()
                    results.append((shift(mine), x, 1))
                torch.cuda.current_stream().wait_stream(other)
        for out, x, times in results:
            assert_same_bits(out, expected(x, times))


@case((2, 3, 4), on=CAPTURABLE)
def inference_as_a_graph(mesh):
    model, delay = model_of(), Delays(mesh.get_local_rank())
    whole = copy.deepcopy(model)
    parallelize_time(model, mesh)
    with torch.inference_mode():
        graph = captured(model, shard_frames(new_clips(), mesh))
        for _ in range(5):
            clips = new_clips()
            delay()
            close(graph(shard_frames(clips, mesh)), whole(clips))
        with pytest.raises(RuntimeError, match="split clips must run once before a CUDA graph captures them"):
            captured_at_once(model, shard_frames(new_clips(9), mesh))


def captured_at_once(function, *arguments):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        function(*arguments)


@case((2,), on=CAPTURABLE, inplace=False)
@case((2,), on=CAPTURABLE, inplace=True)
def training_as_a_graph(mesh, inplace):
    model, clips = model_of(inplace=inplace), new_clips()
    split = copy.deepcopy(model)
    parallelize_time(split, mesh)
    mine = shard_frames(clips, mesh).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(split, (mine.detach().clone().requires_grad_(),))
    delay = Delays(mesh.get_local_rank())
    for _ in range(3):
        clips = new_clips()
        split.zero_grad()
        model.zero_grad()
        delay()
        scores = graphed(shard_frames(clips, mesh).requires_grad_())
        loss_of(scores).backward()
        average(split, mesh.get_group())
        expected = model(clips)
        loss_of(expected).backward()
        close(scores, expected)
        for weight, single in zip(split.parameters(), model.parameters(), strict=True):
            close(weight.grad, single.grad)
