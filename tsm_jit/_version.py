"""The version of the package. The only place that has it."""

__version__ = "0.1.0"
