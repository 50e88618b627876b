"""The module and network surgery of TSAM, temporal shift with an audio modality, under its names.

Names, constructors, state-dict keys and placement are those of https://github.com/aav-antonov/TSAM. A clip is
``n_segment`` segments, of which the first ``n_segment_shifted`` are video frames that are shifted among each other; the
others, spectrograms of the sound as images, pass as they are.
"""

from tsm_jit.convert.tsam import make_Shift
from tsm_jit.modules.tsam import TemporalShift

__all__ = ["TemporalShift", "make_Shift"]
