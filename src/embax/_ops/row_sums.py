"""The rows that a batch names, each once, and the sums of their gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax._checks import INT32_MAX
from embax._ops import native
from embax._ops.geometry import Geometry, StackGeometry, packed_operands
from embax._ops.primitive import bind, define
from embax._ops.segments import count_up_to, entries_of, owners_and_rows, sum_runs
from embax._preprocess.buffers import PreprocessedInput


class RowSums(NamedTuple):
    """The gradient of the rows of one stack that a batch names.

    Args:
        rows: int32[capacity], the distinct rows on the device that owns them, ascending for each owner, one owner after
            another; behind the last one `INT32_MAX`.
        ends: int32[num_devices], where the rows of each owner end.
        gradients: float32[capacity, dim], of each row; zeros behind the last one.
    """

    rows: jax.Array
    ends: jax.Array
    gradients: jax.Array


class Grouped(NamedTuple):
    """Entries in the order of the rows that they name; those that name none are last.

    Args:
        order: int32[n], where an entry was before.
        run: int32[n], the number of its row among the distinct ones.
        rows: int32[n], the distinct rows, `INT32_MAX` behind the last.
        ends: int32[num_owners], where the rows of each owner end.
    """

    order: jax.Array
    run: jax.Array
    rows: jax.Array
    ends: jax.Array


def group(owner: jax.Array, row: jax.Array, num_owners: int) -> Grouped:
    """Groups entries by owner and row; the owner is `num_owners` where an entry names no row."""
    size = row.shape[0]
    place = jnp.arange(size, dtype=jnp.int32)
    if num_owners == 1:  # What names no row has the largest one.
        row, order = jax.lax.sort((row, place), num_keys=1)
        owner = owner[order]
    else:
        owner, row, order = jax.lax.sort((owner, row, place), num_keys=2)
    differs = (row[1:] != row[:-1]) | (owner[1:] != owner[:-1])
    run = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(differs, dtype=jnp.int32)])
    first = jnp.minimum(count_up_to(run, place - 1), size - 1)
    is_row = (place <= run[-1]) & (owner[first] < num_owners)
    last = count_up_to(owner, jnp.arange(num_owners, dtype=jnp.int32)) - 1
    ends = jnp.where(last >= 0, run[last] + 1, 0)
    return Grouped(order, run, jnp.where(is_row, row[first], INT32_MAX), ends)


def sum_groups(grouped: Grouped, values: jax.Array) -> jax.Array:
    """float32[n, dim]: for each distinct row the sum of `values`, which are in the order of `grouped`; zeros behind the last."""
    place = jnp.arange(values.shape[0], dtype=jnp.int32)
    _, sums = sum_runs(grouped.run, values)
    last = count_up_to(grouped.run, place) - 1
    return jnp.where((grouped.rows != INT32_MAX)[:, None], sums[last], 0.0)


def _group_entries(arrays, geometry: Geometry, stack: StackGeometry, num_rows: int):
    partition, ids, sample, gain = entries_of(*arrays, geometry=geometry, stack=stack)
    owner, row = owners_and_rows(partition, ids, sample < geometry.num_samples(stack), num_rows, geometry)
    return group(owner, row, geometry.num_devices), sample, gain


def sum_row_gradients(
    arrays: Sequence[jax.Array], gradient: jax.Array, geometry: Geometry, stack: StackGeometry, num_rows: int
) -> RowSums:
    """The sums of one stack in JAX operations; `gradient` is float32[samples, dim], or float32[samples]."""
    if stack.capacity == 0:
        ends = jnp.zeros(geometry.num_devices, jnp.int32)
        return RowSums(jnp.zeros(0, jnp.int32), ends, jnp.zeros((0, *gradient.shape[1:]), gradient.dtype))
    grouped, sample, gain = _group_entries(arrays, geometry, stack, num_rows)
    order = grouped.order
    columns = gradient.reshape(gradient.shape[0], -1)
    values = gain[order][:, None] * columns.at[sample[order]].get(mode="fill", fill_value=0)
    sums = sum_groups(grouped, values)
    return RowSums(grouped.rows, grouped.ends, sums.reshape(-1, *gradient.shape[1:]))


def row_gradients(
    packed: PreprocessedInput, gradients: Sequence[jax.Array], num_rows: Sequence[int], geometry: Geometry
) -> list[RowSums]:
    """For each row that a device's part of a batch names, the sum of gain times gradient over its entries.

    Args:
        packed: a batch packed for one device, or one device's part of it.
        gradients: float32[samples, dim] of each stack, shaped like its activations.
        num_rows: of each stack, the rows of its table on each device.
        geometry: static.
    """
    flat = bind(row_gradients_p, *packed_operands(packed), *gradients, geometry=geometry, num_rows=tuple(num_rows))
    return [RowSums(*flat[3 * k : 3 * k + 3]) for k in range(len(geometry.stacks))]


def _shape(like, shape: tuple[int, ...], dtype):
    return like.update(shape=shape, dtype=np.dtype(dtype), weak_type=False)


def _row_gradients_shapes(*operands, geometry: Geometry, num_rows: tuple[int, ...]):
    del num_rows
    shapes = []
    for gradient, stack in zip(operands[5:], geometry.stacks, strict=True):
        shapes += [
            _shape(operands[0], (stack.capacity,), np.int32),
            _shape(operands[0], (geometry.num_devices,), np.int32),
            _shape(gradient, (stack.capacity, *gradient.shape[1:]), np.float32),
        ]
    return shapes


def _portable_row_gradients(*operands, geometry: Geometry, num_rows: tuple[int, ...]):
    each = zip(operands[5:], geometry.stacks, num_rows, strict=True)
    return [
        array
        for gradient, stack, rows in each
        for array in sum_row_gradients(operands[:5], gradient, geometry, stack, rows)
    ]


def _native_row_gradients(*operands, geometry: Geometry, num_rows: tuple[int, ...]):
    return native.row_gradients(operands[:5], operands[5:], geometry, num_rows)


row_gradients_p = define(
    "embax_row_gradients",
    _row_gradients_shapes,
    {"native": _native_row_gradients, "portable": _portable_row_gradients},
    derivative="The gradients of rows are the end of a backward pass and have no derivative of their own.",
    batching="Make one larger batch instead.",
)


def distinct_rows(
    packed: PreprocessedInput, num_rows: Sequence[int], geometry: Geometry
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """The rows that a device's part of a batch names, each once.

    Args:
        packed: a batch packed for one device, or one device's part of it.
        num_rows: of each stack, the rows of its table on each device.
        geometry: static.

    Returns:
        `slots`, int32 like `packed.embedding_ids`, flat: for each entry the place of its row in the list of its stack, -1
        where it names none; and of each stack `(rows, ends)`, as in `RowSums`.
    """
    slots, *flat = bind(distinct_rows_p, *packed_operands(packed), geometry=geometry, num_rows=tuple(num_rows))
    return slots, [(flat[2 * k], flat[2 * k + 1]) for k in range(len(geometry.stacks))]


def _distinct_rows_shapes(*operands, geometry: Geometry, num_rows: tuple[int, ...]):
    del num_rows
    ids = operands[1]
    shapes = [ids.update(weak_type=False)]
    for stack in geometry.stacks:
        shapes += [_shape(ids, (stack.capacity,), np.int32), _shape(ids, (geometry.num_devices,), np.int32)]
    return shapes


def _portable_distinct_rows(*operands, geometry: Geometry, num_rows: tuple[int, ...]):
    slots = jnp.full(operands[1].shape, -1, jnp.int32)
    lists: list[jax.Array] = []
    for stack, rows in zip(geometry.stacks, num_rows, strict=True):
        if stack.capacity == 0:
            lists += [jnp.zeros(0, jnp.int32), jnp.zeros(geometry.num_devices, jnp.int32)]
            continue
        grouped, _, _ = _group_entries(operands[:5], geometry, stack, rows)
        slot = jnp.where(grouped.run < grouped.ends[-1], grouped.run, -1)
        own = jnp.zeros(stack.capacity, jnp.int32).at[grouped.order].set(slot, unique_indices=True)
        slots = jax.lax.dynamic_update_slice_in_dim(slots, own, stack.entries_start, axis=0)
        lists += [grouped.rows, grouped.ends]
    return [slots, *lists]


def _native_distinct_rows(*operands, geometry: Geometry, num_rows: tuple[int, ...]):
    return native.distinct_rows(operands, geometry, num_rows)


distinct_rows_p = define(
    "embax_distinct_rows",
    _distinct_rows_shapes,
    {"native": _native_distinct_rows, "portable": _portable_distinct_rows},
    derivative="It has integers alone.",
    batching="Make one larger batch instead.",
)


def take_rows(array: jax.Array, places: jax.Array) -> jax.Array:
    """Rows of an array, 0 where there is no such row.

    Args:
        array: float32[rows, dim] or float32[rows].
        places: int32 array of any shape.

    Returns:
        float32[*places.shape, dim], or float32[*places.shape].
    """
    (rows,) = bind(take_rows_p, array, places.reshape(-1))
    return rows.reshape(*places.shape, *array.shape[1:])


def _portable_take_rows(array: jax.Array, places: jax.Array) -> list[jax.Array]:
    if array.shape[0] == 0:  # JAX takes nothing of an array that has nothing.
        return [jnp.zeros((places.shape[0], *array.shape[1:]), array.dtype)]
    return [array.at[jnp.where(places < 0, INT32_MAX, places)].get(mode="fill", fill_value=0)]


take_rows_p = define(
    "embax_take_rows",
    lambda array, places: [_shape(array, (*places.shape, *array.shape[1:]), array.dtype)],
    {"native": lambda array, places: [native.take_rows(array, places)], "portable": _portable_take_rows},
    derivative="Differentiate what is computed from the rows.",
    batching="Take all rows in one call.",
)
