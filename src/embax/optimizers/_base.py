"""What every optimizer is: a spec of hyperparameters and slots, and one rule that updates the touched rows."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from embax._checks import is_finite_number
from embax._types import Array, Float

LearningRate: TypeAlias = float | Callable[..., Any]
Initializer: TypeAlias = Callable[..., jax.Array]


def _positional_arguments(function: Callable[..., Any]) -> int:
    """The number of arguments that `function` needs, `self` not counted."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.kind not in variadic and p.default is inspect.Parameter.empty]
    if any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in needed):
        raise ValueError("an argument can be given by keyword only")
    return len(needed)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """Base class of the optimizers that are fused into the backward pass of a table.

    A subclass is a frozen dataclass of hyperparameters; it names its slots in `Slots`, initializes them, and states its
    row rule in `update_rows`. Two specs are equal when they are of one class and all their fields are equal.

    Args:
        learning_rate: a number, a function of no argument, or a schedule: a function of the step (an int or an int32
            scalar, traced or not) that returns a scalar.
    """

    learning_rate: LearningRate = 0.001

    native_rule: ClassVar[str] = ""
    """Name of the C++ row rule in `csrc/kernels/optimizers.h`."""
    Slots: ClassVar[Callable[..., Sequence[jax.Array]]]
    """NamedTuple of the slot variables, each shaped like the table."""

    def __post_init__(self) -> None:
        if callable(self.learning_rate):
            try:
                arguments: int | str = _positional_arguments(self.learning_rate)
            except (ValueError, TypeError) as error:
                arguments = f"unknown ({error})"
            if arguments not in (0, 1):
                raise ValueError(
                    f"{type(self).__name__}: the learning rate schedule {self.learning_rate!r} takes {arguments} "
                    "arguments; it must take none, or the step alone. Bind the others with functools.partial."
                )
        elif not is_finite_number(self.learning_rate):
            raise ValueError(
                f"{type(self).__name__}: learning_rate is {self.learning_rate!r}; it must be a number, a function of no "
                "argument, or a function of the step."
            )

    def get_learning_rate(self, step: int | jax.Array | None = None) -> jax.Array:
        """The learning rate at `step`.

        Args:
            step: int or int32 scalar; needed when the learning rate is a schedule.

        Returns:
            A float32 scalar.

        Raises:
            ValueError: the learning rate is a schedule and `step` is None.
        """
        rate = self.learning_rate
        if callable(rate):
            if _positional_arguments(rate) == 0:
                rate = rate()
            elif step is None:
                raise ValueError(
                    f"{type(self).__name__}: the learning rate {rate!r} is a function of the step, and no step was given. "
                    "Pass step= to the layer's call, or to apply_gradients."
                )
            else:
                rate = rate(step)
        rate = jnp.asarray(rate, jnp.float32)
        if rate.shape:
            raise ValueError(
                f"{type(self).__name__}: the learning rate {self.learning_rate!r} returned an array of shape {rate.shape}; it "
                "must return a scalar."
            )
        return rate

    def get_hyperparameters(self, step: int | jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The float32 scalars that the row rule takes at `step`, the learning rate first."""
        return (self.get_learning_rate(step),)

    def slot_variables_initializers(self) -> Sequence[Initializer]:
        """One initializer a slot, in the order and type of `Slots`."""
        raise ValueError(f"{type(self).__name__} does not say how its slots are initialized.")

    def slot_variables_count(self) -> int:
        """The number of slot variables a table has beside itself."""
        return len(self.slot_variables_initializers())

    def short_name(self) -> str:
        """A short lower case name."""
        return self.native_rule

    def update_rows(
        self,
        gradient: Float[Array, "rows dim"],
        table: Float[Array, "rows dim"],
        slots: tuple[Float[Array, "rows dim"], ...],
        hyperparameters: tuple[Float[Array, ""], ...],
    ) -> tuple[Float[Array, "rows dim"], tuple[Float[Array, "rows dim"], ...]]:
        """The row rule: new rows of the table and of its slots from the gradient of these rows.

        Args:
            gradient: float32[rows, dim], the gradient with respect to each row.
            table: float32[rows, dim].
            slots: one float32[rows, dim] a slot.
            hyperparameters: the float32 scalars of `get_hyperparameters`.

        Returns:
            The new `table` and `slots`, of the same shapes.
        """
        raise ValueError(f"{type(self).__name__} does not state its row rule.")
