"""A TSM-ResNet-50 on a real video, frame by frame as from a camera, in one direction and in both.

It prints the median and the 99th percentile of the times, the latency in frames and the memory of the state.
"""

import time
from pathlib import Path

import av
import torch
import torchvision

import tsm_jit
from tsm_jit.video_io import default_clip, network_input

FRAMES = 24
device = "cuda" if torch.cuda.is_available() else "cpu"

for direction in ("past", "both"):
    net = torchvision.models.resnet50()
    tsm_jit.make_temporal_shift(net, n_segment=8, direction=direction)
    stream = tsm_jit.online.convert(net.eval().to(device))

    milliseconds, labels = [], []
    with av.open(Path(default_clip())) as video, torch.inference_mode():
        for _, picture in zip(range(FRAMES), video.decode(video=0), strict=False):
            pixels = torch.from_numpy(picture.to_ndarray(format="rgb24")).permute(2, 0, 1)
            frame = network_input(pixels[None]).to(device)
            begin = time.perf_counter()
            scores = stream(frame)  # those of the frame that came `stream.latency` frames before
            if scores is not None:
                labels.append(scores.argmax(1).item())  # waits for the result
            milliseconds.append((time.perf_counter() - begin) * 1e3)
        state = sum(each.numel() * each.element_size() for each in stream.state) / 2**20
        labels += [scores.argmax(1).item() for scores in stream.flush()]  # of the last frames

    assert len(labels) == len(milliseconds)
    half, most = torch.tensor(milliseconds[stream.latency + 3 :]).quantile(torch.tensor([0.5, 0.99])).tolist()
    print(
        f"direction={direction!r}, {len(labels)} frames on {device}: p50 {half:.1f} ms, p99 {most:.1f} ms, "
        f"latency {stream.latency} frames, state {state:.1f} MiB"
    )
