"""The layer for Flax NNX."""
