"""Lookup and update of tables whose rows lie on several devices, inside `jax.shard_map`.

Each device asks the owners for the distinct rows that its part of the batch names, and sends the sums of their gradients back
the same way: `all_to_all` of arrays of a static size, which hold `rows_per_round` rows for each owner. What does not fit goes in
further rounds. A round takes a range of each owner's rows, whose end the devices agree on: the lowest at which one of them
has filled its part. So all that is sent for a row is sent in one round, and each row is updated once a step, whatever the skew.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax._checks import INT32_MAX, next_multiple
from embax._ops.gain_gradients import gain_gradients
from embax._ops.geometry import Geometry, StackGeometry
from embax._ops.lookup import lookup_stacks, quantize
from embax._ops.row_sums import RowSums, distinct_rows, group, row_gradients, sum_groups, take_rows
from embax._ops.row_update import RowLimits, ordered, orders_of
from embax._ops.segments import count_up_to
from embax._ops.update import apply_rows
from embax._ops.varying import as_varying
from embax._preprocess.buffers import PreprocessedInput, StackLayout

_ALIGNMENT = 8


def _most_rows(stack: StackGeometry | StackLayout, sparsecores_per_device: int, max_minibatches: int) -> int:
    """Distinct rows of another device that one device may name in a batch within its limits, which are those of a minibatch."""
    by_limits = sparsecores_per_device**2 * stack.max_unique_ids_per_partition * max(max_minibatches, 1)
    return min(by_limits, stack.capacity)


def rows_per_round(
    stack: StackGeometry | StackLayout, num_devices: int, sparsecores_per_device: int, max_minibatches: int = 0
) -> int:
    """Rows of a stack that a device sends to each other device in one round.

    Enough for ids that are spread over the devices at random, and no more than the limits of the batch allow: what one device
    sends in a round, to all devices, is little more than the entries of its buffer.
    """
    mean = stack.capacity / num_devices
    by_entries = math.ceil(mean + 5 * math.sqrt(mean)) + _ALIGNMENT
    most = _most_rows(stack, sparsecores_per_device, max_minibatches)
    return next_multiple(max(min(by_entries, most), 1), _ALIGNMENT)


def _round_sizes(geometry: Geometry) -> list[int]:
    of_device = (geometry.num_devices, geometry.sparsecores_per_device, geometry.max_minibatches)
    return [rows_per_round(stack, *of_device) for stack in geometry.stacks]


@dataclasses.dataclass(frozen=True)
class _Outgoing:
    """The rows of one stack that a device names, by owner.

    Args:
        rows: int32[n], see `RowSums`.
        ends: int32[num_devices], see `RowSums`.
        size: rows of a round.
    """

    rows: jax.Array
    ends: jax.Array
    size: int

    @property
    def begins(self) -> jax.Array:
        """int32[num_devices]: where the rows of each owner begin."""
        return jnp.concatenate([jnp.zeros(1, jnp.int32), self.ends[:-1]])

    def _at(self, places: jax.Array) -> jax.Array:
        """The rows at these places, `INT32_MAX` where there are none; also of a list without places."""
        if self.rows.shape[0] == 0:
            return jnp.full(places.shape, INT32_MAX, jnp.int32)
        return self.rows.at[places].get(mode="fill", fill_value=INT32_MAX)

    def bound(self, starts: jax.Array) -> jax.Array:
        """int32[num_devices]: the first row that does not fit into a round, `INT32_MAX` where all fit."""
        last = starts + self.size
        return jnp.where(last < self.ends, self._at(last), INT32_MAX)

    def round(self, starts: jax.Array, bound: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The rows of a round that ends at `bound`.

        Returns:
            Places in the list, int32[num_devices, size]; the rows there, `INT32_MAX` where there is none; and where the next
            round starts, int32[num_devices].
        """
        places = starts[:, None] + jnp.arange(self.size, dtype=jnp.int32)[None]
        rows = jnp.where(places < self.ends[:, None], self._at(places), INT32_MAX)
        taken = rows < bound[:, None]
        return places, jnp.where(taken, rows, INT32_MAX), starts + jnp.sum(taken, axis=1, dtype=jnp.int32)


def _agreed(outgoing: Sequence[_Outgoing], starts: jax.Array, axis: Any) -> jax.Array:
    """int32[stacks, num_devices]: where a round ends on which all devices agree."""
    own = jnp.stack([one.bound(begin) for one, begin in zip(outgoing, starts, strict=True)])
    return jax.lax.pmin(own, axis)


def _to_owners(array: jax.Array, axis: Any) -> jax.Array:
    """Sends `array[d]` to device `d`; receives what device `s` sent at index `s`."""
    return jax.lax.all_to_all(array, axis, split_axis=0, concat_axis=0, tiled=True)


