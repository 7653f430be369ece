"""What keeps the statistics of packed batches for later runs."""

import abc

from embax.compat.sparsecore.lib.nn.embedding import SparseDenseMatmulInputStats


class FDOClient(abc.ABC):
    """Records statistics, publishes them, and loads what all processes have published."""

    @abc.abstractmethod
    def record(self, data: SparseDenseMatmulInputStats) -> None:
        """Adds the statistics of a batch to what will be published."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Publishes what was recorded so far."""

    @abc.abstractmethod
    def load(self) -> SparseDenseMatmulInputStats:
        """What all processes have published last."""
