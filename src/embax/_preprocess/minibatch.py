"""How hosts agree on the minibatches of a batch."""

import numpy as np

from embax import _native
from embax._preprocess.all_reduce import AllReduceInterface
from embax._preprocess.limits import Counts

_FAILED = 1 << 63
"""Bit of the first reduction that says that a host could not pack its part of the batch."""


class Agreement:
    """Decides for one batch, together with the other hosts if there are any.

    Two reductions: whether any host is beyond a limit, then where buckets of ids are parted.

    Args:
        all_reduce: None if there is one host.
        batch_number: the same on all hosts, and another for each batch.
    """

    def __init__(self, all_reduce: AllReduceInterface | None, batch_number: int):
        self._all_reduce = all_reduce
        self._batch_number = batch_number

    def _reduce(self, which: int, value: int) -> int:
        if self._all_reduce is None:
            return value
        return self._all_reduce.bitwise_or(2 * self._batch_number + which, value)

    def fail(self) -> None:
        """Tells the other hosts, which would wait, that this one could not pack its part."""
        self._reduce(0, _FAILED)

    def form_minibatches(self, batch: _native.SortedBatch, counts: Counts, limits: np.ndarray, threads: int) -> int:
        """Puts the entries of `batch` into minibatches if the batch of any host needs that; returns their number.

        Args:
            batch: sorted.
            counts: its counts.
            limits: int64[stacks, 3], of which partitions must keep the first two.
            threads: threads to work with.

        Raises:
            RuntimeError: another host could not pack its part.
        """
        exceeded = bool(
            (counts.max_ids.max(axis=1) > limits[:, 0]).any()
            or (counts.max_unique_ids.max(axis=1) > limits[:, 1]).any()
        )
        answer = self._reduce(0, int(exceeded))
        if answer & _FAILED:
            raise RuntimeError(
                f"Batch {self._batch_number} was packed here, but another host could not pack its part of it: see the error "
                "there. Skip the batch on all hosts, or mend the input."
            )
        if not answer:
            return 1
        boundaries = self._reduce(1, _native.minibatch_boundaries(batch, limits, threads))
        return _native.form_minibatches(batch, boundaries, threads)
