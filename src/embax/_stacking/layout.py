"""Where the rows of a table lie in its stack: exact inverse maps between logical and physical order.

With `N` SparseCores, row `r` of a table lies on SparseCore `(r + rotation) % N`, at row `row_offset_in_shard + r // N`
there; the stack holds the rows of SparseCore 0, then those of SparseCore 1, and so on.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax._stacking.plan import RowPlacement, TablePlan


def physical_rows(ids: Any, placement: RowPlacement, num_rows: int, num_sparsecores: int) -> Any:
    """The rows of the stack that hold rows `ids` of a table.

    Args:
        ids: int or integer array of any shape, NumPy or JAX, each in `[0, vocabulary_size)`.
        placement: the table's place.
        num_rows: rows of the stack.
        num_sparsecores: SparseCores that it is laid out for.
    """
    sparsecore = (ids % num_sparsecores + placement.rotation) % num_sparsecores
    return sparsecore * (num_rows // num_sparsecores) + placement.row_offset_in_shard + ids // num_sparsecores


def logical_rows(
    rows: Any, placements: Sequence[RowPlacement], num_rows: int, num_sparsecores: int
) -> tuple[Any, Any, Any]:
    """The tables and their rows that rows `rows` of the stack hold, the inverse of `physical_rows`.

    Args:
        rows: integer array of any shape, NumPy or JAX, each in `[0, num_rows)`.
        placements: the places of all tables of the stack, by ascending `row_offset_in_shard`.
        num_rows: rows of the stack.
        num_sparsecores: SparseCores that it is laid out for.

    Returns:
        Three arrays like `rows`: index into `placements`; row of that table; and whether it is one, and not padding.
    """
    xp: Any = jnp if isinstance(rows, jax.Array) else np
    columns: Any = [xp.asarray(column, rows.dtype) for column in zip(*placements, strict=True)]
    vocabularies, offsets, rotations = columns
    sparsecore, row = divmod(rows, num_rows // num_sparsecores)
    table = xp.clip(xp.searchsorted(offsets, row, side="right") - 1, 0, len(placements) - 1)
    ids = (row - offsets[table]) * num_sparsecores + (sparsecore - rotations[table]) % num_sparsecores
    return table, ids, (ids >= 0) & (ids < vocabularies[table])


def of_table(shape: tuple[int, ...], table: TablePlan) -> tuple[int, ...]:
    """The shape of one table in an array of `shape`, [rows, dim], or [rows] of one value a row, of its stack."""
    return (table.vocabulary_size, table.embedding_dim)[: len(shape)]


def _columns(array: Any, table: TablePlan) -> Any:
    """The columns of a table in the last dimension of [..., dim] shards; one value a row has none."""
    return (..., slice(table.embedding_dim)) if array.ndim == 3 else ...


def take_table(stacked: Any, table: TablePlan, num_sparsecores: int) -> Any:
    """The rows and columns of one table, in logical order.

    Args:
        stacked: [rows, dim] or [rows] array of the stack, NumPy or JAX.
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.

    Returns:
        [table.vocabulary_size, table.embedding_dim] array of the same kind, or [table.vocabulary_size].
    """
    xp = np if isinstance(stacked, np.ndarray) else jnp
    rows_per_sparsecore = -(-table.vocabulary_size // num_sparsecores)
    start = table.rows.row_offset_in_shard
    shards = stacked.reshape(num_sparsecores, -1, *stacked.shape[1:])
    shards = shards[:, start : start + rows_per_sparsecore]
    shards = shards[_columns(shards, table)]
    by_row = xp.swapaxes(xp.roll(shards, -table.rows.rotation, axis=0), 0, 1)
    return by_row.reshape(-1, *by_row.shape[2:])[: table.vocabulary_size]


def put_table(stacked: np.ndarray, values: np.ndarray, table: TablePlan, num_sparsecores: int) -> None:
    """Writes one table into its place in `stacked`, the inverse of `take_table`; all else stays.

    Args:
        stacked: [rows, dim] or [rows] C-contiguous array of the stack, changed in place.
        values: [table.vocabulary_size, table.embedding_dim], or [table.vocabulary_size].
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.
    """
    shards = stacked.reshape(num_sparsecores, -1, *stacked.shape[1:])
    shards = shards[_columns(shards, table)]
    for remainder in range(min(num_sparsecores, table.vocabulary_size)):
        rows = values[remainder::num_sparsecores]
        sparsecore = (remainder + table.rows.rotation) % num_sparsecores
        start = table.rows.row_offset_in_shard
        shards[sparsecore, start : start + len(rows)] = rows


def put_blocks(stacked: Any, values: Any, table: TablePlan, num_sparsecores: int) -> Any:
    """The stack with one table in its place, in JAX and by whole blocks, which XLA exchanges where arrays are sharded.

    Args:
        stacked: [rows, dim] array of the stack.
        values: [table.vocabulary_size, columns], at most as many columns as the stack.
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.
    """
    count, columns = values.shape
    rows = -(-count // num_sparsecores)
    padded = jnp.pad(values, ((0, rows * num_sparsecores - count), (0, 0)))
    block = jnp.roll(
        jnp.swapaxes(padded.reshape(rows, num_sparsecores, columns), 0, 1), table.rows.rotation, axis=0
    )
    sparsecores = (jnp.arange(num_sparsecores) - table.rows.rotation) % num_sparsecores
    valid = jnp.arange(rows) * num_sparsecores + sparsecores[:, None] < count
    shards = stacked.reshape(num_sparsecores, -1, stacked.shape[1])
    start = table.rows.row_offset_in_shard
    place = shards.at[:, start : start + rows, :columns]
    return place.set(jnp.where(valid[..., None], block, place.get())).reshape(stacked.shape)


def join_tables(
    filler: Any, values: Sequence[Any], tables: Sequence[TablePlan], shape: tuple[int, ...], num_sparsecores: int
) -> Any:
    """The stack that holds all its tables: what filling it and `put_table` of each make, in JAX.

    Moves whole blocks, so that XLA exchanges sharded tables block by block; a scatter by rows would gather each table on
    every device.

    Args:
        filler: scalar array of the tables' dtype, what belongs to no table.
        values: [vocabulary_size, embedding_dim] array of each table, or [vocabulary_size].
        tables: all tables of the stack, by ascending `row_offset_in_shard`, the first at 0.
        shape: rows and columns of the stack, or rows alone.
        num_sparsecores: SparseCores that the stack is laid out for.
    """
    num_rows, *columns = shape
    ends = [*(table.rows.row_offset_in_shard for table in tables[1:]), num_rows // num_sparsecores]
    blocks = []
    for value, table, end in zip(values, tables, ends, strict=True):
        padding = (end - table.rows.row_offset_in_shard) * num_sparsecores - table.vocabulary_size
        widths = ((0, padding), *((0, dim - table.embedding_dim) for dim in columns))
        padded = jnp.pad(value, widths, constant_values=filler)
        by_sparsecore = jnp.swapaxes(padded.reshape(-1, num_sparsecores, *columns), 0, 1)
        blocks.append(jnp.roll(by_sparsecore, table.rows.rotation, axis=0))
    return jnp.concatenate(blocks, axis=1).reshape(shape)
