"""``nn.Module`` classes: drop-ins for TSM and TSAM, non-local blocks, clips and streams."""
