"""The sound of TSAM: a log-mel spectrogram of a waveform as an image, in plain torch.

Windows, bands, FFT length and logarithm are those of TSAM's configuration (https://github.com/aav-antonov/TSAM), so
that networks trained there see the same numbers. The image stands beside the frames of the clip, as a segment
that :mod:`tsm_jit.tsam` does not shift.
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

WINDOWS_AND_HOPS = ((25, 10), (50, 25), (100, 50))  # ms, one pair a channel: from fine in time to fine in frequency
_N_FFT = 4800  # TSAM's: 100 ms at 48 kHz
_EPSILON = 1e-6  # silence is log(1e-6) = -13.8


def log_mel_image(waveform: Tensor, sample_rate: int, size: int = 224) -> Tensor:
    """The sound of a clip as an image, TSAM's audio segment (https://github.com/aav-antonov/TSAM).

    Each channel is ``log(power + 1e-6)`` of a mel spectrogram of ``size`` bands (:func:`mel_spectrogram`), with windows
    of 25, 50 and 100 ms every 10, 25 and 50 ms; its time axis is resized to ``size`` columns, bilinear and antialiased
    as by torchvision's ``Resize``. Row 0 is the lowest band, column 0 the start. As in TSAM nothing is normalised:
    values lie between -13.8 (silence) and about 15 (a tone at full scale), where frames normalised for ImageNet lie
    within 3 of 0. TSAM takes the first channel of a file.

    Args:
        waveform: ``[*, samples]``, float32 or float64, -1 to 1, on any device: one channel each, so mix or choose
            before. Longer than 2400 samples (50 ms at 48 kHz) at rates up to 48 kHz.
        sample_rate: of the waveform, in Hz.
        size: rows and columns of the image.

    Returns:
        ``[*, 3, size, size]``, of the waveform's dtype and device; differentiable.

    Raises:
        TypeError, ValueError: as :func:`mel_spectrogram`.

    Example::

        clip = torch.cat([frames, log_mel_image(waveform, 48000)[None]])  # [8 + 1, 3, 224, 224]
    """
    size, sample_rate = integer("size", size, 1), integer("sample_rate", sample_rate, 2)
    n_fft = _fft_length(sample_rate, max(window for window, _ in WINDOWS_AND_HOPS), size)  # one: the rows agree
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
    """Power in mel bands over time, as ``torchaudio.transforms.MelSpectrogram`` with its defaults for the rest.

    That is: a Hann window, frames centred with reflection at both ends, squared magnitudes, and triangular filters of
    height 1 from 0 Hz to half the sample rate on the HTK scale, ``2595 * log10(1 + Hz / 700)``.

    Args:
        waveform: ``[*, samples]``, float32 or float64, any device; more samples than half of ``n_fft``.
        sample_rate: of the waveform, in Hz.
        window_ms, hop_ms: length and distance of the windows in milliseconds, rounded to samples.
        n_mels: the number of bands.
        n_fft: the length of the transform in samples; by default 4800, as in TSAM, doubled until it holds the window
            and no band is empty.

    Returns:
        ``[*, n_mels, frames]``, one frame every hop from sample 0 on; of the dtype and device of ``waveform``,
        differentiable.

    Raises:
        TypeError: ``waveform`` is no float32 or float64 tensor; a number is none.
        ValueError: ``waveform`` is empty or too short; an argument is outside its range; ``n_fft`` is less than the
            window.
    """
    sample_rate, n_mels = integer("sample_rate", sample_rate, 2), integer("n_mels", n_mels, 1)  # 2: f_max is half of it
    window, hop = _samples("window_ms", window_ms, sample_rate), _samples("hop_ms", hop_ms, sample_rate)
    n_fft = _fft_length(sample_rate, window_ms, n_mels) if n_fft is None else integer("n_fft", n_fft, 1)
    if n_fft < window:
        raise ValueError(f"n_fft must be at least the window of {window} samples, got {n_fft}")
    _check_waveform(waveform, sample_rate, n_fft)

    # Autocast would multiply in half precision, where the power of a loud sound is infinite.
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
        # While a graph is traced, the filters may be of its kind of tensor: not for everybody's cache.
        filters = _filters if type(waveform) is Tensor and not is_compiling() else _filters.__wrapped__
        mel = filters(sample_rate, n_fft, n_mels, waveform.device, waveform.dtype) @ power
    return mel.reshape(*waveform.shape[:-1], n_mels, mel.shape[-1])


@functools.lru_cache(maxsize=16)
def _filters(sample_rate: int, n_fft: int, n_mels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The triangular filters ``[n_mels, n_fft // 2 + 1]``."""
    with torch.inference_mode(False), torch.no_grad():  # the cached tensor serves training later
        end = sample_rate // 2
        hertz = torch.linspace(0, end, n_fft // 2 + 1, dtype=torch.float64, device="cpu")
        mels = torch.linspace(0, 2595 * math.log10(1 + end / 700), n_mels + 2, dtype=torch.float64, device="cpu")
        edges = 700 * (10 ** (mels / 2595) - 1)
        low, centre, high = (edges[i : i + n_mels, None] for i in range(3))
        rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
        return torch.minimum(rising, falling).clamp(min=0).to(device, dtype)


def _fft_length(sample_rate: int, window_ms: float, n_mels: int) -> int:
    """The least ``4800 * 2**k`` that holds the window and leaves no band empty.

    The first band is the narrowest, from 0 Hz to the second of ``n_mels + 1`` equal steps in mel: it is not empty if
    the frequencies of the transform lie closer. Transforms as short as the windows would be too coarse: of 224 bands,
    400 samples at 16 kHz (25 ms) leave 30 empty. As one length serves all windows of an image, they share the filters,
    and a row is the same band in every channel; the shorter windows are padded with zeros, which interpolates their
    spectra. The length scales the power; hence TSAM's, which is enough for 224 bands and 100 ms up to 48 kHz.
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
        raise ValueError(f"{name} must be at least a sample at sample_rate={sample_rate}, got {milliseconds} ms")
    return samples


def _check_waveform(waveform: Any, sample_rate: int, n_fft: int) -> None:
    if not isinstance(waveform, Tensor):
        raise TypeError(f"waveform must be a tensor, got {type(waveform).__name__}")
    if waveform.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"waveform must be float32 or float64, got {waveform.dtype}")
    if waveform.dim() == 0 or waveform.numel() == 0:
        raise ValueError(f"waveform must be [*, samples] and not empty, got {list(waveform.shape)}")
    least, samples = n_fft // 2 + 1, waveform.shape[-1]  # of which half a transform is reflected at each end
    if samples < least:
        raise ValueError(
            f"waveform must have at least {least} samples ({1000 * least / sample_rate:.0f} ms at "
            f"sample_rate={sample_rate}), got {samples}"
        )
