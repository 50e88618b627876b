"""Times a streaming network: latency of a frame and memory, compared with whole clips and no shift."""

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
STREAMS = (1, 8)  # at the same time


def rows(
    device: torch.device, frames: int, make: Callable[[], nn.Module] = torchvision.models.resnet50, size: int = 224
) -> Iterator[list[Row]]:
    """Yields, for 1 and 8 streams, the latency of each method to compute the scores of the next frame."""
    plain = make().eval().to(device)
    net = copy.deepcopy(plain)
    make_temporal_shift(net, CLIP, direction="past")
    for streams in STREAMS:
        video = torch.randn(CLIP, streams, 3, size, size, device=device)
        with torch.inference_mode():
            yield _rows(plain, net, video, frames)


def _rows(plain: nn.Module, net: nn.Module, video: Tensor, frames: int) -> list[Row]:
    streams, device = video.shape[1], video.device
    clips = video.transpose(0, 1).flatten(0, 1)
    offline = net(clips).unflatten(0, (streams, CLIP)).transpose(0, 1)
    stream = online.convert(net)
    methods: dict[str, Callable[[Tensor], Tensor]] = {"without shift": plain, "online": stream}
    if device.type == "cuda":
        methods["online, CUDA graph"] = captured(online.convert(net), video[0])
    for name, method in methods.items():
        if method is plain:
            continue
        actual = torch.stack([method(frame).clone() for frame in video])
        if (actual - offline).abs().max() > 1e-2 * offline.abs().max():  # convolutions may run in TF32
            raise Mismatch(f"{name}: {streams} streams do not have the scores of their clips")
    methods[f"the last {CLIP} frames again"] = lambda frame: net(clips)
    state = mebibytes(sum(each.numel() * each.element_size() for each in stream.state))
    results = []
    for name, method in methods.items():
        times = sorted(_latencies(method, video, frames))
        # Unknown for a CUDA graph: it owns its memory permanently, and a replay allocates nothing.
        peak = None if name.endswith("graph") else timing.peak_bytes(functools.partial(method, video[0]), device)
        results.append(
            {
                "streams": streams,
                "who": name,
                "median_milliseconds": times[len(times) // 2] * 1e3,
                "p99_milliseconds": times[math.ceil(0.99 * len(times)) - 1] * 1e3,
                "state_mebibytes": state if name.startswith("online") else None,
                "peak_mebibytes": mebibytes(peak),
            }
        )
    return results


def captured(stream: online.OnlineNetwork, first: Tensor) -> Callable[[Tensor], Tensor]:
    """Captures a stream as a CUDA graph. It can, since the memory of the state stays in place."""
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


def _latencies(method: Callable[[Tensor], Tensor], video: Tensor, frames: int) -> Iterator[float]:
    """Yields the seconds from a frame on the device to its scores there, without the warm-up."""
    for k in range(frames + 3):
        begin = time.perf_counter()
        method(video[k % len(video)])
        if video.is_cuda:
            torch.cuda.synchronize()
        if k >= 3:
            yield time.perf_counter() - begin
