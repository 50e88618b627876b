"""More elements than 32 bits count, in one byte each: around 2^31 and 2^32, where an index would wrap."""

import math
import os

import pytest
import torch

import tsm_jit

SHAPES = {
    # [N*T, C, L] or [N*T, C] of one-byte elements
    "a long plane": (4, 8, 2**26 + 2**11 + 7),
    "many clips": (2**21, 1031),
    "many channels": (4, 2**29 + 1031),
}


def room_for(device: torch.device, size: int) -> None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of memory")


def random_bytes(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Repeated with a period that no stride is a multiple of: many times faster than so many random numbers."""
    x = torch.empty(shape, dtype=torch.uint8, device=device)
    tile = torch.randint(0, 256, (1_000_003,), dtype=torch.uint8, device=device)
    flat = x.view(-1)
    whole = flat.numel() // tile.numel() * tile.numel()
    flat[:whole].view(-1, tile.numel()).copy_(tile)
    flat[whole:] = tile[: flat.numel() - whole]
    return x


def check(x: torch.Tensor, shift) -> None:
    """``circular`` by folds of a quarter, and the same in place."""
    out = shift(x)
    clips, moved = x.unflatten(0, (-1, 4)), out.unflatten(0, (-1, 4))
    fold = x.shape[1] // 4
    for t in range(4):
        assert torch.equal(moved[:, t, :fold], clips[:, (t + 1) % 4, :fold])
        assert torch.equal(moved[:, t, fold : 2 * fold], clips[:, t - 1, fold : 2 * fold])
        assert torch.equal(moved[:, t, 2 * fold :], clips[:, t, 2 * fold :])
    tsm_jit.temporal_shift(x, 4, fold_div=4, padding="circular", inplace=True)
    assert torch.equal(x, out)


def circular(x: torch.Tensor) -> torch.Tensor:
    return tsm_jit.temporal_shift(x, 4, fold_div=4, padding="circular")


@pytest.mark.feature("more than 2^31 elements")
@pytest.mark.parametrize("name", SHAPES)
def test_more_than_2_to_the_31_elements(device, name):
    shape = SHAPES[name] if device.type == "cpu" else (2 * SHAPES[name][0], *SHAPES[name][1:])  # and than 2^32
    assert math.prod(shape) > 2**31
    room_for(device, 4 * math.prod(shape))
    check(random_bytes(shape, device), circular)


@pytest.mark.feature("more than 2^31 elements", column="compiled")
def test_compiled(device):
    shape = SHAPES["many clips"]
    room_for(device, 4 * math.prod(shape))
    check(random_bytes(shape, device), torch.compile(circular, fullgraph=True))
