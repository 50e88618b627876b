"""Module and network surgery of TSAM, temporal shift with an audio modality.

Names, constructors, state-dict keys and placement match https://github.com/aav-antonov/TSAM. A clip has ``n_segment``
segments. The first ``n_segment_shifted`` segments are video frames, which are shifted. The others are spectrograms of
the audio as images, which do not change.

Example::

    net = torchvision.models.resnet50()
    tsm_jit.tsam.make_Shift(net, 9, 8, f_div=8, shift_depth=2, n_insert=1, m_insert=0)
    scores = net(torch.randn(9, 3, 112, 112))  # 8 frames and 1 spectrogram
"""

from tsm_jit.convert.tsam import make_Shift
from tsm_jit.modules.tsam import TemporalShift

__all__ = ["TemporalShift", "make_Shift"]
