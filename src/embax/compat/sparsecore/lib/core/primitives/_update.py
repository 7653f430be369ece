"""The primitives that update a table and its slots by the gradient of activations."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from embax._ops.across_devices import update_across
from embax._ops.backend import backend_on, chosen_backend
from embax._ops.row_update import RowLimits
from embax.compat.sparsecore.lib.core.primitives._batch import make_batch, only_minibatch, sharded_axis
from embax.compat.sparsecore.lib.core.primitives._checks import (
    NUM_MINIBATCHES,
    PACKED,
    check_count,
    check_dtypes,
    check_limits,
    check_packed,
    check_states,
    check_update,
)
from embax.compat.sparsecore.lib.core.primitives._primitive import define
from embax.optimizers import OptimizerSpec

_FLAGS = frozenset({"use_nesterov"})
"""Hyperparameters that are bool."""


def with_given_hyperparameters(optimizer: type[OptimizerSpec]) -> OptimizerSpec:
    """An optimizer with the same row rule, whose hyperparameters are given as a tuple, where others are given the step."""

    class Given(optimizer):
        native_rule = optimizer.native_rule

        def get_hyperparameters(self, step: Any = None) -> tuple[jax.Array, ...]:
            return step if isinstance(step, tuple) else super().get_hyperparameters(step)

    Given.__name__ = optimizer.__name__
    return Given()


def _like_table(gradient: jax.Array, table: jax.Array) -> jax.Array:
    """The gradient with the rank of the table."""
    if gradient.ndim == table.ndim:
        return gradient
    return gradient.reshape(-1) if table.ndim == 1 else gradient.reshape(-1, 1)


def update(
    packed: Sequence[jax.Array],
    gradient: jax.Array,
    states: Sequence[jax.Array],
    hyperparameters: Sequence[jax.Array],
    optimizer: OptimizerSpec,
    *,
    max_ids_per_partition: int,
    max_unique_ids_per_partition: int,
    computation_name: str,
    enable_minibatching: bool,
    num_sparsecores_per_device: int | None,
    limits: RowLimits,
    in_order: bool,
) -> tuple[jax.Array, ...]:
    """New table and slots of one stack.

    Args:
        packed: row pointers, ids, samples, gains and the number of minibatches.
        gradient: float32[samples, dim], or float32[samples].
        states: table and slots.
        hyperparameters: float32 scalars of the optimizer's row rule.
        optimizer: takes them instead of a step.
        max_ids_per_partition: see `TableSpec`.
        max_unique_ids_per_partition: see `TableSpec`.
        computation_name: the name of the stack in errors.
        enable_minibatching: whether the buffers are those of minibatches.
        num_sparsecores_per_device: None where the shapes or the device's kind say it.
        limits: what the new rows of the table are clipped to.
        in_order: whether the backend takes one minibatch after another by itself. Where an id occurs in several, its row is
            updated by each.
    """
    gradient = _like_table(gradient, states[0])
    batch, geometry = make_batch(
        packed,
        states[0],
        gradient.shape[0],
        name=computation_name,
        max_ids_per_partition=max_ids_per_partition,
        max_unique_ids_per_partition=max_unique_ids_per_partition,
        enable_minibatching=enable_minibatching,
        num_sparsecores=num_sparsecores_per_device,
        optimizer=optimizer,
    )
    given: Any = tuple(hyperparameters)

    def step(batch, states):
        axis = sharded_axis()
        return update_across(batch, [[gradient]], [tuple(states)], [], geometry, axis, given, [limits])[0]

    if in_order or geometry.max_minibatches < 2:
        return step(batch, states)
    count = jnp.clip(packed[4], 1, geometry.max_minibatches)
    batch = batch.replace(num_minibatches=count.reshape(1))
    return jax.lax.fori_loop(
        0, count, lambda number, states: step(only_minibatch(batch, geometry, number, count), states), tuple(states)
    )


def tpu_runs_minibatches() -> bool:
    """Whether on a TPU the SparseCores do what is traced, which take one minibatch after another."""
    return backend_on("tpu", chosen_backend()) == "sparsecore"


def update_primitive(
    name: str,
    optimizer: type[OptimizerSpec],
    computation_name: str,
    slots: Sequence[str] = (),
    hyperparameters: Sequence[str] = ("learning_rate",),
    parameters: Sequence[str] = (),
) -> Primitive:
    """The primitive of one optimizer.

    Its operands are row pointers, ids, samples, gains, number of minibatches, table, slots, gradient, hyperparameters; its
    results the table and the slots. Without slots the result is the table, and no sequence.

    Args:
        name: of the primitive.
        optimizer: has the row rule.
        computation_name: the default of this parameter.
        slots: names of the slots.
        hyperparameters: names of the operands that the row rule takes.
        parameters: names of static numbers that it takes behind them.
    """
    spec = with_given_hyperparameters(optimizer)
    names = (*PACKED, NUM_MINIBATCHES, "embedding_table", *slots, "activations_grad", *hyperparameters)
    first_state, num_states = len(PACKED) + 1, 1 + len(slots)
    states = slice(first_state, first_state + num_states)
    default_computation_name = computation_name

    def shapes(
        *operands: Any,
        max_ids_per_partition: int,
        max_unique_ids_per_partition: int,
        computation_name: str = default_computation_name,
        sharding_strategy: int = 1,
        enable_minibatching: bool = False,
        min_value: float | None = None,
        max_value: float | None = None,
        num_sparsecores_per_device: int | None = None,
        **static: Any,
    ) -> Any:
        del enable_minibatching, num_sparsecores_per_device
        if sorted(static) != sorted(parameters):
            raise ValueError(f"{name} was given the parameters {sorted(static)}; it takes {sorted(parameters)}.")
        check_count(operands, names, name)
        check_packed(operands[:first_state])
        check_states(dict(zip(names[states], operands[states], strict=True)), operands[states.stop])
        for scalar_name, scalar in zip(hyperparameters, operands[states.stop + 1 :], strict=True):
            check_dtypes({scalar_name: scalar}, jnp.bool_ if scalar_name in _FLAGS else jnp.float32)
        check_limits(max_ids_per_partition, max_unique_ids_per_partition, sharding_strategy)
        check_update(computation_name, min_value, max_value)
        results = [state.update(weak_type=False) for state in operands[states]]
        return results if slots else results[0]

    def run(
        *operands: jax.Array,
        in_order: bool = False,
        computation_name: str = default_computation_name,
        sharding_strategy: int = 1,
        enable_minibatching: bool = False,
        min_value: float | None = None,
        max_value: float | None = None,
        num_sparsecores_per_device: int | None = None,
        max_ids_per_partition: int,
        max_unique_ids_per_partition: int,
        **static: Any,
    ) -> Any:
        del sharding_strategy
        scalars = [jnp.asarray(scalar, jnp.float32) for scalar in operands[states.stop + 1 :]]
        scalars += [jnp.float32(static[parameter]) for parameter in parameters]
        new = update(
            operands[:first_state],
            operands[states.stop],
            operands[states],
            [scalar.reshape(()) for scalar in scalars],
            spec,
            max_ids_per_partition=max_ids_per_partition,
            max_unique_ids_per_partition=max_unique_ids_per_partition,
            computation_name=computation_name,
            enable_minibatching=enable_minibatching,
            num_sparsecores_per_device=num_sparsecores_per_device,
            limits=(min_value, max_value),
            in_order=in_order,
        )
        return new if slots else new[0]

    def on_tpu(*operands: jax.Array, **params: Any) -> Any:
        return run(*operands, in_order=tpu_runs_minibatches(), **params)

    return define(name, shapes, run, multiple_results=bool(slots), on_tpu=on_tpu)
