"""The batch of one stack as the operands of a primitive, and the geometry that their shapes say."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax._ops.geometry import Geometry, StackGeometry
from embax._ops.segments import count_up_to
from embax._preprocess.buffers import (
    MAX_MINIBATCHES,
    PADDING_VALUE,
    PARTITION_ALIGNMENT,
    PackedLayout,
    PreprocessedInput,
    row_pointers_per_segment,
)
from embax._topology import num_sparsecores_per_device
from embax.compat.sparsecore.lib.core.primitives._checks import columns_of
from embax.optimizers import OptimizerSpec


def num_devices() -> int:
    """Devices that what is traced runs on, each with its part: those of the manual axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh.manual_axes)


def sharded_axis() -> Any:
    """The manual axis, or a tuple of them, that tables are sharded over; None on one device."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if num_devices() == 1:
        return None
    return axes[0] if len(axes) == 1 else tuple(axes)


def _sparsecores_per_device(num_row_pointers: int, devices: int, minibatched: bool, given: int | None) -> int:
    """SparseCores a device: the number given, else that of the device's kind, else what the row pointers are for."""
    if given is not None or minibatched:
        num = num_sparsecores_per_device() if given is None else given
        per_minibatch = num * row_pointers_per_segment(num * devices)
        fits = num_row_pointers >= per_minibatch if minibatched else num_row_pointers == per_minibatch
        if not fits:
            raise ValueError(
                f"lhs_row_pointers has {num_row_pointers} elements; {num} SparseCores a device, on {devices} devices, have "
                f"{per_minibatch}{' a minibatch' if minibatched else ''}."
            )
        return num
    for num in range(1, num_row_pointers // row_pointers_per_segment(devices) + 1):
        if num * row_pointers_per_segment(num * devices) == num_row_pointers:
            return num
    raise ValueError(
        f"lhs_row_pointers has {num_row_pointers} elements, which no number of SparseCores a device explains: S of them, on "
        f"{devices} devices, have S * max(S * {devices}, 8). With minibatches pass enable_minibatching=True."
    )


def _check_divides(what: str, size: int, num: int) -> None:
    if size % num:
        raise ValueError(f"{what}, {size}, must be a multiple of {num}, the SparseCores of a device.")


def make_batch(
    operands: Sequence[jax.Array],
    table: jax.Array,
    num_samples: int,
    *,
    name: str,
    max_ids_per_partition: int,
    max_unique_ids_per_partition: int,
    enable_minibatching: bool,
    num_sparsecores: int | None,
    quantization: tuple[float, float, int] | None = None,
    optimizer: OptimizerSpec | None = None,
) -> tuple[PreprocessedInput, Geometry]:
    """A packed batch of one stack.

    Args:
        operands: row pointers, ids, samples, gains and the number of minibatches.
        table: what it looks up, the device's part.
        num_samples: samples on the device.
        name: the name of the stack.
        max_ids_per_partition: see `TableSpec`.
        max_unique_ids_per_partition: see `TableSpec`.
        enable_minibatching: whether the buffers are those of minibatches.
        num_sparsecores: SparseCores a device, None where the shapes or the device's kind say it.
        quantization: see `QuantizationConfig.as_tuple`.
        optimizer: of the table, if it is updated.

    Raises:
        ValueError: no topology explains the shapes.
    """
    row_pointers, ids, samples, gains, num_minibatches = operands
    devices = num_devices()
    num = _sparsecores_per_device(row_pointers.shape[0], devices, enable_minibatching, num_sparsecores)
    _check_divides("The batch of a device", num_samples, num)
    _check_divides("The rows of the table on a device", table.shape[0], num)
    if not enable_minibatching:
        _check_divides("The length of lhs_local_embedding_ids", ids.shape[0], num)
    packed = PreprocessedInput(
        row_pointers,
        ids,
        samples,
        gains,
        PackedLayout((), 1, devices, num, enable_minibatching),
        num_minibatches.reshape(1) if enable_minibatching else None,
    )
    stack = StackGeometry(
        name=name,
        row_pointers_start=0,
        entries_start=0,
        capacity=ids.shape[0],
        samples_per_sparsecore=num_samples // num,
        quantization=quantization,
        width=columns_of(table),
        max_ids_per_partition=max_ids_per_partition,
        max_unique_ids_per_partition=max_unique_ids_per_partition,
        optimizer=optimizer,
    )
    minibatches = row_pointers.shape[0] // (num * row_pointers_per_segment(num * devices))
    max_minibatches = min(minibatches, MAX_MINIBATCHES) if enable_minibatching else 0
    return packed, Geometry((stack,), num * devices, max_minibatches, devices)


def only_minibatch(
    packed: PreprocessedInput, geometry: Geometry, number: jax.Array, count: jax.Array
) -> PreprocessedInput:
    """The batch with the entries of minibatch `number` of `count` alone; those of the others become padding."""
    samples = jnp.asarray(packed.sample_ids)

    def select() -> jax.Array:
        pointers = jnp.asarray(packed.row_pointers)[: geometry.max_segments * geometry.row_pointers_per_segment]
        ends = pointers.reshape(geometry.max_segments, -1)[:, geometry.num_sparsecores - 1]
        ends = (ends + (PARTITION_ALIGNMENT - 1)) // PARTITION_ALIGNMENT * PARTITION_ALIGNMENT
        # What lies behind the last segment was not written.
        written = jnp.arange(geometry.max_segments, dtype=jnp.int32) < geometry.sparsecores_per_device * count
        segment = count_up_to(jnp.where(written, ends, samples.shape[0]), jnp.arange(samples.shape[0], dtype=jnp.int32))
        return jnp.where(segment % count == number, samples, PADDING_VALUE)

    return packed.replace(sample_ids=jax.lax.cond(count > 1, select, lambda: samples))
