"""The layer for Flax NNX. Needs the extra `embax[flax]`."""

from embax.nnx import embed as embed
