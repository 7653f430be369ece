"""What makes a function of arrays a primitive that lowers to it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from embax._ops.primitive import refuse_transformations


def define(
    name: str,
    shapes: Callable[..., Any],
    function: Callable[..., Any],
    *,
    multiple_results: bool,
    on_tpu: Callable[..., Any] | None = None,
) -> Primitive:
    """A primitive that runs eagerly and under jit, on every platform.

    Args:
        name: its name.
        shapes: checks the operands, and returns what the results are.
        function: of the operands, to be traced into JAX operations when it is lowered.
        multiple_results: whether they return a sequence.
        on_tpu: another function for TPUs.
    """
    primitive = Primitive(name)
    primitive.multiple_results = multiple_results
    primitive.def_abstract_eval(shapes)

    @functools.cache
    def jitted(**params: Any):
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.def_impl(lambda *operands, **params: jitted(**params)(*operands))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=multiple_results))
    if on_tpu is not None:
        lower_on_tpu = mlir.lower_fun(on_tpu, multiple_results=multiple_results)
        mlir.register_lowering(primitive, lower_on_tpu, platform="tpu")

    refuse_transformations(
        primitive,
        derivative="Differentiate with respect to the activations, and pass the gradients to the primitive of an optimizer.",
        batching="Make one larger batch instead.",
    )
    return primitive
