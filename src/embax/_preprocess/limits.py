"""How large the packed buffers are: as the specs say, or as the batches need."""

import logging
import os
import threading
from typing import NamedTuple

import numpy as np

from embax._checks import next_multiple
from embax._preprocess.buffers import PARTITION_ALIGNMENT, suggested_capacity
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax._stacking.plan import Plan, StackPlan

_logger = logging.getLogger("embax")

_growth_lock = threading.Lock()
"""Held while buffers grow, of whichever packer; replaced in a forked child, where its holder may not exist."""


def _renew_growth_lock() -> None:
    global _growth_lock
    _growth_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_growth_lock)


class Counts(NamedTuple):
    """What packing counts, of all stacks: the arrays of `SparseDenseMatmulInputStats`, a row a stack."""

    max_ids: np.ndarray
    max_unique_ids: np.ndarray
    required: np.ndarray

    def as_stats(self, names: list[str]) -> SparseDenseMatmulInputStats:
        """The counts by the names of the stacks."""
        return SparseDenseMatmulInputStats(*(dict(zip(names, array, strict=True)) for array in self))


class FixedCapacities:
    """Buffers as the limits of the specs ask for; a batch beyond a limit is an error."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._capacities = tuple(
            suggested_capacity(stack, plan.num_sparsecores_per_device, plan.num_sparsecores) for stack in plan.stacks
        )

    def fit(self, counts: Counts) -> tuple[int, ...]:
        """Entries of each stack on a device.

        Raises:
            ValueError: the batch is beyond a limit.
        """
        plan = self._plan
        maxima = zip(*(array.max(axis=1).tolist() for array in counts), strict=True)
        for number, (ids, unique_ids, required) in enumerate(maxima):
            stack, capacity = plan.stacks[number], self._capacities[number]
            spec, where = stack.spec, f"Stack {stack.name!r}: "
            for field, what, array, most in (
                ("max_ids_per_partition", "ids", counts.max_ids, ids),
                ("max_unique_ids_per_partition", "distinct ids", counts.max_unique_ids, unique_ids),
            ):
                limit = getattr(spec, field)
                if most > limit:
                    device, sparsecore = divmod(int(array[number].argmax()), plan.num_sparsecores)
                    raise ValueError(
                        f"{where}a SparseCore of local device {device} has {most} {what} for the rows of SparseCore "
                        f"{sparsecore}, above {field}={limit}. {_remedy(stack, field, most)}"
                    )
            sparsecores = plan.num_sparsecores_per_device
            if required > capacity // sparsecores:
                device, sparsecore = divmod(int(counts.required[number].argmax()), sparsecores)
                field = "suggested_coo_buffer_size_per_device"
                raise ValueError(
                    f"{where}SparseCore {sparsecore} of local device {device} needs {required} entries of the packed "
                    f"buffer, above the {capacity // sparsecores} that it gets from {field}={getattr(spec, field)}. "
                    f"{_remedy(stack, field, required * sparsecores)}"
                )
        return self._capacities


def _remedy(stack: StackPlan, field: str, value: int) -> str:
    grow = 'let buffers grow with limits="grow".'
    if len(stack.tables) == 1:
        return f"Set {field} to at least {value} in the spec of {stack.tables[0].name!r} before it is placed, or {grow}"
    if field == "suggested_coo_buffer_size_per_device":
        return f"Raise the max_ids_per_partition of the stack, from which its buffer follows, or {grow}"
    return f"Pass stack_to_{field}= to the stacking function, for at least {value}, or {grow}"


class GrowingCapacities:
    """Buffers that follow the batches: each change makes compiled code compile again, so they grow rarely and together.

    A stack that outgrows its buffer gets a quarter more than it needs. Every other stack that has come within an
    eighth of its own then grows too, since it would be the next to ask. Each growth is thus by at least a quarter of
    some stack: the number of growths is logarithmic in the largest batch. They never shrink.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        sparsecores = plan.num_sparsecores_per_device
        # All per SparseCore. The largest needs so far decide which stacks grow along.
        self._needs = [0] * len(plan.stacks)
        self._shares = [
            0
            if stack.spec.suggested_coo_buffer_size_per_device is None
            else suggested_capacity(stack, sparsecores, plan.num_sparsecores) // sparsecores
            for stack in plan.stacks
        ]

    def fit(self, counts: Counts) -> tuple[int, ...]:
        """Entries of each stack on a device, enough for this batch and for all before it."""
        required = counts.required.max(axis=1).tolist()
        with _growth_lock:
            before = self._shares
            self._needs = [max(pair) for pair in zip(self._needs, required, strict=True)]
            if any(need > share for need, share in zip(self._needs, before, strict=True)):
                self._shares = [
                    max(share, _with_headroom(need)) if need + need // 8 > share else share
                    for need, share in zip(self._needs, before, strict=True)
                ]
            shares = self._shares
        if shares is not before:
            _logger.info("Packed buffers grow from %s to %s entries a SparseCore.", before, shares)
        return tuple([share * self._plan.num_sparsecores_per_device for share in shares])


def _with_headroom(need: int) -> int:
    # Counts of few ids vary more, relative to their size, than counts of many: hence the constant.
    return next_multiple(need + need // 4 + 4 * PARTITION_ALIGNMENT, PARTITION_ALIGNMENT)
