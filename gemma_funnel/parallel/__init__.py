"""Meshes, where arrays live on them, and several processes."""
