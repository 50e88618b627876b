"""Fused residual networks with shifted activations. The public names are in :mod:`tsm_jit.residual`."""
