"""Optimizers of the user's own: a function of one row, in JAX or as StableHLO text."""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax._checks import positive_int
from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import Initializer, OptimizerSpec
from embax.optimizers._clipping import apply_clipping
from embax.optimizers._stablehlo import Program
from embax.optimizers._trace import trace_rule


@functools.cache
def _slots_type(count: int) -> Any:
    """A NamedTuple of `count` slots without names of their own."""
    return collections.namedtuple("CustomSlotVariables", [f"slot_{number}" for number in range(count)])


def _describe(value: Any) -> str:
    return f"{getattr(value, 'dtype', type(value).__name__)}{list(getattr(value, 'shape', ()))}"


def _check_arguments(rule: Callable[..., Any], count: int) -> None:
    """Raises a ValueError if the signature of the rule is known, and does not take `count` arguments."""
    try:
        signature = inspect.signature(rule)
    except ValueError:
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise ValueError(
            f"CustomOptimizerSpec: custom_computation_fn does not take {count} arguments ({error}); it is called with gradient, "
            "table, slots and the learning rate, by position."
        ) from None


@dataclasses.dataclass(frozen=True)
class CustomOptimizerSpec(OptimizerSpec):
    """An optimizer whose row rule is a function of yours. It runs on every backend without C++.

    The rule is `function(gradient, table, *slots, learning_rate)`. All arguments are float32[1, dim], the learning rate
    included, but a slot of one value a row is float32[1, 1]. It returns the new row of the table and the new slots, in the
    order and the shapes of the arguments; without slots the row alone, or a tuple of it. `dim` is the `embedding_dim` of the
    tables; under an elementwise rule it may include columns of padding.

    Args:
        learning_rate: a number or a schedule (see `OptimizerSpec`).
        custom_computation_fn: the rule, of JAX operations.
        stablehlo: the rule as StableHLO text, or bytes of it, whose `main` takes and returns these arrays; learning rates of
            shape [] and [1] are possible too. It has precedence. `lower_to_stablehlo` makes such text.
        slot_variable_initializers_tuple: an initializer a slot, such as `jax.nn.initializers.zeros`; a NamedTuple names the
            slots, else they are `slot_0`, `slot_1` and so on.
        short_name_str: a short lower case name.
        slots_of_one_value: a bool a slot, whether it has one value a row and is stored as float32[rows]; () means none has.

    Raises:
        ValueError: there is no rule, it returns other arrays than it should, or the text is not StableHLO.

    Example:
        >>> def sign_momentum(gradient, table, momentum, learning_rate):
        ...     momentum = 0.9 * momentum + 0.1 * gradient
        ...     return table - learning_rate * jnp.sign(momentum), momentum
        >>> optimizer = embax.CustomOptimizerSpec(
        ...     0.01, sign_momentum, slot_variable_initializers_tuple=(jax.nn.initializers.zeros,)
        ... )
    """

    custom_computation_fn: Callable[..., Any] | None = None
    stablehlo: str | bytes | None = None
    slot_variable_initializers_tuple: Sequence[Initializer] = ()
    short_name_str: str = "custom"
    slots_of_one_value: Sequence[bool] = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        initializers = self.slot_variable_initializers_tuple
        if not isinstance(initializers, Sequence) or not all(map(callable, initializers)):
            raise ValueError(
                f"CustomOptimizerSpec: slot_variable_initializers_tuple is {initializers!r}; it must be a tuple of functions "
                "(key, shape, dtype) -> array, such as jax.nn.initializers.zeros."
            )
        if not hasattr(initializers, "_fields"):
            initializers = _slots_type(len(initializers))(*initializers)
        object.__setattr__(self, "slot_variable_initializers_tuple", initializers)
        one_value = tuple(self.slots_of_one_value) or (False,) * len(initializers)
        if len(one_value) != len(initializers) or not all(isinstance(slot, bool) for slot in one_value):
            raise ValueError(
                f"CustomOptimizerSpec: slots_of_one_value is {self.slots_of_one_value!r}; it must be (), or a bool for each of "
                f"the {len(initializers)} slots."
            )
        object.__setattr__(self, "slots_of_one_value", one_value)
        if self.stablehlo is None and not callable(self.custom_computation_fn):
            raise ValueError(
                f"CustomOptimizerSpec: custom_computation_fn is {self.custom_computation_fn!r}, and stablehlo is None; one of "
                "them must state the row rule, a function or StableHLO text."
            )
        trace_rule(self)  # Says what is wrong with the rule.

    @functools.cached_property
    def _program(self) -> Program | None:
        return None if self.stablehlo is None else Program.parse(self.stablehlo)

    @property
    def rule_columns(self) -> int:  # noqa: D102
        return 8 if self._program is None else self._program.dim

    @staticmethod
    def lower_to_stablehlo(
        custom_computation_fn: Callable[..., Any],
        embedding_dim: int = 1,
        num_slot_variables: int = 0,
        num_hyperparameters: int = 1,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> str:
        """The StableHLO text of a row rule.

        Args:
            custom_computation_fn: the rule, as of a spec.
            embedding_dim: columns of a row.
            num_slot_variables: slots that the rule takes.
            num_hyperparameters: hyperparameters that it takes behind them.
            min_value: what the elements of the new row of the table are clipped to from below; None does not.
            max_value: likewise from above.

        Returns:
            Text whose `main` takes and returns arrays float32[1, embedding_dim].
        """

        def rule(*arguments: jax.Array) -> tuple[jax.Array, ...]:
            result = custom_computation_fn(*arguments)
            table, *slots = result if isinstance(result, list | tuple) else (result,)
            return apply_clipping(table, min_value, max_value), *slots

        dim = positive_int("lower_to_stablehlo", "embedding_dim", embedding_dim)
        row = jax.ShapeDtypeStruct((1, dim), jnp.float32)
        arguments = [row] * (2 + num_slot_variables + num_hyperparameters)
        return jax.jit(rule, keep_unused=True).lower(*arguments).as_text(dialect="stablehlo")

    @staticmethod
    def wrap_stablehlo_with_limits(
        stablehlo: str | bytes,
        embedding_dim: int,
        num_slot_variables: int,
        num_hyperparameters: int,
        min_value: float | None = None,
        max_value: float | None = None,
    ) -> str:
        """StableHLO text of a row rule that clips the new row of the table to limits.

        Args:
            stablehlo: text of the rule, or its bytes.
            embedding_dim: columns of a row.
            num_slot_variables: slots that the rule takes.
            num_hyperparameters: hyperparameters that it takes behind them.
            min_value: see `lower_to_stablehlo`.
            max_value: see `lower_to_stablehlo`.

        Returns:
            The same text where there are no limits, else another.

        Raises:
            ValueError: `stablehlo` cannot be read.
        """
        program = Program.parse(stablehlo)
        if min_value is None and max_value is None:
            return program.text
        counts = (embedding_dim, num_slot_variables, num_hyperparameters)
        return CustomOptimizerSpec.lower_to_stablehlo(program, *counts, min_value, max_value)

    def slot_variables_initializers(self) -> Any:  # noqa: D102
        return self.slot_variable_initializers_tuple

    def row_wise_slots(self) -> Sequence[bool]:  # noqa: D102
        return self.slots_of_one_value

    def short_name(self) -> str:  # noqa: D102
        return self.short_name_str

    def update_rows(  # noqa: D102
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        arrays = (gradient, table, *slots)
        if gradient.shape[0] == 1:
            new = self._row(hyperparameters, *arrays)
        else:
            of_row = jax.vmap(lambda *row: self._row(hyperparameters, *(array[None] for array in row)))
            new = [array[:, 0] for array in of_row(*arrays)]
        return new[0], tuple(new[1:])

    def _row(self, hyperparameters: Scalars, gradient: jax.Array, *state: jax.Array) -> tuple[jax.Array, ...]:
        """The rule of one row, with what it returns checked."""
        if self._program is not None:
            result = self._program(gradient, *state, *hyperparameters)
        else:
            rule: Any = self.custom_computation_fn
            arguments = (gradient, *state, *(jnp.broadcast_to(scalar, gradient.shape) for scalar in hyperparameters))
            _check_arguments(rule, len(arguments))
            result = rule(*arguments)
        new = tuple(result) if isinstance(result, list | tuple) else (result,)
        names = ("table", *self.slot_variable_initializers_tuple._fields)  # pyright: ignore[reportAttributeAccessIssue]
        if len(new) != len(names):
            raise ValueError(
                f"CustomOptimizerSpec: the row rule returned {len(new)} arrays; it must return {len(names)}, the new "
                f"{', '.join(names)}, in this order."
            )
        for name, array, old in zip(names, new, state, strict=True):
            if getattr(array, "shape", None) != old.shape or getattr(array, "dtype", None) != jnp.float32:
                raise ValueError(
                    f"CustomOptimizerSpec: the row rule returned as new {name} {_describe(array)}; it must be "
                    f"{_describe(old)}, as the argument is."
                )
        return new
