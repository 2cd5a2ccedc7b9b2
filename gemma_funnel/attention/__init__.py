"""Attention over streams: its definition and kernels."""
