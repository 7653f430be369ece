"""The update primitive: gradients of activations into tables and slots, in place."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from embax._checks import INT32_MAX
from embax._ops import native, sparsecore
from embax._ops.backend import backend_on, chosen_backend
from embax._ops.geometry import Geometry, optimizer_of, packed_operands
from embax._ops.refusals import refuse_transformations
from embax._ops.row_update import NO_LIMITS, RowLimits, StackUpdate, hyperparameters_of, new_rows
from embax._ops.segments import entries_of, physical_rows, sum_runs
from embax._preprocess.buffers import PreprocessedInput
from embax._warnings import warn_slow_path

update_p = Primitive("embax_update")
update_p.multiple_results = True


def update_stacks(
    packed: PreprocessedInput,
    gradients: Sequence[jax.Array],
    states: Sequence[tuple[jax.Array, ...]],
    after: Sequence[jax.Array],
    geometry: Geometry,
    step: int | jax.Array | None = None,
    limits: Sequence[RowLimits] | None = None,
) -> list[tuple[jax.Array, ...]]:
    """Updates the rows that a batch touched, each once.

    Args:
        packed: the batch that the lookup took.
        gradients: float32[samples, dim] of each stack, shaped like its activations.
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
    new: list[tuple[jax.Array, ...]] = [()] * len(geometry.stacks)
    # What has no row rule in C++ is a call of its own, so that the others keep theirs.
    for native_rule in (True, False):
        chosen = [k for k, stack in enumerate(geometry.stacks) if native.has_rule(optimizer_of(stack)) == native_rule]
        if not chosen:
            continue
        stacks = tuple(geometry.stacks[k] for k in chosen)
        hyperparameters = [hyperparameters_of(optimizer_of(stack), step) for stack in stacks]
        flat = update_p.bind(
            *packed_operands(packed),
            _one_array([scalar for scalars in hyperparameters for scalar in scalars]),
            *(gradients[k] for k in chosen),
            *(array for k in chosen for array in states[k]),
            *(after[k] for k in chosen if after),
            geometry=dataclasses.replace(geometry, stacks=stacks),
            num_hyperparameters=tuple(map(len, hyperparameters)),
            limits=tuple(limits[k] if limits else NO_LIMITS for k in chosen),
            backend=chosen_backend(),
        )
        for k, state in zip(chosen, _grouped(flat, [len(states[k]) for k in chosen]), strict=True):
            new[k] = state
    return new


