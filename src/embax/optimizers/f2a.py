"""F2A, Adagrad by the frequency of rows."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import LearningRate, OptimizerSpec


class F2ASlotVariables(NamedTuple):
    """F2A's slots: the sum of the squared gradients of each element, and how many steps it took."""

    accumulator: Any
    local_step: Any


@dataclasses.dataclass(frozen=True)
class F2AOptimizerSpec(OptimizerSpec):
    """Adagrad with larger steps for rows that are named less often, elementwise, at step `t`, which counts from 0.

        n += 1
        f = min((max(t, 1) / n)**rho, max_lr_multiplier)
        a += g**2
        w -= lr * (f * g / sqrt(a) + l1 * sign(w) + l2 * w)

    `sign(0)` is 0; where `a` is 0, so is the first term. With `rho`, `l1` and `l2` 0 this is Adagrad. `t` is the step of the
    training: pass `step=` to the layer's call, or to `apply_gradients`.

    Args:
        learning_rate: `lr`, a number or a schedule (see `OptimizerSpec`).
        rho: how much the frequency matters, at least 0.
        initial_accumulator_value: the value of `a` before the first step, at least 0 (see `AdagradOptimizerSpec`).
        initial_local_step_value: the value of `n` before the first step, at least 0.
        l1_regularization_strength: `l1`, at least 0.
        l2_regularization_strength: `l2`, at least 0. Rows decay only at steps that name them.
        max_lr_multiplier: the largest `f`, above 0.

    Source: the F2A optimizer of JAX SparseCore (jax-tpu-embedding), whose name, fields and formula these are.
    """

    learning_rate: LearningRate = 0.01
    rho: float = 0.5
    initial_accumulator_value: float = 0.1
    initial_local_step_value: float = 0.0
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    max_lr_multiplier: float = 1e6

    native_rule: ClassVar[str] = "f2a"
    Slots: ClassVar = F2ASlotVariables

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rho", "initial_local_step_value", "l1_regularization_strength", "l2_regularization_strength"):
            self._check_number(field, lambda value: value >= 0, "of at least 0")
        self._check_number(
            "initial_accumulator_value", lambda a: a >= 0, "of at least 0, since its square root is taken"
        )
        self._check_number("max_lr_multiplier", lambda multiplier: multiplier > 0, "above 0")

    def slot_variables_initializers(self) -> F2ASlotVariables:  # noqa: D102
        return F2ASlotVariables(
            accumulator=jax.nn.initializers.constant(self.initial_accumulator_value),
            local_step=jax.nn.initializers.constant(self.initial_local_step_value),
        )

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """`lr`, `rho`, `l1`, `l2`, `max_lr_multiplier` and `t` (see `OptimizerSpec.get_hyperparameters`)."""
        number = self._step_number(step)
        constants = (self.rho, self.l1_regularization_strength, self.l2_regularization_strength, self.max_lr_multiplier)
        return self.get_learning_rate(step), *map(jnp.float32, constants), number

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        learning_rate, rho, l1, l2, max_multiplier, step = hyperparameters
        accumulator, local_step = slots
        local_step = local_step + 1.0
        multiplier = jnp.minimum(jnp.power(jnp.maximum(step, 1.0) / local_step, rho), max_multiplier)
        accumulator = accumulator + gradient * gradient
        scaled = jnp.where(accumulator == 0, 0.0, gradient / jnp.sqrt(accumulator))
        return table - learning_rate * (multiplier * scaled + l1 * jnp.sign(table) + l2 * table), (
            accumulator,
            local_step,
        )
