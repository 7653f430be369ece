"""What the trace of a row rule says about it."""

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

if TYPE_CHECKING:
    from embax.optimizers._base import OptimizerSpec

# fmt: off
_ELEMENTWISE = frozenset({
    "abs", "add", "add_any", "and", "atan2", "bitcast_convert_type", "broadcast_in_dim", "cbrt", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_right_logical", "sign", "sin", "sqrt", "square", "sub",
    "tan", "tanh", "xor",
})
# fmt: on
"""JAX's primitives that compute each element of a result from the elements at its place, where all shapes are one."""

_CALLS = frozenset({"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"})


def trace_rule(optimizer: "OptimizerSpec", dim: int) -> ClosedJaxpr:
    """The jaxpr of the row rule for one row of `dim` columns.

    Raises:
        ValueError: the rule returns something else than the new row and the new slots.
        Exception: whatever the rule, or a schedule at step 0, raises.
    """
    row, value = (jax.ShapeDtypeStruct((1, columns), jnp.float32) for columns in (dim, 1))
    slots = tuple(value if one_value else row for one_value in optimizer.row_wise_slots())
    scalars = jax.eval_shape(lambda: tuple(optimizer.get_hyperparameters(np.int32(0))))  # pyright: ignore[reportArgumentType]
    return jax.make_jaxpr(optimizer.checked_update)(row, row, slots, scalars)


def _called(equation: Any) -> list[ClosedJaxpr]:
    if equation.primitive.name not in _CALLS:
        return []
    return [value for value in equation.params.values() if isinstance(value, ClosedJaxpr)]


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """The equations of a jaxpr and of all that it calls, the calls themselves left out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name not in _CALLS:
            yield equation
        for called in _called(equation):
            yield from equations(called.jaxpr)


def _constants(closed: ClosedJaxpr) -> Iterator[Any]:
    """The values that a jaxpr and all that it calls hold, but for literals."""
    yield from closed.consts
    for equation in closed.jaxpr.eqns:
        for called in _called(equation):
            yield from _constants(called)


def why_mixes_columns(closed: ClosedJaxpr, dim: int) -> str | None:
    """What in the trace of a rule for rows of `dim` columns mixes columns, or tells one from another; None if nothing does."""
    for equation in equations(closed.jaxpr):
        name = equation.primitive.name
        if name not in _ELEMENTWISE:
            return f"its rule uses {name}"
        if any(value.aval.shape not in ((), (1, dim)) for value in (*equation.invars, *equation.outvars)):
            return f"its rule uses {name} on another shape than that of a row"
        if any(isinstance(value, Literal) and np.ndim(value.val) for value in equation.invars):
            return "its rule holds an array"
    if any(np.ndim(value) for value in _constants(closed)):
        return "its rule holds an array"
    return None


@functools.lru_cache(maxsize=1024)
def why_not_elementwise(optimizer: "OptimizerSpec") -> str | None:
    """Why the rule is not made of operations on the elements of one column alone, the same ones whatever the number of columns.

    None if it is.
    """
    texts = set()
    for dim in optimizer.rule_widths:
        try:
            closed = trace_rule(optimizer, dim)
        except Exception as error:  # Whatever a function of a user's raises: with the columns of its table it may run.
            return f"its rule cannot be traced for {dim} columns ({type(error).__name__})"
        if reason := why_mixes_columns(closed, dim):
            return reason
        texts.add(re.sub(rf"\b1, ?{dim}\b", "1, dim", str(closed.jaxpr)))  # The shape; other numbers must be the same.
    return None if len(texts) == 1 else "its rule depends on the number of columns"
