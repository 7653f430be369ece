"""Packing for the reference's functions: its checks, and its arrays by the name of the stack."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from embax._preprocess.buffers import PackedLayout, PreprocessedInput
from embax._preprocess.packer import Packer
from embax._preprocess.sizes import compute_coo_buffer_size_per_device, compute_row_pointers_size_per_device
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax.compat._placement import features_to_pack
from embax.compat.sparsecore.lib.nn.embedding_spec import FeatureSpec

_MAX_BATCH = 2**26
"""Samples of a feature on a device must be fewer."""

_MAX_KEPT = 256
_packers: dict[Any, tuple[Packer, list[Any]]] = {}


class Packed(NamedTuple):
    """A packed batch: arrays by stack, int32 but for the gains; `num_minibatches` of each local device."""

    row_pointers: dict[str, Any]
    embedding_ids: dict[str, Any]
    sample_ids: dict[str, Any]
    gains: dict[str, Any]
    num_minibatches: Any
    stats: SparseDenseMatmulInputStats | None


def check_counts(local_device_count: int, global_device_count: int, num_sc_per_device: int) -> None:
    """Raises a ValueError unless there are so many devices and SparseCores."""
    for name, count in (
        ("local_device_count", local_device_count),
        ("global_device_count", global_device_count),
        ("num_sc_per_device", num_sc_per_device),
    ):
        if count < 1:
            raise ValueError(f"{name} must be greater than 0, but got {count}")
    if global_device_count < local_device_count:
        raise ValueError(
            f"global_device_count must be greater than or equal to local_device_count, but got {global_device_count} vs "
            f"{local_device_count}"
        )
    total = global_device_count * num_sc_per_device
    if total & (total - 1):
        raise ValueError(f"Total number of SparseCores ({total}) must be a power of 2.")


def _check_batches(features: Sequence[FeatureSpec], batches: Sequence[int], devices: int, sparsecores: int) -> None:
    for feature, batch in zip(features, batches, strict=True):
        if batch // devices >= _MAX_BATCH:
            raise ValueError(
                f"Feature {feature.name!r}: a batch of {batch} samples on {devices} devices exceeds the maximum limit supported "
                f"by the SparseCore CooFormat, {_MAX_BATCH - 1} samples a device. Split the batch."
            )
        parts = devices * sparsecores
        if batch % parts:
            raise ValueError(
                f"Feature {feature.name!r}: a batch of {batch} samples does not divide by {devices} local devices of "
                f"{sparsecores} SparseCores; fill it up to {-(-batch // parts) * parts} samples."
            )


def _packer_for(
    features: Sequence[FeatureSpec], devices: int, sparsecores: int, any_id: bool, all_reduce: Any, **options: Any
) -> Packer:
    """A packer, kept from an earlier call if nothing about the specs has changed: see `embax._preprocess.pack`.

    One that has an all-reduce is kept with it, and no longer: it may hold connections.
    """
    kept = _packers if all_reduce is None else vars(all_reduce).setdefault("_packers_of_compat", {})
    parts: list[Any] = []
    for feature in features:
        table = feature.table_spec
        parts += (feature.name, feature._id_transformation, feature.output_shape)
        parts += (table.name, table.vocabulary_size, table.embedding_dim, table.combiner, table._stacked_table_spec)
    key = (devices, sparsecores, any_id, *options.values(), *map(id, parts))
    known = kept.get(key)
    if known is None:
        while len(kept) >= _MAX_KEPT:
            kept.pop(next(iter(kept), None), None)
        placed = features_to_pack(features, devices, sparsecores, any_id=any_id)
        known = kept.setdefault(key, (Packer(placed, all_reduce=all_reduce, **options), parts))
    return known[0]


def _of_stacks(array: Any, layout: PackedLayout, leading: bool, pointers: bool) -> dict[str, Any]:
    """The parts of the stacks in an array of all: views, where a device alone holds them or there is one stack."""
    of_devices = array.reshape(layout.num_local_devices, -1)
    parts = {}
    for stack in layout.stacks:
        start, size = stack.entries_start, stack.capacity
        if pointers:
            start, size = stack.row_pointers_start, layout.row_pointers_per_device // len(layout.stacks)
        part = of_devices[:, start : start + size]
        parts[stack.name] = np.ascontiguousarray(part) if leading else part.reshape(-1)
    return parts


def _by_stack(packed: PreprocessedInput, leading: bool) -> tuple[dict[str, Any], ...]:
    layout = packed.layout
    return (
        _of_stacks(packed.row_pointers, layout, leading, True),
        *(
            _of_stacks(array, layout, leading, False)
            for array in (packed.embedding_ids, packed.sample_ids, packed.gains)
        ),
    )


def pack(
    features: Sequence[FeatureSpec],
    batches: Sequence[int],
    ids: Sequence[Any],
    weights: Sequence[Any] | None,
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int,
    any_id: bool,
    has_leading_dimension: bool = False,
    allow_id_dropping: bool = False,
    batch_number: int = 0,
    enable_minibatching: bool = False,
    all_reduce_interface: Any = None,
) -> Packed:
    """Packs a batch.

    Args:
        features: the features, placed.
        batches: samples of each, on all local devices.
        ids: of each, as `embax.preprocess` takes them.
        weights: likewise, or None.
        local_device_count: devices that are packed for.
        global_device_count: devices of all hosts.
        num_sc_per_device: SparseCores of each.
        any_id: see `features_to_pack`.
        has_leading_dimension: whether arrays have a leading dimension of the local devices.
        allow_id_dropping: whether what is beyond a limit is dropped, rather than an error.
        batch_number: the same on all hosts, for the minibatches.
        enable_minibatching: whether there may be several minibatches.
        all_reduce_interface: how hosts agree on them.

    Raises:
        ValueError: a count, an array or a spec is not what it should be, or a limit is exceeded.
    """
    if not features:
        raise ValueError("input_batches cannot be empty.")
    check_counts(local_device_count, global_device_count, num_sc_per_device)
    _check_batches(features, batches, local_device_count, num_sc_per_device)
    if enable_minibatching and local_device_count < global_device_count and all_reduce_interface is None:
        raise ValueError(
            f"enable_minibatching with {local_device_count} of {global_device_count} devices on this host: "
            "all_reduce_interface must be given, such as get_all_reduce_interface returns it."
        )
    packer = _packer_for(
        features,
        global_device_count,
        num_sc_per_device,
        any_id,
        all_reduce_interface if enable_minibatching else None,
        limits="drop" if allow_id_dropping else "raise",
        num_local_devices=local_device_count,
        enable_minibatching=enable_minibatching,
    )
    packed = packer(list(ids), None if weights is None else list(weights), batch_number=batch_number)
    stats = packed.stats
    assert stats is not None
    for stack in packed.layout.stacks:
        stats.id_drop_counters.setdefault(stack.name, 0)
    number = packed.num_minibatches
    if number is None:
        number = np.ones(local_device_count, np.int32)
    if has_leading_dimension:
        number = number.reshape(local_device_count, 1)
    pointers, embedding_ids, sample_ids, gains = _by_stack(packed, has_leading_dimension)
    return Packed(pointers, embedding_ids, sample_ids, gains, number, stats)


def eval_shape(
    features: Sequence[FeatureSpec],
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int,
    has_leading_dimension: bool,
    enable_minibatching: bool,
) -> Packed:
    """The shapes of a packed batch; those of its arrays are flat, with a leading dimension or without.

    Raises:
        ValueError: a count or a spec is not what it should be.
    """
    check_counts(local_device_count, global_device_count, num_sc_per_device)
    sizes = buffer_sizes(features, global_device_count, num_sc_per_device, enable_minibatching)
    pointers = compute_row_pointers_size_per_device(global_device_count, num_sc_per_device, enable_minibatching)

    def shapes(dtype: Any, by_stack: Mapping[str, int]) -> dict[str, Any]:
        return {name: jax.ShapeDtypeStruct((local_device_count * size,), dtype) for name, size in by_stack.items()}

    number = (local_device_count, 1) if has_leading_dimension else (local_device_count,)
    return Packed(
        shapes(np.int32, dict.fromkeys(sizes, pointers)),
        shapes(np.int32, sizes),
        shapes(np.int32, sizes),
        shapes(np.float32, sizes),
        jax.ShapeDtypeStruct(number, np.int32),
        None,
    )


def buffer_sizes(features: Sequence[FeatureSpec], devices: int, sparsecores: int, minibatching: bool) -> dict[str, int]:
    """Entries of each stack on a device."""
    placed = features_to_pack(features, devices, sparsecores, any_id=True)
    return compute_coo_buffer_size_per_device(placed, enable_minibatching=minibatching)
