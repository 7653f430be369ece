"""What packing counts on the host."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PackStats:
    """Counts of one packed batch, a mapping by stack name each.

    Args:
        max_ids_per_partition: int32[L * N]: for each of `L` local devices and `N` SparseCores the largest number of
            entries that one SparseCore of the device sends there, after merging duplicates.
        max_unique_ids_per_partition: likewise of distinct ids.
        required_buffer_size_per_sc: int32[L * S]: entries that each local SparseCore needs, partitions rounded up to 8.
    """

    max_ids_per_partition: dict[str, np.ndarray]
    max_unique_ids_per_partition: dict[str, np.ndarray]
    required_buffer_size_per_sc: dict[str, np.ndarray]
