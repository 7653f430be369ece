"""Functions with shapes, annotated the way embax's own modules are."""

import jax.numpy as jnp

from embax._types import Array, Float, Int


def take(table: Float[Array, "vocab dim"], ids: Int[Array, " batch"]) -> Float[Array, "batch dim"]:
    """Rows of a table."""
    return table[ids]


def take_first(table: Float[Array, "vocab dim"], ids: Int[Array, " batch"]) -> Float[Array, "batch dim"]:
    """Rows of a table, with a result that is not of the shape it promises."""
    return table[ids[:1]]


def ones(rows: int, dim: str) -> Float[Array, "rows dim"]:
    """Takes what its annotations forbid and checks it itself."""
    return jnp.ones((rows, int(dim)))