def _in_rounds(outgoing: Sequence[_Outgoing], axis: Any, start: Any, one_round) -> Any:
    """`one_round(carry, places, rows)` until all rows of all devices were in a round.

    Args:
        outgoing: of each stack.
        axis: of the mesh.
        start: the first carry.
        one_round: gets the places and rows of a round, of each stack, and returns the next carry.
    """

    def body(state):
        starts, _, carry = state
        bounds = _agreed(outgoing, starts, axis)
        rounds = [one.round(begin, bound) for one, begin, bound in zip(outgoing, starts, bounds, strict=True)]
        carry = one_round(carry, [places for places, _, _ in rounds], [rows for _, rows, _ in rounds])
        return jnp.stack([after for _, _, after in rounds]), jnp.any(bounds < INT32_MAX), carry

    starts = jnp.stack([one.begins for one in outgoing])
    axes = axis if isinstance(axis, tuple) else (axis,)
    state = (as_varying(starts, axes), jnp.array(True), as_varying(start, axes))
    return jax.lax.while_loop(lambda state: state[1], body, state)[2]


def lookup_exchanging(
    packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry, axis: Any
) -> list[jax.Array]:
    """Activations of every stack, from tables that hold the rows of this device.

    Args:
        packed: one device's part of a batch.
        tables: float32[rows, dim] of each stack, or float32[rows].
        geometry: static, without features.
        axis: name of the mesh axis that the rows are spread over, or a tuple of names.

    Returns:
        float32[sparsecores_per_device * samples_per_sparsecore, dim] of each stack, without dim where its table has none.
    """
    zeros = [
        jnp.zeros((geometry.num_samples(stack), *table.shape[1:]), table.dtype)
        for stack, table in zip(geometry.stacks, tables, strict=True)
    ]

    def activations(packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry) -> list[jax.Array]:
        return [array for (array,) in lookup_stacks(packed, tables, geometry)]

    return _sum_over_rounds(packed, tables, geometry, axis, zeros, activations)


def gain_gradients_exchanging(
    gradients: Sequence[jax.Array],
    packed: PreprocessedInput,
    tables: Sequence[jax.Array],
    geometry: Geometry,
    axis: Any,
) -> list[jax.Array]:
    """`gain_gradients` from tables that hold the rows of this device; arguments as for `lookup_exchanging`."""

    def products(packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry) -> list[jax.Array]:
        return gain_gradients(gradients, packed, tables, geometry)

    zeros = [jnp.zeros(stack.capacity, jnp.float32) for stack in geometry.stacks]
    return _sum_over_rounds(packed, tables, geometry, axis, zeros, products)


def _sum_over_rounds(
    packed: PreprocessedInput,
    tables: Sequence[jax.Array],
    geometry: Geometry,
    axis: Any,
    zeros: list[jax.Array],
    function: Callable[[PreprocessedInput, Sequence[jax.Array], Geometry], list[jax.Array]],
) -> list[jax.Array]:
    """The sum over all rounds of `function(batch, rows, geometry)`, of the entries whose rows were received in a round."""
    slots, lists = distinct_rows(packed, [table.shape[0] for table in tables], geometry)
    outgoing = [_Outgoing(*one, size) for one, size in zip(lists, _round_sizes(geometry), strict=True)]
    # The values of an owner are rounded before they are sent.
    plain = tuple(dataclasses.replace(stack, quantization=None) for stack in geometry.stacks)
    local = dataclasses.replace(geometry, stacks=plain, gathered=True)

    def one_round(sums, places, rows):
        asked = _to_owners(jnp.concatenate(rows, axis=1), axis)
        found, ids, start = [], slots, 0
        for stack, table, one, place, asking in zip(geometry.stacks, tables, outgoing, places, rows, strict=True):
            wanted = asked[:, start : start + one.size]
            start += one.size
            values = take_rows(table, wanted)
            received = _to_owners(quantize(values, stack.quantization), axis)
            found.append(received.reshape(-1, *table.shape[1:]))
            own = jax.lax.slice_in_dim(slots, stack.entries_start, stack.entries_start + stack.capacity)
            own = _received_at(own, one, place[:, 0], asking)
            ids = jax.lax.dynamic_update_slice_in_dim(ids, own, stack.entries_start, axis=0)
        more = function(packed.replace(embedding_ids=ids), found, local)
        return [a + b for a, b in zip(sums, more, strict=True)]

    return _in_rounds(outgoing, axis, zeros, one_round)


def _received_at(slots: jax.Array, one: _Outgoing, starts: jax.Array, rows: jax.Array) -> jax.Array:
    """For each entry the place where its row was received, -1 where it was not in this round.

    Args:
        slots: int32[n], places in the list of rows, or -1.
        one: that list.
        starts: int32[num_devices], where this round starts in the list.
        rows: int32[num_devices, size], what was asked for.
    """
    counts = jnp.sum(rows != INT32_MAX, axis=1, dtype=jnp.int32)
    owner = jnp.minimum(count_up_to(one.ends, slots), starts.shape[0] - 1)
    place = slots - starts[owner]
    received = (slots >= 0) & (place >= 0) & (place < counts[owner])
    return jnp.where(received, owner * one.size + place, -1)


