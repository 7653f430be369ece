"""Layers for Flax."""
