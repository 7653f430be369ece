"""Checks of arguments whose errors say what was given, what is allowed, and where."""

import numbers
import operator
from typing import Any

import numpy as np

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)


def positive_int(owner: str, field: str, value: Any, *, maximum: int = INT32_MAX) -> int:
    """`value` as an int in `[1, maximum]`, or a ValueError that names `owner` and `field`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{owner}: {field} is {value!r}; it must be an integer from 1 to {maximum}.") from None
    if isinstance(value, bool) or not 1 <= number <= maximum:
        raise ValueError(f"{owner}: {field} is {value!r}; it must be an integer from 1 to {maximum}.")
    return number


def boolean(owner: str, field: str, value: Any) -> bool:
    """`value` if it is a bool, Python's or NumPy's, or a ValueError that names `owner` and `field`."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"{owner}: {field} is {value!r}; it must be True or False.")


def is_finite_number(value: Any) -> bool:
    """Whether `value` is an int or a float that float32 holds, neither infinite nor NaN."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    size: Any = abs(value)
    return bool(size <= FLOAT32_MAX)


def next_multiple(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
