"""Packing in plain JAX, to the same format as the C++ core: sorts, searches and gathers, and no scatter."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax._ops.segments import aligned, count_up_to, sum_runs
from embax._preprocess.buffers import PADDING_VALUE, PackedLayout, StackLayout
from embax._preprocess.traced import RawFeature
from embax._stacking.plan import FeaturePlan


class Samples(NamedTuple):
    """Which sample each id of a feature belongs to.

    `number` is int32[n], in `[0, batch)`; `held` is bool[n], whether a sample has the id at all.
    """

    raw: RawFeature
    batch: int
    number: jax.Array
    held: jax.Array

    @classmethod
    def of(cls, raw: RawFeature, batch: int) -> "Samples":
        """The samples of the ids of a feature."""
        position = jnp.arange(raw.ids.size, dtype=jnp.int32)
        if raw.row_splits is None:
            return cls(raw, batch, position // max(raw.ids.size // max(batch, 1), 1), jnp.ones(position.shape, bool))
        number = jnp.clip(count_up_to(raw.row_splits, position) - 1, 0, max(batch - 1, 0))
        return cls(raw, batch, number, (position >= raw.row_splits[0]) & (position < raw.row_splits[-1]))

    def sums(self, values: jax.Array) -> jax.Array:
        """For each id the sum over its sample of `values`, float32[n], which are 0 where no sample has an id."""
        if values.size == 0 or self.batch == 0:
            return values
        if self.raw.row_splits is None:
            return jnp.sum(values.reshape(self.batch, -1), axis=1)[self.number]
        _, sums = sum_runs(self.number, values[:, None])
        # Behind the last sample lie only zeros of the ids that none has.
        return sums[jnp.clip(self.raw.row_splits[self.number + 1] - 1, 0, values.size - 1), 0]

    def any(self, flags: jax.Array) -> jax.Array:
        """For each id whether one of its sample has its flag, bool[n], set."""
        if flags.size == 0 or self.batch == 0:
            return flags
        if self.raw.row_splits is None:
            return jnp.any(flags.reshape(self.batch, -1), axis=1)[self.number]
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(flags, dtype=jnp.int32)])
        return before[self.raw.row_splits[self.number + 1]] > before[self.raw.row_splits[self.number]]


class Gains(NamedTuple):
    """The gains of the ids of a feature, arrays of its n ids.

    `valid` tells which ids count; `weights` are 0 where they do not; `divisor` is what the combiner divides by, 0 where the
    gains are 0; `gains` are float32. `invalid` is int32, the ids that were left out as not valid, or whose gains were.
    """

    valid: jax.Array
    weights: jax.Array
    divisor: jax.Array
    gains: jax.Array
    invalid: jax.Array


def gains_of(samples: Samples, feature: FeaturePlan, combiner: str) -> Gains:
    """The gains of the ids of a feature."""
    raw = samples.raw
    present = samples.held if raw.row_splits is not None else samples.held & (raw.ids != -1)
    valid = present & (raw.ids >= 0) & (raw.ids < feature.table.vocabulary_size)
    if raw.weights is not None:
        valid = valid & jnp.isfinite(raw.weights)
    invalid = jnp.sum(present & ~valid, dtype=jnp.int32)
    weights = jnp.where(valid, jnp.ones(valid.shape, jnp.float32) if raw.weights is None else raw.weights, 0.0)
    if combiner == "sum":
        return Gains(valid, weights, jnp.ones_like(weights), weights, invalid)
    divisor = samples.sums(weights) if combiner == "mean" else jnp.sqrt(samples.sums(weights * weights))
    gains = jnp.where(divisor == 0.0, 0.0, weights / jnp.where(divisor == 0.0, 1.0, divisor))
    unsound = ~jnp.isfinite(divisor) | ~jnp.isfinite(gains)
    if combiner == "sqrtn":  # Squares that are too small for float32.
        unsound = unsound | ((divisor == 0.0) & (weights != 0.0))
    unsound = valid & samples.any(valid & unsound)
    divisor, gains = jnp.where(unsound, 0.0, divisor), jnp.where(unsound, 0.0, gains)
    return Gains(valid, weights, divisor, gains, invalid + jnp.sum(unsound, dtype=jnp.int32))


class Places(NamedTuple):
    """Where the ids of a feature are looked up and what: arrays of its n ids.

    `sparsecore` is the one that looks it up, `key` is `partition * rows of a SparseCore + row`, and `sample` counts on the
    SparseCore over all features of the stack. All are int32; what is not valid has any values.
    """

    sparsecore: jax.Array
    key: jax.Array
    sample: jax.Array


def places_of(
    samples: Samples, valid: jax.Array, feature: FeaturePlan, stack: StackLayout, layout: PackedLayout
) -> Places:
    """Where the ids of a feature are looked up and what."""
    sparsecores, partitions = layout.num_sparsecores_per_device, layout.num_sparsecores
    before = [-(-size // sparsecores) for size in stack.batch_sizes[: stack.features.index(feature)]]
    share = max(-(-samples.batch // sparsecores), 1)
    sparsecore = samples.number // share
    ids = jnp.where(valid, samples.raw.ids, 0)
    remainder = ids % partitions
    column = (remainder + feature.col_shift % partitions) % partitions + (ids - remainder) + feature.col_offset
    key = column % partitions * (stack.num_rows // partitions) + column // partitions
    return Places(sparsecore, key, samples.number - sparsecore * share + sum(before))


def pack(features: Sequence[RawFeature], layout: PackedLayout) -> list[jax.Array]:
    """Row pointers, ids, sample ids, gains, and the invalid ids of each feature."""
    parts, invalid = [], {}
    for stack in layout.stacks:
        *arrays, counts = _pack_stack(features, stack, layout)
        parts.append(arrays)
        invalid.update(zip((feature.leaf for feature in stack.features), counts, strict=True))
    joined = [jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return [*joined, jnp.stack([invalid[leaf] for leaf in range(len(features))])]


def _pack_stack(
    features: Sequence[RawFeature], stack: StackLayout, layout: PackedLayout
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, list[jax.Array]]:
    sparsecores, partitions = layout.num_sparsecores_per_device, layout.num_sparsecores
    rows = stack.num_rows // partitions
    pointers_of_sparsecore = layout.row_pointers_per_device // len(layout.stacks) // sparsecores
    of_features, invalid, first_samples = [], [], [0]
    for feature, batch in zip(stack.features, stack.batch_sizes, strict=True):
        samples = Samples.of(features[feature.leaf], batch)
        gains = gains_of(samples, feature, stack.combiner)
        places = places_of(samples, gains.valid, feature, stack, layout)
        sparsecore = jnp.where(gains.valid, places.sparsecore, sparsecores)
        of_features.append((sparsecore, places.key, places.sample, gains.gains))
        invalid.append(gains.invalid)
        first_samples.append(first_samples[-1] + -(-batch // sparsecores))
    unsorted = [jnp.concatenate(arrays) for arrays in zip(*of_features, strict=True)]
    if unsorted[0].size == 0:
        nothing = jnp.zeros(0, jnp.int32)
        pointers = jnp.zeros(sparsecores * pointers_of_sparsecore, jnp.int32)
        return pointers, nothing, nothing, jnp.zeros(0, jnp.float32), invalid
    # On a SparseCore the samples ascend as they are read, so that a stable sort leaves those of a row in order.
    sparsecore, key, sample, gain = jax.lax.sort(unsorted, num_keys=2, is_stable=True)

    # Equal entries are merged: each run of them becomes one.
    first = jnp.zeros(1, jnp.int32)
    changes = (jnp.diff(sparsecore) != 0) | (jnp.diff(key) != 0) | (jnp.diff(sample) != 0)
    run = jnp.concatenate([first, jnp.cumsum(changes, dtype=jnp.int32)])
    is_last, sums = sum_runs(run, gain[:, None])
    infinite = ~jnp.isfinite(sums[:, 0])
    merged = jnp.where(infinite, 0.0, sums[:, 0])
    for k in range(len(stack.features)):
        mine = (sample >= first_samples[k]) & (sample < first_samples[k + 1]) & (sparsecore < sparsecores)
        invalid[k] = invalid[k] + jnp.sum(mine & is_last & infinite, dtype=jnp.int32)

    # Where each partition of each SparseCore begins among the entries, among the runs, and in the packed arrays.
    number = sparsecores * partitions
    place = jnp.where(sparsecore < sparsecores, sparsecore * partitions + key // rows, number)
    begins = count_up_to(place, jnp.arange(number + 1, dtype=jnp.int32) - 1)
    runs = jnp.concatenate([run, run[-1:] + 1])[begins]
    counts = jnp.diff(runs)
    ends = jnp.cumsum(aligned(counts), dtype=jnp.int32)
    starts = ends - aligned(counts)
    of_partitions = (starts + counts).reshape(sparsecores, partitions)
    others = jnp.broadcast_to(
        ends.reshape(sparsecores, partitions)[:, -1:], (sparsecores, pointers_of_sparsecore - partitions)
    )
    pointers = jnp.concatenate([of_partitions, others], axis=1).reshape(-1)

    position = jnp.arange(stack.capacity, dtype=jnp.int32)
    partition = count_up_to(starts, position) - 1
    offset = position - starts[partition]
    written = offset < counts[partition]
    entry = count_up_to(run, runs[partition] + offset) - 1
    ids = jnp.where(written, key[entry] % rows, PADDING_VALUE)
    return (
        pointers,
        ids,
        jnp.where(written, sample[entry], PADDING_VALUE),
        jnp.where(written, merged[entry], np.float32(np.nan)),
        invalid,
    )
