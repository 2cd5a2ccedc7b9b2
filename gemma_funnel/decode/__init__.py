"""Decoding with caches, and how tokens are drawn."""
