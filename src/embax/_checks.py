"""Checks of arguments whose errors say what was given, what is allowed, and where."""

import operator
from typing import Any

INT32_MAX = 2**31 - 1


def positive_int(owner: str, field: str, value: Any, *, maximum: int = INT32_MAX) -> int:
    """`value` as an int in `[1, maximum]`, or a ValueError that names `owner` and `field`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{owner}: {field} is {value!r}; it must be an integer from 1 to {maximum}.") from None
    if isinstance(value, bool) or not 1 <= number <= maximum:
        raise ValueError(f"{owner}: {field} is {value!r}; it must be an integer from 1 to {maximum}.")
    return number


def next_multiple(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
