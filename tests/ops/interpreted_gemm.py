"""The kernels of ``shift_gemm`` in Triton's interpreter on the CPU, for ``test_shift_conv.py``: random products.

First of whole clips, then of clips whose frames are split over two or three processes.
"""

import random
import tempfile

import torch
import torch.distributed as dist
from torch.nn.functional import conv2d

import tsm_jit
from tsm_jit import ops, plans
from tsm_jit.ops import shift_conv
from tsm_jit.ops.sharded_shift import TimeShard

WHOLE = TimeShard(0, 1, "")


def check(seed: int, shard: TimeShard = WHOLE) -> None:
    """Compares a product of the frames of this rank, with PyTorch's convolution of whole clips in float64."""
    random.seed(seed)
    torch.manual_seed(seed)
    length, clips, stride = shard.ranks + random.randint(0, 4), random.randint(1, 3), random.choice((1, 2))
    channels, outputs = 8 * random.randint(1, 8), 8 * random.randint(1, 6)
    left, groups = channels // 8, []
    for _ in range(random.randint(1, 4)):
        width = random.randint(0, left)
        left -= width
        groups.append((8 * width, random.randint(-length, length)))
    padding, shifted = random.choice(plans.PADDINGS), random.randint(1, length)
    tokens = stride == 1 and random.random() < 0.5
    prefix = random.randint(0, 1) if tokens else 0
    height, width = random.randint(1, 5), 1 if tokens else random.randint(1, 5)
    x = torch.randn(length * clips, channels, height, width, dtype=torch.float64).requires_grad_()
    weight = torch.randn(outputs, channels, 1, 1, dtype=torch.float64).requires_grad_()
    moved = tsm_jit.shift_groups(x[:, :, prefix:], length, groups, padding=padding, n_segment_shifted=shifted)
    z = conv2d(torch.cat([x[:, :, :prefix], moved], 2), weight, None, stride)
    dz = torch.randn_like(z)
    dx, dw = torch.autograd.grad(z, (x, weight), dz)
    relu = random.random() < 0.3
    z = z.relu() if relu else z

    plan = plans.Shift(length, shifted, 2 if tokens else 1, padding, tuple(groups)).canonical().encode()
    layer = ops.Layer(plan, prefix) if tokens else ops.Layer.conv1x1(plan, stride)
    if shard.ranks > 1:
        layer = layer._replace(shard=shard)
    held = shard.frames(length)

    def rows(frames: torch.Tensor) -> torch.Tensor:
        """The frames of this rank, as rows of channels."""
        own = frames.detach().unflatten(0, (clips, length))[:, held.start : held.stop].flatten(0, 1)
        own = own.permute(0, 2, 3, 1).contiguous()
        return own.flatten(1, 2) if tokens else own

    def frames(rows: torch.Tensor) -> torch.Tensor:
        return rows if tokens else rows.permute(0, 3, 1, 2)

    own = frames(rows(x).float())
    product = shift_conv.Product(own.shape, outputs, layer, torch.float32, torch.device("cpu"), processors=5)
    w, own_dz = weight.detach().float().flatten(1), frames(rows(dz).float())
    halo = product.halo(own)
    close(product.forward(own, halo, w, None, relu), frames(rows(z)))
    own_dw = product.weight_grad(own_dz, own, halo)
    if shard.ranks > 1:
        dist.all_reduce(own_dw)
    close(own_dw.flatten(1), dw.flatten(1))
    close(product.input_grad(own_dz, w), frames(rows(dx)))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def check_on_rank(rank: int, ranks: int, folder: str, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for seed in seeds:
        print("seed", seed, "on rank", rank, "of", ranks, flush=True)
        check(seed, TimeShard(rank, ranks, dist.group.WORLD.group_name))
    dist.destroy_process_group()


def new_seeds(count: int) -> list[int]:
    return [random.SystemRandom().randrange(2**31) for _ in range(count)]


if __name__ == "__main__":
    for seed in new_seeds(8):
        print("seed", seed)
        check(seed)
    for ranks in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(check_on_rank, (ranks, folder, new_seeds(8)), ranks)
