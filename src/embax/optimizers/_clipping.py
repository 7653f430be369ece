"""Clipping of the rows of a table."""

import jax
import jax.numpy as jnp
import numpy as np


def apply_clipping(values: jax.Array, min_value: float | None = None, max_value: float | None = None) -> jax.Array:
    """`values`, float32 of any shape, clipped to `[min_value, max_value]`; None is no limit, and NaN stays."""
    if min_value is not None:
        values = jnp.maximum(values, np.float32(min_value))
    if max_value is not None:
        values = jnp.minimum(values, np.float32(max_value))
    return values
