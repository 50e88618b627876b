"""Residual networks whose stream between blocks stays shifted; the public names are in :mod:`tsm_jit.residual`."""
