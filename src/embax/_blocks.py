"""One table or slot in logical order: out of its stack, and into it, a block of rows at a time."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax._stacking.layout import of_table, physical_rows, take_table
from embax._stacking.plan import RowPlacement, TablePlan
from embax._variables import _fill

BLOCK_BYTES = 64 << 20
"""Bytes of a block: what the conversion needs beside the array in logical order."""


@functools.partial(jax.jit, static_argnames=("count", "columns", "num_sparsecores"))
def _take(
    stacked: jax.Array,
    first: Any,
    placement: RowPlacement,
    *,
    count: int,
    columns: tuple[int, ...],
    num_sparsecores: int,
) -> jax.Array:
    ids = first + jnp.arange(count, dtype=jnp.int32)
    physical = physical_rows(ids, placement, stacked.shape[0], num_sparsecores)
    return stacked.at[physical, *map(slice, columns)].get(mode="promise_in_bounds")


@functools.partial(jax.jit, static_argnames="num_sparsecores", donate_argnames="stacked")
def _put(stacked: jax.Array, rows: Any, first: Any, placement: RowPlacement, *, num_sparsecores: int) -> jax.Array:
    ids = first + jnp.arange(rows.shape[0], dtype=jnp.int32)
    physical = physical_rows(ids, placement, stacked.shape[0], num_sparsecores)
    return stacked.at[physical, *map(slice, rows.shape[1:])].set(rows, unique_indices=True)


def _blocks(table: TablePlan) -> tuple[int, list[np.int32]]:
    """Rows of a block, and the first row of each; the last overlaps the one before, so that all have one shape."""
    rows = table.vocabulary_size
    count = min(rows, max(1, BLOCK_BYTES // (4 * table.embedding_dim)))
    return count, [np.int32(min(first, rows - count)) for first in range(0, rows, count)]


def take_logical(stacked: Any, table: TablePlan, num_sparsecores: int) -> np.ndarray:
    """The values of a table or slot by row.

    Args:
        stacked: [rows, dim] or [rows] array of the stack, JAX or NumPy. A JAX array is copied out by blocks and never aliased: a
            NumPy view of it would make the next donated step copy it.
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.

    Returns:
        A new C-contiguous array [table.vocabulary_size, table.embedding_dim], or [table.vocabulary_size].
    """
    if isinstance(stacked, np.ndarray):
        return np.ascontiguousarray(take_table(stacked, table, num_sparsecores))
    values = np.empty(of_table(stacked.shape, table), np.float32)
    count, firsts = _blocks(table)
    for first in firsts:
        columns = values.shape[1:]
        rows = _take(stacked, first, table.rows, count=count, columns=columns, num_sparsecores=num_sparsecores)
        values[first : first + count] = np.asarray(rows)
    return values


def empty_stack(shape: tuple[int, ...]) -> jax.Array:
    """An array of a stack, 0 everywhere. No id reads the rows and columns of padding, so 0 will do for slots too."""
    if len(shape) == 1:
        return jnp.zeros(shape, jnp.float32)
    return _fill(jnp.zeros(shape[1], jnp.float32), shape[0])


def put_logical(stacked: jax.Array, values: np.ndarray, table: TablePlan, num_sparsecores: int) -> jax.Array:
    """Puts a table or slot into its place, the inverse of `take_logical`.

    Args:
        stacked: [rows, dim] or [rows] array of the stack; it is donated.
        values: floating point [table.vocabulary_size, table.embedding_dim], or [table.vocabulary_size].
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.

    Returns:
        The array of the stack. It does not alias `values`, which may be freed.
    """
    count, firsts = _blocks(table)
    for first in firsts:
        rows = np.asarray(values[first : first + count], np.float32)
        stacked = _put(stacked, rows, first, table.rows, num_sparsecores=num_sparsecores)
    return stacked.block_until_ready()
