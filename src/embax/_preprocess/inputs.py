"""From a user's tree of ids and weights to the flat arrays that packing reads."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from embax._preprocess.arrays import (
    ALLOWED,
    FLOAT32,
    INT32,
    INT64,
    describe,
    floats,
    host,
    integers,
    to_numpy,
    too_wide,
)
from embax._preprocess.coo import CooEntries, SparseCoo, read_coo, read_coo_weights
from embax._stacking.plan import FeaturePlan

_JOIN = (
    "Values of a Ragged are those of all samples one after another: join them with np.concatenate, or pass the list of samples "
    "without a Ragged."
)
_SPLITS = "They must be one list of integers: 0, and behind each sample the number of values so far."


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ragged:
    """Ids (or weights) of samples of different lengths. A pytree.

    Sample `i` has the values `values[row_splits[i]:row_splits[i + 1]]`.

    Args:
        values: integer[n] ids, or float[n] weights, of all samples one after another.
        row_splits: integer[batch + 1], from 0 to n, never decreasing.

    Example:
        >>> ragged = Ragged(values=np.array([7, 7, 3]), row_splits=np.array([0, 2, 2, 3]))  # [7, 7], [], [3]
    """

    values: Any
    row_splits: Any


class FlatFeature(NamedTuple):
    """The ids of one feature, checked in all but their values."""

    ids: np.ndarray
    """int32 or int64, [batch, valency] or, with row splits, [n]."""
    weights: np.ndarray | None
    """float32, like the ids; None stands for ones."""
    row_splits: np.ndarray | None
    """int64[batch + 1]; None for dense ids."""
    batch: int
    given_ids: np.ndarray | None = None
    """The ids as given, flat, where int64 does not hold them all."""
    coo: CooEntries | None = None
    """Where a `SparseCoo` has the ids, which are in the order of their samples here."""


def flatten_like(skeleton: Any, treedef: Any, tree: Any, what: str) -> list[Any]:
    """The subtrees of `tree` at the leaves of the feature specs.

    Args:
        skeleton: the tree of the specs, with the features' names as leaves.
        treedef: its structure.
        tree: tree of the user.
        what: "ids" or "weights".

    Raises:
        ValueError: the structures differ; says where.
    """
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        difference = _difference(skeleton, tree, what) or str(error)
        raise ValueError(
            f"The {what} must have the structure of the feature specs, one leaf a feature: {difference}."
        ) from None


def _difference(skeleton: Any, tree: Any, path: str) -> str | None:
    if isinstance(skeleton, str):
        return None
    if isinstance(skeleton, Mapping):
        if not isinstance(tree, Mapping):
            return (
                f"{path} is a {type(tree).__name__}, the specs have a mapping with the keys {sorted(skeleton, key=str)}"
            )
        missing, extra = ([key for key in a if key not in b] for a, b in ((skeleton, tree), (tree, skeleton)))
        if missing or extra:
            parts = ((missing, "is missing"), (extra, "has no place in the specs"))
            return "; ".join(f"{path}[{key!r}] {problem}" for keys, problem in parts for key in keys)
        pairs = [(f"{path}[{key!r}]", skeleton[key], tree[key]) for key in skeleton]
    elif isinstance(skeleton, Sequence):
        if not isinstance(tree, Sequence):
            return f"{path} is a {type(tree).__name__}, the specs have a {type(skeleton).__name__} of {len(skeleton)}"
        if len(tree) != len(skeleton):
            return f"{path} has {len(tree)} elements, the specs have {len(skeleton)}"
        pairs = [(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(skeleton, tree, strict=True))]
    else:
        return None
    differences = (_difference(inner, given, inner_path) for inner_path, inner, given in pairs)
    found = next((difference for difference in differences if difference), None)
    if found is None and type(tree) is not type(skeleton):
        return f"{path} is a {type(tree).__name__}, the specs have a {type(skeleton).__name__}"
    return found


def _fast_rows(rows: Any, dtypes: tuple[np.dtype, ...]) -> tuple[np.ndarray, np.ndarray] | None:
    """Values and row splits of rows that are all arrays of one of `dtypes`, or all lists of such numbers; else None."""
    kinds = set(map(type, rows))
    try:
        if kinds == {np.ndarray} and {row.dtype for row in rows} <= set(dtypes):
            values = np.concatenate(rows)
        elif kinds == {list}:
            numbers = list(itertools.chain.from_iterable(rows))
            if not set(map(type, numbers)) <= {int, float}:  # bool, in particular, would pass for int.
                return None
            values = np.array(numbers)
        else:
            return None
        if values.ndim != 1 or values.dtype not in dtypes:
            return None
    except (ValueError, TypeError, OverflowError):
        return None
    return values, _splits_of(rows)


def _splits_of(rows: Any) -> np.ndarray:
    splits = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)), out=splits[1:])
    return splits


def _rows(owner: str, rows: Any, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Values, row splits, and the values as given where int64 does not hold them."""
    is_ids = what == "ids"
    fast = _fast_rows(rows, (INT32, INT64) if is_ids else (FLOAT32, np.dtype(np.float64)))
    if fast is not None:
        values, splits = fast
        return (values if is_ids else floats(owner, values)), splits, None
    arrays = []
    for sample, row in enumerate(rows):
        where = f"{owner}, sample {sample}"
        array = to_numpy(where, row, what, ALLOWED)
        if array.ndim != 1:
            given = f"have {array.ndim} dimensions" if array.ndim else f"are {describe(row)}"
            empty = "a sample without ids is []" if is_ids else "weights of ones are None in place of the list"
            raise ValueError(
                f"{where}: its {what} {given}; in a list of samples each one must be a 1-d array or a list, and {empty}. "
                f"{ALLOWED}"
            )
        if array.size == 0:  # An empty list has no dtype of its own.
            array = np.zeros(0, np.int32 if is_ids else np.float32)
        elif is_ids:
            integers(where, array)
        else:
            array = floats(where, array)
        arrays.append(array)
    splits = _splits_of(arrays)
    if not arrays:
        return np.zeros(0, np.int32 if is_ids else np.float32), splits, None
    if not is_ids:
        return np.concatenate(arrays), splits, None
    values = np.concatenate([integers(owner, array) for array in arrays])
    wide = any(too_wide(array) is not None for array in arrays)
    return values, splits, np.concatenate([array.astype(object) for array in arrays]) if wide else None


