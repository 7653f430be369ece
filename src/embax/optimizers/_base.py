"""What every optimizer is: a spec of hyperparameters and slots, and one rule that updates the touched rows."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._checks import is_finite_number
from embax._types import Rows, RowSlots, Scalars
from embax.optimizers._trace import why_not_elementwise

LearningRate: TypeAlias = float | Callable[..., Any]
Initializer: TypeAlias = Callable[..., jax.Array]

PASS_STEP = "Pass step= to the layer's call, or to apply_gradients."
WEIGHT_DECAY_MODES = ("decoupled", "l2")
_PARTS_OF_A_RULE = ("update_rows", "get_hyperparameters", "row_wise_slots", "slot_variables_initializers")


def _positional_arguments(function: Callable[..., Any]) -> int:
    """The number of arguments that `function` needs, `self` not counted."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.kind not in variadic and p.default is inspect.Parameter.empty]
    if any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in needed):
        raise ValueError("an argument can be given by keyword only")
    return len(needed)


def one_minus_power(base: float, exponent: jax.Array) -> jax.Array:
    """`1 - base**exponent` without the cancellation that this expression has in float32 where `base` is close to 1.

    Args:
        base: a decay rate in [0, 1). It is rounded to float32 first, as the row rule sees it, so that both agree.
        exponent: float32 scalar, at least 0.

    Returns:
        A float32 scalar.
    """
    logarithm = math.log(max(float(np.float32(base)), 1e-38))  # Of 0 it would be infinite, and 0**0 a NaN.
    return -jnp.expm1(exponent * np.float32(logarithm))


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """Base class of the optimizers that are fused into the backward pass of a table.

    A subclass is a frozen dataclass of hyperparameters; it names its slots in `Slots`, initializes them, and states its
    row rule in `update_rows`. Two specs are equal when they are of one class and all their fields are equal.

    What the keyword arguments ask for happens to every row that a batch touches, in this order, whatever the optimizer: the
    gradient `g` of the row is clipped by value, then by norm; then the row `w` decays, and the rule takes its step.

    Args:
        learning_rate: a number, a function of no argument, or a schedule: a function of the step (an int or an int32
            scalar, traced or not) that returns a scalar.
        weight_decay: `d`, at least 0. Rows that no id names do not decay.
        weight_decay_mode: "decoupled", `w -= lr * d * w` before the step, as in AdamW; or "l2", `g += d * w`, the gradient of
            `d / 2 * |w|**2`.
        clip_gradient_value: `c` above 0, or None: each element of `g` is clipped to `[-c, c]`.
        clip_gradient_norm: `c` above 0, or None: `g` is scaled to a Euclidean norm of `c` where it has a larger one.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """

    learning_rate: LearningRate = 0.001
    weight_decay: float = dataclasses.field(default=0.0, kw_only=True)
    weight_decay_mode: str = dataclasses.field(default="decoupled", kw_only=True)
    clip_gradient_value: float | None = dataclasses.field(default=None, kw_only=True)
    clip_gradient_norm: float | None = dataclasses.field(default=None, kw_only=True)

    native_rule: ClassVar[str] = ""
    """Name of the C++ row rule in `csrc/kernels/optimizers.h`, "" where there is none; inherited if all of the rule is."""
    Slots: ClassVar[Callable[..., Sequence[jax.Array]]]
    """NamedTuple of the slot variables."""

    rule_widths: ClassVar[tuple[int, ...]] = (61, 67)
    """Columns of the rows that the rule is traced for, to look at it; numbers that no rule is likely to name."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "native_rule" not in vars(cls) and not vars(cls).keys().isdisjoint(_PARTS_OF_A_RULE):
            cls.native_rule = ""  # A rule of its own is not the one that its base has in C++.

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
                f"{type(self).__name__}: learning_rate is {self.learning_rate!r}; it must be a number (float(x) "
                "makes one of an array), a function of no argument, or a function of the step."
            )
        self._check_number("weight_decay", lambda decay: decay >= 0, "of at least 0")
        if self.weight_decay_mode not in WEIGHT_DECAY_MODES:
            raise ValueError(
                f"{type(self).__name__}: weight_decay_mode is {self.weight_decay_mode!r}; it must be one of "
                f"{', '.join(map(repr, WEIGHT_DECAY_MODES))}."
            )
        for field in ("clip_gradient_value", "clip_gradient_norm"):
            if getattr(self, field) is not None:
                self._check_number(field, lambda limit: limit > 0, "above 0, or None")

    @property
    def elementwise(self) -> bool:
        """Whether the rule treats each element of a row by itself; of a rule in Python alone, its trace shows it.

        If not, tables of different widths are not stacked, since a rule must not see columns that only stacking has added.
        """
        return not any(self.row_wise_slots()) and (bool(self.native_rule) or why_not_elementwise(self) is None)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """The names of the slots, in order."""
        slots = self.slot_variables_initializers()
        return tuple(getattr(slots, "_fields", [f"slot_{number}" for number in range(len(slots))]))

    def make_slots(self, values: Sequence[Any]) -> Any:
        """`values`, one a slot, as the type that the initializers of the slots have."""
        initializers: Any = self.slot_variables_initializers()
        return type(initializers)(*values) if hasattr(initializers, "_fields") else tuple(values)

    @property
    def decays_weights(self) -> bool:
        """Whether rows decay apart from the rule."""
        return self.weight_decay > 0 and self.weight_decay_mode == "decoupled"

    @property
    def l2(self) -> float:
        """The factor of the row that is added to its gradient."""
        return self.weight_decay if self.weight_decay_mode == "l2" else 0.0

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
                    f"{PASS_STEP}"
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
        """The float32 scalars that the row rule takes at `step`, the learning rate first.

        Args:
            step: int or int32 scalar, traced or not, that counts from 0; needed by schedules and by some optimizers.

        Returns:
            The scalars, in the order of the formula in C++.

        Raises:
            ValueError: the step is needed and None, or is negative.
        """
        return (self.get_learning_rate(step),)

    def _step_number(self, step: int | jax.Array | None) -> jax.Array:
        """`step` as a float32 scalar, for the rules that cannot do without."""
        if step is None:
            raise ValueError(
                f"{type(self).__name__}: the formula needs the number of the step, and no step was given. {PASS_STEP}"
            )
        known = step if isinstance(step, Tracer) else np.asarray(step)
        integer = jnp.issubdtype(known.dtype, jnp.integer) and known.ndim == 0
        if not integer or (known is not step and known < 0):
            raise ValueError(
                f"{type(self).__name__}: the step is {step!r}; it must be an integer scalar that counts from 0."
            )
        return jnp.asarray(step, jnp.float32)

    def _check_number(self, field: str, valid: Callable[[Any], bool], limits: str) -> None:
        """A ValueError that states the `limits`, unless the field is a finite number that is `valid`."""
        value = getattr(self, field)
        if not (is_finite_number(value) and valid(float(np.float32(value)))):
            raise ValueError(f"{type(self).__name__}: {field} is {value!r}; it must be a number {limits}.")

    def _check_decay(self, field: str) -> None:
        """A ValueError unless the field is in [0, 1). What float32 rounds to 1 would never decay."""
        self._check_number(field, lambda decay: 0 <= decay < 1, "from 0 to less than 1 (in float32)")

    def _check_bool(self, field: str) -> None:
        """A ValueError unless the field is a bool."""
        value = getattr(self, field)
        if not isinstance(value, bool):
            raise ValueError(f"{type(self).__name__}: {field} is {value!r}; it must be True or False.")

    def slot_variables_initializers(self) -> Sequence[Initializer]:
        """One initializer a slot, in the order and type of `Slots`."""
        raise ValueError(f"{type(self).__name__} does not say how its slots are initialized.")

    def slot_variables_count(self) -> int:
        """The number of slot variables a table has beside itself."""
        return len(self.slot_variables_initializers())

    def row_wise_slots(self) -> Sequence[bool]:
        """For each slot whether it has one value a row and is stored as float32[rows]; else it is shaped like the table."""
        return (False,) * self.slot_variables_count()

    def short_name(self) -> str:
        """A short lower case name."""
        return self.native_rule or type(self).__name__.lower()

    def update_rows(
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        """The row rule: new rows of the table and of its slots from the gradient of these rows.

        Args:
            gradient: float32[rows, dim], the gradient with respect to each row.
            table: float32[rows, dim].
            slots: one float32[rows, dim] a slot, or float32[rows, 1] where it has one value a row.
            hyperparameters: the float32 scalars of `get_hyperparameters`, of any shape that broadcasts to the rows.

        Returns:
            The new `table` and `slots`, of the same shapes.
        """
        raise ValueError(f"{type(self).__name__} does not state its row rule.")

    def checked_update(
        self, gradient: Rows, table: Rows, slots: RowSlots, hyperparameters: Scalars
    ) -> tuple[Rows, RowSlots]:
        """What `update_rows` returns, checked.

        Raises:
            ValueError: it is not a new table and new slots of the shapes and dtypes of the old ones.
        """
        result: Any = self.update_rows(gradient, table, slots, hyperparameters)
        if not isinstance(result, Sequence) or len(result) != 2 or not isinstance(result[1], Sequence):
            raise ValueError(
                f"{type(self).__name__}: update_rows returned {type(result).__name__}; it must return the new table, and a "
                "tuple of the new slots."
            )
        new = (result[0], *result[1])
        self.check_new(new, (table, *slots))
        return new[0], new[1:]

    def check_new(self, new: Sequence[Any], old: Sequence[Any]) -> None:
        """Raises a ValueError unless the arrays that a rule returned, a table's and its slots', are like the old ones."""
        names = ("table", *self.slot_names)
        if len(new) != len(names):
            raise ValueError(
                f"{type(self).__name__}: the row rule returned {len(new)} arrays; it must return {len(names)}, the new "
                f"{', '.join(names)}, in this order."
            )
        for name, after, before in zip(names, new, old, strict=True):
            given, wanted = (f"{getattr(a, 'dtype', type(a).__name__)}{list(np.shape(a))}" for a in (after, before))
            if given != wanted:
                raise ValueError(
                    f"{type(self).__name__}: the row rule returned as new {name} {given}; it must be {wanted}, as the "
                    "argument is."
                )
