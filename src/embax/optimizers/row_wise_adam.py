"""Row-wise Adam."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers.adam import AdamOptimizerSpec


@dataclasses.dataclass(frozen=True)
class RowWiseAdamOptimizerSpec(AdamOptimizerSpec):
    """Adam with one second moment a row, at step `t`, which counts from 0; the mean is over the row's elements.

        m += (1 - b1) * (g - m)
        v += (1 - b2) * (mean(g**2) - v)
        w -= alpha_t * m / (sqrt(v) + eps_t)

    with `alpha_t` and `eps_t` of `AdamOptimizerSpec`, whose slots and arguments it has. The velocity is stored as
    float32[rows]. An element whose denominator is 0 takes no step.

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, with the second moment of each row averaged as in
    FBGEMM's partial row-wise Adam.
    """

    native_rule: ClassVar[str] = "row_wise_adam"

    def row_wise_slots(self) -> tuple[bool, ...]:  # noqa: D102
        return (False, True)

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        alpha, beta_1, beta_2, epsilon = hyperparameters
        momentum, velocity = slots
        momentum = momentum + (1.0 - beta_1) * (gradient - momentum)
        square = jnp.mean(gradient * gradient, axis=1, keepdims=True)
        velocity = velocity + (1.0 - beta_2) * (square - velocity)
        denominator = jnp.sqrt(velocity) + epsilon
        return table - jnp.where(denominator == 0, 0.0, alpha * momentum / denominator), (momentum, velocity)
