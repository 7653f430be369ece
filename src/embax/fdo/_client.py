"""What every store of statistics offers."""

import abc

from embax._preprocess.stats import SparseDenseMatmulInputStats


class FDOClient(abc.ABC):
    """Records the statistics of packed batches, shares them, and loads what all processes have shared."""

    @abc.abstractmethod
    def record(self, stats: SparseDenseMatmulInputStats) -> None:
        """Adds the statistics of a batch to what this process knows."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Makes what this process knows known to all."""

    @abc.abstractmethod
    def load(self) -> SparseDenseMatmulInputStats:
        """What all processes have published, for `embax.update_preprocessing_parameters`; this process then knows it too."""
