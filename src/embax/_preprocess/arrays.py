"""Arrays of a user as the arrays that packing reads: on the host, of a few dtypes, with errors that say what was given."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._checks import INT64_MAX

INT32 = np.dtype(np.int32)
INT64 = np.dtype(np.int64)
FLOAT32 = np.dtype(np.float32)
ALLOWED = (
    "Allowed are an integer array [batch, valency] in which -1 is padding, embax.Ragged(values, row_splits), "
    "embax.SparseCoo(indices, values, dense_shape), and a list or 1-d object array of 1-d integer arrays, one a sample."
)
_UNMASK = {
    "ids": "Leave masked ids out; in dense ids [batch, valency] make them padding with ids.filled(-1).",
    "weights": "Give masked places the weight 0 with weights.filled(0).",
    "items": "Leave masked items out, or make them padding: filled(-1) for ids, filled(0) for weights.",
}
_MAX_NESTING = 4
"""Lists are searched this deep; what packing takes is nested less."""


def describe(leaf: Any) -> str:
    """What a leaf is, for a message."""
    if isinstance(leaf, (np.ndarray, jax.Array)):
        kind = "NumPy" if isinstance(leaf, np.ndarray) else "JAX"
        return f"a {kind} array of shape {leaf.shape} and dtype {leaf.dtype}"
    return f"a {type(leaf).__name__}"


def host(owner: str, leaf: Any, what: str) -> Any:
    """A JAX array as a NumPy array; anything else as it is, but no masked array."""
    if isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(
            f"{owner}: its {what} are a masked array, whose mask would be lost. "
            f"{_UNMASK.get(what, f'Pass {what} without a mask.')}"
        )
    if not isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, Tracer):
        raise ValueError(
            f"{owner}: its {what} are traced by JAX. Packing takes traced ids as one integer array [batch, valency] in which -1 "
            "is padding, or as embax.Ragged(values, row_splits) of two arrays, and weights of their form; or call it outside "
            "jit, and pass its result into the jitted function."
        )
    if not leaf.is_fully_addressable:
        raise ValueError(
            f"{owner}: its {what} are a JAX array spread over several processes; give every process its own part, for "
            "example a NumPy array."
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise ValueError(f"{owner}: its {what} are {describe(leaf)}; they must be numbers.")
    return np.asarray(leaf)


def find(values: Any, kinds: type | tuple[type, ...]) -> Any:
    """The first object of `kinds` in a list or tuple or in those nested in it, else None."""
    level = [values]
    for _ in range(_MAX_NESTING):
        types = set(map(type, level))  # Far cheaper than a look at each element of a long list.
        if any(issubclass(type_, kinds) for type_ in types):
            return next(element for element in level if isinstance(element, kinds))
        if not any(issubclass(type_, (list, tuple)) for type_ in types):
            return None
        level = list(itertools.chain.from_iterable(e for e in level if isinstance(e, (list, tuple))))
    return None


def _whole(numbers: list[Any]) -> bool:
    return all(issubclass(type_, (int, np.integer)) and type_ is not bool for type_ in set(map(type, numbers)))


def beyond_int64(array: np.ndarray) -> bool:
    """Whether an object array holds integers alone, of which int64 does not hold all."""
    if array.dtype != object:
        return False
    numbers = array.reshape(-1).tolist()
    return _whole(numbers) and any(not -INT64_MAX - 1 <= number <= INT64_MAX for number in numbers)


def exact_array(values: Any) -> np.ndarray:
    """`np.asarray(values)`, but integers never become floats; those that int64 does not hold may be an object array."""
    array = np.asarray(values)
    if array.dtype.kind == "f" and array.size and isinstance(values, (list, tuple)):
        exact = np.array(values, object)  # NumPy makes floats of 2**63 beside 1, and of np.uint64 beside int.
        if _whole(exact.reshape(-1).tolist()):
            return exact if beyond_int64(exact) else exact.astype(np.int64)
    return array


def to_numpy(owner: str, values: Any, what: str, remedy: str) -> np.ndarray:
    """What a user gave as an array, such as a list of numbers, as a NumPy array of any dtype.

    Args:
        owner: begins the errors, such as "Feature 'f'".
        values: NumPy or JAX array, or what NumPy makes one of.
        what: what of the owner `values` are, such as "ids".
        remedy: a sentence for where no array can be made of them.

    Raises:
        ValueError: `values`, or an array in lists of them, is traced or masked; or they are no array.
    """
    values = host(owner, values, what)
    if isinstance(values, np.ndarray):
        return values
    host(owner, find(values, (np.ma.MaskedArray, Tracer)), what)
    try:
        return np.asarray(values) if what == "weights" else exact_array(values)
    except Exception:  # Foreign objects raise what they like while NumPy asks for their elements.
        problem = describe(values)
        if isinstance(values, (list, tuple)):
            problem += " whose parts differ in length, or that mixes numbers and lists"
        raise ValueError(f"{owner}: its {what} are not an array of numbers but {problem}. {remedy}") from None


def integers(owner: str, array: np.ndarray, what: str = "ids") -> np.ndarray:
    """`array` as int32 or int64; integers that int64 does not hold become the nearest one that it does."""
    dtype = array.dtype
    if dtype in (INT32, INT64):
        return np.ascontiguousarray(array)
    if beyond_int64(array):
        return np.asarray(np.clip(array, -INT64_MAX - 1, INT64_MAX), np.int64, order="C")
    if dtype.kind not in "iu":
        raise ValueError(
            f"{owner}: its {what} are {describe(array)}; they must be integers. {_to_integers(array, what)} "
            f"{ALLOWED if what == 'ids' else ''}".rstrip()
        )
    if dtype.kind == "u" and dtype.itemsize == 8:
        return np.minimum(array, np.uint64(INT64_MAX)).astype(np.int64, order="C")
    narrow = dtype.itemsize < 4 or (dtype.kind == "i" and dtype.itemsize == 4)
    return array.astype(np.int32 if narrow else np.int64, order="C")


def _to_integers(array: np.ndarray, what: str) -> str:
    """How to make integers of what are none."""
    if array.dtype.kind in "US":
        return "Map each string to an integer of its own first, the same in every batch."
    if array.dtype == object:
        others = [element for element in array.reshape(-1).tolist() if not _whole([element])]
        if others:
            return f"One of them is {describe(others[0])}."
    convert = f"Convert them, for example with {what}.astype(np.int64), if they are whole numbers"
    # Sequences of floats were filled up by 0, the weight of padding, which would be looked up as an id.
    return convert + (", and before embax.flatten_sequences." if what == "ids" and array.dtype.kind == "f" else ".")


def floats(owner: str, array: np.ndarray) -> np.ndarray:
    """Weights as float32."""
    if array.dtype == FLOAT32:
        return np.ascontiguousarray(array)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "iu"):
        raise ValueError(
            f"{owner}: its weights are {describe(array)}; they must be real numbers, such as float32. Convert them, for "
            "example with np.asarray(weights, np.float32)."
        )
    with np.errstate(over="ignore"):  # What float32 does not hold becomes infinite, which packing reports.
        return array.astype(np.float32, order="C")


def too_wide(array: np.ndarray) -> np.ndarray | None:
    """The ids as given, flat, where int64 may not hold them all."""
    return array.reshape(-1) if array.dtype in (np.uint64, object) else None
