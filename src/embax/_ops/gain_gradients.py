"""The gradients of a batch's gains: what those of sample weights that were packed inside jit are made of."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from embax._ops import sparsecore
from embax._ops.backend import backend_on, chosen_backend
from embax._ops.geometry import Geometry, StackGeometry, packed_operands
from embax._ops.lookup import quantize
from embax._ops.refusals import refuse_transformations
from embax._ops.segments import entries_of, physical_rows
from embax._preprocess.buffers import PreprocessedInput

gain_gradients_p = Primitive("embax_gain_gradients")
gain_gradients_p.multiple_results = True


def gain_gradients(
    gradients: Sequence[jax.Array], packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry
) -> list[jax.Array]:
    """For each entry of a batch the product of its row and its sample's gradient.

    Args:
        gradients: float32[samples, dim] of each stack, shaped like its activations.
        packed: a batch packed for one device.
        tables: the tables as they were looked up, float32[rows, dim] or float32[rows] of each stack.
        geometry: static.

    Returns:
        float32[capacity] of each stack, 0 where an entry is padding.
    """
    geometry.check_one_device()
    return gain_gradients_p.bind(
        *packed_operands(packed), *gradients, *tables, geometry=geometry, backend=chosen_backend()
    )


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
    rows = physical_rows(partition, ids, valid, geometry.num_sparsecores, table.shape[0])
    values = quantize(table.at[rows].get(mode="fill", fill_value=0), stack.quantization).reshape(len(rows), -1)
    of_sample = gradient.at[sample].get(mode="fill", fill_value=0).reshape(len(rows), -1)
    # Columns that belong to no feature have no gradient, and may hold anything.
    product = jnp.where(of_sample == 0.0, 0.0, of_sample * values)
    return jnp.where(rows < table.shape[0], jnp.sum(product, axis=1), 0.0)


def _portable(*operands, geometry: Geometry, backend: str | None) -> list[jax.Array]:
    del backend
    arrays, count = operands[:5], len(geometry.stacks)
    gradients, tables = operands[5 : 5 + count], operands[5 + count :]
    return [
        _of_stack(arrays, gradient, table, geometry, stack)
        for gradient, table, stack in zip(gradients, tables, geometry.stacks, strict=True)
    ]


@functools.cache
def _jitted(**params):
    return jax.jit(functools.partial(gain_gradients_p.bind, **params))


@gain_gradients_p.def_impl
def _run(*operands, **params):
    return _jitted(**params)(*operands)


@gain_gradients_p.def_abstract_eval
def _shapes(*operands, geometry: Geometry, backend: str | None):
    del backend
    gains = operands[3]
    return [gains.update(shape=(stack.capacity,)) for stack in geometry.stacks]


refuse_transformations(
    gain_gradients_p,
    derivative="Gradients with respect to sample weights have no derivative of their own.",
    batching="Make one larger batch instead.",
)

_lower_portable = mlir.lower_fun(_portable, multiple_results=True)


def _lower_tpu(context, *operands, geometry: Geometry, backend: str | None):
    tables = context.avals_in[5 + len(geometry.stacks) :]
    for stack, table in zip(geometry.stacks, tables, strict=True):
        # Only SparseCores read single rows of tables in their format; what else reads them converts the whole table.
        if backend_on("tpu", backend) == "sparsecore" and sparsecore.holds(stack, table, geometry):
            raise ValueError(
                f"Stack {stack.name!r}: gradients with respect to sample weights are not there for tables in the format of a "
                "TPU's SparseCores. Take the weights out of what is differentiated, for example with jax.lax.stop_gradient, or "
                'use tables in the format of other arrays under embax.use_backend("portable").'
            )
    return _lower_portable(context, *operands, geometry=geometry, backend=backend)


mlir.register_lowering(gain_gradients_p, _lower_portable)
mlir.register_lowering(gain_gradients_p, _lower_tpu, platform="tpu")
