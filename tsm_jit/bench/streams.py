"""A network on a stream: the latency of a frame and memory, against clips run again and the network without shift."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor, nn

from tsm_jit import online
from tsm_jit.bench import Mismatch, Row, mebibytes, timing
from tsm_jit.convert.tsm import make_temporal_shift

CLIP = 8


def rows(
    device: torch.device, frames: int, make: Callable[[], nn.Module] = torchvision.models.resnet50, size: int = 224
) -> Iterator[list[Row]]:
    """For 1 stream and for 8: every way to get the scores of the next frame, over so many frames."""
    plain = make().eval().to(device)
    net = copy.deepcopy(plain)
    make_temporal_shift(net, CLIP, direction="past")
    for streams in (1, 8):
        video = torch.randn(CLIP, streams, 3, size, size, device=device)
        with torch.inference_mode():
            yield _rows(plain, net, video, frames)


def _rows(plain: nn.Module, net: nn.Module, video: Tensor, frames: int) -> list[Row]:
    streams, device = video.shape[1], video.device
    clips = video.transpose(0, 1).flatten(0, 1)
    offline = net(clips).unflatten(0, (streams, CLIP)).transpose(0, 1)
    stream = online.convert(net)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"without shift": plain, "online": stream}
    if device.type == "cuda":
        ways["online, CUDA graph"] = captured(online.convert(net), video[0])
    for name, way in ways.items():
        if way is plain:
            continue
        actual = torch.stack([way(frame).clone() for frame in video])
        if (actual - offline).abs().max() > 1e-2 * offline.abs().max():  # convolutions may run in TF32
            raise Mismatch(f"{name}: {streams} streams do not have the scores of their clips")
    ways[f"the last {CLIP} frames again"] = lambda frame: net(clips)
    state = mebibytes(sum(each.numel() * each.element_size() for each in stream.state))
    found = []
    for name, way in ways.items():
        times = sorted(_latencies(way, video, frames))
        # A graph holds its memory all the time, and a replay allocates nothing.
        peak = None if name.endswith("graph") else timing.peak_bytes(functools.partial(way, video[0]), device)
        found.append(
            {
                "streams": streams,
                "who": name,
                "median_milliseconds": times[len(times) // 2] * 1e3,
                "p99_milliseconds": times[math.ceil(0.99 * len(times)) - 1] * 1e3,
                "state_mebibytes": state if name.startswith("online") else None,
                "peak_mebibytes": mebibytes(peak),
            }
        )
    return found


def captured(stream: online.OnlineNetwork, first: Tensor) -> Callable[[Tensor], Tensor]:
    """The stream as a CUDA graph, at its beginning: the state lies still, so that the graph goes on from it."""
    frame = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
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


def _latencies(way: Callable[[Tensor], Tensor], video: Tensor, frames: int) -> Iterator[float]:
    """Seconds from a frame on the device to its scores there; the first are the warm-up."""
    for k in range(frames + 3):
        begin = time.perf_counter()
        way(video[k % len(video)])
        if video.is_cuda:
            torch.cuda.synchronize()
        if k >= 3:
            yield time.perf_counter() - begin
