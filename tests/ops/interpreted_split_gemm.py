"""The kernels of ``shift_gemm`` in Triton's interpreter, for clips whose frames are split over two or three processes.

Random products on CPUs, for ``test_shift_conv.py``. The last rank may shift before PyTorch's own product, as it would
with a hook. Ranks compare each exchange there, so it must send and receive the same messages.
"""

import contextlib
import os
import random
import tempfile

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import random_groups
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tsm_jit import ops, plans
from tsm_jit.ops import shift_conv
from tsm_jit.ops.sharded_shift import sharded_shift
from tsm_jit.ops.time_shard import TimeShard


class Case:
    """A product of shifted frames or tokens. All ranks have the same one."""

    def __init__(self, seed: int, ranks: int):
        random.seed(seed)
        torch.manual_seed(seed)
        self.length, self.clips, self.stride = ranks + random.randint(0, 4), random.randint(1, 2), random.choice((1, 2))
        channels, outputs = 8 * random.randint(2, 6), 8 * random.randint(1, 3)
        groups = random_groups(channels, 8, self.length)
        self.tokens = self.stride == 1 and random.random() < 0.4
        self.prefix = random.randint(0, 1) if self.tokens else 0
        shape = (random.randint(2, 4),) if self.tokens else (random.randint(1, 4), random.randint(1, 4))
        size = (*shape, channels) if self.tokens else (channels, *shape)
        self.x = torch.randn(self.clips * self.length, *size)
        self.weight = torch.randn(outputs, channels, *([] if self.tokens else [1, 1]))
        shifted, padding = random.randint(1, self.length), random.choice(plans.PADDINGS)
        plan = plans.Shift(self.length, shifted, 2 if self.tokens else 1, padding, tuple(groups))
        self.shift = plan.canonical().encode()
        self.is_small, self.creates_graph, self.in_checkpoint = [random.random() < 0.5 for _ in range(3)]
        # With both, each kind of layer is computed again at another time.
        self.one_rank_shifts = random.random() < 0.5 and not (self.creates_graph and self.in_checkpoint)

    def separate(self, x: Tensor, weight: Tensor, shift) -> Tensor:
        y = ops.shift_tokens(x, self.shift, self.prefix, shift)
        return F.linear(y, weight) if self.tokens else F.conv2d(y, weight, None, self.stride)

    def product(self, x: Tensor, weight: Tensor, shard: TimeShard) -> Tensor:
        layer = ops.Layer(self.shift, self.prefix) if self.tokens else ops.Layer.conv1x1(self.shift, self.stride)
        cpu = torch.device("cpu")
        product = shift_conv.Product(x.shape, len(weight), layer._replace(shard=shard), x.dtype, cpu, processors=5)
        product.is_small = self.is_small
        return product(x, weight, None)

    def gradients(self, z: Tensor, x: Tensor, weight: Tensor, dz: Tensor) -> list[Tensor]:
        """Of ``x`` and the weight, and of a function of these: sums over ranks, but those of ``x``."""
        grads = torch.autograd.grad(z, (x, weight), dz, create_graph=self.creates_graph)
        if self.creates_graph:
            penalty = grads[0].square().sum() + (grads[1] * weight.detach()).sum()
            grads = (*grads, *torch.autograd.grad(penalty, (x, weight)))
        return [grad.detach() for grad in grads]

    def cut(self, frames: Tensor, shard: TimeShard) -> Tensor:
        """The frames of this rank."""
        held = shard.frames(self.length)
        own = frames.detach().unflatten(0, (self.clips, self.length))[:, held.start : held.stop].flatten(0, 1)
        return own.contiguous(memory_format=torch.contiguous_format if self.tokens else torch.channels_last)


def check(seed: int, shard: TimeShard) -> None:
    case = Case(seed, shard.ranks)
    x, weight = case.x.double().requires_grad_(), case.weight.double().requires_grad_()
    z = case.separate(x, weight, ops.temporal_shift)
    dz = torch.randn_like(z)
    expected = case.gradients(z, x, weight, dz)
    own_x, own_weight = case.cut(case.x, shard).requires_grad_(), case.weight.clone().requires_grad_()

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        if case.one_rank_shifts and shard.rank == shard.ranks - 1:
            return case.separate(x, weight, lambda x, shift: sharded_shift(x, shift, shard))
        return case.product(x, weight, shard)

    if case.in_checkpoint:
        own_z = checkpoint(layer, own_x, own_weight, use_reentrant=False)
    else:
        own_z = layer(own_x, own_weight)
    close(own_z, case.cut(z, shard))
    for number, grad in enumerate(case.gradients(own_z, own_x, own_weight, case.cut(dz, shard).float())):
        if number % 2:
            grad = grad.contiguous()
            dist.all_reduce(grad)
            close(grad, expected[number])
        else:
            close(grad, case.cut(expected[number], shard))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-3)  # of sums of squares in float32


def check_on_rank(rank: int, ranks: int, folder: str, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    # There is no GPU whose device would be the current one.
    shift_conv.current_device = lambda: None  # type: ignore[assignment,return-value]
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for seed in seeds:
        print("seed", seed, "on rank", rank, "of", ranks, flush=True)
        check(seed, TimeShard(rank, ranks, dist.group.WORLD.group_name, "a layer"))
    dist.barrier()
    os._exit(0)  # without the end of gloo's threads, which may abort a process


if __name__ == "__main__":
    for ranks in (2, 3):
        seeds = [random.SystemRandom().randrange(2**31) for _ in range(8)]
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(check_on_rank, (ranks, folder, seeds), ranks)
