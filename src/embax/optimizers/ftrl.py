"""FTRL-Proximal."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import LearningRate, OptimizerSpec


class FTRLSlotVariables(NamedTuple):
    """FTRL's slots: the sum of the squared gradients of each element, and the linear term of what it minimizes."""

    accumulator: Any
    linear: Any


@dataclasses.dataclass(frozen=True)
class FTRLOptimizerSpec(OptimizerSpec):
    """FTRL-Proximal, elementwise, with `p` the learning rate power and `P(a) = a**-p`.

        A = a + g**2
        L = l + g - (P(A) - P(a)) / lr * w
        w = (clip(L, -l1, l1) - L) / ((P(A) + beta) / lr + 2 * l2)
        a, l = A, L

    With `multiply_linear_by_learning_rate` the linear term and the denominator are `lr` times those above:

        L = l + lr * g - (P(A) - P(a)) * w
        w = (clip(L, -lr * l1, lr * l1) - L) / (P(A) + beta + 2 * lr * l2)

    An element whose denominator is 0 (`a`, `g`, `beta` and `l2` are all 0) keeps its value. The new `w` comes from the slots:
    of a table's initial values little is left when a row is first updated, and with l1 many elements become exactly 0.

    Args:
        learning_rate: `lr`, a number above 0 or a schedule (see `OptimizerSpec`). A schedule that is 0 at some step needs
            `multiply_linear_by_learning_rate`; without it the linear term would be divided by 0.
        learning_rate_power: `p`, at most 0; -0.5 takes square roots, and is several times as fast as others.
        l1_regularization_strength: `l1`, at least 0.
        l2_regularization_strength: `l2`, at least 0.
        beta: at least 0.
        initial_accumulator_value: the value of `a` before the first step, at least 0.
        initial_linear_value: the value of `l` before the first step.
        multiply_linear_by_learning_rate: whether the linear term holds the learning rates of its steps. Take True when the
            learning rate changes by orders of magnitude.

    Source: McMahan and others, Ad Click Prediction: a View from the Trenches, 2013.
    """

    learning_rate: LearningRate = 0.01
    learning_rate_power: float = -0.5
    l1_regularization_strength: float = 0.0
    l2_regularization_strength: float = 0.0
    beta: float = 0.0
    initial_accumulator_value: float = 0.1
    initial_linear_value: float = 0.0
    multiply_linear_by_learning_rate: bool = False

    native_rule: ClassVar[str] = "ftrl"
    Slots: ClassVar = FTRLSlotVariables

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.learning_rate):
            self._check_number("learning_rate", lambda rate: rate > 0, "above 0, since FTRL divides by it")
        self._check_number("learning_rate_power", lambda power: power <= 0, "of at most 0")
        for field in ("l1_regularization_strength", "l2_regularization_strength", "beta"):
            self._check_number(field, lambda strength: strength >= 0, "of at least 0")
        self._check_number("initial_accumulator_value", lambda a: a >= 0, "of at least 0, since its root is taken")
        self._check_number("initial_linear_value", lambda linear: True, "that is finite")
        self._check_bool("multiply_linear_by_learning_rate")
        if self.decays_weights:
            raise ValueError(
                f"FTRLOptimizerSpec: weight_decay is {self.weight_decay!r}; it must be 0, or weight_decay_mode 'l2', since FTRL "
                "makes rows anew from its slots. Its own remedy is l2_regularization_strength."
            )

    def slot_variables_initializers(self) -> FTRLSlotVariables:  # noqa: D102
        return FTRLSlotVariables(
            accumulator=jax.nn.initializers.constant(self.initial_accumulator_value),
            linear=jax.nn.initializers.constant(self.initial_linear_value),
        )

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """`lr`, `p`, `l1`, `l2`, `beta`, and 1 or 0 for `multiply_linear_by_learning_rate`; `step` is for schedules alone."""
        constants = (
            self.learning_rate_power,
            self.l1_regularization_strength,
            self.l2_regularization_strength,
            self.beta,
            self.multiply_linear_by_learning_rate,
        )
        return self.get_learning_rate(step), *map(jnp.float32, constants)

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        learning_rate, power, l1, l2, beta, multiply = hyperparameters
        accumulator, linear = slots
        # Both forms are one: the linear term is in units of the gradient times `scale`.
        scale = jnp.where(multiply != 0, learning_rate, 1.0)
        per_rate = jnp.where(multiply != 0, 1.0, 1.0 / learning_rate)
        total = accumulator + gradient * gradient
        root, old_root = jnp.power(total, -power), jnp.power(accumulator, -power)
        linear = linear + scale * gradient - (root - old_root) * per_rate * table
        denominator = (root + beta) * per_rate + 2.0 * scale * l2
        threshold = scale * l1
        new = (jnp.clip(linear, -threshold, threshold) - linear) / denominator
        return jnp.where(denominator == 0, table, new), (total, linear)
