"""The layer for Flax Linen."""
