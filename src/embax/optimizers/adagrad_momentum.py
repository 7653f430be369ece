"""Adagrad with momentum."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import OptimizerSpec


class AdagradMomentumSlotVariables(NamedTuple):
    """Slots: the sum (or running mean) of the squared gradients of each element, and its momentum."""

    accumulator: Any
    momentum: Any


@dataclasses.dataclass(frozen=True)
class AdagradMomentumOptimizerSpec(OptimizerSpec):
    """Adagrad with momentum, elementwise.

        a = a + g**2 if beta2 == 1 else beta2 * a + (1 - beta2) * g**2
        s = g * (a + eps)**(-1 / exponent)
        m = k * m + s
        w -= lr * (k * m + s if use_nesterov else m)

    Where `a + eps` is 0, so is `s`.

    Args:
        learning_rate: `lr`, a number or a schedule (see `OptimizerSpec`).
        momentum: `k`, decay of the momentum, in [0, 1).
        beta2: decay of the accumulator, in [0, 1]; at 1 it is a sum, as Adagrad's.
        epsilon: `eps`, at least 0.
        exponent: above 0; 2 takes the square root, and is several times as fast as others.
        use_nesterov: whether the step looks ahead along the momentum.
        initial_accumulator_value: the value of `a` before the first step, at least 0 (see `AdagradOptimizerSpec`).
        initial_momentum_value: the value of `m` before the first step.

    Source: Duchi, Hazan and Singer, Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011;
    Sutskever, Martens, Dahl and Hinton, On the Importance of Initialization and Momentum in Deep Learning, 2013.
    """

    momentum: float = 0.9
    beta2: float = 1.0
    epsilon: float = 1e-10
    exponent: float = 2.0
    use_nesterov: bool = False
    initial_accumulator_value: float = 0.1
    initial_momentum_value: float = 0.0

    native_rule: ClassVar[str] = "adagrad_momentum"
    Slots: ClassVar = AdagradMomentumSlotVariables

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decay("momentum")
        self._check_number("beta2", lambda beta: 0 <= beta <= 1, "from 0 to 1")
        self._check_number("epsilon", lambda epsilon: epsilon >= 0, "of at least 0")
        self._check_number("exponent", lambda exponent: exponent > 0, "above 0")
        self._check_bool("use_nesterov")
        self._check_number("initial_accumulator_value", lambda a: a >= 0, "of at least 0, since its root is taken")
        self._check_number("initial_momentum_value", lambda m: True, "that is finite")

    def slot_variables_initializers(self) -> AdagradMomentumSlotVariables:  # noqa: D102
        return AdagradMomentumSlotVariables(
            accumulator=jax.nn.initializers.constant(self.initial_accumulator_value),
            momentum=jax.nn.initializers.constant(self.initial_momentum_value),
        )

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """`lr`, `k`, `beta2`, `eps`, `exponent`, and 1 or 0 for `use_nesterov`; `step` is for schedules alone."""
        constants = (self.momentum, self.beta2, self.epsilon, self.exponent, self.use_nesterov)
        return self.get_learning_rate(step), *map(jnp.float32, constants)

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        learning_rate, decay, beta2, epsilon, exponent, use_nesterov = hyperparameters
        accumulator, momentum = slots
        share = jnp.where(beta2 == 1, 1.0, 1.0 - beta2)
        accumulator = beta2 * accumulator + share * gradient * gradient
        base = accumulator + epsilon
        scaled = jnp.where(base == 0, 0.0, gradient * jnp.power(base, -1.0 / exponent))
        momentum = decay * momentum + scaled
        step = jnp.where(use_nesterov != 0, decay * momentum + scaled, momentum)
        return table - learning_rate * step, (accumulator, momentum)
