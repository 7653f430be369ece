"""Lookup of entries whose ids are rows of the table at hand: one SparseCore, one partition."""

from typing import Any

import jax
import jax.numpy as jnp

from embax._ops.geometry import Geometry, StackGeometry
from embax._ops.lookup import lookup_stacks
from embax._preprocess.buffers import PackedLayout, PreprocessedInput, row_pointers_per_segment
from embax.compat.sparsecore.lib.core.primitives._checks import check_count, check_entries, check_table
from embax.compat.sparsecore.lib.core.primitives._primitive import define

_NAME = "local_sparse_dense_matmul"
_OPERANDS = ("lhs_local_embedding_ids", "lhs_local_sample_ids", "lhs_gains", "embedding_table")


def _shapes(*operands: Any, device_batch_size: int) -> Any:
    check_count(operands, _OPERANDS, _NAME)
    ids, samples, gains, table = operands
    check_entries(ids, samples, gains)
    check_table(table, 2)
    return table.update(shape=(device_batch_size, table.shape[1]), weak_type=False)


def _look_up(
    ids: jax.Array, samples: jax.Array, gains: jax.Array, table: jax.Array, *, device_batch_size: int
) -> jax.Array:
    row_pointers = jnp.full(row_pointers_per_segment(1), ids.shape[0], jnp.int32)
    stack = StackGeometry(_NAME, 0, 0, ids.shape[0], device_batch_size, None, table.shape[1], 1, 1)
    packed = PreprocessedInput(row_pointers, ids, samples, gains, PackedLayout((), 1, 1, 1))
    return lookup_stacks(packed, [table], Geometry((stack,), 1, 0))[0][0]


tpu_local_sparse_dense_matmul_primitive = define(_NAME, _shapes, _look_up, multiple_results=False)
"""float32[device_batch_size, dim] of ids, samples, gains and table: for each sample the sum of gain times row."""
