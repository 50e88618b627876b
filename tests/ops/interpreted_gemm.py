"""The kernels of ``shift_gemm`` in Triton's interpreter on the CPU, for ``test_shift_conv.py``: random products."""

import random

import torch
from support import random_groups
from torch.nn.functional import conv2d

import tsm_jit
from tsm_jit import ops, plans
from tsm_jit.ops import shift_conv


def check(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    length, clips, stride = random.randint(1, 5), random.randint(1, 3), random.choice((1, 2))
    channels, outputs = 8 * random.randint(1, 8), 8 * random.randint(1, 6)
    groups = random_groups(channels, 8, length)
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

    plan = plans.Shift(length, shifted, 2 if tokens else 1, padding, tuple(groups)).canonical()
    rows = [each.detach().float().permute(0, 2, 3, 1).contiguous() for each in (x, dz)]
    if tokens:
        rows = [each.flatten(1, 2) for each in rows]
    shape = rows[0].shape if tokens else x.shape
    layer = ops.Layer(plan.encode(), prefix) if tokens else ops.Layer.conv1x1(plan.encode(), stride)
    product = shift_conv.Product(shape, outputs, layer, torch.float32, torch.device("cpu"), processors=5)
    inputs = [each if tokens else each.permute(0, 3, 1, 2) for each in rows]
    w = weight.detach().float().flatten(1)
    relu = random.random() < 0.3
    actual = product.forward(inputs[0], None, w, None, relu)
    close(actual if tokens else actual.permute(0, 2, 3, 1), (z.relu() if relu else z).permute(0, 2, 3, 1))
    close(product.weight_grad(inputs[1], inputs[0], None), dw)
    actual = product.input_grad(inputs[1], w)
    close(actual if tokens else actual.permute(0, 2, 3, 1), dx.permute(0, 2, 3, 1))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double().flatten(), expected.flatten(), rtol=1e-4, atol=1e-4)


for seed in [random.SystemRandom().randrange(2**31) for _ in range(8)]:
    print("seed", seed)
    check(seed)
