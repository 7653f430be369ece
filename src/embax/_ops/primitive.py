"""How this package defines a JAX primitive: shapes, a lowering for each backend, and what JAX may not do with it."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.interpreters import batching as _batching

from embax._ops.backend import OF_PLATFORM, backend_on, chosen_backend


def define(
    name: str,
    shapes: Callable[..., list[Any]],
    lowerings: Mapping[str, Callable[..., Any]],
    *,
    derivative: str,
    batching: str,
) -> Primitive:
    """A primitive with any number of results. Bind it with `bind`, which records the backend that is chosen.

    Args:
        name: of the primitive.
        shapes: abstract values of the results, from those of the operands and the parameters.
        lowerings: by backend, "portable" among them: the results from the operands and the parameters, in JAX operations.
        derivative: what to do instead of differentiating it.
        batching: what to do instead of mapping it by `vmap`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    @functools.cache
    def jitted(**params):
        return jax.jit(functools.partial(primitive.bind, **params))

    @primitive.def_impl
    def _run(*operands, **params):
        return jitted(**params)(*operands)

    @primitive.def_abstract_eval
    def _shapes(*operands, backend: str | None, **params):
        del backend
        return shapes(*operands, **params)

    lower = {backend: mlir.lower_fun(function, multiple_results=True) for backend, function in lowerings.items()}

    def lower_on(platform: str, context, *operands, backend: str | None, **params):
        chosen = backend_on(platform, backend)
        return lower.get(chosen, lower["portable"])(context, *operands, **params)

    mlir.register_lowering(primitive, functools.partial(lower_on, "any other"))
    for platform, backend in OF_PLATFORM.items():
        if backend in lower:
            mlir.register_lowering(primitive, functools.partial(lower_on, platform), platform=platform)

    refuse_transformations(primitive, derivative=derivative, batching=batching)
    return primitive


def refuse_transformations(primitive: Primitive, *, derivative: str, batching: str) -> None:
    """Makes differentiation and `vmap` of a primitive a ValueError with these remedies."""

    def refuse_derivative(*args: object, **params: object) -> NoReturn:
        raise ValueError(f"{primitive.name} cannot be differentiated. {derivative}")

    def refuse_batching(*args: object, **params: object) -> NoReturn:
        raise ValueError(f"{primitive.name} cannot be mapped by vmap. {batching}")

    ad.primitive_jvps[primitive] = refuse_derivative
    _batching.primitive_batchers[primitive] = refuse_batching


def cut(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """`flat` cut into lists of the given sizes."""
    ends = list(itertools.accumulate(sizes))
    return [list(flat[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def bind(primitive: Primitive, *operands: Any, **params: Any) -> list[jax.Array]:
    """Binds a primitive of `define` under the backend that is chosen now."""
    return primitive.bind(*operands, **params, backend=chosen_backend())
