"""Stochastic gradient descent."""

import dataclasses
from typing import ClassVar, NamedTuple

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import Initializer, OptimizerSpec


class SGDSlotVariables(NamedTuple):
    """SGD keeps nothing beside the table."""


@dataclasses.dataclass(frozen=True)
class SGDOptimizerSpec(OptimizerSpec):
    """Stochastic gradient descent without momentum: `w -= lr * g`.

    Args:
        learning_rate: `lr`, a number or a schedule (see `OptimizerSpec`).

    Source: Robbins and Monro, A Stochastic Approximation Method, 1951.
    """

    native_rule: ClassVar[str] = "sgd"
    Slots: ClassVar = SGDSlotVariables

    def slot_variables_initializers(self) -> tuple[Initializer, ...]:  # noqa: D102
        return SGDSlotVariables()

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        (learning_rate,) = hyperparameters
        return table - learning_rate * gradient, slots
