"""Optimizers of the user's own: a function of one row, in JAX or as StableHLO text."""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax._checks import is_finite_number, positive_int
from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._base import Initializer, OptimizerSpec
from embax.optimizers._clipping import apply_clipping
from embax.optimizers._stablehlo import Program
from embax.optimizers._trace import trace_rule


@functools.cache
def _slots_type(count: int) -> Any:
    """A NamedTuple of `count` slots without names of their own."""
    slots: Any = collections.namedtuple("CustomSlotVariables", [f"slot_{number}" for number in range(count)])
    slots.__reduce__ = lambda self: (_named_slots, tuple(self))  # No module has it as an attribute, which pickle needs.
    return slots


def _named_slots(*slots: Any) -> Any:
    return _slots_type(len(slots))(*slots)


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
    tables, but an elementwise rule, one without reductions and the like, may see columns of padding too.

    Args:
        learning_rate: a number or a schedule (see `OptimizerSpec`).
        custom_computation_fn: the rule, of JAX operations.
        stablehlo: the rule as StableHLO text, or bytes of it, whose `main` takes and returns these arrays; learning rates of
            shape [] and [1] are possible too. It has precedence. `lower_to_stablehlo` makes such text. Text of an elementwise
            rule serves tables of any width, other text those of its own.
        slot_variable_initializers_tuple: an initializer a slot, such as `jax.nn.initializers.zeros`; a NamedTuple names the
            slots, else they are `slot_0`, `slot_1` and so on.
        short_name_str: a short lower case name.
        slots_of_one_value: a bool a slot, whether it has one value a row and is stored as float32[rows]; () means none has.

    Raises:
        ValueError: there is no rule, it returns other arrays than it should, or the text is not StableHLO. What else a
            function raises for rows of 61 columns is taken to mean that it is for those of its table, and is raised there.

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
    # Tuples of equal initializers are equal, whatever they name the slots.
    _names: tuple[str, ...] = dataclasses.field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        initializers = self.slot_variable_initializers_tuple
        if not isinstance(initializers, Sequence) or not all(map(callable, initializers)):
            raise ValueError(
                f"CustomOptimizerSpec: slot_variable_initializers_tuple is {initializers!r}; it must be a tuple of functions "
                "(key, shape, dtype) -> array, such as jax.nn.initializers.zeros."
            )
        if not hasattr(initializers, "_fields"):
            initializers = _named_slots(*initializers)
        object.__setattr__(self, "slot_variable_initializers_tuple", initializers)
        object.__setattr__(self, "_names", self.slot_names)
        given: Any = self.slots_of_one_value
        one_value = (tuple(given) if isinstance(given, Sequence) else (given,)) or (False,) * len(initializers)
        if len(one_value) != len(initializers) or not all(isinstance(slot, bool) for slot in one_value):
            raise ValueError(
                f"CustomOptimizerSpec: slots_of_one_value is {self.slots_of_one_value!r}; it must be (), or a bool for each of "
                f"the {len(initializers)} slots."
            )
        object.__setattr__(self, "slots_of_one_value", one_value)
        if isinstance(self.stablehlo, bytes):
            object.__setattr__(self, "stablehlo", Program.parse(self.stablehlo).text)
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(
                f"CustomOptimizerSpec: the row rule or an initializer has no hash ({error}), which tells equal optimizers; "
                "give its class __hash__, or pass a function."
            ) from None
        if self.stablehlo is None and not callable(self.custom_computation_fn):
            raise ValueError(
                f"CustomOptimizerSpec: custom_computation_fn is {self.custom_computation_fn!r}, and stablehlo is None; one of "
                "them must state the row rule, a function or StableHLO text."
            )
        try:
            trace_rule(self, self.rule_widths[0])
        except ValueError as error:
            if str(error).startswith("CustomOptimizerSpec: "):
                raise
        except Exception:  # The function's own: it may be for as many columns as its tables have.
            pass

    @property
    def _program(self) -> Program | None:
        return None if self.stablehlo is None else Program.parse(self.stablehlo)

    @property
    def rule_widths(self) -> tuple[int, ...]:  # noqa: D102
        return OptimizerSpec.rule_widths if self._program is None else (self._program.dim,)

    @staticmethod
    def lower_to_stablehlo(
        custom_computation_fn: Callable[..., Any],
        embedding_dim: int = 1,
        num_slot_variables: int = 0,
        num_hyperparameters: int = 1,
        min_value: float | None = None,
        max_value: float | None = None,
        slots_of_one_value: Sequence[bool] = (),
    ) -> str:
        """The StableHLO text of a row rule.

        Args:
            custom_computation_fn: the rule, as of a spec.
            embedding_dim: columns of a row.
            num_slot_variables: slots that the rule takes.
            num_hyperparameters: hyperparameters that it takes behind them.
            min_value: what the elements of the new row of the table are clipped to from below; None does not.
            max_value: likewise from above.
            slots_of_one_value: as of a spec.

        Returns:
            Text whose `main` takes and returns arrays float32[1, embedding_dim].

        Raises:
            ValueError: a number is not what it should be, or `min_value` is above `max_value`.
        """

        def rule(*arguments: jax.Array) -> tuple[jax.Array, ...]:
            result = custom_computation_fn(*arguments)
            table, *slots = result if isinstance(result, list | tuple) else (result,)
            return apply_clipping(table, min_value, max_value), *slots

        owner = "lower_to_stablehlo"
        row = jax.ShapeDtypeStruct((1, positive_int(owner, "embedding_dim", embedding_dim)), jnp.float32)
        # One more than 0 is the least that is positive.
        slots = positive_int(owner, "num_slot_variables + 1", num_slot_variables + 1) - 1
        scalars = positive_int(owner, "num_hyperparameters + 1", num_hyperparameters + 1) - 1
        one_value = tuple(slots_of_one_value) or (False,) * slots
        limits = [limit for limit in (min_value, max_value) if limit is not None]
        if len(one_value) != slots or not all(map(is_finite_number, limits)) or limits != sorted(limits):
            raise ValueError(
                f"{owner}: slots_of_one_value, min_value and max_value are {slots_of_one_value!r}, {min_value!r} and "
                f"{max_value!r}; they must be () or a bool for each of the {slots} slots, and numbers in this order, or None."
            )
        value = jax.ShapeDtypeStruct((1, 1), jnp.float32)
        arguments = [row, row, *(value if one else row for one in one_value), *[row] * scalars]
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
        one_value = [shape == (1, 1) and embedding_dim > 1 for shape in program.shapes[2 : 2 + num_slot_variables]]
        return CustomOptimizerSpec.lower_to_stablehlo(program, *counts, min_value, max_value, one_value)

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
        """The new row and slots of one row, checked."""
        program = self._program
        if program is not None:
            any_width = gradient.shape[1] != program.dim and self.elementwise
            result: Any = program(gradient, *state, *hyperparameters, any_width=any_width)
        else:
            rule: Any = self.custom_computation_fn
            arguments = (gradient, *state, *(jnp.broadcast_to(scalar, gradient.shape) for scalar in hyperparameters))
            _check_arguments(rule, len(arguments))
            result = rule(*arguments)
        new = tuple(result) if isinstance(result, list | tuple) else (result,)
        self.check_new(new, state)
        return new
