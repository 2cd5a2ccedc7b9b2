"""The version, which a written checkpoint says."""

__version__ = "0.2.0.dev0"
