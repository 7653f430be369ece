"""One table or slot in logical order: out of its stack, and into it, a block of rows at a time."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax._refs import is_ref, read
from embax._stacking.layout import of_table, physical_rows, take_table
from embax._stacking.plan import RowPlacement, TablePlan

BLOCK_BYTES = 64 << 20
"""Bytes of a block: what the conversion needs beside the array in logical order."""


def rows_by_number(function: Callable[..., jax.Array], array: jax.Array, *others: Any, writes: bool) -> jax.Array:
    """`function(array, *others)`, which reads or writes rows of a table by number.

    On meshes of explicit axes JAX asks how the result is sharded: as the table, or what was read on every device.
    """
    sharding = jax.typeof(array).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return function(array, *others)
    out = jax.sharding.NamedSharding(sharding.mesh, sharding.spec if writes else jax.P())
    on_auto_axes: Any = jax.sharding.auto_axes(function, out_sharding=out)
    return on_auto_axes(array, *others)


@functools.partial(jax.jit, static_argnames=("count", "columns", "num_sparsecores", "everywhere"))
def _take(
    stacked: jax.Array,
    first: Any,
    placement: RowPlacement,
    *,
    count: int,
    columns: tuple[int, ...],
    num_sparsecores: int,
    everywhere: jax.sharding.Sharding | None,
) -> jax.Array:
    stacked = read(stacked)
    ids = first + jnp.arange(count, dtype=jnp.int32)
    physical = physical_rows(ids, placement, stacked.shape[0], num_sparsecores)

    def take(stacked, physical):
        return stacked.at[physical, *map(slice, columns)].get(mode="promise_in_bounds")

    rows = rows_by_number(take, stacked, physical, writes=False)
    return rows if everywhere is None else jax.lax.with_sharding_constraint(rows, everywhere)


@functools.partial(jax.jit, static_argnames="num_sparsecores", donate_argnames="stacked")
def _put(stacked: jax.Array, rows: Any, first: Any, placement: RowPlacement, *, num_sparsecores: int) -> jax.Array:
    ids = first + jnp.arange(rows.shape[0], dtype=jnp.int32)
    physical = physical_rows(ids, placement, stacked.shape[0], num_sparsecores)

    def put(stacked, physical, rows):
        return stacked.at[physical, *map(slice, rows.shape[1:])].set(rows, unique_indices=True)

    return rows_by_number(put, stacked, physical, rows, writes=True)


@functools.partial(jax.jit, static_argnames="num_sparsecores")
def _put_into_ref(stacked: Any, rows: Any, first: Any, placement: RowPlacement, *, num_sparsecores: int) -> None:
    stacked[...] = _put(stacked[...], rows, first, placement, num_sparsecores=num_sparsecores)


def _blocks(table: TablePlan) -> tuple[int, list[np.int32]]:
    """Rows of a block, and the first row of each; the last overlaps the one before, so that all have one shape."""
    rows = table.vocabulary_size
    count = min(rows, max(1, BLOCK_BYTES // (4 * table.embedding_dim)))
    return count, [np.int32(min(first, rows - count)) for first in range(0, rows, count)]


def logical_blocks(stacked: Any, table: TablePlan, num_sparsecores: int) -> Iterator[tuple[slice, jax.Array]]:
    """The rows of a table or slot, an array or a ref, a block at a time. On several processes all must iterate; all get them."""
    count, firsts = _blocks(table)
    everywhere = None if stacked.sharding.is_fully_addressable else _replicated(stacked.sharding)
    columns = of_table(stacked.shape, table)[1:]
    for first in firsts:
        rows = _take(
            *(stacked, first, table.rows),
            count=count,
            columns=columns,
            num_sparsecores=num_sparsecores,
            everywhere=everywhere,
        )
        yield slice(int(first), int(first) + count), rows


def _replicated(sharding: Any) -> jax.sharding.NamedSharding:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise ValueError(f"A table is sharded over several processes by {sharding}; it must be a NamedSharding.")
    return jax.sharding.NamedSharding(sharding.mesh, jax.P())


def take_logical(stacked: Any, table: TablePlan, num_sparsecores: int) -> np.ndarray:
    """The values of a table or slot by row.

    Args:
        stacked: [rows, dim] or [rows] array of the stack, JAX (of this process) or NumPy, or a ref. A JAX array is copied out by
            blocks and never aliased: a NumPy view of it would make the next donated step copy it.
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.

    Returns:
        A new C-contiguous array [table.vocabulary_size, table.embedding_dim], or [table.vocabulary_size].
    """
    if isinstance(stacked, np.ndarray):
        return np.ascontiguousarray(take_table(stacked, table, num_sparsecores))
    values = np.empty(of_table(stacked.shape, table), np.float32)
    for rows, block in logical_blocks(stacked, table, num_sparsecores):
        values[rows] = np.asarray(block)
    return values


def put_logical(stacked: Any, values: np.ndarray, table: TablePlan, num_sparsecores: int) -> Any:
    """Puts a table or slot into its place, the inverse of `take_logical`.

    Args:
        stacked: [rows, dim] or [rows] array of the stack, which is donated, or a ref, which is written in place.
        values: floating point [table.vocabulary_size, table.embedding_dim], or [table.vocabulary_size].
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.

    Returns:
        The array of the stack, or the ref. It does not alias `values`, which may be freed.
    """
    count, firsts = _blocks(table)
    for first in firsts:
        rows = np.asarray(values[first : first + count], np.float32)
        if is_ref(stacked):
            _put_into_ref(stacked, rows, first, table.rows, num_sparsecores=num_sparsecores)
        else:
            stacked = _put(stacked, rows, first, table.rows, num_sparsecores=num_sparsecores)
    jax.block_until_ready(stacked)
    return stacked
