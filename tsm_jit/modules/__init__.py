"""``nn.Module`` classes: drop-in modules for TSM and TSAM, non-local blocks, video models, streaming."""
