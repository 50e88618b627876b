"""Network surgery and checkpoints, for the architectures of ``architectures.py``."""
