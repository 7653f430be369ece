"""Packing of one table for one device, whole buffers with all their padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from embax._checks import next_multiple
from embax._preprocess.buffers import PADDING_VALUE, PARTITION_ALIGNMENT, row_pointers_per_segment, theoretical_capacity
from embax.compat import _packing
from embax.compat.sparsecore.lib.nn.embedding_spec import (
    FeatureIdTransformation,
    FeatureSpec,
    SGDOptimizerSpec,
    StackedTableSpec,
    TableSpec,
)
from embax.compat.sparsecore.utils import utils

_TABLE = "table"


def _spec(batch: int, max_ids: int, max_unique_ids: int) -> FeatureSpec:
    """The one feature of a table that may have any id."""
    optimizer = SGDOptimizerSpec()
    stack = StackedTableSpec(_TABLE, 8, 8, optimizer, "sum", batch, max_ids, max_unique_ids)
    table = TableSpec(
        name=_TABLE,
        vocabulary_size=1,
        embedding_dim=8,
        initializer=np.zeros,  # pyright: ignore[reportArgumentType]
        optimizer=optimizer,
        combiner="sum",
        _stacked_table_spec=stack,
    )
    return FeatureSpec(
        name=_TABLE,
        table_spec=table,
        input_shape=(batch, 1),
        output_shape=(batch, 8),
        _id_transformation=FeatureIdTransformation(),
    )


def _rows(name: str, batch: Any) -> Any:
    """A batch as packing takes it: a 2-d array, or a list of 1-d ones."""
    rank = np.ndim(batch) if not isinstance(batch, (list, tuple)) else None
    if rank not in (None, 1, 2) or (rank == 1 and np.asarray(batch).dtype != object):
        raise ValueError(f"{name} must be a 2-d array, or a list of 1-d arrays, but got an array of rank {rank}.")
    if rank == 2 and np.asarray(batch).dtype != object:
        return batch
    # Also of rank 2: so NumPy makes an object array of rows that have one length.
    return [np.array(list(row)) for row in batch]


def preprocess_sparse_dense_matmul_input(
    features: Any,
    features_weights: Any,
    mesh: Any,
    *,
    max_ids_per_partition: int,
    max_unique_ids_per_partition: int,
    num_sc_per_device: int = -1,
    sharding_strategy: str = "MOD",
    enable_minibatching: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Packs the ids that one device looks up in one table.

    Args:
        features: integer[batch, valency], or a list of 1-d arrays; with minibatching a list of these, one a minibatch.
        features_weights: likewise.
        mesh: its number of devices is that of the table's.
        max_ids_per_partition: ids that one SparseCore may send to another.
        max_unique_ids_per_partition: distinct ids.
        num_sc_per_device: SparseCores of a device; -1 means those of the first device.
        sharding_strategy: "MOD".
        enable_minibatching: whether there are minibatches.

    Returns:
        Row pointers, embedding ids, sample ids and gains.

    Raises:
        ValueError: a rank, a length or a limit is not what it should be, or a limit is exceeded.
    """
    if sharding_strategy != "MOD":
        raise ValueError(f"The sharding strategy is {sharding_strategy!r}; only MOD is supported.")
    for name, limit in (
        ("max_ids_per_partition", max_ids_per_partition),
        ("max_unique_ids_per_partition", max_unique_ids_per_partition),
    ):
        if limit < 1:
            raise ValueError(f"{name} must be positive, got {limit}.")
    if len(features) != len(features_weights):
        raise ValueError(
            f"There are {len(features)} features and {len(features_weights)} weights; they must be as many."
        )
    sparsecores = utils.num_sparsecores_per_device() if num_sc_per_device == -1 else num_sc_per_device
    devices = len(mesh.devices)
    batches: Sequence[Any] = features if enable_minibatching else [features]
    weights: Sequence[Any] = features_weights if enable_minibatching else [features_weights]
    packed = []
    for ids, weight in zip(batches, weights, strict=True):
        rows = _rows("features", ids)
        packed.append(
            _packing.pack(
                [_spec(len(rows), max_ids_per_partition, max_unique_ids_per_partition)],
                [len(rows)],
                [rows],
                [_rows("features_weights", weight)],
                1,
                devices,
                num_sc_per_device=sparsecores,
                any_id=True,
            )
        )
    capacity = theoretical_capacity(max_ids_per_partition, sparsecores, devices * sparsecores)
    return _whole_buffers(packed, sparsecores, devices * sparsecores, capacity, minibatched=enable_minibatching)


def _whole_buffers(
    minibatches: Sequence[_packing.Packed], sparsecores: int, num_sparsecores: int, capacity: int, *, minibatched: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Joins minibatches, each packed alone, and fills what packing leaves as it is.

    SparseCores have equal shares, in which row pointers count; with minibatches all segments follow one another, SparseCore
    by SparseCore, and row pointers count from the start.
    """
    share, size = capacity // sparsecores, row_pointers_per_segment(num_sparsecores)
    entries = capacity * len(minibatches)
    ids, samples = (np.full(entries, PADDING_VALUE, np.int32) for _ in range(2))
    gains = np.full(entries, np.nan, np.float32)
    pointers = np.zeros((sparsecores, len(minibatches), size), np.int32)
    start = 0
    for sparsecore in range(sparsecores):
        start = start if minibatched else sparsecore * share
        for number, packed in enumerate(minibatches):
            ends = packed.row_pointers[_TABLE].reshape(sparsecores, size)[sparsecore]
            length = next_multiple(int(ends[num_sparsecores - 1]), PARTITION_ALIGNMENT)
            pointers[sparsecore, number] = ends + start if minibatched else ends
            arrays = (packed.embedding_ids, packed.sample_ids, packed.gains)
            for buffer, array in zip((ids, samples, gains), arrays, strict=True):
                buffer[start : start + length] = array[_TABLE][sparsecore * share : sparsecore * share + length]
            start += length
    return pointers.reshape(-1), ids, samples, gains