def update_exchanging(
    packed: PreprocessedInput,
    gradients: Sequence[jax.Array],
    states: Sequence[tuple[jax.Array, ...]],
    after: Sequence[jax.Array],
    geometry: Geometry,
    axis: Any,
    step: int | jax.Array | None = None,
    limits: Sequence[RowLimits] | None = None,
) -> list[tuple[jax.Array, ...]]:
    """Updates the rows that a batch touched, each once, on the devices that own them.

    Args:
        packed: one device's part of a batch.
        gradients: float32[samples, dim] of each stack, shaped like its activations.
        states: table and slots of each stack, of this device; see `update_stacks`.
        after: see `update_stacks`.
        geometry: static; each stack has its optimizer.
        axis: name of the mesh axis that the rows are spread over, or a tuple of names.
        step: for schedules and for optimizers that need it.
        limits: of each stack, static: what the new rows of its table are clipped to.

    Returns:
        New table and slots of each stack.
    """
    num_rows = [state[0].shape[0] for state in states]
    sums, outgoing = _outgoing_gradients(packed, gradients, num_rows, after, geometry)

    def one_round(states, places, rows):
        wanted, received = _sent_gradients(sums, outgoing, places, rows, axis)
        return apply_rows(wanted, received, states, (), geometry, step, limits)

    return _in_rounds(outgoing, axis, [tuple(state) for state in states], one_round)


def _outgoing_gradients(
    packed: PreprocessedInput,
    gradients: Sequence[jax.Array],
    num_rows: Sequence[int],
    after: Sequence[jax.Array],
    geometry: Geometry,
) -> tuple[list[RowSums], list[_Outgoing]]:
    """The gradients of the rows that a device names, which wait for the lookup, and their way to the owners."""
    sums = row_gradients(packed, gradients, num_rows, geometry)
    outgoing = [
        _Outgoing(one.rows, ordered(one.ends, order), size)
        for one, order, size in zip(sums, orders_of(after, len(sums)), _round_sizes(geometry), strict=True)
    ]
    return sums, outgoing


def _sent_gradients(
    sums: Sequence[RowSums],
    outgoing: Sequence[_Outgoing],
    places: Sequence[jax.Array],
    rows: Sequence[jax.Array],
    axis: Any,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What the devices send each other in a round: of each stack int32[n] rows of the receiver, and their gradients."""
    asked = _to_owners(jnp.concatenate(rows, axis=1), axis)
    wanted, received, start = [], [], 0
    for one, to, place in zip(sums, outgoing, places, strict=True):
        wanted.append(asked[:, start : start + to.size].reshape(-1))
        start += to.size
        sent = _to_owners(take_rows(one.gradients, place), axis)
        received.append(sent.reshape(-1, *sent.shape[2:]))
    return wanted, received


def gather_row_gradients(
    packed: PreprocessedInput,
    gradients: Sequence[jax.Array],
    num_rows: Sequence[int],
    after: Sequence[jax.Array],
    geometry: Geometry,
    axis: Any,
) -> list[tuple[jax.Array, jax.Array]]:
    """The gradients of the rows that a batch touched, on the devices that own them.

    Args:
        packed: one device's part of a batch.
        gradients: float32[samples, dim] of each stack, shaped like its activations.
        num_rows: of each stack, the rows of its table on each device.
        after: see `update_stacks`.
        geometry: static.
        axis: name of the mesh axis that the rows are spread over, or a tuple of names.

    Returns:
        For each stack `(rows, gradients)`: int32[n] distinct ascending rows, `INT32_MAX` behind the last, and float32[n, dim].
    """
    sums, outgoing = _outgoing_gradients(packed, gradients, num_rows, after, geometry)
    # What the limits of the batch let all devices name on one.
    devices = geometry.num_devices
    rooms = [
        min(devices * _most_rows(stack, geometry.sparsecores_per_device, geometry.max_minibatches), rows)
        for stack, rows in zip(geometry.stacks, num_rows, strict=True)
    ]

    def one_round(carry, places, rows):
        filled, lists = carry
        wanted, received = _sent_gradients(sums, outgoing, places, rows, axis)
        counts, longer = [], []
        for have, all_rows, all_values, new_rows, new_values in zip(
            filled, *zip(*lists, strict=True), wanted, received, strict=True
        ):
            grouped = group(jnp.where(new_rows == INT32_MAX, 1, 0), new_rows, 1)
            values = sum_groups(grouped, new_values[grouped.order])
            # Behind the last row of a round come ones that the next round overwrites.
            at = (jax.lax.dynamic_update_slice_in_dim(all_rows, grouped.rows, have, axis=0),)
            longer.append((*at, jax.lax.dynamic_update_slice_in_dim(all_values, values, have, axis=0)))
            counts.append(have + grouped.ends[-1])
        return jnp.stack(counts), longer

    lists = []
    for one, to, room in zip(sums, outgoing, rooms, strict=True):
        size = room + devices * to.size
        values = jnp.zeros((size, *one.gradients.shape[1:]), one.gradients.dtype)
        lists.append((jnp.full(size, INT32_MAX, jnp.int32), values))
    start = (jnp.zeros(len(sums), jnp.int32), lists)
    _, lists = _in_rounds(outgoing, axis, start, one_round)
    return [(rows[:room], values[:room]) for (rows, values), room in zip(lists, rooms, strict=True)]
