"""The version, which a checkpoint names."""

__version__ = "0.2.0"
