"""Lookup and update on however many devices, by what each stack and platform allows."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from embax._ops import sparsecore
from embax._ops.backend import backend_on, chosen_backend
from embax._ops.exchange import (
    gain_gradients_exchanging,
    gather_row_gradients,
    lookup_exchanging,
    update_exchanging,
)
from embax._ops.gain_gradients import gain_gradients
from embax._ops.geometry import Geometry
from embax._ops.lookup import lookup_stacks
from embax._ops.row_sums import row_gradients
from embax._ops.row_update import RowLimits, ordered, orders_of
from embax._ops.unstack import activations_of_features, gradient_of_stack
from embax._ops.update import update_stacks
from embax._preprocess.buffers import PreprocessedInput


def _by_holder(
    geometry: Geometry, tables: Sequence[jax.Array], on_sparsecores: Callable, exchanging: Callable
) -> list[Any]:
    """Results of all stacks: `on_sparsecores` of those that SparseCores of a TPU hold, where it is one; else `exchanging`.

    SparseCores look rows up across devices by themselves. Both functions get the numbers of stacks, and their geometry.
    """
    results: list[Any] = [None] * len(geometry.stacks)
    may_hold = backend_on("tpu", chosen_backend()) == "sparsecore"
    held = [
        k for k, stack in enumerate(geometry.stacks) if may_hold and sparsecore.why_not_held(stack, tables[k]) is None
    ]
    others = [k for k in range(len(geometry.stacks)) if k not in held]
    for chosen in (held, others):
        if not chosen:
            continue
        part = dataclasses.replace(geometry, stacks=tuple(geometry.stacks[k] for k in chosen))
        if chosen is held:
            found = jax.lax.platform_dependent(
                tpu=lambda k=chosen, part=part: on_sparsecores(k, part),
                default=lambda k=chosen, part=part: exchanging(k, part),
            )
        else:
            found = exchanging(chosen, part)
        for k, result in zip(chosen, found, strict=True):
            results[k] = result
    return results


def lookup_across(
    packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry, axis: Any
) -> list[list[jax.Array]]:
    """`lookup_stacks` of tables that are sharded over a mesh axis, unless it is None."""
    if axis is None:
        return lookup_stacks(packed, tables, geometry)
    stacked = _by_holder(
        geometry.without_features(),
        tables,
        lambda chosen, part: [array for (array,) in lookup_stacks(packed, [tables[k] for k in chosen], part)],
        lambda chosen, part: lookup_exchanging(packed, [tables[k] for k in chosen], part, axis),
    )
    return [activations_of_features(*one, geometry) for one in zip(stacked, geometry.stacks, strict=True)]


def update_across(
    packed: PreprocessedInput,
    gradients: Sequence[Sequence[jax.Array]],
    states: Sequence[tuple[jax.Array, ...]],
    after: Sequence[jax.Array],
    geometry: Geometry,
    axis: Any,
    step: int | jax.Array | None = None,
    limits: Sequence[RowLimits] | None = None,
) -> list[tuple[jax.Array, ...]]:
    """`update_stacks` of tables that are sharded over a mesh axis, unless it is None."""
    if axis is None:
        return update_stacks(packed, gradients, states, after, geometry, step, limits)
    each = zip(gradients, geometry.stacks, states, strict=True)
    stacked = [gradient_of_stack(arrays, stack, state[0].shape[-1], geometry) for arrays, stack, state in each]

    def others(chosen: Sequence[int]):
        return [states[k] for k in chosen], [after[k] for k in chosen] if after else ()

    def limits_of(chosen: Sequence[int]):
        return [limits[k] for k in chosen] if limits else None

    return _by_holder(
        geometry.without_features(),
        [state[0] for state in states],
        lambda chosen, part: update_stacks(
            packed, [[stacked[k]] for k in chosen], *others(chosen), part, step, limits_of(chosen)
        ),
        lambda chosen, part: update_exchanging(
            packed, [stacked[k] for k in chosen], *others(chosen), part, axis, step, limits_of(chosen)
        ),
    )


def gradients_across(
    packed: PreprocessedInput,
    gradients: Sequence[jax.Array],
    num_rows: Sequence[int],
    after: Sequence[jax.Array],
    geometry: Geometry,
    axis: Any,
) -> list[tuple[jax.Array, jax.Array]]:
    """For each stack the rows that a batch touched on this device, and their gradients; see `gather_row_gradients`."""
    if axis is not None:
        return gather_row_gradients(packed, gradients, num_rows, after, geometry, axis)
    sums = row_gradients(packed, gradients, num_rows, geometry)
    orders = orders_of(after, len(sums))
    return [(ordered(one.rows, order), one.gradients) for one, order in zip(sums, orders, strict=True)]


def gain_gradients_across(
    gradients: Sequence[jax.Array],
    packed: PreprocessedInput,
    tables: Sequence[jax.Array],
    geometry: Geometry,
    axis: Any,
) -> list[jax.Array]:
    """`gain_gradients` of tables that are sharded over a mesh axis, unless it is None."""
    if axis is None:
        return gain_gradients(gradients, packed, tables, geometry)
    return gain_gradients_exchanging(gradients, packed, tables, geometry, axis)
