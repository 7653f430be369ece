"""Where the rows of a table lie in its stack: exact inverse maps between logical and physical order.

With `N` SparseCores, row `r` of a table lies on SparseCore `(r + rotation) % N`, at row `row_offset_in_shard + r // N`
there; the stack holds the rows of SparseCore 0, then those of SparseCore 1, and so on.
"""

from typing import Any

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


def take_table(stacked: Any, table: TablePlan, num_sparsecores: int) -> Any:
    """The rows and columns of one table, in logical order.

    Args:
        stacked: [rows, dim] array of the stack, NumPy or JAX.
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.

    Returns:
        [table.vocabulary_size, table.embedding_dim] array of the same kind.
    """
    xp = np if isinstance(stacked, np.ndarray) else jnp
    rows_per_sparsecore = -(-table.vocabulary_size // num_sparsecores)
    start = table.rows.row_offset_in_shard
    shards = stacked.reshape(num_sparsecores, -1, stacked.shape[-1])
    shards = shards[:, start : start + rows_per_sparsecore, : table.embedding_dim]
    by_row = xp.swapaxes(xp.roll(shards, -table.rows.rotation, axis=0), 0, 1)
    return by_row.reshape(-1, table.embedding_dim)[: table.vocabulary_size]


def put_table(stacked: np.ndarray, values: np.ndarray, table: TablePlan, num_sparsecores: int) -> None:
    """Writes one table into its place in `stacked`, the inverse of `take_table`; all else stays.

    Args:
        stacked: [rows, dim] C-contiguous array of the stack, changed in place.
        values: [table.vocabulary_size, table.embedding_dim].
        table: the table's place.
        num_sparsecores: SparseCores that the stack is laid out for.
    """
    shards = stacked.reshape(num_sparsecores, -1, stacked.shape[-1])
    for remainder in range(min(num_sparsecores, table.vocabulary_size)):
        rows = values[remainder::num_sparsecores]
        sparsecore = (remainder + table.rows.rotation) % num_sparsecores
        start = table.rows.row_offset_in_shard
        shards[sparsecore, start : start + len(rows), : table.embedding_dim] = rows
