"""What packing counts on the host."""

import dataclasses
from typing import Any, Protocol

import numpy as np


class BatchCounts(Protocol):
    """Counts of a packed batch, flat or a row a stack."""

    @property
    def max_ids(self) -> np.ndarray:
        """int32[stacks * L * N]: for each stack, local device and SparseCore the most entries that it is sent by one."""
        ...

    @property
    def max_unique_ids(self) -> np.ndarray:
        """int32, likewise: the most distinct ids."""
        ...

    @property
    def required(self) -> np.ndarray:
        """int32[stacks * L * S]: the entries that each local SparseCore needs."""
        ...


_COUNTED = {
    "max_ids_per_partition": "max_ids",
    "max_unique_ids_per_partition": "max_unique_ids",
    "required_buffer_size_per_sc": "required",
}
"""The fields of statistics that are counted, and their names in `BatchCounts`."""


@dataclasses.dataclass(frozen=True, eq=False)
class SparseDenseMatmulInputStats:
    """Counts of one packed batch, all of them mappings.

    The first three describe the batch as given: before an id was dropped for a limit, or put into a minibatch. They are
    what `embax.update_preprocessing_parameters` takes limits from. The metadata of the first four fields holds the
    "suffix" that the clients of `embax.fdo` store them under.

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

    max_ids_per_partition: dict[str, np.ndarray] = dataclasses.field(
        default_factory=dict, metadata={"suffix": "_max_ids"}
    )
    max_unique_ids_per_partition: dict[str, np.ndarray] = dataclasses.field(
        default_factory=dict, metadata={"suffix": "_max_unique_ids"}
    )
    required_buffer_size_per_sc: dict[str, np.ndarray] = dataclasses.field(
        default_factory=dict, metadata={"suffix": "_required_buffer_size"}
    )
    id_drop_counters: dict[str, int] = dataclasses.field(default_factory=dict, metadata={"suffix": "_id_drop_counters"})
    dropped_ids: dict[str, int] = dataclasses.field(default_factory=dict)
    invalid_ids: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_counts(cls, stacks: list[str], counts: "BatchCounts") -> "SparseDenseMatmulInputStats":
        """From the counts of the first three fields, whose mappings are made when first asked for.

        Args:
            stacks: the names of the stacks.
            counts: of the batch.
        """
        stats = cls.__new__(cls)
        stats.__dict__.update(_stacks=stacks, _counts=counts, id_drop_counters={}, dropped_ids={}, invalid_ids={})
        return stats

    def __getattr__(self, name: str) -> Any:
        if name not in _COUNTED or "_counts" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        stacks = self.__dict__["_stacks"]
        rows = getattr(self.__dict__["_counts"], _COUNTED[name]).reshape(len(stacks), -1)
        return self.__dict__.setdefault(name, dict(zip(stacks, rows, strict=True)))

    def __getstate__(self) -> dict[str, Any]:
        # What counts come from does not go to other processes.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_cc(cls, stats: Any) -> "SparseDenseMatmulInputStats":
        """From an object with the names of the reference's native statistics.

        Args:
            stats: has the mappings `max_ids_per_partition`, `max_unique_ids_per_partition`, `required_buffer_sizes` and
                `dropped_id_count`, which are taken as they are.
        """
        return cls(
            max_ids_per_partition=stats.max_ids_per_partition,
            max_unique_ids_per_partition=stats.max_unique_ids_per_partition,
            required_buffer_size_per_sc=stats.required_buffer_sizes,
            id_drop_counters=stats.dropped_id_count,
        )

    def get_required_buffer_size_per_device(self, stack: str, num_sc_per_device: int | None = None) -> int | None:
        """Entries of a stack that fit the batch on every device: the SparseCores' largest need, times their number.

        Args:
            stack: name of the stack.
            num_sc_per_device: SparseCores of a device; None means the number of values, which is right for one device.

        Returns:
            The entries, or None for a stack without values.
        """
        values = self.required_buffer_size_per_sc.get(stack)
        if values is None:
            return None
        return round(np.max(values).item() * (num_sc_per_device or np.size(values)))

    def set_required_buffer_size_per_device(self, stack: str, size: int, num_sc_per_device: int | None = None) -> None:
        """Sets the entries of a stack that a device needs, equally for each of its SparseCores.

        Args:
            stack: name of the stack.
            size: entries of the stack on a device.
            num_sc_per_device: SparseCores of a device; None means the number of values that the stack has.

        Raises:
            ValueError: the stack has no values and `num_sc_per_device` is not given.
        """
        known = self.required_buffer_size_per_sc.get(stack)
        number = num_sc_per_device or (0 if known is None else np.size(known))
        if not number:
            raise ValueError("num_sc_per_device must be provided if the table is not present.")
        # A size that does not divide stays exact, so that getting it returns what was set.
        share = size / number if size % number else size // number
        self.required_buffer_size_per_sc[stack] = np.full(number, share)
