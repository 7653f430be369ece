"""How large the packed buffers are: as the specs say, or as the batches need."""

import logging
import threading

import numpy as np

from embax._checks import next_multiple
from embax._preprocess.buffers import PARTITION_ALIGNMENT, suggested_capacity
from embax._preprocess.stats import PackStats
from embax._stacking.plan import Plan, StackPlan

_logger = logging.getLogger("embax")


class FixedCapacities:
    """Buffers as the limits of the specs ask for; a batch beyond a limit is an error."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._capacities = tuple(
            suggested_capacity(stack, plan.num_sparsecores_per_device, plan.num_sparsecores) for stack in plan.stacks
        )

    def fit(self, stats: PackStats) -> tuple[int, ...]:
        """Entries of each stack on a device.

        Raises:
            ValueError: the batch is beyond a limit.
        """
        for stack, capacity in zip(self._plan.stacks, self._capacities, strict=True):
            spec, name = stack.spec, stack.name
            for field, what, counts, limit in (
                ("max_ids_per_partition", "ids", stats.max_ids_per_partition[name], spec.max_ids_per_partition),
                (
                    "max_unique_ids_per_partition",
                    "distinct ids",
                    stats.max_unique_ids_per_partition[name],
                    spec.max_unique_ids_per_partition,
                ),
            ):
                if (counts > limit).any():
                    device, sparsecore = divmod(int(counts.argmax()), self._plan.num_sparsecores)
                    raise ValueError(
                        f"Stack {name!r}: a SparseCore of local device {device} has {counts.max()} {what} for the rows of "
                        f"SparseCore {sparsecore}, above {field}={limit}. {_remedy(stack, field, int(counts.max()))}"
                    )
            required = stats.required_buffer_size_per_sc[name]
            sparsecores = self._plan.num_sparsecores_per_device
            if (required > capacity // sparsecores).any():
                device, sparsecore = divmod(int(required.argmax()), sparsecores)
                field, need = "suggested_coo_buffer_size_per_device", int(required.max()) * sparsecores
                raise ValueError(
                    f"Stack {name!r}: SparseCore {sparsecore} of local device {device} needs {required.max()} entries of the "
                    f"packed buffer, above the {capacity // sparsecores} that it gets from {field}="
                    f"{spec.suggested_coo_buffer_size_per_device}. {_remedy(stack, field, need)}"
                )
        return self._capacities


def _remedy(stack: StackPlan, field: str, value: int) -> str:
    tables = ", ".join(repr(table.name) for table in stack.tables)
    return (
        f'Set {field} to at least {value} in the spec of {tables} before it is placed, or let buffers grow with limits="grow".'
    )


class GrowingCapacities:
    """Buffers that follow the batches: each change makes compiled code compile again, so they grow rarely and together.

    A stack that outgrows its buffer gets a quarter more than it needs. Every other stack that has come within an eighth of
    its own then grows too, since it would be the next to ask. Each growth is thus by at least a quarter of some stack: the
    number of growths is logarithmic in the largest batch. They never shrink.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._lock = threading.Lock()
        sparsecores = plan.num_sparsecores_per_device
        # All per SparseCore. The largest needs so far decide which stacks grow along.
        self._needs = [0] * len(plan.stacks)
        self._shares = [
            0
            if stack.spec.suggested_coo_buffer_size_per_device is None
            else suggested_capacity(stack, sparsecores, plan.num_sparsecores) // sparsecores
            for stack in plan.stacks
        ]

    def fit(self, stats: PackStats) -> tuple[int, ...]:
        """Entries of each stack on a device, enough for this batch and for all before it."""
        required = [int(stats.required_buffer_size_per_sc[stack.name].max()) for stack in self._plan.stacks]
        with self._lock:
            self._needs = [max(pair) for pair in zip(self._needs, required, strict=True)]
            if any(need > share for need, share in zip(self._needs, self._shares, strict=True)):
                before = self._shares
                self._shares = [
                    max(share, _with_headroom(need)) if need + need // 8 > share else share
                    for need, share in zip(self._needs, self._shares, strict=True)
                ]
                _logger.info("Packed buffers grow from %s to %s entries a SparseCore.", before, self._shares)
            shares = self._shares
        return tuple(share * self._plan.num_sparsecores_per_device for share in shares)


def _with_headroom(need: int) -> int:
    # Counts of few ids vary more, relative to their size, than counts of many: hence the constant.
    return next_multiple(need + need // 4 + 4 * PARTITION_ALIGNMENT, PARTITION_ALIGNMENT)


def stats_of(plan: Plan, max_ids: np.ndarray, max_unique_ids: np.ndarray, required: np.ndarray) -> PackStats:
    """The statistics of a batch from arrays that hold the stacks one after another."""
    counts = []
    for array in (max_ids, max_unique_ids, required):
        rows = array.reshape(len(plan.stacks), -1)
        counts.append({stack.name: row for stack, row in zip(plan.stacks, rows, strict=True)})
    return PackStats(*counts)
