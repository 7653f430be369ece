"""How hosts agree on the minibatches of a batch."""

import numpy as np

from embax import _native
from embax._preprocess.all_reduce import AllReduceInterface
from embax._preprocess.limits import Counts, Limits

_EXCEEDED, _TOO_SMALL, _FAILED = 1, 2, 4
"""What a host says of its part of a batch: it is beyond the limits of partitions, so that minibatches are needed; without
minibatches it is beyond a limit that they do not help with; it could not be packed."""


class Agreement:
    """Decides for one batch, together with the other hosts if there are any.

    Up to three reductions: what the hosts say of their parts; with minibatches, where buckets of ids are parted; and whether
    all parts are within the limits then.

    Args:
        all_reduce: None if there is one host.
        batch_number: the same on all hosts, and another for each batch; None takes the next of `all_reduce`.
    """

    def __init__(self, all_reduce: AllReduceInterface | None, batch_number: int | None):
        self._all_reduce = all_reduce
        if batch_number is None:
            batch_number = all_reduce.next_batch_number() if all_reduce is not None else 0
        self._batch_number = batch_number

    def _reduce(self, which: int, value: int) -> int:
        if self._all_reduce is None:
            return value
        return self._all_reduce.bitwise_or(4 * self._batch_number + which, value)

    def fail(self) -> None:
        """Tells the other hosts, which would wait, that this one could not pack its part."""
        self._reduce(0, _FAILED)

    def _other_host(self) -> RuntimeError:
        return RuntimeError(
            f"Batch {self._batch_number} could be packed here, but not on another host: see the error there. Skip the batch on "
            "all hosts, or mend the input or the limits."
        )

    def settle(
        self, batch: _native.SortedBatch, counts: Counts, limits: Limits, threads: int
    ) -> tuple[int, np.ndarray]:
        """Puts the entries of `batch` into minibatches if the batch of any host needs that.

        Args:
            batch: sorted.
            counts: its counts.
            limits: those of the packer.
            threads: threads to work with.

        Returns:
            The number of minibatches, and the limits to pack with: int64[stacks, 3].

        Raises:
            LimitExceededError: this host's part is beyond a limit.
            RuntimeError: another host's part is, or could not be packed.
        """
        current = limits.current
        problem = limits.problem(counts)
        exceeded = bool(
            (counts.max_ids.max(axis=1) > current[:, 0]).any()
            or (counts.max_unique_ids.max(axis=1) > current[:, 1]).any()
        )
        answer = self._reduce(0, (_EXCEEDED if exceeded else 0) | (_TOO_SMALL if problem else 0))
        if answer & _FAILED:
            raise self._other_host()
        if not answer & _EXCEEDED:
            if answer & _TOO_SMALL:
                raise problem or self._other_host()
            return 1, limits.fit(counts)
        boundaries = self._reduce(1, _native.minibatch_boundaries(batch, current, threads))
        number = _native.form_minibatches(batch, boundaries, threads)
        counts = Counts.of(batch, len(current), minibatched=True)
        problem = limits.problem(counts)
        if self._reduce(2, _FAILED if problem else 0):
            raise problem or self._other_host()
        return number, limits.fit(counts)
