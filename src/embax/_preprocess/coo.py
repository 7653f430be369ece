"""Ids and weights in sparse coordinates."""

import dataclasses
import operator
from typing import Any, NamedTuple

import jax
import numpy as np

from embax._checks import INT32_MAX
from embax._preprocess.arrays import describe, floats, host, integers, to_numpy, too_wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseCoo:
    """Ids (or weights) of samples of different lengths, each with its coordinates. A pytree.

    Entry `k` is `values[k]`, an id of sample `indices[k, 0]`. Its position `indices[k, 1]` tells the entries of a sample apart
    and says in errors where they are; what is looked up does not depend on it. A sample without entries is empty.

    Args:
        indices: integer[n, 2] of (sample, position). Samples need not ascend; the entries of one keep their order.
        values: integer[n] ids, or float[n] weights.
        dense_shape: (batch, width), above all samples and all positions.

    Example:
        >>> coo = SparseCoo(np.array([[0, 0], [0, 1], [2, 0]]), np.array([7, 7, 3]), (3, 2))  # [7, 7], [], [3]
    """

    indices: Any
    values: Any
    dense_shape: Any


_FLAT = "Values of a SparseCoo are a flat list or 1-d array, one an entry."


class CooEntries(NamedTuple):
    """Where the ids of a `SparseCoo` are."""

    indices: np.ndarray
    """int[n, 2], as given."""
    order: np.ndarray | None
    """The number among the given entries of each entry in the order of samples; None where they are in that order."""
    dense_shape: tuple[int, int]

    def position(self, entry: int) -> int:
        """The position, as given, of an entry in the order of samples."""
        return int(self.indices[entry if self.order is None else self.order[entry], 1])


def _dense_shape(owner: str, given: Any) -> tuple[int, int]:
    given = host(owner, given, "dense_shape")
    elements = list(given) if isinstance(given, (list, tuple)) or (isinstance(given, np.ndarray) and given.ndim) else []
    elements = [host(owner, element, "dense_shape") for element in elements]
    try:  # Each by itself: NumPy makes floats of np.uint64 beside int.
        shape = [-1 if isinstance(element, (bool, np.bool)) else operator.index(element) for element in elements]
    except TypeError:
        shape = []
    if len(shape) != 2 or min(shape) < 0 or shape[0] > INT32_MAX:
        raise ValueError(
            f"{owner}: the dense_shape of its SparseCoo is {given!r}; it must be (batch, width), two integers from 0, the batch "
            f"up to {INT32_MAX}."
        )
    return shape[0], shape[1]


def _indices(owner: str, leaf: SparseCoo) -> np.ndarray:
    remedy = "They must be a (sample, position) of each entry, integer[n, 2]."
    indices = to_numpy(owner, leaf.indices, "indices", remedy)
    if indices.size == 0:  # Empty lists have neither two columns nor integers.
        indices = indices.astype(np.int32)
        return indices.reshape(0, 2) if indices.shape == (0,) else indices
    return indices


def _check_coordinates(owner: str, indices: np.ndarray, dense_shape: tuple[int, int]) -> None:
    outside = (indices < 0) | (indices >= np.asarray(dense_shape))
    if not outside.any():
        return
    entry, column = map(int, np.argwhere(outside)[0])
    what, within = (("sample", "batch"), ("position", "width"))[column]
    limit = dense_shape[column]
    raise ValueError(
        f"{owner}, entry {entry}: {what} {indices[entry, column]} in its indices is outside the {within} of {limit} in its "
        f"dense_shape; it must be from 0 and below that. Remove the entry, or correct dense_shape."
    )


def read_coo(owner: str, leaf: SparseCoo) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, CooEntries]:
    """Ids in the order of samples, row splits, the ids as given where int64 does not hold them, and where they are.

    Raises:
        ValueError: names `owner`, the entry, what was given and what is allowed.
    """
    indices = _indices(owner, leaf)
    given = to_numpy(owner, leaf.values, "ids", _FLAT)
    if indices.ndim != 2 or indices.shape[1] != 2 or given.shape != indices.shape[:1]:
        raise ValueError(
            f"{owner}: its SparseCoo has indices of shape {indices.shape} and values of shape {given.shape}; they must be "
            "[n, 2], of (sample, position), and [n]."
        )
    dense_shape = _dense_shape(owner, leaf.dense_shape)
    if given.size == 0:  # Empty lists are float64.
        given = given.astype(np.int32)
    coordinates, values = integers(owner, indices, "indices"), integers(owner, given)
    _check_coordinates(owner, indices, dense_shape)
    samples, wide, order = coordinates[:, 0], too_wide(given), None
    if (samples[1:] < samples[:-1]).any():
        order = np.argsort(samples, kind="stable")
        values = values[order]
        wide = None if wide is None else wide[order]
    splits = np.zeros(dense_shape[0] + 1, np.int64)
    np.cumsum(np.bincount(samples, minlength=dense_shape[0]), out=splits[1:])
    return values, splits, wide, CooEntries(coordinates, order, dense_shape)


def read_coo_weights(owner: str, leaf: Any, ids: CooEntries) -> np.ndarray:
    """float32 weights of the ids of a `SparseCoo`, in the order of samples.

    Raises:
        ValueError: names `owner`, the entry, what was given and what is allowed.
    """
    if isinstance(leaf, SparseCoo):
        _check_same_places(owner, leaf, ids)
        given = to_numpy(owner, leaf.values, "weights", _FLAT)
    else:
        given = host(owner, leaf, "weights")
        if not isinstance(given, np.ndarray) or given.ndim != 1:
            raise ValueError(
                f"{owner}: its weights are {describe(given)}; for ids in a SparseCoo they must be a SparseCoo with the same "
                "indices, a 1-d array in the order of the ids, or None for ones."
            )
    if given.ndim != 1:
        raise ValueError(f"{owner}: the SparseCoo of its weights has values of shape {given.shape}; they must be [n].")
    if given.shape != ids.indices.shape[:1]:
        raise ValueError(f"{owner}: there are {given.size} weights for {len(ids.indices)} ids; each id needs one.")
    weights = floats(owner, given)
    return weights if ids.order is None else weights[ids.order]


def _check_same_places(owner: str, weights: SparseCoo, ids: CooEntries) -> None:
    indices = _indices(f"{owner}, weights", weights)
    integers(f"{owner}, weights", indices, "indices")
    if indices.shape != ids.indices.shape:
        raise ValueError(
            f"{owner}: its weights have indices of shape {indices.shape}, its ids of shape {ids.indices.shape}; they must be "
            "equal."
        )
    different = np.flatnonzero((indices != ids.indices).any(axis=1))
    if different.size:
        entry = int(different[0])
        places = (tuple(map(int, part[entry])) for part in (ids.indices, indices))
        raise ValueError(
            "{}, entry {}: its id is at (sample, position) {}, its weight at {}; the indices of weights must equal those of the "
            "ids, in the same order.".format(owner, entry, *places)
        )
    shape = _dense_shape(owner, weights.dense_shape)
    if shape != ids.dense_shape:
        raise ValueError(
            f"{owner}: the dense_shape of its weights is {shape}, of its ids {ids.dense_shape}; they must be equal."
        )
