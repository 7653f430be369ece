"""The update primitives: gradients of activations, or of rows, into tables and slots, in place."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from embax._checks import INT32_MAX
from embax._ops import native, sparsecore
from embax._ops.geometry import Geometry, optimizer_of, packed_operands
from embax._ops.primitive import bind, cut, define
from embax._ops.row_sums import group, sum_groups, sum_row_gradients
from embax._ops.row_update import (
    NO_LIMITS,
    RowLimits,
    StackUpdate,
    hyperparameters_of,
    new_rows,
    ordered,
    orders_of,
)
from embax._ops.unstack import gradient_of_stack, only_features_of_all_columns
from embax._preprocess.buffers import PreprocessedInput
from embax._warnings import warn_slow_path


def update_stacks(
    packed: PreprocessedInput,
    gradients: Sequence[Sequence[jax.Array]],
    states: Sequence[tuple[jax.Array, ...]],
    after: Sequence[jax.Array],
    geometry: Geometry,
    step: int | jax.Array | None = None,
    limits: Sequence[RowLimits] | None = None,
) -> list[tuple[jax.Array, ...]]:
    """Updates the rows that a batch touched, each once, in tables that hold all of them.

    Args:
        packed: the batch that the lookup took.
        gradients: of each stack arrays shaped like those that `lookup_stacks` returns.
        states: table and slots of each stack, float32[rows, dim], or float32[rows] for a slot of one value a row. A table of
            rank 1, float32[rows], is one of one column; its gradients are float32[samples].
        after: nothing, or an array of each stack that was computed from its lookup. It is not read, but makes the update
            wait for the lookup: XLA copies the table where it cannot see that order.
        geometry: static; each stack has its optimizer.
        step: for schedules and for optimizers that need it.
        limits: of each stack, static: what the new rows of its table are clipped to.

    Returns:
        New table and slots of each stack.
    """
    return _by_rule(update_p, packed_operands(packed), [gradients], states, after, geometry, step, limits)


def apply_rows(
    rows: Sequence[jax.Array],
    gradients: Sequence[jax.Array],
    states: Sequence[tuple[jax.Array, ...]],
    after: Sequence[jax.Array],
    geometry: Geometry,
    step: int | jax.Array | None = None,
    limits: Sequence[RowLimits] | None = None,
) -> list[tuple[jax.Array, ...]]:
    """Updates rows, each once, by the sum of the gradients that are given for it.

    Args:
        rows: int32[n] of each stack, rows of its table in any order, also several times; what is no row is left out.
        gradients: float32[n, dim] of each stack.
        states: as in `update_stacks`.
        after: as in `update_stacks`.
        geometry: static; only the stacks' optimizers and widths are read.
        step: for schedules and for optimizers that need it.
        limits: as in `update_stacks`.

    Returns:
        New table and slots of each stack.
    """
    geometry = geometry.without_features()
    parts = [[[array] for array in arrays] for arrays in (rows, gradients)]
    return _by_rule(apply_rows_p, [], parts, states, after, geometry, step, limits)


def _by_rule(
    primitive: Primitive,
    shared: Sequence[Any],
    parts: Sequence[Sequence[Sequence[jax.Array]]],
    states: Sequence[tuple[jax.Array, ...]],
    after: Sequence[jax.Array],
    geometry: Geometry,
    step: int | jax.Array | None,
    limits: Sequence[RowLimits] | None,
) -> list[tuple[jax.Array, ...]]:
    """Binds an update primitive to `shared`, the hyperparameters, `parts` of each stack, `states` and `after`."""
    new: list[tuple[jax.Array, ...]] = [()] * len(geometry.stacks)
    # What has no row rule in C++ is a call of its own, so that the others keep theirs.
    for native_rule in (True, False):
        chosen = [k for k, stack in enumerate(geometry.stacks) if native.has_rule(optimizer_of(stack)) == native_rule]
        if not chosen:
            continue
        stacks = tuple(geometry.stacks[k] for k in chosen)
        hyperparameters = [hyperparameters_of(optimizer_of(stack), step) for stack in stacks]
        flat = bind(
            primitive,
            *shared,
            _one_array([scalar for scalars in hyperparameters for scalar in scalars]),
            *(array for part in parts for k in chosen for array in part[k]),
            *(array for k in chosen for array in states[k]),
            *(after[k] for k in chosen if after),
            geometry=dataclasses.replace(geometry, stacks=stacks),
            num_hyperparameters=tuple(map(len, hyperparameters)),
            limits=tuple(limits[k] if limits else NO_LIMITS for k in chosen),
        )
        for k, state in zip(chosen, cut(flat, [len(states[k]) for k in chosen]), strict=True):
            new[k] = tuple(state)
    return new


def _one_array(scalars: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(scalars) if scalars else jnp.zeros(0, jnp.float32)


def _columns(array: jax.Array) -> jax.Array:
    """A matrix as it is, an array of one value a row as a matrix of one column."""
    return array[:, None] if array.ndim == 1 else array


def _updated(one: StackUpdate, rows: jax.Array, gradient: jax.Array) -> list[jax.Array]:
    """New table and slots from the gradients of distinct ascending rows, behind which come values past every row."""
    num_rows = one.state[0].shape[0]
    if num_rows + rows.shape[0] > INT32_MAX:
        raise ValueError(
            f"Stack {one.stack.name!r}: {num_rows} rows and a buffer of {rows.shape[0]} entries are more than int32 counts, "
            f"{INT32_MAX}, which the portable backend needs; split the table."
        )
    # Behind the touched rows come rows past the end of the table, which reading fills and writing drops. All differ and are
    # sorted, so that no write meets another.
    padding = num_rows + jnp.arange(rows.shape[0], dtype=jnp.int32)
    touched = jnp.where(rows < num_rows, rows, padding)
    # The rule must not see the columns that only the stack has. One value a row is read and written as it is: on a GPU a
    # reshape of the whole array would copy it.
    columns = (slice(one.stack.width),)
    places = [array.at[touched, *columns[: array.ndim - 1]] for array in one.state]
    known: Any = {"unique_indices": True, "indices_are_sorted": True}
    old = [_columns(place.get(mode="fill", fill_value=0, **known)) for place in places]
    table, slots = new_rows(
        one.optimizer, one.limits, gradient[:, columns[0]], old[0], tuple(old[1:]), one.hyperparameters
    )
    return [
        place.set(new if array.ndim == 2 else new[:, 0], mode="drop", **known)
        for place, array, new in zip(places, one.state, (table, *slots), strict=True)
    ]


def _portable_stack(arrays: Sequence[jax.Array], one: StackUpdate, geometry: Geometry) -> Sequence[jax.Array]:
    stack = one.stack
    if stack.capacity == 0 or geometry.num_samples(stack) == 0:
        return one.state
    row_pointers, ids, *others = arrays
    arrays = (row_pointers, ordered(ids, one.order), *others)
    sums = sum_row_gradients(arrays, _columns(one.gradient), geometry, stack, one.state[0].shape[0])
    return _updated(one, sums.rows, sums.gradients)


def _sparsecore_stack(arrays: Sequence[jax.Array], one: StackUpdate, geometry: Geometry) -> Sequence[jax.Array]:
    lower = sparsecore.update if sparsecore.holds(one.stack, one.state[0]) else _portable_stack
    return lower(arrays, one, geometry)


def _portable_rows(rows: jax.Array, one: StackUpdate) -> Sequence[jax.Array]:
    if rows.shape[0] == 0:
        return one.state
    rows, num_rows = ordered(rows, one.order), one.state[0].shape[0]
    is_row = (rows >= 0) & (rows < num_rows)
    grouped = group(jnp.where(is_row, 0, 1), jnp.where(is_row, rows, num_rows), 1)
    return _updated(one, grouped.rows, sum_groups(grouped, _columns(one.gradient)[grouped.order]))


def _num_states(geometry: Geometry) -> list[int]:
    """Arrays of each stack: its table and its slots."""
    return [1 + optimizer_of(stack).slot_variables_count() for stack in geometry.stacks]


def _updates(
    hyperparameters: jax.Array,
    operands: Sequence[jax.Array],
    geometry: Geometry,
    num_hyperparameters: tuple[int, ...],
    limits: tuple[RowLimits, ...],
) -> list[StackUpdate]:
    """The updates of all stacks; `operands` are gradients, tables and slots, and what orders the updates."""
    gradients, states, after = _parts(operands, geometry)
    fields = zip(
        geometry.stacks,
        _of_stacks(gradients, states, geometry),
        map(tuple, states),
        map(tuple, cut(list(hyperparameters), num_hyperparameters)),
        orders_of(after, len(states)),
        limits,
        strict=True,
    )
    return [StackUpdate(*update) for update in fields]


def _parts(operands: Sequence[Any], geometry: Geometry) -> tuple[list[list[Any]], list[list[Any]], Sequence[Any]]:
    """The gradients of each stack, its table and slots, and what orders the updates."""
    num_gradients, num_states = geometry.num_arrays(), _num_states(geometry)
    first, last = sum(num_gradients), sum(num_gradients) + sum(num_states)
    return cut(operands[:first], num_gradients), cut(operands[first:last], num_states), operands[last:]


def _of_stacks(
    gradients: Sequence[Sequence[jax.Array]], states: Sequence[Sequence[jax.Array]], geometry: Geometry
) -> list[jax.Array]:
    """The gradient of each stack as a whole."""
    each = zip(geometry.stacks, gradients, states, strict=True)
    return [gradient_of_stack(arrays, stack, state[0].shape[-1], geometry) for stack, arrays, state in each]


def _in_jax(update_stack: Callable[..., Sequence[jax.Array]], *operands, geometry: Geometry, **params):
    updates = _updates(operands[5], operands[6:], geometry, **params)
    return [array for one in updates for array in update_stack(operands[:5], one, geometry)]


def _without_rule(geometry: Geometry) -> bool:
    """Whether stacks have optimizers that C++ has no rule for, which is said. Calls have all or none of these."""
    optimizers = [optimizer_of(stack) for stack in geometry.stacks]
    without_rule = sorted({type(optimizer).__name__ for optimizer in optimizers if not native.has_rule(optimizer)})
    if without_rule:
        warn_slow_path(
            f"{', '.join(without_rule)} has no native row rule: its updates run in plain JAX operations, which are slower on "
            'CPU. embax.use_backend("portable") chooses that without this warning.'
        )
    return bool(without_rule)


def _native(*operands, geometry: Geometry, **params):
    if _without_rule(geometry):
        return _in_jax(_portable_stack, *operands, geometry=geometry, **params)
    gradients, states, after = _parts(operands[6:], geometry)
    # The kernels read the gradients of features that have all columns of their stack; others are put together for them.
    by_kernel = only_features_of_all_columns(geometry, [state[0].shape[-1] for state in states])
    read = [
        arrays if stack.features else [gradient_of_stack(arrays, whole, state[0].shape[-1], geometry)]
        for stack, whole, arrays, state in zip(by_kernel.stacks, geometry.stacks, gradients, states, strict=True)
    ]
    flat = [array for arrays in (*read, *states) for array in arrays]
    return native.update(operands[:5], operands[5], [*flat, *after], geometry=by_kernel, **params)


def _shapes(*operands, geometry: Geometry, **params):
    del params
    _, states, _ = _parts(operands[6:], geometry)
    return [state.update() for of_stack in states for state in of_stack]


update_p = define(
    "embax_update",
    _shapes,
    {
        "native": _native,
        "portable": functools.partial(_in_jax, _portable_stack),
        "sparsecore": functools.partial(_in_jax, _sparsecore_stack),
    },
    derivative="The update of tables is the end of a backward pass and has no derivative of its own.",
    batching="Make one larger batch instead.",
)


def _portable_apply_rows(hyperparameters: jax.Array, *operands, geometry: Geometry, **params):
    num_stacks = len(geometry.stacks)
    updates = _updates(hyperparameters, operands[num_stacks:], geometry, **params)
    return [
        array for rows, one in zip(operands[:num_stacks], updates, strict=True) for array in _portable_rows(rows, one)
    ]


def _native_apply_rows(hyperparameters: jax.Array, *operands, geometry: Geometry, **params):
    if _without_rule(geometry):
        return _portable_apply_rows(hyperparameters, *operands, geometry=geometry, **params)
    return native.apply_rows(hyperparameters, operands, geometry=geometry, **params)


def _apply_rows_shapes(*operands, geometry: Geometry, **params):
    del params
    first = 1 + 2 * len(geometry.stacks)
    return [state.update() for state in operands[first : first + sum(_num_states(geometry))]]


apply_rows_p = define(
    "embax_apply_rows",
    _apply_rows_shapes,
    {"native": _native_apply_rows, "portable": _portable_apply_rows},
    derivative="The update of tables is the end of a backward pass and has no derivative of its own.",
    batching="Make one larger batch instead.",
)
