"""Cases of 1x1 convolutions and linear layers. Their GPU kernels read shifted frames, also those of other ranks."""

import copy

import torch
import torch.distributed as dist
from support import error
from torch import nn
from torch.utils.checkpoint import checkpoint

import tsm_jit
from time_parallel.cases import ON_GPUS, case, share
from tsm_jit import ops
from tsm_jit.distributed import parallelize_time, shard_frames

LENGTH = 7
LAYERS = {
    "TSM": lambda: tsm_jit.TemporalShift(nn.Conv2d(64, 72, 1, bias=False), LENGTH, 8),
    "stride": lambda: tsm_jit.TemporalShift(nn.Conv2d(64, 64, 1, stride=2), LENGTH, 4, inplace=True),
    "TSAM": lambda: tsm_jit.tsam.TemporalShift(nn.Conv2d(64, 64, 1), LENGTH, 5, 4, 2),
    "tokens": lambda: tsm_jit.TokenShift(nn.Linear(64, 64), LENGTH, 8, num_prefix_tokens=1),
}


def frames_of(kind: str, side: int) -> torch.Tensor:
    """Clips ``[N, T, ...]``. Of a small side, PyTorch's own products compute the gradients."""
    if kind == "tokens":
        return torch.randn(2, LENGTH, side * side, 64)
    x = torch.randn(2 * LENGTH, 64, side, side).contiguous(memory_format=torch.channels_last)
    return x.unflatten(0, (2, LENGTH))


def run(layer, frames, dz, how: str) -> list[torch.Tensor]:
    """The output and all gradients, of a checkpoint too. With ``"twice"``, also gradients of a function of these."""
    x = frames.clone(memory_format=torch.preserve_format).requires_grad_()
    z = checkpoint(layer, x, use_reentrant=False) if how == "checkpoint" else layer(x)
    grads = torch.autograd.grad(z, [x, *layer.parameters()], dz, create_graph=how == "twice")
    if how == "twice":
        weight = layer.shifted_module().weight
        penalty = grads[0].square().sum() + (grads[1] * weight.detach()).sum()  # a sum over ranks
        grads = [*grads, *torch.autograd.grad(penalty, (x, weight))]
    return [z.detach(), *(each.detach() for each in grads)]


def kernels_serve(layer, x) -> bool:
    net, shift = layer.shifted_module(), layer.shift_of(layer.whole_clips(x))
    prefix, convolution = getattr(layer, "num_prefix_tokens", 0), None
    if isinstance(net, nn.Conv2d):
        convolution = (net.stride, net.padding, net.dilation, net.groups)
    with torch.no_grad():
        whole = ops.Layer(shift, prefix, convolution, layer.split_shard())
        return ops.shifted_layer(x, net.weight, net.bias, whole) is not None


@case((2, 3, 4), on=ON_GPUS, kind="TSM")
@case((2,), on=ON_GPUS, kind="stride")
@case((2, 3), on=ON_GPUS, kind="TSAM")
@case((2,), on=ON_GPUS, kind="tokens")
def products(mesh, kind):
    for side, dtype, how in (
        (90, torch.bfloat16, "once"),
        (90, torch.float16, "twice"),
        (6, torch.bfloat16, "once"),
        (90, torch.bfloat16, "checkpoint"),
    ):
        exact_layer = LAYERS[kind]().double()
        for weight in exact_layer.parameters():  # of values that all dtypes have
            weight.data = weight.data.bfloat16().double()
        clips = frames_of(kind, side).bfloat16()
        whole = copy.deepcopy(exact_layer).to(dtype)
        split = copy.deepcopy(whole)
        parallelize_time(split, mesh)
        frames, mine = clips.flatten(0, 1), shard_frames(clips, mesh).to(dtype)
        if kind != "tokens":
            mine = mine.contiguous(memory_format=torch.channels_last)
        assert kernels_serve(split, mine)
        dz = torch.randn_like(exact_layer(frames.double())).bfloat16()
        own_dz = shard_frames(dz.to(dtype).unflatten(0, (2, LENGTH)), mesh)
        exact = run(exact_layer, frames.double(), dz.double(), how)
        expected = run(whole, frames.to(dtype), dz.to(dtype), how)
        actual = run(split, mine, own_dz, how)
        for number, (a, b, c) in enumerate(zip(actual, expected, exact, strict=True)):
            if a.shape == c.shape:  # the gradient of a weight is the sum over ranks
                a = a.double().contiguous()
                dist.all_reduce(a, group=mesh.get_group())
            else:
                b, c = [share(each.unflatten(0, (2, LENGTH)), mesh) for each in (b, c)]
            # Each rank rounds its part of the gradient of a weight, and sums may have another order.
            assert error(a, c) <= 3 * error(b, c) + 1e-6, (side, dtype, how, number, error(a, c), error(b, c))