def dense_shape(feature: FeaturePlan, given: tuple[int, ...]) -> tuple[int, int]:
    """[batch, valency] of dense ids of a shape, which may be [batch] where the feature has one id a sample."""
    if len(given) == 1 and feature.valency in (None, 1):
        return (given[0], 1)
    if len(given) != 2:
        hint = f" (A 1-d array is taken where input_shape has one id a sample; here it has {feature.valency}.)"
        raise ValueError(
            f"Feature {feature.name!r}: its ids have shape {given}; they must have 2 dimensions, [batch, valency]. {ALLOWED}"
            f"{hint if len(given) == 1 else ' Reshape them.'}"
        )
    return (given[0], given[1])


def _read_ids(feature: FeaturePlan, leaf: Any) -> FlatFeature:
    owner = f"Feature {feature.name!r}"
    if isinstance(leaf, Ragged):
        given = to_numpy(owner, leaf.values, "ids", _JOIN)
        splits = to_numpy(owner, leaf.row_splits, "row_splits", _SPLITS)
        if given.ndim != 1 or splits.ndim != 1 or splits.size == 0:
            raise ValueError(
                f"{owner}: its Ragged has values of shape {given.shape} and row_splits of shape {splits.shape}; they "
                "must be 1-d, and row_splits one longer than the batch."
            )
        if given.size == 0:
            given = given.astype(np.int32)
        splits = integers(owner, splits, "row_splits").astype(np.int64, copy=False)
        return FlatFeature(integers(owner, given), None, splits, splits.size - 1, too_wide(given))
    if isinstance(leaf, SparseCoo):
        values, splits, given, entries = read_coo(owner, leaf)
        return FlatFeature(values, None, splits, splits.size - 1, given, entries)
    leaf = host(owner, leaf, "ids")
    if isinstance(leaf, (list, tuple)) or (isinstance(leaf, np.ndarray) and leaf.dtype == object and leaf.ndim == 1):
        values, splits, given = _rows(owner, leaf, "ids")
        return FlatFeature(values, None, splits, splits.size - 1, given)
    if not isinstance(leaf, np.ndarray):
        raise ValueError(f"{owner}: its ids are {describe(leaf)}. {ALLOWED}")
    ids = integers(owner, leaf)
    ids = ids.reshape(dense_shape(feature, leaf.shape))
    return FlatFeature(ids, None, None, ids.shape[0], too_wide(leaf))