def _one_array(scalars: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(scalars) if scalars else jnp.zeros(0, jnp.float32)


def _grouped(flat: Sequence, sizes: Sequence[int]) -> list[tuple]:
    """`flat` cut into tuples of the given sizes."""
    groups, start = [], 0
    for size in sizes:
        groups.append(tuple(flat[start : start + size]))
        start += size
    return groups


def _opaque_zero(after: jax.Array) -> jax.Array:
    """An int32 0 that XLA takes for a function of `after`, whatever that holds, NaN included."""
    bits = jax.lax.bitcast_convert_type(after.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return jax.lax.population_count(bits) >> 6


def _columns(array: jax.Array) -> jax.Array:
    """A matrix as it is, an array of one value a row as a matrix of one column."""
    return array[:, None] if array.ndim == 1 else array


def _portable_stack(arrays: Sequence[jax.Array], one: StackUpdate, geometry: Geometry) -> Sequence[jax.Array]:
    geometry.check_one_device()
    stack, state = one.stack, one.state
    num_rows = state[0].shape[0]
    if num_rows + stack.capacity > INT32_MAX:
        raise ValueError(
            f"Stack {stack.name!r}: {num_rows} rows and a buffer of {stack.capacity} entries are more than int32 counts, "
            f"{INT32_MAX}, which the portable backend needs; split the table."
        )
    if stack.capacity == 0 or geometry.num_samples(stack) == 0:
        return state
    partition, ids, sample, gain = entries_of(*arrays, geometry=geometry, stack=stack)
    if one.order is not None:
        ids = ids + one.order
    rows = physical_rows(partition, ids, sample < geometry.num_samples(stack), geometry.num_sparsecores, num_rows)
    order = jnp.argsort(rows, stable=True)
    rows = rows[order]
    contributions = gain[order][:, None] * _columns(one.gradient).at[sample[order]].get(mode="fill", fill_value=0)
    is_last, sums = sum_runs(rows, contributions)
    # The touched rows, each once, to the front; behind them rows past the end of the table, which reading fills and
    # writing drops. All differ and are sorted, so that no write meets another.
    padding = num_rows + jnp.arange(stack.capacity, dtype=jnp.int32)
    touched = jnp.where(is_last & (rows < num_rows), rows, padding)
    compact = jnp.argsort(touched)
    touched = touched[compact]
    # The rule must not see the columns that only the stack has. One value a row is read and written as it is: on a GPU a
    # reshape of the whole array would copy it.
    columns = (slice(stack.width),)
    places = [array.at[touched, *columns[: array.ndim - 1]] for array in state]
    known: Any = {"unique_indices": True, "indices_are_sorted": True}
    old = [_columns(place.get(mode="fill", fill_value=0, **known)) for place in places]
    gradient = sums[compact, *columns]
    table, slots = new_rows(one.optimizer, one.limits, gradient, old[0], tuple(old[1:]), one.hyperparameters)
    return [
        place.set(new if array.ndim == 2 else new[:, 0], mode="drop", **known)
        for place, array, new in zip(places, state, (table, *slots), strict=True)
    ]


def _sparsecore_stack(arrays: Sequence[jax.Array], one: StackUpdate, geometry: Geometry) -> Sequence[jax.Array]:
    lower = sparsecore.update if sparsecore.holds(one.stack, one.state[0], geometry) else _portable_stack
    return lower(arrays, one, geometry)


def _num_states(geometry: Geometry) -> list[int]:
    """Arrays of each stack: its table and its slots."""
    return [1 + optimizer_of(stack).slot_variables_count() for stack in geometry.stacks]


def _by_stack(
    update_stack,
    row_pointers,
    ids,
    samples,
    gains,
    num_minibatches,
    hyperparameters,
    *operands,
    geometry: Geometry,
    num_hyperparameters: tuple[int, ...],
    limits: tuple[RowLimits, ...],
    backend: str | None,
):
    del backend
    arrays = (row_pointers, ids, samples, gains, num_minibatches)
    sizes = _num_states(geometry)
    gradients, states, after = _grouped(operands, [len(sizes), sum(sizes), len(operands)])
    updates = zip(
        geometry.stacks,
        gradients,
        _grouped(states, sizes),
        _grouped(list(hyperparameters), num_hyperparameters),
        [_opaque_zero(array) if array.size else None for array in after] or [None] * len(sizes),
        limits,
        strict=True,
    )
    return [array for update in updates for array in update_stack(arrays, StackUpdate(*update), geometry)]


@functools.cache
def _jitted(**params):
    return jax.jit(functools.partial(update_p.bind, **params))


@update_p.def_impl
def _run(*operands, **params):
    return _jitted(**params)(*operands)


@update_p.def_abstract_eval
def _shapes(*operands, geometry: Geometry, **params):
    del params
    first = 6 + len(geometry.stacks)
    return [state.update() for state in operands[first : first + sum(_num_states(geometry))]]


refuse_transformations(
    update_p,
    derivative="The update of tables is the end of a backward pass and has no derivative of its own.",
    batching="Make one larger batch instead.",
)

_lower_portable = mlir.lower_fun(functools.partial(_by_stack, _portable_stack), multiple_results=True)
_lower_sparsecore = mlir.lower_fun(functools.partial(_by_stack, _sparsecore_stack), multiple_results=True)


def _native(*operands, geometry: Geometry, backend: str | None, **params):
    del backend
    geometry.check_one_device()
    packed, hyperparameters, rest = operands[:5], operands[5], operands[6:]
    return native.update(packed, hyperparameters, rest, geometry=geometry, **params)


_lower_native = mlir.lower_fun(_native, multiple_results=True)


def _lower_cpu(context, *operands, geometry: Geometry, backend: str | None, **params):
    lower = _lower_native if backend_on("cpu", backend) == "native" else _lower_portable
    optimizers = [optimizer_of(stack) for stack in geometry.stacks]
    without_rule = sorted({type(optimizer).__name__ for optimizer in optimizers if not native.has_rule(optimizer)})
    if without_rule and lower is _lower_native:
        lower = _lower_portable
        warn_slow_path(
            f"{', '.join(without_rule)} has no native row rule: its updates run in plain JAX operations, which are slower on "
            'CPU. embax.use_backend("portable") chooses that without this warning.'
        )
    return lower(context, *operands, geometry=geometry, backend=backend, **params)


def _lower_tpu(context, *operands, backend: str | None, **params):
    lower = _lower_sparsecore if backend_on("tpu", backend) == "sparsecore" else _lower_portable
    return lower(context, *operands, backend=backend, **params)


mlir.register_lowering(update_p, _lower_portable)
mlir.register_lowering(update_p, _lower_cpu, platform="cpu")
mlir.register_lowering(update_p, _lower_tpu, platform="tpu")
