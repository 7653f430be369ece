"""Arrays of a user as the arrays that packing reads: on the host, of a few dtypes, with errors that say what was given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

INT32 = np.dtype(np.int32)
INT64 = np.dtype(np.int64)
FLOAT32 = np.dtype(np.float32)
_INT64_MAX = 2**63 - 1
ALLOWED = (
    "Allowed are an integer array [batch, valency] in which -1 is padding, embax.Ragged(values, row_splits), "
    "embax.SparseCoo(indices, values, dense_shape), and a list or 1-d object array of 1-d integer arrays, one a sample."
)


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
            f"{owner}: its {what} are a masked array, whose mask would be lost. Fill the masked places: "
            f"{what}.filled({-1 if what == 'ids' else 0})."
        )
    if not isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, Tracer):
        raise ValueError(
            f"{owner}: its {what} are traced by JAX. Packing runs on the host: call it outside jit, and pass its "
            "result into the jitted function."
        )
    if not leaf.is_fully_addressable:
        raise ValueError(
            f"{owner}: its {what} are a JAX array spread over several processes; give every process its own part, for "
            "example a NumPy array."
        )
    return np.asarray(leaf)


def integers(owner: str, array: np.ndarray, what: str = "ids") -> np.ndarray:
    """`array` as int32 or int64; unsigned integers that int64 does not hold become its largest value."""
    dtype = array.dtype
    if dtype in (INT32, INT64):
        return np.ascontiguousarray(array)
    if dtype.kind not in "iu":
        raise ValueError(
            f"{owner}: its {what} are {describe(array)}; they must be integers. Convert them, for example with "
            f"{what}.astype(np.int64), if they are whole numbers. {ALLOWED if what == 'ids' else ''}".rstrip()
        )
    if dtype.kind == "u" and dtype.itemsize == 8:
        return np.minimum(array, np.uint64(_INT64_MAX)).astype(np.int64, order="C")
    narrow = dtype.itemsize < 4 or (dtype.kind == "i" and dtype.itemsize == 4)
    return array.astype(np.int32 if narrow else np.int64, order="C")


def floats(owner: str, array: np.ndarray) -> np.ndarray:
    """Weights as float32."""
    if array.dtype == FLOAT32:
        return np.ascontiguousarray(array)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "iu"):
        raise ValueError(f"{owner}: its weights are {describe(array)}; they must be real numbers, such as float32.")
    with np.errstate(over="ignore"):  # What float32 does not hold becomes infinite, which packing reports.
        return array.astype(np.float32, order="C")


def too_wide(array: np.ndarray) -> np.ndarray | None:
    """The ids as given, flat, where int64 may not hold them all."""
    return array.reshape(-1) if array.dtype == np.uint64 else None
