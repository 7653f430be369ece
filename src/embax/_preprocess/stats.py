"""What packing counts on the host."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SparseDenseMatmulInputStats:
    """Counts of one packed batch, all of them mappings.

    The first three describe the batch as given: before an id was dropped for a limit, or put into a minibatch.

    Args:
        max_ids_per_partition: by stack, int32[L * N]: for each of `L` local devices and `N` SparseCores the largest
            number of entries that one SparseCore of the device sends there, after merging duplicates.
        max_unique_ids_per_partition: likewise of distinct ids.
        required_buffer_size_per_sc: by stack, int32[L * S]: entries that each local SparseCore needs, partitions
            rounded up to 8.
        id_drop_counters: by stack, the ids that a limit dropped, duplicates included; empty unless `limits="drop"`.
        dropped_ids: the same by table.
        invalid_ids: by feature, the ids that were left out since they or their weights are not valid; empty unless
            `validation="drop"`.
    """

    max_ids_per_partition: dict[str, np.ndarray]
    max_unique_ids_per_partition: dict[str, np.ndarray]
    required_buffer_size_per_sc: dict[str, np.ndarray]
    id_drop_counters: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped_ids: dict[str, int] = dataclasses.field(default_factory=dict)
    invalid_ids: dict[str, int] = dataclasses.field(default_factory=dict)
