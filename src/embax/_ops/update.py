"""The update primitive: gradients of activations into tables and slots, in place."""

import functools
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from embax._checks import INT32_MAX
from embax._ops import native
from embax._ops.backend import chosen_backend, warn_slow_path
from embax._ops.geometry import Geometry, StackGeometry, packed_operands
from embax._ops.refusals import refuse_transformations
from embax._ops.segments import entries_of, physical_rows, sum_runs
from embax._preprocess.buffers import PreprocessedInput
from embax.optimizers import OptimizerSpec

update_p = Primitive("embax_update")
update_p.multiple_results = True


def update_stacks(
    packed: PreprocessedInput,
    gradients: Sequence[jax.Array],
    states: Sequence[tuple[jax.Array, ...]],
    hyperparameters: Sequence[tuple[jax.Array, ...]],
    after: Sequence[jax.Array],
    geometry: Geometry,
    optimizers: tuple[OptimizerSpec, ...],
) -> list[tuple[jax.Array, ...]]:
    """Updates the rows that a batch touched, each once.

    Args:
        packed: the batch that the lookup took.
        gradients: float32[samples, dim] of each stack, shaped like its activations.
        states: table and slots of each stack, float32[rows, dim].
        hyperparameters: float32 scalars of each stack's optimizer.
        after: nothing, or an array of each stack that was computed from its lookup. It is not read, but makes the update
            wait for the lookup: XLA copies the table where it cannot see that order.
        geometry: static.
        optimizers: of each stack, static.

    Returns:
        New table and slots of each stack.
    """
    new = update_p.bind(
        *packed_operands(packed),
        jnp.stack([scalar for scalars in hyperparameters for scalar in scalars]),
        *gradients,
        *(array for state in states for array in state),
        *after,
        geometry=geometry,
        optimizers=optimizers,
        num_hyperparameters=tuple(map(len, hyperparameters)),
        backend=chosen_backend(),
    )
    return _grouped(new, [len(state) for state in states])


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


def _portable_stack(
    arrays,
    gradient: jax.Array,
    state: tuple[jax.Array, ...],
    hyperparameters: tuple[jax.Array, ...],
    after: jax.Array | None,
    geometry: Geometry,
    stack: StackGeometry,
    optimizer: OptimizerSpec,
) -> tuple[jax.Array, ...]:
    num_rows = state[0].shape[0]
    if num_rows + stack.capacity > INT32_MAX:
        raise ValueError(
            f"Stack {stack.name!r}: {num_rows} rows and a buffer of {stack.capacity} entries are more than int32 counts, "
            f"{INT32_MAX}, which the portable backend needs; split the table."
        )
    if stack.capacity == 0 or geometry.num_samples(stack) == 0:
        return state
    partition, ids, sample, gain = entries_of(*arrays, geometry=geometry, stack=stack)
    if after is not None:
        ids = ids + _opaque_zero(after)
    rows = physical_rows(partition, ids, sample < geometry.num_samples(stack), geometry.num_sparsecores, num_rows)
    order = jnp.argsort(rows, stable=True)
    rows = rows[order]
    contributions = gain[order][:, None] * gradient.at[sample[order]].get(mode="fill", fill_value=0)
    is_last, sums = sum_runs(rows, contributions)
    # The touched rows, each once, to the front; behind them rows past the end of the table, which reading fills and
    # writing drops. All differ and are sorted, so that no write meets another.
    padding = num_rows + jnp.arange(stack.capacity, dtype=jnp.int32)
    touched = jnp.where(is_last & (rows < num_rows), rows, padding)
    compact = jnp.argsort(touched)
    touched = touched[compact]
    old = [
        array.at[touched].get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
        for array in state
    ]
    table, slots = optimizer.update_rows(sums[compact], old[0], tuple(old[1:]), hyperparameters)
    return tuple(
        array.at[touched].set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)
        for array, rows in zip(state, (table, *slots), strict=True)
    )


def _portable(
    row_pointers,
    ids,
    samples,
    gains,
    num_minibatches,
    hyperparameters,
    *operands,
    geometry: Geometry,
    optimizers: tuple[OptimizerSpec, ...],
    num_hyperparameters: tuple[int, ...],
    backend: str,
):
    del backend
    arrays = (row_pointers, ids, samples, gains, num_minibatches)
    num_stacks = len(optimizers)
    sizes = [1 + optimizer.slot_variables_count() for optimizer in optimizers]
    gradients, states, after = _grouped(operands, [num_stacks, sum(sizes), len(operands)])
    scalars = _grouped(list(hyperparameters), num_hyperparameters)
    results = []
    for k, (state, stack) in enumerate(zip(_grouped(states, sizes), geometry.stacks, strict=True)):
        order = after[k] if after and after[k].size else None
        results += _portable_stack(arrays, gradients[k], state, scalars[k], order, geometry, stack, optimizers[k])
    return results


@functools.cache
def _jitted(**params):
    return jax.jit(functools.partial(update_p.bind, **params))


@update_p.def_impl
def _run(*operands, **params):
    return _jitted(**params)(*operands)


@update_p.def_abstract_eval
def _shapes(*operands, optimizers: tuple[OptimizerSpec, ...], **params):
    del params
    first = 6 + len(optimizers)
    num_states = sum(1 + optimizer.slot_variables_count() for optimizer in optimizers)
    return [jax.core.ShapedArray(state.shape, state.dtype) for state in operands[first : first + num_states]]


refuse_transformations(
    update_p,
    derivative="The update of tables is the end of a backward pass and has no derivative of its own.",
    batching="Make one larger batch instead.",
)

_lower_portable = mlir.lower_fun(_portable, multiple_results=True)


def _lower_cpu(context, *operands, geometry: Geometry, optimizers: tuple[OptimizerSpec, ...], backend: str, **params):
    without_rule = sorted({type(optimizer).__name__ for optimizer in optimizers if not native.has_rule(optimizer)})
    if backend == "native" and not without_rule:
        return native.lower_update(context, *operands, geometry=geometry, optimizers=optimizers)
    if backend == "native":
        warn_slow_path(
            f"{', '.join(without_rule)} has no native row rule: the update of this step runs in plain JAX operations, for all "
            'its stacks. embax.use_backend("portable") chooses that without this warning.'
        )
    return _lower_portable(context, *operands, geometry=geometry, optimizers=optimizers, backend=backend, **params)


mlir.register_lowering(update_p, _lower_portable)
mlir.register_lowering(update_p, _lower_cpu, platform="cpu")
