"""The audio segment of TSAM: a log-mel spectrogram of a waveform as an image, written in PyTorch.

Windows, bands, FFT length and logarithm match TSAM's configuration (https://github.com/aav-antonov/TSAM), so networks
trained there see the same values. The image is an additional segment of the clip, which :mod:`tsm_jit.tsam` does not
shift.

Example::

    image = tsm_jit.audio.log_mel_image(torch.randn(48000), sample_rate=48000)  # [3, 224, 224]
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from tsm_jit._checks import integer

__all__ = ["log_mel_image", "mel_spectrogram"]

# In ms, one pair per channel, from fine time to fine frequency resolution.
WINDOWS_AND_HOPS = ((25, 10), (50, 25), (100, 50))
_N_FFT = 4800  # as in TSAM: 100 ms at 48 kHz
_EPSILON = 1e-6  # silence gives log(1e-6) = -13.8


def log_mel_image(waveform: Tensor, sample_rate: int, size: int = 224) -> Tensor:
    """Computes TSAM's audio segment of a clip: an image of its sound (https://github.com/aav-antonov/TSAM).

    Each channel is ``log(power + 1e-6)`` of a mel spectrogram (:func:`mel_spectrogram`) with ``size`` bands. The three
    channels have windows of 25, 50 and 100 ms and hops of 10, 25 and 50 ms. The time axis is resized to ``size``
    columns, bilinear with antialiasing as in torchvision's ``Resize``. Row 0 is the lowest band, column 0 the start.

    As in TSAM the image is not normalized. Values range from -13.8 (silence) to about 15 (a tone at full scale), while
    frames normalized for ImageNet range from about -3 to 3.

    Args:
        waveform: ``[*, samples]``, mono, float32 or float64, values from -1 to 1, any device. TSAM uses the first
            channel of a file. At rates up to 48 kHz it needs more than 2400 samples (50 ms at 48 kHz).
        sample_rate: the sample rate of the waveform in Hz.
        size: the number of rows and columns of the image.

    Returns:
        ``[*, 3, size, size]`` with the dtype and device of the waveform. It is differentiable.

    Raises:
        TypeError, ValueError: as :func:`mel_spectrogram`.

    Example::

        frames, waveform = torch.randn(8, 3, 224, 224), torch.randn(48000)
        clip = torch.cat([frames, tsm_jit.audio.log_mel_image(waveform, 48000)[None]])  # [8 + 1, 3, 224, 224]
    """
    size, sample_rate = integer("size", size, 1), integer("sample_rate", sample_rate, 2)
    n_fft = _fft_length(sample_rate, max(window for window, _ in WINDOWS_AND_HOPS), size)  # the same for all channels
    channels = []
    for window, hop in WINDOWS_AND_HOPS:
        image = (mel_spectrogram(waveform, sample_rate, window, hop, size, n_fft=n_fft) + _EPSILON).log()
        rows = image.reshape(-1, 1, size, image.shape[-1])
        resized = F.interpolate(rows, (size, size), mode="bilinear", align_corners=False, antialias=True)
        channels.append(resized.reshape(*image.shape[:-1], size))
    return torch.stack(channels, -3)


def mel_spectrogram(
    waveform: Tensor, sample_rate: int, window_ms: float, hop_ms: float, n_mels: int, *, n_fft: int | None = None
) -> Tensor:
    """Computes the power in mel bands over time, equal to ``torchaudio.transforms.MelSpectrogram``.

    The other parameters have torchaudio's defaults. Windows are Hann windows. Frames are centered, with reflection
    padding. Magnitudes are squared. The filters are triangles of height 1 from 0 Hz to half the sample rate, on the HTK
    scale ``2595 * log10(1 + Hz / 700)``. TSAM (https://github.com/aav-antonov/TSAM) uses this spectrogram.

    Args:
        waveform: ``[*, samples]``, float32 or float64, any device, with more samples than ``n_fft // 2``.
        sample_rate: the sample rate of the waveform in Hz.
        window_ms: the length of a window in milliseconds, rounded to samples.
        hop_ms: the distance between windows in milliseconds, rounded to samples.
        n_mels: the number of bands.
        n_fft: the FFT length in samples. The default is 4800 as in TSAM, doubled until it is at least the window length
            and no band is empty.

    Returns:
        ``[*, n_mels, frames]``, with one frame per hop, starting at sample 0. It has the dtype and device of the
        waveform and is differentiable.

    Raises:
        TypeError: ``waveform`` is not a float32 or float64 tensor, or another argument is not a number.
        ValueError: ``waveform`` is empty or too short; an argument is outside its range; or ``n_fft`` is less than the
            window length.

    Example::

        power = tsm_jit.audio.mel_spectrogram(torch.randn(16000), 16000, window_ms=25, hop_ms=10, n_mels=80)
    """
    # At a sample rate of 1 Hz the highest frequency would be 0.
    sample_rate, n_mels = integer("sample_rate", sample_rate, 2), integer("n_mels", n_mels, 1)
    window, hop = _samples("window_ms", window_ms, sample_rate), _samples("hop_ms", hop_ms, sample_rate)
    n_fft = _fft_length(sample_rate, window_ms, n_mels) if n_fft is None else integer("n_fft", n_fft, 1)
    if n_fft < window:
        raise ValueError(f"n_fft must be at least the window of {window} samples, got {n_fft}")
    _check_waveform(waveform, sample_rate, n_fft)

    # Under autocast, the product would be in half precision, where the power of loud sound overflows.
    with torch.autocast(waveform.device.type, enabled=False):
        spectrum = torch.stft(
            waveform.reshape(-1, waveform.shape[-1]),
            n_fft,
            hop_length=hop,
            win_length=window,
            window=torch.hann_window(window, dtype=waveform.dtype, device=waveform.device),
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        # Not cached under tracing, where the filters may be fake tensors.
        filters = _filters if type(waveform) is Tensor and not is_compiling() else _filters.__wrapped__
        mel = filters(sample_rate, n_fft, n_mels, waveform.device, waveform.dtype) @ power
    return mel.reshape(*waveform.shape[:-1], n_mels, mel.shape[-1])


@functools.lru_cache(maxsize=16)
def _filters(sample_rate: int, n_fft: int, n_mels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Computes the triangular filters ``[n_mels, n_fft // 2 + 1]``."""
    with torch.inference_mode(False), torch.no_grad():  # training may use the cached tensor later
        end = sample_rate // 2
        hertz = torch.linspace(0, end, n_fft // 2 + 1, dtype=torch.float64, device="cpu")
        mels = torch.linspace(0, 2595 * math.log10(1 + end / 700), n_mels + 2, dtype=torch.float64, device="cpu")
        edges = 700 * (10 ** (mels / 2595) - 1)
        low, centre, high = (edges[i : i + n_mels, None] for i in range(3))
        rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
        return torch.minimum(rising, falling).clamp(min=0).to(device, dtype)


def _fft_length(sample_rate: int, window_ms: float, n_mels: int) -> int:
    """Returns the smallest ``4800 * 2**k`` that is at least the window length and leaves no band empty.

    The first band is the narrowest. It spans the first two of ``n_mels + 1`` equal mel steps from 0 Hz, and is not
    empty if the FFT frequencies are closer than that. An FFT as short as the window is too coarse: with 400 samples at
    16 kHz (25 ms), 30 of 224 bands are empty.

    All windows of an image have the same FFT length. So they share the filters, and a row is the same band in every
    channel. Zero padding of the shorter windows interpolates their spectra. The FFT length scales the power, so the
    default is TSAM's length, which is enough for 224 bands and 100 ms up to 48 kHz.
    """
    window = _samples("window_ms", window_ms, sample_rate)
    end = sample_rate // 2
    narrowest = 700 * math.expm1(2 / (n_mels + 1) * math.log1p(end / 700))
    n_fft = _N_FFT
    while n_fft < window or end / (n_fft // 2) >= narrowest:
        n_fft *= 2
    return n_fft


def _samples(name: str, milliseconds: Any, sample_rate: int) -> int:
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        raise TypeError(f"{name} must be a number of milliseconds, got {milliseconds!r}")
    if not 0 < milliseconds < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {milliseconds}")
    samples = round(milliseconds * sample_rate / 1000)
    if samples < 1:
        raise ValueError(f"{name} must be at least one sample at sample_rate={sample_rate}, got {milliseconds} ms")
    return samples


def _check_waveform(waveform: Any, sample_rate: int, n_fft: int) -> None:
    if not isinstance(waveform, Tensor):
        raise TypeError(f"waveform must be a tensor, got {type(waveform).__name__}")
    if waveform.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"waveform must be float32 or float64, got {waveform.dtype}")
    if waveform.dim() == 0 or waveform.numel() == 0:
        raise ValueError(f"waveform must be [*, samples] and not empty, got {list(waveform.shape)}")
    minimum, samples = n_fft // 2 + 1, waveform.shape[-1]  # reflection padding needs n_fft // 2 samples at each end
    if samples < minimum:
        raise ValueError(
            f"waveform must have at least {minimum} samples ({1000 * minimum / sample_rate:.0f} ms at "
            f"sample_rate={sample_rate}), got {samples}"
        )
