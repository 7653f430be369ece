"""The released reference, jax-tpu-embedding, beside embax: equal specs on both sides, and packed buffers compared.

It runs on a CPU as long as the number of SparseCores is passed to it. A limit that is exceeded aborts its process, so
give it limits that hold. The environment of `make test-reference` has it.
"""

from typing import Any

import jax
import numpy as np
from jax_tpu_embedding.sparsecore.lib.nn import embedding, embedding_spec  # pyright: ignore[reportMissingImports]

import embax
from embax._preprocess.buffers import PARTITION_ALIGNMENT, row_pointers_per_segment


def peer_specs(specs: Any) -> Any:
    """The reference's specs for the features and tables of `specs`, not placed, all with SGD: packing uses no optimizer."""
    tables = {}
    for name, table in embax.get_table_specs(specs).items():
        tables[name] = embedding_spec.TableSpec(
            name=name,
            vocabulary_size=table.vocabulary_size,
            embedding_dim=table.embedding_dim,
            initializer=table.initializer,
            optimizer=embedding_spec.SGDOptimizerSpec(learning_rate=table.optimizer.learning_rate),
            combiner=table.combiner,
            max_ids_per_partition=table.max_ids_per_partition,
            max_unique_ids_per_partition=table.max_unique_ids_per_partition,
            suggested_coo_buffer_size_per_device=table.suggested_coo_buffer_size_per_device,
        )

    def feature(ours: embax.FeatureSpec) -> Any:
        return embedding_spec.FeatureSpec(
            name=ours.name,
            table_spec=tables[ours.table_spec.name],
            input_shape=tuple(ours.input_shape),
            output_shape=tuple(ours.output_shape),
        )

    return jax.tree.map(feature, specs, is_leaf=lambda leaf: isinstance(leaf, embax.FeatureSpec))


def peer_pack(
    specs: Any, ids: Any, weights: Any, local_devices: int, devices: int, sparsecores: int, **options: Any
) -> tuple[Any, Any]:
    """The reference's packed batch and its statistics. It takes ragged ids as object arrays, weights for all features or none."""
    return embedding.preprocess_sparse_dense_matmul_input(
        ids, weights, specs, local_devices, devices, num_sc_per_device=sparsecores, **options
    )


_FIELDS = {
    "row_pointers": "lhs_row_pointers",
    "embedding_ids": "lhs_embedding_ids",
    "sample_ids": "lhs_sample_ids",
    "gains": "lhs_gains",
}
"""The arrays of a packed batch, and what the reference calls them."""


def from_peer(theirs: Any, ours: embax.PreprocessedInput) -> embax.PreprocessedInput:
    """The reference's packed batch in arrays like those of `ours`: those of all stacks in one, device by device.

    Raises:
        AssertionError: there are other stacks, or arrays have another shape or dtype than embax gives them.
    """
    layout = ours.layout
    num_devices, names = layout.num_local_devices, [stack.name for stack in layout.stacks]
    per_stack = layout.row_pointers_per_device // len(layout.stacks)
    arrays = {}
    for field, their_field in _FIELDS.items():
        mine, other = getattr(ours, field), getattr(theirs, their_field)
        assert set(other) == set(names), (set(other), set(names))
        parts = []
        for stack in layout.stacks:
            size = per_stack if field == "row_pointers" else stack.capacity
            shape = (num_devices, size) if mine.ndim == 2 else (num_devices * size,)
            assert other[stack.name].shape == shape, f"{field} of {stack.name}: {other[stack.name].shape}, not {shape}"
            parts.append(np.asarray(other[stack.name]).reshape(num_devices, size))
        arrays[field] = np.concatenate(parts, axis=1).reshape(mine.shape)
        assert arrays[field].dtype == mine.dtype, (field, arrays[field].dtype)
    if ours.num_minibatches is not None:
        arrays["num_minibatches"] = np.asarray(theirs.num_minibatches)
        assert arrays["num_minibatches"].shape == ours.num_minibatches.shape, arrays["num_minibatches"].shape
    return ours.replace(**arrays, stats=None)


def written_places(packed: embax.PreprocessedInput) -> tuple[np.ndarray, np.ndarray]:
    """bool, a row a device: which row pointers, and which entries, packing writes, those that fill up partitions included."""
    layout = packed.layout
    num_devices, sparsecores = layout.num_local_devices, layout.num_sparsecores_per_device
    pointers = np.asarray(packed.row_pointers).reshape(num_devices, -1)
    per_segment = row_pointers_per_segment(layout.num_sparsecores)
    segments = sparsecores * (1 if packed.num_minibatches is None else int(np.ravel(packed.num_minibatches)[0]))
    of_pointers = np.zeros(pointers.shape, bool)
    of_entries = np.zeros((num_devices, layout.entries_per_device), bool)
    for stack in layout.stacks:
        start, stop = stack.row_pointers_start, stack.row_pointers_start + segments * per_segment
        of_pointers[:, start:stop] = True
        last = pointers[:, start:stop].reshape(num_devices, segments, per_segment)[:, :, layout.num_sparsecores - 1]
        ends = -(-last // PARTITION_ALIGNMENT) * PARTITION_ALIGNMENT
        # SparseCores have equal shares, or with minibatches follow one another.
        shares = 1 if layout.minibatched else sparsecores
        written = np.arange(stack.capacity // shares) < ends[:, -shares:, None]
        of_entries[:, stack.entries_start : stack.entries_start + stack.capacity] = written.reshape(num_devices, -1)
    return of_pointers, of_entries


def check_equal_packing(ours: embax.PreprocessedInput, theirs: Any) -> None:
    """Raises an AssertionError unless both sides packed a batch alike, bit for bit up to the last row pointers.

    What lies behind these is not written by either side.

    Args:
        ours: a batch packed by embax.
        theirs: the same batch packed by the reference. The sides divide ids into several minibatches by hashes of their own.
    """
    other = from_peer(theirs, ours)
    if ours.num_minibatches is not None:
        assert (np.ravel(ours.num_minibatches) == 1).all(), ours.num_minibatches
        np.testing.assert_array_equal(ours.num_minibatches, other.num_minibatches)
    of_pointers, of_entries = written_places(ours)
    for field in _FIELDS:
        written = of_pointers if field == "row_pointers" else of_entries
        a, b = (np.asarray(getattr(side, field)).reshape(written.shape)[written] for side in (ours, other))
        if field == "gains":  # As bits, so that -0 differs from 0.
            a, b = a.view(np.int32), b.view(np.int32)
        np.testing.assert_array_equal(a, b, field, strict=True)
