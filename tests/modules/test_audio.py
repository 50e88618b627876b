"""The image of TSAM's sound: against a DFT and triangles written out, against torchaudio, on tones, and its errors."""

import importlib.util
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from support import assert_same_bits

from tsm_jit import audio
from tsm_jit.audio import log_mel_image, mel_spectrogram

RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000)


def band_edges(sample_rate, n_mels):
    """The corners of the triangles in Hz: equal steps of ``2595 log10(1 + f / 700)``."""
    end = 2595 * math.log10(1 + (sample_rate // 2) / 700)
    return [700 * (10 ** (end * i / (n_mels + 1) / 2595) - 1) for i in range(n_mels + 2)]


def written_out(waveform, sample_rate, window, hop, n_mels, n_fft):
    """The mel spectrogram from its definition: windows cut one by one, a sum of cosines and sines, triangles."""
    padded = np.pad(waveform, n_fft // 2, mode="reflect")
    hann = np.array([math.sin(math.pi * k / window) ** 2 for k in range(window)])
    first = (n_fft - window) // 2
    angles = 2 * np.pi * np.outer(np.arange(n_fft // 2 + 1), first + np.arange(window)) / n_fft
    cosines, sines = np.cos(angles), np.sin(angles)
    columns = []
    for begin in range(0, len(padded) - n_fft + 1, hop):
        part = padded[begin + first : begin + first + window] * hann
        columns.append((cosines @ part) ** 2 + (sines @ part) ** 2)
    hertz = [(sample_rate // 2) * k / (n_fft // 2) for k in range(n_fft // 2 + 1)]
    edges = band_edges(sample_rate, n_mels)
    triangles = [np.interp(hertz, edges[i : i + 3], [0, 1, 0]) for i in range(n_mels)]
    return np.array(triangles) @ np.array(columns).T


@pytest.mark.parametrize(
    ("sample_rate", "window_ms", "hop_ms", "n_mels", "n_fft"),
    [
        (8000, 25, 10, 224, None),
        (16000, 100, 50, 224, None),
        (48000, 25, 10, 224, None),
        (96000, 100, 50, 40, None),  # a window longer than 4800
        (11025, 25, 10, 20, 512),  # odd rate: the last frequency is 5512 Hz
        (44100, 7.3, 2.1, 64, 1024),
        (1000, 63, 63, 3, 63),  # odd transform
    ],
)
def test_against_the_definition(device, sample_rate, window_ms, hop_ms, n_mels, n_fft):
    waveform = torch.rand(5100, dtype=torch.float64) * 2 - 1
    window, hop = round(window_ms * sample_rate / 1000), round(hop_ms * sample_rate / 1000)
    expected = written_out(
        waveform.numpy(), sample_rate, window, hop, n_mels, n_fft or (4800 if window <= 4800 else 9600)
    )
    actual = mel_spectrogram(waveform.to(device), sample_rate, window_ms, hop_ms, n_mels, n_fft=n_fft)
    assert actual.device.type == device.type
    # Thousands of products, added in another order.
    torch.testing.assert_close(actual.cpu(), torch.from_numpy(expected), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sample_rate", RATES)
@pytest.mark.parametrize(("window_ms", "hop_ms"), audio.WINDOWS_AND_HOPS)
def test_against_torchaudio(sample_rate, window_ms, hop_ms):
    transforms = pytest.importorskip("torchaudio.transforms", reason="compares with torchaudio", exc_type=Exception)
    window, hop = (round(ms * sample_rate / 1000) for ms in (window_ms, hop_ms))

    def theirs():
        return transforms.MelSpectrogram(sample_rate, 4800, window, hop, n_mels=224)

    waveform = torch.rand(2, sample_rate // 2, dtype=torch.float64) * 2 - 1
    torch.set_default_dtype(torch.float64)  # of its filters
    try:
        expected = theirs().double()(waveform)
    finally:
        torch.set_default_dtype(torch.float32)
    actual = mel_spectrogram(waveform, sample_rate, window_ms, hop_ms, 224)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)  # the filters' corners round elsewhere
    actual = mel_spectrogram(waveform.float(), sample_rate, window_ms, hop_ms, 224)
    # torchaudio makes its filters in float32, with errors of 1e-4 where they are small.
    torch.testing.assert_close(actual, theirs()(waveform.float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sample_rate", [8000, 44100])
def test_the_image_is_made_as_tsam_makes_it(sample_rate):
    """Three spectrograms of 4800 samples, the logarithm of each plus 1e-6, and torchvision's Resize."""
    waveform = torch.rand(3 * sample_rate, dtype=torch.float64) * 2 - 1  # 301 columns to reduce, 61 to enlarge
    resize = torchvision.transforms.Resize((224, 224))
    expected = [
        resize((mel_spectrogram(waveform, sample_rate, window, hop, 224, n_fft=4800) + 1e-6).log()[None])[0]
        for window, hop in [(25, 10), (50, 25), (100, 50)]
    ]
    torch.testing.assert_close(log_mel_image(waveform, sample_rate), torch.stack(expected))


@pytest.mark.parametrize("n_mels", [40, 128, 224, 1000])
@pytest.mark.parametrize("sample_rate", [*RATES, 96000, 192000])
def test_the_default_fft_length_leaves_no_band_empty(sample_rate, n_mels):
    """The spectrum of an impulse is 1 at each frequency, so its power in a band is the sum of a filter."""
    impulse = torch.zeros(20000, dtype=torch.float64)
    impulse[0] = 1

    def filter_sums(n_fft=None):
        return mel_spectrogram(impulse, sample_rate, 100, 50, n_mels, n_fft=n_fft)[:, 0]

    sums, lengths = filter_sums(), (4800 * 2**k for k in range(4))
    n_fft = next(n for n in lengths if n >= sample_rate // 10 and (filter_sums(n) > 0).all())
    assert_same_bits(sums, filter_sums(n_fft))
    # The filters overlap: together they are 1 between the centres of the first and the last one.
    edges = band_edges(sample_rate, n_mels)
    hertz = np.linspace(0, sample_rate // 2, n_fft // 2 + 1)
    expected = np.interp(hertz, [*edges[:2], *edges[-2:]], [0, 1, 1, 0]).sum()
    assert sums.sum().item() == pytest.approx(expected, rel=1e-5)  # a window of odd length is below 1 at the impulse


@pytest.mark.parametrize("sample_rate", [8000, 16000, 48000])
def test_tones_land_in_their_band(device, sample_rate):
    bands = torch.arange(0, 224, 7)
    hertz = torch.tensor(band_edges(sample_rate, 224), dtype=torch.float64)[1:-1][bands]
    seconds = torch.arange(sample_rate, dtype=torch.float64) / sample_rate
    image = log_mel_image(torch.sin(2 * math.pi * hertz[:, None] * seconds).to(device), sample_rate).cpu()
    off = (image.mean(-1).argmax(-1) - bands[:, None]).abs()
    assert off.amax(0).tolist() <= [3, 2, 0]  # 25 ms cannot tell the lowest bands apart, 100 ms can
    assert (off[bands >= 28] == 0).all()


def test_columns_are_the_time():
    waveform = torch.zeros(64000)
    waveform[48000] = 1
    image = log_mel_image(waveform, 16000)
    assert ((image.mean(1).argmax(-1) - 0.75 * 224).abs() <= 3).all()
    silence = math.log(1e-6)
    assert (image[..., :120] - silence).abs().max() < 1e-3
    assert (image[..., 160:175].amax((1, 2)) > silence + 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_batches_and_dtypes(device, dtype):
    waveforms = torch.rand(2, 3, 9000, dtype=dtype, device=device) * 2 - 1
    images = log_mel_image(waveforms, 16000)
    assert images.shape == (2, 3, 3, 224, 224)
    assert (images.dtype, images.device) == (dtype, waveforms.device)
    # A product of matrices of another shape adds in another order, in float32, and the logarithm of near silence
    # enlarges that: here and for other strides and another precision below.
    torch.testing.assert_close(images[1, 2], log_mel_image(waveforms[1, 2], 16000), rtol=1e-3, atol=1e-3)
    assert log_mel_image(waveforms[0], 16000, size=32).shape == (3, 3, 32, 32)
    assert mel_spectrogram(waveforms, 16000, 25, 10, 80).shape == (2, 3, 80, 9000 // 160 + 1)
    strided = waveforms.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(log_mel_image(strided, 16000), images, rtol=1e-3, atol=1e-3)
    assert log_mel_image(waveforms[0, 0, :2401], 16000).shape == (3, 224, 224)  # the shortest
    precise = log_mel_image(waveforms.double(), 16000)
    torch.testing.assert_close(images.double(), precise, rtol=1e-3, atol=1e-3)


def test_loud_sound_under_autocast(device):
    waveform = torch.sin(torch.arange(16000, device=device) * 0.5)
    with torch.autocast(device.type, torch.bfloat16):
        image = log_mel_image(waveform, 16000)
    assert_same_bits(image, log_mel_image(waveform, 16000))


def test_gradients(device):
    waveform = torch.rand(2, 60, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mel_spectrogram(x, 1000, 16, 8, 4, n_fft=32), waveform)
    waveform = torch.rand(2500, dtype=torch.float64, device=device, requires_grad=True)
    # On CUDA the backward of an antialiased resize adds in any order.
    assert torch.autograd.gradcheck(
        lambda x: log_mel_image(x, 16000, size=16), waveform, fast_mode=True, nondet_tol=1e-9
    )
    silence = torch.zeros(2500, device=device, requires_grad=True)
    log_mel_image(silence, 16000).sum().backward()
    assert_same_bits(silence.grad, torch.zeros_like(silence))


def test_the_filters_of_one_use_serve_the_next():
    """Made in inference mode or under fake tensors, they must not reach the training that follows."""
    waveform = torch.rand(3000, requires_grad=True)
    rates = random.sample(range(8000, 11025), 2)  # of no other test
    operators = []
    for _ in range(2):
        with torch.inference_mode(), torch.profiler.profile() as profile:
            image = log_mel_image(waveform, rates[0])
        operators.append(len(profile.events()))
    assert operators[1] < operators[0]
    log_mel_image(waveform, rates[0]).sum().backward()
    assert_same_bits(log_mel_image(waveform.detach(), rates[0]), image.clone())

    class Image(torch.nn.Module):
        def forward(self, x):
            return log_mel_image(x, rates[1])

    exported = torch.export.export(Image(), (waveform.detach(),)).module()
    torch.testing.assert_close(exported(waveform.detach()), log_mel_image(waveform.detach(), rates[1]))


SOUND = torch.zeros(16000)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], 16000), TypeError, "waveform must be a tensor, got list"),
        ((SOUND.short(), 16000), TypeError, "waveform must be float32 or float64, got torch.int16"),
        ((SOUND.half(), 16000), TypeError, "waveform must be float32 or float64, got torch.float16"),
        ((SOUND[0], 16000), ValueError, "waveform must be [*, samples] and not empty, got []"),
        ((SOUND[:0], 16000), ValueError, "waveform must be [*, samples] and not empty, got [0]"),
        ((SOUND[None][:0], 16000), ValueError, "waveform must be [*, samples] and not empty, got [0, 16000]"),
        (
            (SOUND[:2400], 16000),
            ValueError,
            "waveform must have at least 2401 samples (150 ms at sample_rate=16000), got 2400",
        ),
        ((SOUND, 16000.0), TypeError, "sample_rate must be an integer, got 16000.0"),
        ((SOUND, 0), ValueError, "sample_rate must be at least 2, got 0"),
        ((SOUND, -8000), ValueError, "sample_rate must be at least 2, got -8000"),
        ((SOUND, 10), ValueError, "window_ms must be at least one sample at sample_rate=10, got 25 ms"),
        ((SOUND, 16000, 0), ValueError, "size must be at least 1, got 0"),
        ((SOUND, 16000, True), TypeError, "size must be an integer, got True"),
    ],
)
def test_errors_of_the_image(arguments, error, message):
    with pytest.raises(error) as raised:
        log_mel_image(*arguments)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"waveform": None}, TypeError, "waveform must be a tensor, got NoneType"),
        ({"sample_rate": "16k"}, TypeError, "sample_rate must be an integer, got '16k'"),
        ({"window_ms": "25"}, TypeError, "window_ms must be a number of milliseconds, got '25'"),
        ({"window_ms": True}, TypeError, "window_ms must be a number of milliseconds, got True"),
        ({"window_ms": 0}, ValueError, "window_ms must be positive and finite, got 0"),
        ({"hop_ms": -10}, ValueError, "hop_ms must be positive and finite, got -10"),
        ({"hop_ms": math.nan}, ValueError, "hop_ms must be positive and finite, got nan"),
        ({"window_ms": math.inf}, ValueError, "window_ms must be positive and finite, got inf"),
        ({"hop_ms": 0.01}, ValueError, "hop_ms must be at least one sample at sample_rate=16000, got 0.01 ms"),
        ({"n_mels": 0}, ValueError, "n_mels must be at least 1, got 0"),
        ({"n_mels": 80.0}, TypeError, "n_mels must be an integer, got 80.0"),
        ({"n_fft": 256}, ValueError, "n_fft must be at least the window of 400 samples, got 256"),
        ({"n_fft": 512.0}, TypeError, "n_fft must be an integer, got 512.0"),
        (
            {"window_ms": 1000.5},
            ValueError,
            "waveform must have at least 9601 samples (600 ms at sample_rate=16000), got 9600",
        ),
    ],
)
def test_errors_of_the_spectrogram(changed, error, message):
    arguments = {"waveform": SOUND[:9600], "sample_rate": 16000, "window_ms": 25, "hop_ms": 10, "n_mels": 80}
    with pytest.raises(error) as raised:
        mel_spectrogram(**(arguments | changed))
    assert str(raised.value) == message


# --- the example -----------------------------------------------------------------------------------------------------


def write_video(path: Path, sound: bool, samples: int = 0) -> Path:
    av = pytest.importorskip("av", reason="needs the demo extra")
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=25)]
        streams[0].width, streams[0].height, streams[0].pix_fmt = 64, 48, "yuv420p"
        if sound:
            streams.append(container.add_stream("pcm_s16le", rate=16000, layout="mono"))
        for _ in range(8):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            container.mux(streams[0].encode(frame))
        if samples:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.int16), format="s16", layout="mono")
            frame.sample_rate = 16000
            container.mux(streams[1].encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return path


def test_unusable_input_of_the_example(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the demo extra")
    script = Path(__file__).parents[2] / "examples" / "tsam_audio_video.py"
    spec = importlib.util.spec_from_file_location("tsam_audio_video", script)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    unusable = {
        "does not exist": tmp_path / "nothing.mp4",
        "cannot be read as a video": Path(__file__),
        "has no sound, only video": write_video(tmp_path / "silent.mp4", sound=False),
        "waveform must have at least 2401 samples (150 ms at sample_rate=16000), got 1600": write_video(
            tmp_path / "short.mkv", sound=True, samples=1600
        ),
        "waveform must be [*, samples] and not empty, got [0]": write_video(tmp_path / "empty.mkv", sound=True),
    }
    for message, path in unusable.items():
        assert example.main(["--video", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(path) in error
        assert error.count("\n") == 1
