"""Packing inside jit: a primitive whose results have the format of the host's, and the gradients of sample weights.

On CPU the C++ core packs, elsewhere plain JAX. Gains are differentiable with respect to the weights; nothing else is.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax._ops import native
from embax._ops.geometry import inside_shard_map
from embax._ops.pack_portable import Samples, gains_of, pack, places_of
from embax._ops.primitive import bind, define
from embax._ops.segments import aligned
from embax._ops.varying import as_varying, varying_axes
from embax._preprocess.buffers import PackedLayout, PreprocessedInput, StackLayout
from embax._preprocess.traced import RawFeature, raw_layout, read_batch
from embax._specs import COMBINERS
from embax._stacking.plan import FeaturePlan, Plan


def pack_traced(
    plan: Plan, features: Sequence[FeaturePlan], ids: Sequence[Any], weights: Sequence[Any]
) -> PreprocessedInput:
    """Packs ids on the device that runs the step: one device's part, for rows on all devices.

    Args:
        plan: the placed specs.
        features: in the order of the feature leaves.
        ids: of each feature; of some of them the ids or the weights are traced.
        weights: of each feature, or None.

    Returns:
        A batch with room for all ids, whose `invalid_ids` count those that were left out.

    Raises:
        ValueError: a shape or a dtype is not allowed, or there are several devices, and this is no device's part.
    """
    if plan.num_devices != 1 and not inside_shard_map():
        raise ValueError(
            f"The specs were placed for {plan.num_devices} devices: inside jit each packs its own part. Call embax.preprocess "
            "from inside jax.shard_map, or outside jit."
        )
    batch = read_batch(features, ids, weights)
    layout = raw_layout(plan, batch)
    results: Any = _packed(layout, batch.features)
    row_pointers, embedding_ids, sample_ids, gains, invalid = results
    if any(of_splits is not None for of_splits in batch.lost):
        lost = [jnp.zeros((), jnp.int32) if of_splits is None else of_splits for of_splits in batch.lost]
        invalid = invalid + jnp.stack(lost)
    return PreprocessedInput(row_pointers, embedding_ids, sample_ids, gains, layout, invalid_ids=invalid)


def _bind(layout: PackedLayout, features: list[RawFeature]) -> list[jax.Array]:
    operands, structure = jax.tree.flatten(features)
    axes = frozenset[str]().union(*map(varying_axes, operands))
    return bind(pack_p, *as_varying(operands, axes), structure=structure, layout=layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(layout: PackedLayout, features: list[RawFeature]) -> list[jax.Array]:
    return _bind(layout, features)


def _forward(layout: PackedLayout, features: list[RawFeature]):
    arrays = _bind(layout, features)
    return arrays, (features, arrays[:3])


def _backward(layout: PackedLayout, residuals, cotangents) -> tuple[list[RawFeature | None]]:
    features, (row_pointers, ids, samples) = residuals
    of_weights: list[RawFeature | None] = [None] * len(features)
    for number, stack in enumerate(layout.stacks):
        weighted = [feature for feature in stack.features if features[feature.leaf].weights is not None]
        if not weighted or stack.capacity == 0:
            continue
        size = layout.row_pointers_per_device // len(layout.stacks)
        pointers = row_pointers[number * size : (number + 1) * size]
        part = slice(stack.entries_start, stack.entries_start + stack.capacity)
        arrays = (pointers, ids[part], samples[part], cotangents[3][part])
        for feature in weighted:
            raw = features[feature.leaf]
            gradient = _weight_gradient(raw, feature, stack, layout, arrays)
            of_weights[feature.leaf] = raw._replace(ids=None, row_splits=None, weights=gradient)
    return (of_weights,)


_packed.defvjp(_forward, _backward)


def _weight_gradient(
    raw: RawFeature, feature: FeaturePlan, stack: StackLayout, layout: PackedLayout, arrays: tuple[jax.Array, ...]
) -> jax.Array:
    """float32[n], the gradient with respect to the weights of a feature.

    Args:
        raw: its ids.
        feature: its placement.
        stack: the stack that it is looked up in.
        layout: the packed batch.
        arrays: row pointers, ids, sample ids of the stack, and the gradients of its gains.
    """
    pointers, ids, entry_samples, of_entries = arrays
    samples = Samples.of(raw, stack.batch_sizes[stack.features.index(feature)])
    gains = gains_of(samples, feature, stack.combiner)
    sparsecore, key, sample = places_of(samples, gains.valid, feature, stack, layout)
    partitions = layout.num_sparsecores
    rows = stack.num_rows // partitions
    ends = pointers.reshape(layout.num_sparsecores_per_device, -1)[:, :partitions].reshape(-1)
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), aligned(ends[:-1])])
    partition = sparsecore * partitions + key // rows

    # The entry of each id, by bisection: entries of a partition are sorted by row and sample.
    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        below = (ids[middle] < key % rows) | ((ids[middle] == key % rows) & (entry_samples[middle] < sample))
        searching = low < high
        return jnp.where(searching & below, middle + 1, low), jnp.where(searching & ~below, middle, high)

    entry, _ = jax.lax.fori_loop(0, stack.capacity.bit_length(), halve, (begins[partition], ends[partition]))
    of_gains = jnp.where(gains.valid, of_entries.at[entry].get(mode="clip"), 0.0)
    if stack.combiner == "sum":
        return of_gains
    # gain = w / D with D = sum(w), or D = sqrt(sum(w^2)).
    nonzero = gains.valid & (gains.divisor != 0.0)
    divisor = jnp.where(nonzero, gains.divisor, 1.0)
    of_gains = jnp.where(nonzero, of_gains, 0.0)
    slope = samples.sums(of_gains * gains.gains)
    of_divisor = slope if stack.combiner == "mean" else slope * gains.gains
    return jnp.where(nonzero, (of_gains - of_divisor) / divisor, 0.0)


def _sizes(layout: PackedLayout, num_features: int) -> list[tuple[int, Any]]:
    entries = layout.entries_per_device
    return [
        (layout.row_pointers_per_device, np.int32),
        (entries, np.int32),
        (entries, np.int32),
        (entries, np.float32),
        (num_features, np.int32),
    ]


def _shapes(*operands, structure: Any, layout: PackedLayout):
    sizes = _sizes(layout, len(structure.children()))
    return [operands[0].update(shape=(size,), dtype=np.dtype(dtype), weak_type=False) for size, dtype in sizes]


def _native(*operands, structure: Any, layout: PackedLayout) -> Sequence[jax.Array]:
    native.register()
    features = jax.tree.unflatten(structure, operands)
    placed = sorted(
        ((feature, batch) for s in layout.stacks for feature, batch in zip(s.features, s.batch_sizes, strict=True)),
        key=lambda one: one[0].leaf,
    )
    of_features = [
        (
            *(feature.table.vocabulary_size, feature.col_offset, feature.col_shift),
            *(batch, raw.row_splits is not None, raw.weights is not None),
        )
        for (feature, batch), raw in zip(placed, features, strict=True)
    ]
    of_stacks = [
        (
            *(COMBINERS.index(stack.combiner), stack.num_rows, len(stack.features)),
            *(stack.row_pointers_start, stack.entries_start, stack.capacity),
        )
        for stack in layout.stacks
    ]
    results = [jax.ShapeDtypeStruct((size,), dtype) for size, dtype in _sizes(layout, len(features))]
    return jax.ffi.ffi_call("embax_pack", results)(
        *operands,
        sparsecores_per_device=np.int64(layout.num_sparsecores_per_device),
        num_sparsecores=np.int64(layout.num_sparsecores),
        features=np.array(of_features, np.int64).reshape(-1),
        stacks=np.array(of_stacks, np.int64).reshape(-1),
        order=np.array([feature.leaf for stack in layout.stacks for feature in stack.features], np.int64),
    )


def _portable(*operands, structure: Any, layout: PackedLayout) -> list[jax.Array]:
    return pack(jax.tree.unflatten(structure, operands), layout)


pack_p = define(
    "embax_pack",
    _shapes,
    {"native": _native, "portable": _portable},
    derivative="Only reverse-mode differentiation with respect to the weights is there.",
    batching="Make one larger batch instead, or several features.",
)
