"""Adam."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import OptimizerSpec, one_minus_power


class AdamSlotVariables(NamedTuple):
    """Adam's slots: running means of the gradient and of its square, elementwise."""

    momentum: Any
    velocity: Any


@dataclasses.dataclass(frozen=True)
class AdamOptimizerSpec(OptimizerSpec):
    """Adam with bias correction, elementwise, at step `t`, which counts from 0.

        m += (1 - b1) * (g - m)
        v += (1 - b2) * (g**2 - v)
        w -= alpha_t * m / (sqrt(v) + eps_t)

    with `alpha_t = lr * sqrt(1 - b2**(t+1)) / (1 - b1**(t+1))` and `eps_t = eps * sqrt(1 - b2**(t+1))`. An element
    whose denominator is 0 takes no step.

    `m` and `v` decay only at steps whose batch names the row, by one factor however many steps it was left out, but `t` is
    the step of the training: pass `step=` to the layer's call, or to `apply_gradients`.

    Args:
        learning_rate: `lr`, a number or a schedule (see `OptimizerSpec`).
        beta_1: `b1`, decay of the mean of the gradient, in [0, 1).
        beta_2: `b2`, decay of the mean of its square, in [0, 1).
        epsilon: `eps`, at least 0.

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8

    native_rule: ClassVar[str] = "adam"
    Slots: ClassVar = AdamSlotVariables

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decay("beta_1")
        self._check_decay("beta_2")
        self._check_number("epsilon", lambda epsilon: epsilon >= 0, "of at least 0")

    def slot_variables_initializers(self) -> AdamSlotVariables:  # noqa: D102
        zeros = jax.nn.initializers.constant(0.0)
        return AdamSlotVariables(momentum=zeros, velocity=zeros)

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """`alpha_t`, `b1`, `b2` and `eps_t` (see `OptimizerSpec.get_hyperparameters`)."""
        count = self._step_number(step) + 1.0
        correction = jnp.sqrt(one_minus_power(self.beta_2, count))
        alpha = self.get_learning_rate(step) * correction / one_minus_power(self.beta_1, count)
        return alpha, jnp.float32(self.beta_1), jnp.float32(self.beta_2), jnp.float32(self.epsilon) * correction

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        alpha, beta_1, beta_2, epsilon = hyperparameters
        momentum, velocity = slots
        momentum = momentum + (1.0 - beta_1) * (gradient - momentum)
        velocity = velocity + (1.0 - beta_2) * (gradient * gradient - velocity)
        denominator = jnp.sqrt(velocity) + epsilon
        return table - jnp.where(denominator == 0, 0.0, alpha * momentum / denominator), (momentum, velocity)
