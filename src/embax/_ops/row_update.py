"""What happens to a touched row around its optimizer's rule, and when: every lowering in JAX operations traces this."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from embax._ops.geometry import StackGeometry, optimizer_of
from embax._types import Rows, RowSlots, Scalars
from embax.optimizers import OptimizerSpec
from embax.optimizers._clipping import apply_clipping

RowLimits: TypeAlias = tuple[float | None, float | None]
"""The smallest and the largest value that an element of a new row may have, None where there is no limit."""

NO_LIMITS: RowLimits = (None, None)


class StackUpdate(NamedTuple):
    """The update of one stack, as a lowering in JAX operations takes it.

    Args:
        stack: where its entries lie, and its optimizer.
        gradient: float32[samples, dim], or float32[samples] of a table of rank 1.
        state: table and slots, float32[rows, dim] or float32[rows].
        hyperparameters: what `hyperparameters_of` returned.
        order: an int32 0 that must be known before the update may begin, or None.
        limits: what the new rows of the table are clipped to.
    """

    stack: StackGeometry
    gradient: jax.Array
    state: tuple[jax.Array, ...]
    hyperparameters: tuple[jax.Array, ...]
    order: jax.Array | None
    limits: RowLimits

    @property
    def optimizer(self) -> OptimizerSpec:
        """The optimizer of the stack."""
        return optimizer_of(self.stack)


def _opaque_zero(after: jax.Array) -> jax.Array:
    """An int32 0 that XLA takes for a function of `after`, whatever that holds, NaN included."""
    bits = jax.lax.bitcast_convert_type(after.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    return jax.lax.population_count(bits) >> 6


def orders_of(after: Sequence[jax.Array], count: int) -> list[jax.Array | None]:
    """For each of `count` stacks an opaque zero that is known when its array of `after` is, None where there is none."""
    return [_opaque_zero(array) if array.size else None for array in after] or [None] * count


def ordered(array: jax.Array, order: jax.Array | None) -> jax.Array:
    """An integer array that is not known before `order` is."""
    return array if order is None else array + order


def hyperparameters_of(optimizer: OptimizerSpec, step: int | jax.Array | None) -> tuple[jax.Array, ...]:
    """The float32 scalars of the rule, and behind them `lr * weight_decay` where rows decay apart from it."""
    scalars = tuple(optimizer.get_hyperparameters(step))
    if optimizer.decays_weights:
        scalars += (optimizer.get_learning_rate(step) * np.float32(optimizer.weight_decay),)
    return scalars


def _clip_gradient(optimizer: OptimizerSpec, gradient: Rows) -> Rows:
    if optimizer.clip_gradient_value is not None:
        gradient = jnp.clip(gradient, -np.float32(optimizer.clip_gradient_value), optimizer.clip_gradient_value)
    if optimizer.clip_gradient_norm is not None:
        # A power of two that keeps the squares from overflow, and those that matter from vanishing.
        largest = jnp.max(jnp.abs(gradient), axis=1, keepdims=True)
        factor = jnp.where(largest > 2.0**60, 2.0**-70, jnp.where(largest < 2.0**-60, 2.0**70, 1.0))
        scaled, limit = gradient * factor, np.float32(optimizer.clip_gradient_norm)
        norm = jnp.sqrt(jnp.sum(scaled * scaled, axis=1, keepdims=True))
        gradient = jnp.where(norm > limit * factor, scaled * (limit / norm), gradient)
    return gradient


def new_rows(
    optimizer: OptimizerSpec,
    limits: RowLimits,
    gradient: Rows,
    table: Rows,
    slots: RowSlots,
    hyperparameters: Scalars,
) -> tuple[Rows, RowSlots]:
    """New rows of a table and of its slots.

    Args:
        optimizer: its row rule, and what is asked for beside it.
        limits: what the new rows of the table are clipped to.
        gradient: float32[rows, dim], the gradient with respect to each row.
        table: float32[rows, dim].
        slots: float32[rows, dim] or float32[rows, 1] of each slot.
        hyperparameters: what `hyperparameters_of` returned, of any shape that broadcasts to the rows.
    """
    gradient = _clip_gradient(optimizer, gradient)
    if optimizer.l2:
        gradient = gradient + np.float32(optimizer.l2) * table
    if optimizer.decays_weights:
        table = table - hyperparameters[-1] * table
        hyperparameters = hyperparameters[:-1]
    table, slots = optimizer.checked_update(gradient, table, slots, hyperparameters)
    return apply_clipping(table, *limits), slots
