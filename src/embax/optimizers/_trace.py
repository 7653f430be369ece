"""What the trace of a row rule says about it."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from embax.optimizers._base import OptimizerSpec

_ELEMENTWISE_NAMES = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow
    is_finite le log log1p logistic lt max min mul ne neg not or pow rem round rsqrt select_n sign sin sqrt square
    stop_gradient sub tan tanh xor
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
"""JAX's primitives that compute each element of a result from the elements at its place."""


def trace_rule(optimizer: "OptimizerSpec", dim: int) -> Any:
    """The jaxpr of `optimizer.update_rows` for one row of `dim` columns.

    Raises:
        ValueError: the rule returns something else than the new row and the new slots.
    """
    row, value = jax.ShapeDtypeStruct((1, dim), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.float32)
    slots = tuple(value if one_value else row for one_value in optimizer.row_wise_slots())
    scalars = jax.eval_shape(lambda: tuple(optimizer.get_hyperparameters(0)))
    return jax.make_jaxpr(optimizer.update_rows)(row, row, slots, scalars)


def _only_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            if equation.primitive.name not in ("pjit", "jit", "custom_jvp_call", "custom_vjp_call", "closed_call"):
                return False
            if not _only_elementwise(getattr(inner, "jaxpr", inner), shape):
                return False
        elif equation.primitive.name == "broadcast_in_dim":
            if equation.invars[0].aval.ndim != 0:
                return False
        elif equation.primitive.name not in _ELEMENTWISE:
            return False
        if any(variable.aval.shape not in ((), shape) for variable in equation.outvars):
            return False
    return True


@functools.lru_cache(maxsize=1024)
def is_elementwise(optimizer: "OptimizerSpec") -> bool:
    """Whether the rule is made of operations on the elements of one column alone."""
    dim = optimizer.rule_columns
    closed = trace_rule(optimizer, dim)
    # An array that the rule closes over has a place for each column.
    constants = all(getattr(constant, "ndim", 0) == 0 for constant in closed.consts)
    return constants and _only_elementwise(closed.jaxpr, (1, dim))
