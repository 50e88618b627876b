"""Cases of single shifts."""

import random

import pytest
import torch
from support import assert_same_bits
from torch import nn

import tsm_jit
from time_parallel.cases import Groups, case, close, share
from tsm_jit import reference
from tsm_jit.distributed import parallelize_time, shard_frames
from tsm_jit.plans import Shift


def random_shift(padding: str, ranks: int) -> Shift:
    """Many groups, distances beyond a rank's frames, frames that do not take part."""
    length = random.randint(ranks, 4 * ranks)
    shifted = random.choice((length, random.randint(1, length)))
    plan = tuple((random.randint(0, 3), random.randint(-length - 1, length + 1)) for _ in range(random.randint(1, 5)))
    return Shift(length, shifted, 1, padding, ((2, 1), (1, -1), *plan))


@case((2, 3, 4), padding="zeros")
@case((2, 3, 4), padding="keep")
@case((2, 3, 4), padding="replicate")
@case((2, 3, 4), padding="circular")
def plans(mesh, padding):
    for _ in range(4):
        shift = random_shift(padding, mesh.size())
        channels = sum(width for width, _ in shift.plan) + random.randint(0, 2)
        x = torch.randn(2, shift.n_segment, channels, 2, 3, dtype=torch.float64)
        weight, tangent = torch.randn_like(x), torch.randn_like(x)
        if random.random() < 0.5:
            x = x.to(memory_format=torch.channels_last_3d)
        net = Groups(nn.Identity(), shift)
        parallelize_time(net, mesh)
        mine = shard_frames(x, mesh).requires_grad_()
        seed = shard_frames(weight, mesh).requires_grad_()
        out = net(mine)
        assert_same_bits(out, share(reference.temporal_shift(x.flatten(0, 1), shift).view_as(x), mesh))
        (grad,) = torch.autograd.grad(out, mine, seed, create_graph=True)
        expected = reference.temporal_shift_backward(weight.flatten(0, 1), shift).view_as(x)
        if padding == "replicate":
            close(grad, share(expected, mesh))  # sums in another order
        else:
            assert_same_bits(grad, share(expected, mesh))
        (twice,) = torch.autograd.grad(grad, seed, shard_frames(tangent, mesh))
        assert_same_bits(twice, share(reference.temporal_shift(tangent.flatten(0, 1), shift).view_as(x), mesh))


@case((3,), dtype=torch.bfloat16)
@case((3,), dtype=torch.bool)
@case((3,), dtype=torch.complex64)
@case((3,), dtype=torch.float8_e5m2)
def dtypes(mesh, dtype):
    shift = Shift(7, 6, 1, "circular", ((2, 1), (1, -2)))
    x = (3 * torch.randn(1, 7, 4, 2, 1)).to(dtype)
    if dtype.is_complex:
        x = x.conj()  # a view, whose memory has other values
    net = Groups(nn.Identity(), shift)
    parallelize_time(net, mesh)
    assert_same_bits(net(shard_frames(x, mesh)), share(reference.temporal_shift(x[0], shift)[None], mesh))


@case((2,))
def clips_and_strides(mesh):
    """Five dimensions; no clip at all; an expanded tensor and an expanded gradient."""
    shift = tsm_jit.TemporalShift(nn.Identity(), 5, 4)
    parallelize_time(shift, mesh)
    x = torch.randn(3, 5, 8, 2, 1)
    expected = tsm_jit.temporal_shift(x, fold_div=4)
    mine = torch.tensor_split(x, 2, 1)[mesh.get_local_rank()].requires_grad_()
    out = shift(mine)
    assert_same_bits(out.flatten(0, 1), share(expected, mesh))
    out.sum().backward()
    whole = x.clone().requires_grad_()
    tsm_jit.temporal_shift(whole, fold_div=4).sum().backward()
    assert_same_bits(mine.grad.flatten(0, 1), share(whole.grad, mesh))
    expanded = shard_frames(x, mesh).expand(-1, -1, 2, 6)
    assert_same_bits(shift(expanded), share(expected, mesh).expand(-1, -1, 2, 6))
    assert shift(shard_frames(x[:0], mesh)).shape == (0, 8, 2, 1)


@case((2,))
def batched_gradients(mesh):
    shift = tsm_jit.TemporalShift(nn.Identity(), 5, 4)
    parallelize_time(shift, mesh)
    mine = shard_frames(torch.randn(1, 5, 8, 2, 1), mesh).requires_grad_()
    out = shift(mine)
    with pytest.raises(NotImplementedError, match="is_grads_batched must be False"):
        torch.autograd.grad(out, mine, torch.randn(3, *out.shape), is_grads_batched=True)


@case((3,), dtype=torch.bfloat16)
@case((3,), dtype=torch.float8_e5m2)
def sums_of_few_bits(mesh, dtype):
    """Up to six gradients meet in one frame. Their sum is rounded once, as in one process."""
    for padding in ("keep", "replicate"):
        shift = Shift(7, 6, 1, padding, ((2, 1), (1, 5), (1, -2)))
        net = Groups(nn.Identity(), shift)
        parallelize_time(net, mesh)
        x, grad = torch.randint(-300, 300, (2, 1, 7, 4, 2, 1)).to(dtype)  # float32 sums of whole numbers are exact
        mine = shard_frames(x, mesh).requires_grad_()
        (actual,) = torch.autograd.grad(net(mine), mine, shard_frames(grad, mesh))
        assert_same_bits(actual, share(reference.temporal_shift_backward(grad[0], shift)[None], mesh))
