"""LaProp."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import OptimizerSpec, one_minus_power


class LaPropSlotVariables(NamedTuple):
    """LaProp's slots: the momentum of the normalized gradient, and the running mean of the squared gradient."""

    mu: Any
    nu: Any


@dataclasses.dataclass(frozen=True)
class LaPropOptimizerSpec(OptimizerSpec):
    """LaProp, which normalizes the gradient before it enters the momentum, elementwise.

        nu = d * nu + (1 - d) * (g**2 + eps)
        mu = b1 * mu + sqrt(1 - b1**2) * g / sqrt(nu)
        w -= lr * mu

    with `d = b2 * (1 - b2**t) / (1 - b2**(t+1))` at step `t`, which counts from 0: that makes `nu` the mean of its terms from
    the first step on. Without a step `d = b2`: `nu` then starts from `initial_slot_value`, and first steps are larger. Where
    `nu` is 0, so is the normalized gradient.

    `t` is the step of the training, not of the row: a row that is first named at a late step sees `d` close to `b2`.

    Args:
        learning_rate: `lr`, a number or a schedule (see `OptimizerSpec`).
        b1: decay of the momentum, in [0, 1).
        b2: decay of the mean of the squared gradient, in [0, 1).
        eps: at least 0.
        rms_clip_threshold: None; clipping is not offered.
        initial_slot_value: the value of `mu` and `nu` before the first step, at least 0.

    Source: Ziyin, Wang and Ueda, LaProp: Separating Momentum and Adaptivity in Adam, 2020.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-30
    rms_clip_threshold: None = None
    initial_slot_value: float = 0.0

    native_rule: ClassVar[str] = "laprop"
    Slots: ClassVar = LaPropSlotVariables

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_decay("b1")
        self._check_decay("b2")
        self._check_number("eps", lambda eps: eps >= 0, "of at least 0")
        self._check_number("initial_slot_value", lambda value: value >= 0, "of at least 0, since its root is taken")
        if self.rms_clip_threshold is not None:
            raise ValueError(
                f"LaPropOptimizerSpec: rms_clip_threshold is {self.rms_clip_threshold!r}; it must be None. Clip the gradients "
                "of the activations instead."
            )

    def slot_variables_initializers(self) -> LaPropSlotVariables:  # noqa: D102
        initial = jax.nn.initializers.constant(self.initial_slot_value)
        return LaPropSlotVariables(mu=initial, nu=initial)

    def get_decay_rate(self, step: int | jax.Array | None = None) -> jax.Array:
        """`d`, the decay of `nu` at `step`, as a float32 scalar; `b2` if there is no step."""
        if step is None:
            return jnp.float32(self.b2)
        number = self._step_number(step)
        return jnp.float32(self.b2) * one_minus_power(self.b2, number) / one_minus_power(self.b2, number + 1.0)

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """`lr`, `b1`, `d` and `eps` (see `OptimizerSpec.get_hyperparameters`)."""
        return self.get_learning_rate(step), jnp.float32(self.b1), self.get_decay_rate(step), jnp.float32(self.eps)

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        learning_rate, b1, decay, eps = hyperparameters
        mu, nu = slots
        nu = decay * nu + (1.0 - decay) * (gradient * gradient + eps)
        normalized = jnp.where(nu == 0, 0.0, gradient / jnp.sqrt(nu))
        mu = b1 * mu + jnp.sqrt((1.0 - b1) * (1.0 + b1)) * normalized
        return table - learning_rate * mu, (mu, nu)
