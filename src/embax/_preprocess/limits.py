"""How many ids and entries the packed buffers hold: as the specs say, or as the batches need.

Limits, and what a batch needs, are int64[stacks, 3]: for each stack the ids of a partition, its distinct ids, and the
entries of a device.
"""

import logging
import os
import threading
from typing import Any, NamedTuple, Protocol

import numpy as np

from embax import _native
from embax._preprocess.buffers import PARTITION_ALIGNMENT, suggested_capacity
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax._stacking.plan import Plan, StackPlan

_logger = logging.getLogger("embax")

_FIELDS = ("max_ids_per_partition", "max_unique_ids_per_partition", "suggested_coo_buffer_size_per_device")
"""The fields of a spec that the columns come from."""

_growth_lock = threading.Lock()
"""Held while limits grow, of whichever packer; replaced in a forked child, where its holder may not exist."""


def _renew_growth_lock() -> None:
    global _growth_lock
    _growth_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_growth_lock)


class LimitExceededError(ValueError):
    """A batch is beyond a limit of the specs.

    Attributes:
        stats: what packing counted of the batch; `embax.update_preprocessing_parameters` takes it.
    """

    def __init__(self, message: str, stats: SparseDenseMatmulInputStats):
        super().__init__(message)
        self.stats = stats

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of a pool send their exceptions on.
        return type(self), (str(self), self.stats)


class Counts(NamedTuple):
    """What packing counts of a batch as it is now: before minibatches are formed, or of these.

    The first three are the arrays of `SparseDenseMatmulInputStats`, a row a stack.
    """

    max_ids: np.ndarray
    max_unique_ids: np.ndarray
    required: np.ndarray
    needs: np.ndarray
    """int64[stacks, 3]: the limits that hold it. SparseCores share a buffer equally, or with minibatches as they need."""

    @classmethod
    def of(cls, batch: _native.SortedBatch, num_stacks: int, minibatched: bool) -> "Counts":
        """The counts of a sorted batch."""
        shape = (num_stacks, -1)
        return cls(
            batch.max_ids.reshape(shape),
            batch.max_unique_ids.reshape(shape),
            batch.required.reshape(shape),
            batch.needs(minibatched).reshape(shape),
        )

    def as_stats(self, names: list[str]) -> SparseDenseMatmulInputStats:
        """The counts by the names of the stacks."""
        return SparseDenseMatmulInputStats.of_counts(names, self)


def spec_limits(plan: Plan, minibatched: bool) -> np.ndarray:
    """int64[stacks, 3]: what the specs say."""
    rows = [
        (
            stack.spec.max_ids_per_partition,
            stack.spec.max_unique_ids_per_partition,
            suggested_capacity(stack, plan.num_sparsecores_per_device, plan.num_sparsecores, minibatched),
        )
        for stack in plan.stacks
    ]
    return np.array(rows, np.int64)


class Limits(Protocol):
    """What a packer asks of its limits."""

    @property
    def current(self) -> np.ndarray:
        """int64[stacks, 3]."""
        ...

    def problem(self, counts: Counts) -> LimitExceededError | None:
        """What to raise of a batch with these counts, if it cannot be packed."""
        ...

    def fit(self, counts: Counts) -> np.ndarray:
        """The limits to pack a batch with that has no problem."""
        ...

    def note(self, needs: np.ndarray) -> None:
        """Remembers what batches needed that `fit` was not asked about, since they were within the limits."""
        ...


class FixedLimits:
    """The limits of the specs. A batch beyond one is an error."""

    def __init__(self, plan: Plan, minibatched: bool):
        self._plan = plan
        self._minibatched = minibatched
        self.current = spec_limits(plan, minibatched)

    def problem(self, counts: Counts) -> LimitExceededError | None:
        """The first limit that the batch is beyond."""
        needs = counts.needs
        beyond = needs > self.current
        if not beyond.any():
            return None
        stack, column = map(int, np.argwhere(beyond)[0])
        return self._error(counts, stack, column, int(needs[stack, column]))

    def fit(self, counts: Counts) -> np.ndarray:
        """The limits, whatever is packed."""
        del counts
        return self.current

    def note(self, needs: np.ndarray) -> None:
        """Nothing: what batches need changes no limit."""
        del needs

    def _error(self, counts: Counts, number: int, column: int, need: int) -> LimitExceededError:
        plan, stack = self._plan, self._plan.stacks[number]
        field, limit = _FIELDS[column], int(self.current[number, column])
        if column < 2:
            device, sparsecore = divmod(int(counts[column][number].argmax()), plan.num_sparsecores)
            problem = (
                f"a SparseCore of local device {device} has {need} {('ids', 'distinct ids')[column]} for the rows of "
                f"SparseCore {sparsecore}{' in one minibatch' if self._minibatched else ''}, above {field}={limit}"
            )
        elif self._minibatched:
            of_devices = counts.required[number].reshape(-1, plan.num_sparsecores_per_device).sum(axis=1)
            problem = (
                f"local device {int(of_devices.argmax())} needs {need} entries of the packed buffer, above the {limit} that "
                f"it gets from {field}={stack.spec.suggested_coo_buffer_size_per_device}"
            )
        else:
            sparsecores = plan.num_sparsecores_per_device
            device, sparsecore = divmod(int(counts.required[number].argmax()), sparsecores)
            problem = (
                f"SparseCore {sparsecore} of local device {device} needs {need // sparsecores} entries of the packed "
                f"buffer, above the {limit // sparsecores} that it gets from "
                f"{field}={stack.spec.suggested_coo_buffer_size_per_device}"
            )
        stats = counts.as_stats([stack.name for stack in plan.stacks])
        return LimitExceededError(f"Stack {stack.name!r}: {problem}. {_remedy(stack, column, need)}", stats)


