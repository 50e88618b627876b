"""Times a streaming network: time of a frame, latency and memory, compared with whole clips and no shift."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torchvision
from torch import Tensor, nn

from tsm_jit import online
from tsm_jit.bench import timing
from tsm_jit.bench.rows import Mismatch, Row, mebibytes
from tsm_jit.convert.surgery import n_segment
from tsm_jit.convert.tsm import make_temporal_shift
from tsm_jit.plans import Direction

CLIP = 8
STREAMS = (1, 8)  # at the same time
WHO: dict[Direction, str] = {"past": "online", "both": "both directions"}


def rows(
    device: torch.device,
    frames: int,
    counts: Sequence[int] = STREAMS,
    make: Callable[[], nn.Module] = torchvision.models.resnet50,
    size: int = 224,
) -> Iterator[list[Row]]:
    """Yields, for each number of streams, the time of each method for the next frame, its latency and its memory."""
    plain = make().eval().to(device)
    nets = {direction: copy.deepcopy(plain) for direction in WHO}
    for direction, net in nets.items():
        make_temporal_shift(net, CLIP, direction=direction)
    length = max(CLIP, online.convert(nets["both"]).latency + 2)  # a CUDA graph of a stream has no flush()
    for streams in counts:
        video = torch.randn(length, streams, 3, size, size, device=device)
        with torch.inference_mode():
            yield _rows(plain, nets, video, frames)


def _rows(plain: nn.Module, nets: dict[Direction, nn.Module], video: Tensor, frames: int) -> list[Row]:
    streams = {WHO[direction]: online.convert(net) for direction, net in nets.items()}
    methods: dict[str, Callable[[Tensor], Tensor | None]] = {"without shift": plain}
    for direction, net in nets.items():
        name, expected = WHO[direction], _offline(net, video[:, [0, -1]])
        methods[name] = streams[name]
        outputs = [streams[name](frame) for frame in video][streams[name].latency :]
        _check(name, [*outputs, *streams[name].flush()], expected)
        if video.is_cuda:
            # The graph replays into the memory of its stream, which must live as long.
            as_graph = streams[f"{name}, CUDA graph"] = online.convert(net)
            graph = captured(as_graph, video[0])
            _check(name, [graph(frame).clone() for frame in video][as_graph.latency :], expected)
            methods[f"{name}, CUDA graph"] = graph
    clips = video[:CLIP].transpose(0, 1).flatten(0, 1)
    methods[f"the last {CLIP} frames again"] = lambda frame: nets["both"](clips)
    results = []
    for name, method in methods.items():
        times = sorted(_seconds(method, video, frames))
        stream = streams.get(name)
        state = None if stream is None else sum(each.numel() * each.element_size() for each in stream.state)
        # Unknown for a CUDA graph: it owns its memory permanently, and a replay allocates nothing.
        peak = None
        if not name.endswith("graph"):
            peak = timing.peak_bytes(functools.partial(method, video[0]), video.device)
        results.append(
            {
                "streams": video.shape[1],
                "who": name,
                "median_milliseconds": times[len(times) // 2] * 1e3,
                "p99_milliseconds": times[math.ceil(0.99 * len(times)) - 1] * 1e3,
                "latency_frames": 0 if stream is None else stream.latency,
                "state_mebibytes": mebibytes(state),
                "peak_mebibytes": mebibytes(peak),
            }
        )
    return results


def _offline(net: nn.Module, video: Tensor) -> Tensor:
    """Returns the scores ``[T, S, K]`` of the network on the whole videos ``[T, S, C, H, W]``."""
    length, streams = video.shape[:2]
    with n_segment(net, length):
        return net(video.transpose(0, 1).flatten(0, 1)).unflatten(0, (streams, length)).transpose(0, 1)


def _check(name: str, outputs: list[Tensor], expected: Tensor) -> None:
    """Compares the first and the last stream with their scores offline."""
    actual, expected = torch.stack(outputs)[:, [0, -1]], expected[: len(outputs)]
    if (actual - expected).abs().max() > 1e-2 * expected.abs().max():  # convolutions may run in TF32
        raise Mismatch(f"{name}: {outputs[0].shape[0]} streams do not have the scores of their videos")


def captured(stream: online.OnlineNetwork, first: Tensor) -> Callable[[Tensor], Tensor]:
    """Captures a stream as a CUDA graph. It can, since the memory of the state stays in place."""
    frame = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(stream.latency + 3):
            stream(frame)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stream(frame)
    stream.reset(torch.ones(len(frame), dtype=torch.bool, device=frame.device))

    def run(new: Tensor) -> Tensor:
        frame.copy_(new)
        graph.replay()
        return out

    return run


def _seconds(method: Callable[[Tensor], Tensor | None], video: Tensor, frames: int) -> Iterator[float]:
    """Yields the seconds from a frame on the device to its scores there, without the warm-up."""
    for k in range(frames + 3):
        begin = time.perf_counter()
        method(video[k % len(video)])
        if video.is_cuda:
            torch.cuda.synchronize()
        if k >= 3:
            yield time.perf_counter() - begin
