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


def stack_arrays(packed: embax.PreprocessedInput, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row pointers, ids, sample ids and gains of one stack, as the reference has them: flat, one part a device."""
    layout = packed.layout
    stack = next(stack for stack in layout.stacks if stack.name == name)
    pointers = layout.num_sparsecores_per_device * row_pointers_per_segment(layout.num_sparsecores)

    def part(array: Any, start: int, size: int) -> np.ndarray:
        return np.asarray(array).reshape(layout.num_local_devices, -1)[:, start : start + size].reshape(-1)

    return (
        part(packed.row_pointers, stack.row_pointers_start, pointers),
        part(packed.embedding_ids, stack.entries_start, stack.capacity),
        part(packed.sample_ids, stack.entries_start, stack.capacity),
        part(packed.gains, stack.entries_start, stack.capacity),
    )


def written_entries(row_pointers: np.ndarray, capacity: int, num_sparsecores: int) -> np.ndarray:
    """bool, a row a local SparseCore: which of its entries packing writes, those that fill up partitions included.

    Args:
        row_pointers: of all local SparseCores.
        capacity: entries of each.
        num_sparsecores: of all devices.
    """
    last = row_pointers.reshape(-1, row_pointers_per_segment(num_sparsecores))[:, num_sparsecores - 1]
    ends = -(-last // PARTITION_ALIGNMENT) * PARTITION_ALIGNMENT
    return np.arange(capacity) < ends[:, None]


def check_equal_packing(ours: embax.PreprocessedInput, theirs: Any, *, max_ulp: dict[str, int] | None = None) -> None:
    """Raises an AssertionError unless both sides packed a batch alike, bit for bit up to the last row pointers.

    What lies behind these is not written by either side.

    Args:
        ours: a batch packed by embax.
        theirs: the same batch packed by the reference, without minibatches.
        max_ulp: by stack, units in the last place by which the gains may differ; none for stacks that are not named.
    """
    layout = ours.layout
    names = {stack.name for stack in layout.stacks}
    assert names == set(theirs.lhs_row_pointers), (names, set(theirs.lhs_row_pointers))
    for name in names:
        pointers, ids, samples, gains = stack_arrays(ours, name)
        their_gains = np.asarray(theirs.lhs_gains[name])
        np.testing.assert_array_equal(pointers, theirs.lhs_row_pointers[name], f"row pointers of {name}", strict=True)
        assert gains.dtype == their_gains.dtype == np.float32
        assert gains.shape == their_gains.shape, f"entries of {name}: {gains.shape}, {their_gains.shape}"
        parts = layout.num_local_devices * layout.num_sparsecores_per_device
        written = written_entries(pointers, ids.size // parts, layout.num_sparsecores).reshape(-1)
        for what, mine, other in (
            ("ids", ids, theirs.lhs_embedding_ids[name]),
            ("sample ids", samples, theirs.lhs_sample_ids[name]),
        ):
            np.testing.assert_array_equal(mine[written], other[written], f"{what} of {name}", strict=True)
        mine, other = gains[written], their_gains[written]
        ulp = (max_ulp or {}).get(name, 0)
        if ulp:
            padding = ids[written] == np.iinfo(np.int32).max
            np.testing.assert_array_equal(np.isnan(other), padding, f"NaN gains of {name}")
            np.testing.assert_array_max_ulp(mine[~padding], other[~padding], maxulp=ulp)
        # As bits, so that -0 differs from 0.
        else:
            np.testing.assert_array_equal(mine.view(np.int32), other.view(np.int32), f"gains of {name}")
