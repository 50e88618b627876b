"""A TSM-ResNet-50 on a real video, frame by frame as from a camera; prints median and 99th percentile of the times."""

import time
from pathlib import Path

import av
import torch
import torchvision

import tsm_jit
from tsm_jit.video_io import default_clip, network_input

FRAMES = 40
device = "cuda" if torch.cuda.is_available() else "cpu"

net = torchvision.models.resnet50()
tsm_jit.make_temporal_shift(net, n_segment=8, direction="past")  # a stream has no next frame yet
stream = tsm_jit.online.convert(net.eval().to(device))

milliseconds = []
with av.open(Path(default_clip())) as video, torch.inference_mode():
    for _, picture in zip(range(FRAMES), video.decode(video=0), strict=False):
        frame = network_input(torch.from_numpy(picture.to_ndarray(format="rgb24")).permute(2, 0, 1)[None]).to(device)
        begin = time.perf_counter()
        stream(frame).argmax(1).item()  # waits for the result
        milliseconds.append((time.perf_counter() - begin) * 1e3)

half, most = torch.tensor(milliseconds[3:]).quantile(torch.tensor([0.5, 0.99])).tolist()
state = sum(each.numel() * each.element_size() for each in stream.state) / 2**20
print(f"{len(milliseconds)} frames on {device}: p50 {half:.1f} ms, p99 {most:.1f} ms, state {state:.1f} MiB")
