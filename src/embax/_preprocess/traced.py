"""From a user's tree of traced ids and weights to the flat arrays that packing inside jit reads.

What shapes and dtypes tell is checked as the step is traced. What only values tell makes no error there: it is counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._checks import INT32_MAX, next_multiple
from embax._preprocess.arrays import describe, floats, integers, to_numpy
from embax._preprocess.buffers import MAX_MINIBATCHES, PARTITION_ALIGNMENT, PackedLayout, make_layout
from embax._preprocess.inputs import Ragged, dense_shape, read_feature
from embax._stacking.plan import FeaturePlan, Plan

_ALLOWED = (
    "Inside jit ids are an integer array [batch, valency] in which -1 is padding, or embax.Ragged(values, row_splits) of 1-d "
    "arrays."
)
_OTHERWISE = (
    "Or pack outside jit, where all forms are allowed, and pass what embax.preprocess returns into the jitted function."
)


class RawFeature(NamedTuple):
    """The ids of one feature on one device. A pytree."""

    ids: jax.Array
    """int32[n]; of dense ids sample by sample, -1 is padding."""
    row_splits: jax.Array | None
    """int32[batch + 1], never decreasing, from 0 or more to at most n; None for dense ids."""
    weights: jax.Array | None
    """float32[n], None for ones."""


class RawBatch(NamedTuple):
    """The ids of all features on one device."""

    features: list[RawFeature]
    batch_sizes: tuple[int, ...]
    lost: list[jax.Array | None]
    """Of each feature int32, the ids that inconsistent row splits speak of, and that no sample has; None for dense ids."""


def is_traced(leaf: Any) -> bool:
    """Whether ids or weights of a feature are traced by JAX. Lists are not looked into."""
    if leaf is None or type(leaf) is np.ndarray:
        return False  # As most are, at every batch.
    parts = (leaf.values, leaf.row_splits) if isinstance(leaf, Ragged) else (leaf,)
    return any(isinstance(part, Tracer) for part in parts)


def _clipped(array: Any) -> jax.Array:
    """Integers as int32, flat. -1 stays what it is; what int32 does not hold becomes what is no id either."""
    xp: Any = np if isinstance(array, np.ndarray) else jnp
    dtype = array.dtype
    if jnp.iinfo(dtype).max > INT32_MAX:
        array = xp.minimum(array, dtype.type(INT32_MAX))
        if jnp.iinfo(dtype).min < 0:
            array = xp.maximum(array, dtype.type(-2))
    return jnp.asarray(array.astype(np.int32).reshape(-1))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, jax.Array))


def _array(owner: str, given: Any, what: str) -> Any:
    """A traced array as it is; anything else as an array on the host."""
    return given if isinstance(given, Tracer) else to_numpy(owner, given, what, _ALLOWED)


def _integers(owner: str, given: Any, what: str) -> Any:
    array = _array(owner, given, what)
    if isinstance(array, Tracer):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{owner}: its {what} are {describe(array)}; they must be integers. {_ALLOWED}")
        return array
    return integers(owner, array if array.size else array.astype(np.int32), what)


def _weights(owner: str, array: Any) -> jax.Array:
    """Weights as float32, flat."""
    if not isinstance(array, Tracer):
        return jnp.asarray(floats(owner, array).reshape(-1))
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise ValueError(
            f"{owner}: its weights are {describe(array)}; they must be real numbers. Convert them with "
            "weights.astype(jnp.float32)."
        )
    return array.astype(jnp.float32).reshape(-1)


def _check_shapes(owner: str, values: Any, splits: Any, what: str) -> None:
    if values.ndim != 1 or splits.ndim != 1 or splits.size == 0:
        raise ValueError(
            f"{owner}: the Ragged of its {what} has values of shape {values.shape} and row_splits of shape {splits.shape}; they "
            "must be 1-d, and row_splits one longer than the batch."
        )


def _consistent_splits(splits: jax.Array, also: jax.Array | None, num_ids: int) -> tuple[jax.Array, jax.Array]:
    """Row splits that never decrease and stay within the ids, and the ids that no sample has.

    From the first split on that is not consistent with those before it, the last one, the number of ids, or with those of
    the weights (`also`), samples are empty.
    """
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), splits[:-1]])
    good = (splits >= before) & (splits <= jnp.minimum(splits[-1], num_ids))
    if also is not None:
        good = good & (splits == also)
    all_good = jnp.all(good)
    first_bad = jnp.where(all_good, splits.size, jnp.argmin(good))
    last_good = jnp.where(first_bad > 0, splits[jnp.maximum(first_bad - 1, 0)], 0)
    consistent = jnp.where(jnp.arange(splits.size) < first_bad, splits, last_good)
    held = consistent[-1] - consistent[0]
    lost = jnp.maximum(jnp.max(splits) - held, jnp.where(all_good, 0, 1))
    return consistent, lost.astype(jnp.int32)


def _read_ragged(feature: FeaturePlan, ids: Ragged, weights: Any) -> tuple[RawFeature, int, jax.Array]:
    owner = f"Feature {feature.name!r}"
    values, splits = _integers(owner, ids.values, "ids"), _integers(owner, ids.row_splits, "row_splits")
    _check_shapes(owner, values, splits, "ids")
    theirs = None
    if isinstance(weights, Ragged):
        theirs = _integers(f"{owner}, weights", weights.row_splits, "row_splits")
        weights = _array(owner, weights.values, "weights")
        _check_shapes(owner, weights, theirs, "weights")
        if theirs.shape != splits.shape:
            raise ValueError(f"{owner}: its weights have {theirs.size - 1} samples, its ids have {splits.size - 1}.")
    if weights is not None and (not _is_array(weights) or weights.shape != values.shape):
        raise ValueError(
            f"{owner}: its weights are {describe(weights)}, but there are {values.size} ids; inside jit those of ragged ids are "
            f"a 1-d array, or embax.Ragged, of as many values, or None for ones. {_OTHERWISE}"
        )
    consistent, lost = _consistent_splits(_clipped(splits), None if theirs is None else _clipped(theirs), values.size)
    flat = None if weights is None else _weights(owner, weights)
    return RawFeature(_clipped(values), consistent, flat), splits.size - 1, lost


def _read_dense(feature: FeaturePlan, ids: Any, weights: Any) -> tuple[RawFeature, int, None]:
    owner = f"Feature {feature.name!r}"
    ids = _integers(owner, ids, "ids")
    shape = dense_shape(feature, ids.shape)
    if weights is not None and (not _is_array(weights) or weights.shape not in (ids.shape, shape)):
        raise ValueError(
            f"{owner}: its weights are {describe(weights)}, its ids have shape {ids.shape}; weights must be an array of the same "
            f"shape, or None for ones. {_OTHERWISE}"
        )
    flat = None if weights is None else _weights(owner, _array(owner, weights, "weights"))
    return RawFeature(_clipped(ids), None, flat), shape[0], None


def _read(feature: FeaturePlan, ids: Any, weights: Any) -> tuple[RawFeature, int, jax.Array | None]:
    """The ids of a feature, its samples, and the ids that its row splits lost."""
    if not (is_traced(ids) or is_traced(weights)):
        known = read_feature(feature, ids, weights)
        if known.row_splits is None:
            return _read_dense(feature, known.ids, known.weights)
        return _read_ragged(feature, Ragged(known.ids, known.row_splits), known.weights)
    if isinstance(ids, Ragged):
        return _read_ragged(feature, ids, weights)
    if _is_array(ids):
        return _read_dense(feature, ids, weights)
    raise ValueError(
        f"Feature {feature.name!r}: its ids are {describe(ids)}, and its weights are traced by JAX. {_ALLOWED} {_OTHERWISE}"
    )


def read_batch(features: Sequence[FeaturePlan], ids: Sequence[Any], weights: Sequence[Any]) -> RawBatch:
    """The ids of one device as packing inside jit takes them, where some of them or of their weights are traced.

    Raises:
        ValueError: the shape or dtype of a leaf is not one of those allowed; names the feature.
    """
    read = list(map(_read, features, ids, weights))
    return RawBatch([raw for raw, _, _ in read], tuple(batch for _, batch, _ in read), [lost for _, _, lost in read])


def raw_layout(plan: Plan, batch: RawBatch) -> PackedLayout:
    """The layout in which one device's part of a batch has room, whatever its ids are.

    All ids of a stack may differ, and each partition may end with places that fill it up. Of ragged ids all may be in the
    samples of one SparseCore, so that the SparseCores' entries follow one another.

    Raises:
        ValueError: a stack has more ids or samples than int32 counts.
    """
    sparsecores, partitions = plan.num_sparsecores_per_device, plan.num_sparsecores
    limits = []
    for stack in plan.stacks:
        total = of_sparsecore = samples = 0
        for feature in stack.features:
            raw, size = batch.features[feature.leaf], batch.batch_sizes[feature.leaf]
            total += raw.ids.size
            samples += size
            dense = raw.row_splits is None and size > 0
            of_sparsecore += raw.ids.size // size * -(-size // sparsecores) if dense else raw.ids.size
        if max(total, samples) > INT32_MAX - MAX_MINIBATCHES * PARTITION_ALIGNMENT * partitions:
            raise ValueError(
                f"Stack {stack.name!r}: its features have {total} ids in {samples} samples; with {partitions} SparseCores in "
                f"all, int32 row pointers count at most {INT32_MAX - MAX_MINIBATCHES * PARTITION_ALIGNMENT * partitions}. Split "
                "the batch."
            )
        padding = (PARTITION_ALIGNMENT - 1) * min(sparsecores * partitions, total)
        capacity = next_multiple(total + padding, PARTITION_ALIGNMENT * sparsecores)
        limits.append((of_sparsecore, of_sparsecore, capacity))
    return make_layout(plan, batch.batch_sizes, np.array(limits, np.int64), max_minibatches=1)
