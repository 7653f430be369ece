"""Adagrad."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import OptimizerSpec


class AdagradSlotVariables(NamedTuple):
    """Adagrad's slot: the sum of the squared gradients of each element."""

    accumulator: Any


@dataclasses.dataclass(frozen=True)
class AdagradOptimizerSpec(OptimizerSpec):
    """Adagrad: `a += g**2; w -= lr * g / sqrt(a)`, elementwise.

    There is no epsilon, as in the SparseCore original; where `a` is 0, also after `g**2` was added, the element takes no step.

    Args:
        learning_rate: `lr`, a number or a schedule (see `OptimizerSpec`).
        initial_accumulator_value: the value of `a` before the first step, at least 0. It should not be far above the square
            of a row's gradient: under a loss that is the mean over a batch of thousands, gradients are so small that the
            default of 0.1 nearly freezes the table; choose 1e-6 or less there.

    Source: Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011.
    """

    initial_accumulator_value: float = 0.1

    native_rule: ClassVar[str] = "adagrad"
    Slots: ClassVar = AdagradSlotVariables

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number(
            "initial_accumulator_value", lambda a: a >= 0, "of at least 0, since its square root is taken"
        )

    def slot_variables_initializers(self) -> AdagradSlotVariables:  # noqa: D102
        return AdagradSlotVariables(accumulator=jax.nn.initializers.constant(self.initial_accumulator_value))

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        (learning_rate,) = hyperparameters
        accumulator = slots[0] + gradient * gradient
        step = jnp.where(accumulator == 0, 0.0, learning_rate * gradient / jnp.sqrt(accumulator))
        return table - step, (accumulator,)