def _remedy(stack: StackPlan, column: int, value: int) -> str:
    field = _FIELDS[column]
    if len(stack.tables) == 1:
        place = f"set {field} to at least {value} in the spec of {stack.tables[0].name!r} before it is placed"
    elif column == 2:
        place = "raise the max_ids_per_partition of the stack, from which its buffer follows"
    else:
        place = f"pass stack_to_{field}= to the stacking function, for at least {value}"
    return (
        "Call embax.update_preprocessing_parameters(specs, error.stats) with the stats of this exception, which makes room "
        f'for this batch, or {place}, or let the limits grow with limits="grow".'
    )


class DroppingLimits(FixedLimits):
    """The limits of the specs; what is beyond them is to be dropped."""

    def problem(self, counts: Counts) -> None:
        """None: there is no such batch."""
        del counts


class GrowingLimits:
    """Limits that follow the batches: each change makes compiled code compile again, so they grow rarely and together.

    A stack that outgrows a limit gets a quarter more than it needs, of all three. Every other stack that has come within an
    eighth of a limit then grows too, since it would be the next. Each growth is thus by at least a quarter of some limit:
    the number of growths is logarithmic in the largest batch. Limits never shrink.

    Buffers begin at what the specs suggest, if they do, else at the first batch, as the limits of partitions do. With
    minibatches these begin at those of the specs, and grow only for a bucket of ids that cannot be divided.
    """

    def __init__(self, plan: Plan, minibatched: bool):
        self._plan = plan
        self._of_specs = spec_limits(plan, minibatched)
        limits = self._of_specs.copy()
        if not minibatched:
            limits[:, :2] = 0
        limits[[stack.spec.suggested_coo_buffer_size_per_device is None for stack in plan.stacks], 2] = 0
        self.current = limits
        self._needs = np.zeros_like(limits)
        # Partitions, and the equal shares of SparseCores, hold multiples of 8 entries.
        share = PARTITION_ALIGNMENT * plan.num_sparsecores_per_device
        self._units = np.array([PARTITION_ALIGNMENT, PARTITION_ALIGNMENT, share])
        self._told = False

    def problem(self, counts: Counts) -> None:
        """None: there is no such batch."""
        del counts

    def fit(self, counts: Counts) -> np.ndarray:
        """The limits to pack a batch with: enough for it and for all before it."""
        with _growth_lock:
            before = self.current
            self._needs = np.maximum(self._needs, counts.needs)
            if (self._needs > before).any():
                near = (self._needs + self._needs // 8 > before).any(axis=1, keepdims=True)
                self.current = np.where(near, np.maximum(before, self._with_headroom()), before)
            current = self.current
            tell = not self._told and bool((current > self._of_specs).any())
            self._told = self._told or tell
        if tell:
            self._notice(current)
        return current

    def note(self, needs: np.ndarray) -> None:
        """Remembers the needs, for the next time that limits grow."""
        with _growth_lock:
            self._needs = np.maximum(self._needs, needs)

    def _with_headroom(self) -> np.ndarray:
        # Counts of few ids vary more, relative to their size, than counts of many: hence the constant.
        wanted = self._needs + self._needs // 4 + 4 * self._units
        return -(-wanted // self._units) * self._units

    def _notice(self, current: np.ndarray) -> None:
        number = int(np.argmax((current > self._of_specs).any(axis=1)))
        _logger.warning(
            "A batch is beyond the limits of the specs, first of all those of stack %r, and these limits grow: from %s to %s "
            "(ids a partition, distinct ids, entries a device). Steps compile again as limits grow, a logarithmic number of "
            "times; this is said once.",
            self._plan.stacks[number].name,
            self._of_specs[number].tolist(),
            current[number].tolist(),
        )
