"""Packed entries in plain JAX: which are valid, and sums over runs without scattering to one place twice."""

import jax
import jax.numpy as jnp

from embax._ops.geometry import Geometry, StackGeometry
from embax._preprocess.buffers import PARTITION_ALIGNMENT


def entries_of(
    row_pointers: jax.Array,
    ids: jax.Array,
    samples: jax.Array,
    gains: jax.Array,
    geometry: Geometry,
    stack: StackGeometry,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The entries of a stack.

    Returns:
        `(partition, id, sample, gain)`, arrays of the stack's capacity. `sample` counts over all SparseCores; it is the
        number of samples, one too many, where an entry is padding or out of range, and the gain is 0 there.
    """
    num = geometry.num_sparsecores
    share = stack.capacity // num
    pointers = jax.lax.dynamic_slice_in_dim(
        row_pointers, stack.row_pointers_start, num * geometry.row_pointers_per_sparsecore
    )
    ends = pointers.reshape(num, -1)[:, :num]
    rounded = (ends + (PARTITION_ALIGNMENT - 1)) // PARTITION_ALIGNMENT * PARTITION_ALIGNMENT
    begins = jnp.pad(rounded[:, :-1], ((0, 0), (1, 0)))
    position = jnp.arange(share, dtype=jnp.int32)
    partition = jax.vmap(lambda begin: jnp.searchsorted(begin, position, side="right"))(begins).astype(jnp.int32) - 1
    within = position[None] < jnp.take_along_axis(ends, partition, axis=1)

    def part(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, stack.entries_start, stack.capacity).reshape(num, share)

    sample = part(samples)
    valid = within & (sample >= 0) & (sample < stack.samples_per_sparsecore)
    first_sample = jnp.arange(num, dtype=jnp.int32)[:, None] * stack.samples_per_sparsecore
    sample = jnp.where(valid, sample + first_sample, geometry.num_samples(stack))
    gain = jnp.where(valid, part(gains), 0.0)
    return partition.reshape(-1), part(ids).reshape(-1), sample.reshape(-1), gain.reshape(-1)


def physical_rows(
    partition: jax.Array, ids: jax.Array, valid: jax.Array, num_partitions: int, num_rows: int
) -> jax.Array:
    """The row of the stacked table that each entry names, `num_rows` where it names none."""
    rows_per_partition = num_rows // num_partitions
    valid = valid & (ids >= 0) & (ids < rows_per_partition)
    return jnp.where(valid, partition * rows_per_partition + jnp.where(valid, ids, 0), num_rows)


def sum_runs(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of `values` over runs of equal `keys`, always in the same order.

    Args:
        keys: int32[n], equal keys side by side.
        values: float32[n, dim].

    Returns:
        `(is_last, sums)`: bool[n], true at the last element of each run, and float32[n, dim] that holds there the sum.
    """
    count = keys.shape[0]
    ends = keys[1:] != keys[:-1]
    position = jnp.arange(count, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(jnp.concatenate([jnp.ones(1, bool), ends]), position, 0))

    # After k rounds, each element holds the sum of the 2^k elements of its run that end with it. A loop of few gathers
    # compiles in a fraction of the time of lax.associative_scan, which unrolls into hundreds of operations.
    def add_from_left(k, sums):
        left = position - (1 << k)
        return sums + jnp.where((left >= start)[:, None], sums[jnp.maximum(left, 0)], 0.0)

    sums = jax.lax.fori_loop(0, (count - 1).bit_length(), add_from_left, values)
    return jnp.concatenate([ends, jnp.ones(1, bool)]), sums
