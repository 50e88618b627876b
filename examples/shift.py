"""The operator: out of place, in place, other plans, gradients. Runs on a GPU if there is one."""

import torch

import tsm_jit

device = "cuda" if torch.cuda.is_available() else "cpu"

x = torch.randn(2 * 8, 64, 56, 56, device=device)  # two clips of eight frames
y = tsm_jit.temporal_shift(x, n_segment=8)  # TSM: 8 channels from the next frame, 8 from the previous one
assert torch.equal(y[0, :8], x[1, :8])
assert torch.equal(y[1, 8:16], x[0, 8:16])

channels_last = x.to(memory_format=torch.channels_last)
z = tsm_jit.temporal_shift(channels_last, n_segment=8, inplace=True)  # the layout stays, nothing is allocated
assert z is channels_last
assert torch.equal(z, y)

tokens = torch.randn(2 * 8, 196, 768, device=device)  # a vision transformer's
tsm_jit.temporal_shift(tokens, n_segment=8, channel_dim=-1)

leaf = x.clone().requires_grad_()
tsm_jit.shift_groups(leaf, 8, [(16, +2), (16, -1)], padding="replicate").square().sum().backward()
print(f"gradient of shape {tuple(leaf.grad.shape)} on {device}: {tsm_jit.info()['devices'][device]}")
