"""Measurements on a GPU, and the kit that brings them to a machine without package access (docs/gpu.md)."""
