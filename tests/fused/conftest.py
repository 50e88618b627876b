"""Fixtures of the tests of fused networks."""

import pytest

from tsm_jit.fused import execute


@pytest.fixture(params=[False, True], ids=["as on the CPU", "as on a GPU"])
def merged(request, monkeypatch, device):
    """Norms are differentiated together with the block's end where kernels make sums by channel: here, also where not,
    and not where they do."""
    if request.param != (device.type == "cuda"):
        monkeypatch.setattr(execute, "has_channel_sums", lambda x: request.param)
    return request.param
