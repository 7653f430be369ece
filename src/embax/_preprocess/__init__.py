"""Packing of ids on the host."""
