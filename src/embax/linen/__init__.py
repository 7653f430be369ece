"""Layers for Flax Linen: `embax.linen.embed`."""

from embax.linen import embed as embed
from embax.linen import embed_optimizer as embed_optimizer