def _splits_of_weights(owner: str, weights: Ragged, values: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """The row splits of weights in a `Ragged`; unless they are `splits`, those of the ids, they are checked by themselves."""
    given = to_numpy(f"{owner}, weights", weights.row_splits, "row_splits", _SPLITS)
    if values.ndim != 1 or given.ndim != 1 or given.size == 0:
        raise ValueError(
            f"{owner}: the Ragged of its weights has values of shape {values.shape} and row_splits of shape {given.shape}; they "
            "must be 1-d, and row_splits one longer than the batch."
        )
    theirs = integers(f"{owner}, weights", given, "row_splits")
    if np.array_equal(theirs, splits):
        return theirs
    of_ids = "They must equal the row_splits of the ids."
    if theirs[0] != 0:
        raise ValueError(f"{owner}: the row_splits of its weights start at {theirs[0]}; they must start at 0. {of_ids}")
    falls = np.flatnonzero(theirs[1:] < theirs[:-1])
    if falls.size:
        sample = int(falls[0])
        raise ValueError(
            f"{owner}, sample {sample}: the row_splits of its weights decrease from {theirs[sample]} to {theirs[sample + 1]}; "
            f"they must never decrease. {of_ids}"
        )
    if theirs[-1] != values.size:
        raise ValueError(
            f"{owner}: the row_splits of its weights end at {theirs[-1]}, but there are {values.size} weights; they must end at "
            f"their number. {of_ids}"
        )
    return theirs


def _read_weights(owner: str, flat: FlatFeature, leaf: Any, ids_shape: tuple[int, ...]) -> np.ndarray:
    splits = flat.row_splits
    if flat.coo is not None:
        return read_coo_weights(owner, leaf, flat.coo)
    if splits is None:
        leaf = host(owner, leaf, "weights")
        shape = leaf.shape if isinstance(leaf, np.ndarray) else None
        if shape not in (ids_shape, flat.ids.shape):
            raise ValueError(
                f"{owner}: its weights are {describe(leaf)}, its ids have shape {ids_shape}; weights must be an array "
                "of the same shape, or None for ones."
                + (" Convert the list with np.asarray(weights, np.float32)." if isinstance(leaf, (list, tuple)) else "")
            )
        return floats(owner, leaf).reshape(flat.ids.shape)
    if isinstance(leaf, Ragged):
        values = floats(owner, to_numpy(owner, leaf.values, "weights", _JOIN))
        theirs = _splits_of_weights(owner, leaf, values, splits)
    else:
        leaf = host(owner, leaf, "weights")
        if isinstance(leaf, np.ndarray) and leaf.dtype != object and leaf.ndim == 1:
            values, theirs = floats(owner, leaf), splits
        elif isinstance(leaf, (list, tuple)) or (isinstance(leaf, np.ndarray) and leaf.ndim):
            values, theirs, _ = _rows(owner, leaf, "weights")
        else:
            raise ValueError(
                f"{owner}: its weights are {describe(leaf)}; for ragged ids they must be ragged in the same way (a "
                "list of 1-d arrays, or embax.Ragged), or None for ones."
            )
    if theirs.shape != splits.shape:
        raise ValueError(f"{owner}: its weights have {theirs.size - 1} samples, its ids have {splits.size - 1}.")
    different = np.flatnonzero(np.diff(theirs) != np.diff(splits))
    if different.size:
        sample = int(different[0])
        counts = (int(np.diff(part)[sample]) for part in (splits, theirs))
        raise ValueError("{}, sample {}: there are {} ids but {} weights.".format(owner, sample, *counts))
    if values.shape != flat.ids.shape:
        raise ValueError(f"{owner}: there are {values.size} weights for {flat.ids.size} ids; each id needs one.")
    return values


def read_feature(feature: FeaturePlan, ids: Any, weights: Any) -> FlatFeature:
    """Checks one leaf of the ids, and of the weights (or None), in all but its values.

    Raises:
        ValueError: names the feature, what was given and what is allowed.
    """
    if type(ids) is np.ndarray and ids.ndim == 2 and ids.dtype in (INT64, INT32):
        flat = FlatFeature(np.ascontiguousarray(ids), None, None, ids.shape[0])  # The common case, made short.
    else:
        flat = _read_ids(feature, ids)
    if weights is None:
        return flat
    ids_shape = tuple(np.shape(ids)) if flat.row_splits is None else flat.ids.shape
    return flat._replace(weights=_read_weights(f"Feature {feature.name!r}", flat, weights, ids_shape))
