"""Sequence features: the items of sequences as samples, and their activations as sequences again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax._checks import INT64_MAX, positive_int
from embax._preprocess.arrays import beyond_int64, describe, exact_array, host

_ALLOWED = (
    "Allowed are an array [batch, sequence, valency] (or [batch, sequence], one id an item), and a list of sequences of "
    "different lengths, each an array [length, valency] or [length], or a list of items."
)


def _filler(dtype: Any) -> int:
    """What a place of padding holds: -1 among ids, 0 among weights."""
    if jnp.issubdtype(dtype, jnp.floating):
        return 0
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return -1
    convert = "Convert it, for example with ids.astype(np.int64)."
    if jnp.issubdtype(dtype, jnp.unsignedinteger):  # Of JAX. Their largest value would become the -1 of padding.
        convert = "Convert it with ids.astype(jnp.int32) if all ids are below 2**31, as those of every vocabulary are."
    raise ValueError(
        f"flatten_sequences: an array of dtype {dtype} is to be padded; only signed integers (ids, by -1) and floats (weights, "
        f"by 0) can be. {convert}"
    )


def _signed(where: str, array: np.ndarray) -> np.ndarray:
    """Integers of any dtype as signed ones, which have a -1 for padding; other arrays as they are."""
    if array.dtype.kind != "u" and not beyond_int64(array):
        return array
    outside = (array > INT64_MAX) | (array < -INT64_MAX - 1)
    if outside.any():
        raise ValueError(
            f"{where}: id {array[outside][0]} is beyond int64, and so outside every vocabulary. Remove it, or map it (for "
            "example id % vocabulary_size)."
        )
    return array.astype(np.int64)


def _cut(length: int, limit: int, where: str, truncate: bool) -> int:
    if length > limit and not truncate:
        raise ValueError(
            f"flatten_sequences: {where} has {length} items, above max_sequence_length={limit}. Make it at least {length}, or "
            "pass truncate=True to keep the first items only."
        )
    return min(length, limit)


def _flatten_array(values: Any, max_length: int, truncate: bool) -> Any:
    batch, length, valency = values.shape
    values = values[:, : _cut(length, max_length, "every sequence", truncate)]
    if length < max_length:
        xp = jnp if isinstance(values, jax.Array) else np
        if isinstance(values, np.ndarray):
            values = _signed("flatten_sequences", values)
        padding = ((0, 0), (0, max_length - length), (0, 0))
        values = xp.pad(values, padding, constant_values=_filler(values.dtype))
    return values.reshape(batch * max_length, valency)


def _array(where: str, values: Any) -> np.ndarray | None:
    """Ids, or weights, as an array of numbers; None where that takes a look at each item."""
    values = host(where, values, "items")
    if isinstance(values, (list, tuple)) and any(isinstance(item, np.ma.MaskedArray) for item in values):
        return None
    try:
        array = exact_array(values)
    except Exception:  # Lists of different lengths, traced items, or foreign objects, which raise what they like.
        return None
    if array.dtype == object and array.ndim == 1 and not beyond_int64(array):
        return None
    array = _signed(where, array)
    if array.size and not (array.dtype.kind in "iu" or jnp.issubdtype(array.dtype, jnp.floating)):
        raise ValueError(f"{where} is {describe(values)}; ids must be integers, and weights real numbers. {_ALLOWED}")
    return array


def _rows(where: str, sequence: Any) -> np.ndarray | list[np.ndarray]:
    """The items of a sequence: an array [length, valency], or 1-d arrays where their valency differs."""
    array = _array(where, sequence)
    if array is not None and array.ndim in (1, 2):
        return array[:, None] if array.ndim == 1 else array
    is_list = array is None and isinstance(sequence, (list, tuple, np.ndarray))
    items = [_array(f"{where}, item {i}", item) for i, item in enumerate(sequence)] if is_list else []
    if not items or any(item is None or item.ndim > 1 for item in items):
        raise ValueError(f"{where} is no list of items, each an id or a 1-d array or list of ids. {_ALLOWED}")
    return [np.atleast_1d(item) for item in items if item is not None]


def _common_dtype(parts: list[np.ndarray]) -> np.dtype:
    try:  # Integers are signed by now, so that they stay integers.
        return np.result_type(*parts) if parts else np.dtype(np.int32)
    except TypeError:  # Of bfloat16 beside int64 or float16: weights, which packing makes float32.
        return np.dtype(np.float32)


def _flatten_list(sequences: Any, max_length: int, truncate: bool) -> np.ndarray:
    rows = [_rows(f"flatten_sequences: sequence {i}", sequence) for i, sequence in enumerate(sequences)]
    rows = [items[: _cut(len(items), max_length, f"sequence {i}", truncate)] for i, items in enumerate(rows)]
    parts = [part for items in rows for part in ([items] if isinstance(items, np.ndarray) else items) if part.size]
    dtype = _common_dtype(parts)
    valency = max((part.shape[-1] for part in parts), default=1)
    flat = np.full((len(rows), max_length, valency), _filler(dtype), dtype)
    for places, items in zip(flat, rows, strict=True):
        if isinstance(items, np.ndarray):
            places[: len(items), : items.shape[1]] = items
        else:
            for place, item in zip(places, items, strict=False):
                place[: len(item)] = item
    return flat.reshape(-1, valency)


def flatten_sequences(values: Any, max_sequence_length: int | None = None, *, truncate: bool = False) -> Any:
    """The items of sequences as samples: from `[batch, sequence, valency]` to `[batch * sequence, valency]`.

    A sequence feature is one whose samples are sequences of items. Its `FeatureSpec` has input_shape `(batch * sequence,
    valency)` and output_shape `(batch * sequence, embedding_dim)`, its items are looked up and combined as samples are, and
    `embax.unflatten_sequences` makes sequences of their activations again. Items of padding have activations of 0.

    Args:
        values: ids, or weights, of one feature: an array `[batch, sequence, valency]`, or `[batch, sequence]` of one id an
            item, NumPy or JAX, also under `jax.jit`; or a list of sequences of different lengths, each an array `[length,
            valency]` or `[length]`, or a list of items, each an id or a list or 1-d array of ids.
        max_sequence_length: items that each sequence has in the result. Shorter sequences are filled up at their end, and
            items to the largest valency, with -1 (or 0 where `values` are floats, as weights are). None keeps the length of
            an array; lists need it.
        truncate: whether longer sequences are cut to their first `max_sequence_length` items, rather than an error.

    Returns:
        `[batch * sequence, valency]` array: JAX where `values` is, else NumPy.

    Raises:
        ValueError: a sequence is too long, `values` has another form, an id is beyond int64, or padding is needed in an
            unsigned JAX array.

    Example:
        >>> ids = {"watched": [[[3, 5], [8]], [[2]]]}  # Two sequences, of two items and of one.
        >>> flat = {name: embax.flatten_sequences(feature, 20) for name, feature in ids.items()}
        >>> packed = embax.preprocess(flat, specs=features)  # doctest: +SKIP
        >>> activations = embax.lookup(packed, variables, specs=features)  # doctest: +SKIP
        >>> jax.tree.map(lambda a: embax.unflatten_sequences(a, 20), activations)  # doctest: +SKIP
    """
    if max_sequence_length is not None:
        max_sequence_length = positive_int("flatten_sequences", "max_sequence_length", max_sequence_length)
    if not isinstance(values, jax.Array):
        values = host("flatten_sequences", values, "ids")
    if isinstance(values, (list, tuple)) or (isinstance(values, np.ndarray) and values.dtype == object and values.ndim):
        if max_sequence_length is None:
            raise ValueError(
                "flatten_sequences: a list of sequences needs max_sequence_length, the items that each is filled up to, so that "
                "every batch has the same shape."
            )
        return _flatten_list(values, max_sequence_length, truncate)
    if not isinstance(values, (np.ndarray, jax.Array)) or values.ndim not in (2, 3):
        raise ValueError(f"flatten_sequences: the values are {describe(values)}. {_ALLOWED}")
    array = values[:, :, None] if values.ndim == 2 else values
    return _flatten_array(array, array.shape[1] if max_sequence_length is None else max_sequence_length, truncate)


def unflatten_sequences(activations: Any, sequence_length: int) -> Any:
    """The activations of items as sequences again: from `[batch * sequence, dim]` to `[batch, sequence, dim]`.

    Args:
        activations: `[batch * sequence, dim]` array of one feature, NumPy or JAX, also under `jax.jit`.
        sequence_length: items of each sequence: the `max_sequence_length` of `embax.flatten_sequences`, or the length of its
            array.

    Returns:
        `[batch, sequence, dim]` array of the same kind.

    Raises:
        ValueError: the items do not divide by the length.
    """
    length = positive_int("unflatten_sequences", "sequence_length", sequence_length)
    if not isinstance(activations, (np.ndarray, jax.Array)) or activations.ndim < 1:
        raise ValueError(
            f"unflatten_sequences: the activations are {describe(activations)}; they must be an array [batch * sequence, dim] of "
            "one feature. For a tree of features call it by jax.tree.map."
        )
    items, *dims = activations.shape
    if items % length:
        raise ValueError(
            f"unflatten_sequences: {items} items do not divide by sequence_length={length}; pass the length that they were "
            "flattened with."
        )
    return activations.reshape(items // length, length, *dims)
