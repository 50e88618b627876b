"""Network surgery and checkpoint conversion for the architectures in ``architectures.py``."""
