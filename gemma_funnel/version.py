"""The version, which a written checkpoint says."""

__version__ = "0.1.0"
