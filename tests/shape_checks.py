"""The type checker of the import hook that `conftest.py` installs."""

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def _has_shape(annotation: Any) -> bool:
    is_shape = isinstance(annotation, type) and issubclass(annotation, AbstractArray)
    return is_shape or any(map(_has_shape, typing.get_args(annotation)))


def check_shapes(function: Callable) -> Callable:
    """Beartype, for the arguments and results with a shape.

    Other annotations are left to pyright: a wrong argument must reach embax's own error, which is tested too.
    """
    shaped = {name: annotation for name, annotation in function.__annotations__.items() if _has_shape(annotation)}
    if not shaped:
        return function
    function.__annotations__ = shaped
    return beartype(function)
