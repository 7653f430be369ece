"""The lookup primitive: packed ids and tables to the activations of every stack."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from embax._ops import native, sparsecore
from embax._ops.geometry import Geometry, StackGeometry, packed_operands
from embax._ops.primitive import bind, cut, define
from embax._ops.segments import count_up_to, entries_of, sum_runs, table_rows
from embax._ops.unstack import activations_of_features, only_features_of_all_columns
from embax._preprocess.buffers import PreprocessedInput


def lookup_stacks(packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry) -> list[list[jax.Array]]:
    """Activations of the features of every stack, from tables that hold the rows of all ids.

    Args:
        packed: a batch packed for one device, or one device's part of it.
        tables: float32[rows, dim] of each stack, or float32[rows].
        geometry: static.

    Returns:
        For each stack float32[batch, output_dim] of its features; where geometry names none
        float32[sparsecores_per_device * samples_per_sparsecore, dim], without dim where its table has none.
    """
    return cut(bind(lookup_p, *packed_operands(packed), *tables, geometry=geometry), geometry.num_arrays())


def quantize(rows: jax.Array, quantization: tuple[float, float, int] | None) -> jax.Array:
    """Rows clipped and rounded to equally spaced values, as `QuantizationConfig.as_tuple` says."""
    if quantization is None:
        return rows
    low, high, buckets = quantization
    step = jnp.float32((high - low) / (buckets - 1))
    codes = jnp.round((jnp.clip(rows, low, high) - low) / step)
    if buckets <= 256:  # Of 8 bits, which hold no NaN.
        codes = jnp.where(jnp.isnan(codes), codes, codes.astype(jnp.uint8).astype(rows.dtype))
    return codes * step + low


def _portable_stack(arrays, table: jax.Array, geometry: Geometry, stack: StackGeometry) -> jax.Array:
    num_samples = geometry.num_samples(stack)
    if stack.capacity == 0 or num_samples == 0:
        return jnp.zeros((num_samples, *table.shape[1:]), table.dtype)
    partition, ids, sample, gain = entries_of(*arrays, geometry=geometry, stack=stack)
    order = jnp.argsort(sample, stable=True)
    sample = sample[order]
    rows = table_rows(partition[order], ids[order], sample < num_samples, table.shape[0], geometry)
    values = quantize(table.at[rows].get(mode="fill", fill_value=0), stack.quantization).reshape(len(rows), -1)
    values = jnp.where((rows < table.shape[0])[:, None], gain[order][:, None] * values, 0.0)
    _, sums = sum_runs(sample, values)
    wanted = jnp.arange(num_samples, dtype=sample.dtype)
    last = count_up_to(sample, wanted) - 1
    present = (last >= 0) & (sample[last] == wanted)
    return jnp.where(present[:, None], sums[last], 0.0).reshape(num_samples, *table.shape[1:])


def _native(*operands, geometry: Geometry) -> list[jax.Array]:
    tables = operands[5:]
    # The kernels write features that have all columns of their stack; others are cut out behind them.
    by_kernel = only_features_of_all_columns(geometry, [table.shape[-1] for table in tables])
    found = cut(native.lookup(operands[:5], tables, by_kernel), by_kernel.num_arrays())
    return [
        array
        for stack, written, arrays in zip(geometry.stacks, by_kernel.stacks, found, strict=True)
        for array in (arrays if written.features else activations_of_features(arrays[0], stack, geometry))
    ]


def _portable(*operands, geometry: Geometry) -> list[jax.Array]:
    return [
        array
        for table, stack in zip(operands[5:], geometry.stacks, strict=True)
        for array in activations_of_features(_portable_stack(operands[:5], table, geometry, stack), stack, geometry)
    ]


def _sparsecore(*operands, geometry: Geometry) -> list[jax.Array]:
    activations: list[jax.Array] = []
    for table, stack in zip(operands[5:], geometry.stacks, strict=True):
        one = dataclasses.replace(geometry, stacks=(stack,))
        if sparsecore.holds(stack, table) and not geometry.gathered:
            (found,) = sparsecore.lookup(operands[:5], [table], one)
            activations += activations_of_features(found, stack, geometry)
        else:
            activations += _portable(*operands[:5], table, geometry=one)
    return activations


def _shapes(*operands, geometry: Geometry):
    return [
        table.update(shape=shape)
        for table, stack in zip(operands[5:], geometry.stacks, strict=True)
        for shape in [(feature.num_samples, feature.dim) for feature in stack.features]
        or [(geometry.num_samples(stack), *table.shape[1:])]
    ]


lookup_p = define(
    "embax_lookup",
    _shapes,
    {"native": _native, "portable": _portable, "sparsecore": _sparsecore},
    derivative="Differentiate with respect to the activations and pass the gradients to embax.apply_gradients, or use a layer.",
    batching="Make one larger batch instead, or several features.",
)
