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
    num_minibatches: jax.Array,
    geometry: Geometry,
    stack: StackGeometry,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The entries of a stack.

    Returns:
        `(partition, id, sample, gain)`, arrays of the stack's capacity. `sample` counts over the device's SparseCores; it is the
        number of samples, one too many, where an entry is padding or out of range, and the gain is 0 there.
    """
    num, local, segments = geometry.num_sparsecores, geometry.sparsecores_per_device, geometry.max_segments
    pointers = jax.lax.dynamic_slice_in_dim(
        row_pointers, stack.row_pointers_start, segments * geometry.row_pointers_per_segment
    )
    ends = pointers.reshape(segments, -1)[:, :num]
    segment = jnp.arange(segments, dtype=jnp.int32)
    if geometry.max_minibatches:
        minibatches = jnp.clip(num_minibatches[0], 1, geometry.max_minibatches)
        # What lies behind the last segment was not written.
        ends = jnp.where((segment < local * minibatches)[:, None], ends, stack.capacity)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), aligned(ends[:-1, -1])])
    else:
        minibatches = 1
        starts = segment * (stack.capacity // local)
        ends = ends + starts[:, None]
    begins = jnp.concatenate([starts[:, None], aligned(ends[:, :-1])], axis=1).reshape(-1)
    position = jnp.arange(stack.capacity, dtype=jnp.int32)
    place = count_up_to(begins, position) - 1
    partition, sparsecore = place % num, place // num // minibatches

    def part(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, stack.entries_start, stack.capacity)

    sample = part(samples)
    valid = (position < ends.reshape(-1)[place]) & (sample >= 0) & (sample < stack.samples_per_sparsecore)
    sample = jnp.where(valid, sample + sparsecore * stack.samples_per_sparsecore, geometry.num_samples(stack))
    return partition, part(ids), sample, jnp.where(valid, part(gains), 0.0)


def count_up_to(ascending: jax.Array, values: jax.Array) -> jax.Array:
    """int32: how many elements of `ascending` are no larger than each value, by halving."""
    # `jnp.searchsorted` carries both ends of what is left. Its loop starts several kernels for each halving; without the loop,
    # each halving uses twice what the one before found, over which LLVM can take time exponential in their number.
    size = ascending.shape[0]
    count = jnp.zeros(values.shape, jnp.int32)
    for bit in reversed(range(size.bit_length())):
        # Beyond the end stands for the last element: if a value is as large, so it is as all before.
        probe = jnp.take(ascending, count + ((1 << bit) - 1), mode="clip")
        count += jnp.where(probe <= values, 1 << bit, 0)
    return jnp.minimum(count, size)


def aligned(ends: jax.Array) -> jax.Array:
    """Ends, or counts, of partitions, rounded up to where the next one may begin."""
    return (ends + (PARTITION_ALIGNMENT - 1)) // PARTITION_ALIGNMENT * PARTITION_ALIGNMENT


def table_rows(partition: jax.Array, ids: jax.Array, valid: jax.Array, num_rows: int, geometry: Geometry) -> jax.Array:
    """The row of the table in hand, of `num_rows`, that each entry names; `num_rows` where it names none."""
    if geometry.gathered:
        return jnp.where(valid & (ids >= 0) & (ids < num_rows), ids, num_rows)
    _, rows = owners_and_rows(partition, ids, valid, num_rows, geometry)
    return rows


def owners_and_rows(
    partition: jax.Array, ids: jax.Array, valid: jax.Array, num_rows: int, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """The device that owns the row of each entry, and the row there.

    Args:
        partition: int32[n], the SparseCore that owns the row.
        ids: int32[n], the row on that SparseCore.
        valid: bool[n], false where an entry is padding.
        num_rows: rows of the table on each device.
        geometry: static.

    Returns:
        Two int32[n]; `geometry.num_devices` and `num_rows` where an entry names no row.
    """
    local = geometry.sparsecores_per_device
    rows_per_partition = num_rows // local
    valid = valid & (ids >= 0) & (ids < rows_per_partition)
    owner = jnp.where(valid, partition // local, geometry.num_devices)
    return owner, jnp.where(valid, partition % local * rows_per_partition + jnp.where(valid, ids, 0), num_rows)


def sum_runs(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of `values` over runs of equal `keys`, always in the same order.

    Args:
        keys: int32[n], equal keys side by side.
        values: float32[n, dim].

    Returns:
        `(is_last, sums)`: bool[n], true at the last element of each run, and float32[n, dim] that holds there the sum.
    """
    return jnp.concatenate([keys[1:] != keys[:-1], jnp.ones(1, bool)]), _running_sums(keys, values)


# Longer blocks make fewer levels, and so fewer kernels, and compile longer. Of 4, 6, 8, 12 and 16 tried on CPU and compiled for
# an H100, 8 was as fast as any, moved hardly more bytes than 16, and compiled in half its time.
_BLOCK = 8


def _running_sums(keys: jax.Array, values: jax.Array) -> jax.Array:
    """float32[n, dim]: at each element, the sum of its run up to it.

    In blocks of `_BLOCK` elements, one after another. What a block ends with goes into a list of its own, an eighth as long,
    whose running sums, found the same way, are what the blocks begin with. So each level reads its values twice and writes
    them once; a scan by doubling distances would read and write all of them log2(n) times.
    """
    count, dim = values.shape
    num_blocks = -(-count // _BLOCK)
    padding = (0, num_blocks * _BLOCK - count)
    place = [key[:, None] for key in jnp.unstack(jnp.pad(keys, padding).reshape(num_blocks, _BLOCK), axis=1)]
    value = jnp.unstack(jnp.pad(values, (padding, (0, 0))).reshape(num_blocks, _BLOCK, dim), axis=1)

    def sums_from(first: jax.Array) -> list[jax.Array]:
        sums = [first]
        for k in range(1, _BLOCK):
            sums.append(value[k] + jnp.where(place[k] == place[k - 1], sums[-1], 0.0))
        return sums

    first = value[0]
    if num_blocks > 1:
        before = _running_sums(place[-1][:-1, 0], sums_from(first)[-1][:-1])
        goes_on = place[0][1:] == place[-1][:-1]
        first = jnp.concatenate([first[:1], first[1:] + jnp.where(goes_on, before, 0.0)])
    return jnp.stack(sums_from(first), axis=1).reshape(num_blocks * _BLOCK, dim)[:count]
