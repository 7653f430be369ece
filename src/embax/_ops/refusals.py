"""What JAX's transformations may not do with a primitive, said with the remedy."""

from typing import NoReturn

from jax.extend.core import Primitive
from jax.interpreters import ad
from jax.interpreters import batching as _batching


def refuse_transformations(primitive: Primitive, *, derivative: str, batching: str) -> None:
    """Makes differentiation and `vmap` of a primitive a ValueError with these remedies."""

    def refuse_derivative(*args: object, **params: object) -> NoReturn:
        raise ValueError(f"{primitive.name} cannot be differentiated. {derivative}")

    def refuse_batching(*args: object, **params: object) -> NoReturn:
        raise ValueError(f"{primitive.name} cannot be mapped by vmap. {batching}")

    ad.primitive_jvps[primitive] = refuse_derivative
    _batching.primitive_batchers[primitive] = refuse_batching
