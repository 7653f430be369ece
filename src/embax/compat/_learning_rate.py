"""Learning rates as the reference evaluates them, and embax's optimizers with them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from embax.optimizers import OptimizerSpec


def _arguments(function: Callable[..., Any]) -> tuple[int, int]:
    """How many arguments `function` needs, and how many it takes by position, `self` and `*args` not counted."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in by_position]
    return sum(p.default is inspect.Parameter.empty for p in parameters), len(parameters)


def _scheduled(schedule: Callable[..., Any], step: Any) -> jax.Array:
    """The rate at `step`, rounded to float32 once, so that a traced step and a Python int give the same."""
    try:
        with jax.enable_x64(True):
            return jnp.asarray(schedule(step), jnp.float32)
    except TypeError:  # Some schedules combine arrays whose dtypes then differ.
        return jnp.asarray(schedule(step), jnp.float32)


def learning_rate_at(owner: str, rate: Any, step: int | jax.Array | None) -> jax.Array:
    """A learning rate as a float32 scalar.

    Args:
        owner: begins the errors.
        rate: a number, a function of no argument, or of one, the step.
        step: the number of the step, traced or not, or None.

    Raises:
        ValueError: `rate` is a function of the step and there is none, or of more arguments.
    """
    if not callable(rate):
        return jnp.asarray(rate, jnp.float32)
    needed, taken = _arguments(rate)
    if needed > 1:
        raise ValueError(
            f"{owner}: the learning rate {rate!r} needs {needed} arguments; it must be a number, or a function of no argument or "
            "of the step alone. Bind the others with functools.partial."
        )
    if step is None and needed:
        raise ValueError(
            f"{owner}: the learning rate {rate!r} is a function of the step, and step is None. Pass step=."
        )
    if step is None or not taken:
        return jnp.asarray(rate(), jnp.float32)
    return _scheduled(rate, step)


class _AsReference:
    """What differs in the reference, as a base beside a class of embax: without a step Adam and F2A are at step 0."""

    def get_learning_rate(self, step: int | jax.Array | None = None) -> jax.Array:
        optimizer: Any = self
        return learning_rate_at(type(self).__name__, optimizer.learning_rate, step)

    def _step_number(self, step: int | jax.Array | None) -> jax.Array:
        base: Any = super()
        return base._step_number(0 if step is None else step)


@functools.cache
def as_reference(optimizer: type[OptimizerSpec]) -> type[OptimizerSpec]:
    """A class of embax's optimizers, with the learning rates and the default step of the reference."""
    return type(optimizer.__name__, (_AsReference, optimizer), {"__module__": __name__})
