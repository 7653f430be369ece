"""The gradients of a batch's gains: what those of sample weights that were packed inside jit are made of."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from embax._ops import sparsecore
from embax._ops.geometry import Geometry, StackGeometry, packed_operands
from embax._ops.lookup import quantize
from embax._ops.primitive import bind, define
from embax._ops.segments import entries_of, table_rows
from embax._preprocess.buffers import PreprocessedInput


def gain_gradients(
    gradients: Sequence[jax.Array], packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry
) -> list[jax.Array]:
    """For each entry of a batch the product of its row and its sample's gradient.

    Args:
        gradients: float32[samples, dim] of each stack, shaped like its activations.
        packed: a batch packed for one device, or one device's part of it.
        tables: the tables as they were looked up, float32[rows, dim] or float32[rows] of each stack.
        geometry: static.

    Returns:
        float32[capacity] of each stack, 0 where an entry is padding.
    """
    return bind(gain_gradients_p, *packed_operands(packed), *gradients, *tables, geometry=geometry)


def _of_stack(
    arrays: Sequence[jax.Array], gradient: jax.Array, table: jax.Array, geometry: Geometry, stack: StackGeometry
) -> jax.Array:
    if stack.capacity == 0 or geometry.num_samples(stack) == 0:
        return jnp.zeros(stack.capacity, jnp.float32)
    row_pointers, ids, samples, gains, num_minibatches = arrays
    partition, ids, sample, _ = entries_of(
        row_pointers, ids, samples, gains, num_minibatches, geometry=geometry, stack=stack
    )
    valid = sample < geometry.num_samples(stack)
    rows = table_rows(partition, ids, valid, table.shape[0], geometry)
    values = quantize(table.at[rows].get(mode="fill", fill_value=0), stack.quantization).reshape(len(rows), -1)
    of_sample = gradient.at[sample].get(mode="fill", fill_value=0).reshape(len(rows), -1)
    # Columns that belong to no feature have no gradient, and may hold anything.
    product = jnp.where(of_sample == 0.0, 0.0, of_sample * values)
    return jnp.where(rows < table.shape[0], jnp.sum(product, axis=1), 0.0)


def _portable(*operands, geometry: Geometry) -> list[jax.Array]:
    arrays, count = operands[:5], len(geometry.stacks)
    gradients, tables = operands[5 : 5 + count], operands[5 + count :]
    return [
        _of_stack(arrays, gradient, table, geometry, stack)
        for gradient, table, stack in zip(gradients, tables, geometry.stacks, strict=True)
    ]


def _sparsecore(*operands, geometry: Geometry) -> list[jax.Array]:
    for stack, table in zip(geometry.stacks, operands[5 + len(geometry.stacks) :], strict=True):
        # Only SparseCores read single rows of tables in their format; what else reads them converts the whole table.
        if sparsecore.holds(stack, table):
            raise ValueError(
                f"Stack {stack.name!r}: gradients with respect to sample weights are not there for tables in the format of a "
                "TPU's SparseCores. Take the weights out of what is differentiated, for example with jax.lax.stop_gradient, or "
                'use tables in the format of other arrays under embax.use_backend("portable").'
            )
    return _portable(*operands, geometry=geometry)


def _shapes(*operands, geometry: Geometry):
    gains = operands[3]
    return [gains.update(shape=(stack.capacity,)) for stack in geometry.stacks]


gain_gradients_p = define(
    "embax_gain_gradients",
    _shapes,
    {"portable": _portable, "sparsecore": _sparsecore},
    derivative="Gradients with respect to sample weights have no derivative of their own.",
    batching="Make one larger batch instead.",
)
