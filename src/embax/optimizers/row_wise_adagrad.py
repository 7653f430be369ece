"""Row-wise Adagrad."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import OptimizerSpec


class RowWiseAdagradSlotVariables(NamedTuple):
    """Row-wise Adagrad's slot: one value a row, the sum of the mean squared gradients of the row."""

    accumulator: Any


@dataclasses.dataclass(frozen=True)
class RowWiseAdagradOptimizerSpec(OptimizerSpec):
    """Adagrad with one accumulator a row: `a += mean(g**2); w -= lr * g / (sqrt(a) + eps)`, the mean over the row's elements.

    Its slot takes `1 / embedding_dim` of the memory of Adagrad's. An element whose
    denominator is 0 takes no step.

    Args:
        learning_rate: `lr`, a number or a schedule (see `OptimizerSpec`).
        initial_accumulator_value: the value of `a` before the first step, at least 0.
        epsilon: `eps`, at least 0.

    Source: Khudia and others, FBGEMM: Enabling High-Performance Low-Precision Deep Learning Inference, 2021, whose library
    names it exact row-wise Adagrad; the rule goes back to Duchi, Hazan and Singer, 2011.
    """

    initial_accumulator_value: float = 0.0
    epsilon: float = 1e-8

    native_rule: ClassVar[str] = "row_wise_adagrad"
    Slots: ClassVar = RowWiseAdagradSlotVariables

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number(
            "initial_accumulator_value", lambda a: a >= 0, "of at least 0, since its square root is taken"
        )
        self._check_number("epsilon", lambda epsilon: epsilon >= 0, "of at least 0")

    def slot_variables_initializers(self) -> RowWiseAdagradSlotVariables:  # noqa: D102
        return RowWiseAdagradSlotVariables(accumulator=jax.nn.initializers.constant(self.initial_accumulator_value))

    def row_wise_slots(self) -> tuple[bool, ...]:  # noqa: D102
        return (True,)

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """`lr` and `eps` (see `OptimizerSpec.get_hyperparameters`)."""
        return self.get_learning_rate(step), jnp.float32(self.epsilon)

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        learning_rate, epsilon = hyperparameters
        accumulator = slots[0] + jnp.mean(gradient * gradient, axis=1, keepdims=True)
        denominator = jnp.sqrt(accumulator) + epsilon
        return table - jnp.where(denominator == 0, 0.0, learning_rate * gradient / denominator), (accumulator,)
