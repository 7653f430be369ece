"""Statistics in files of text."""

import jax

from embax.compat.sparsecore.lib.fdo import fdo_client
from embax.compat.sparsecore.lib.nn.embedding import SparseDenseMatmulInputStats
from embax.fdo import CSVFileFDOClient as _Files


class CSVFileFDOClient(_Files, fdo_client.FDOClient):
    """See `embax.fdo.CSVFileFDOClient`.

    Args:
        base_dir: the directory of the files.
        retain_history: whether a row is kept for each recorded batch, rather than the largest counts.
    """

    def __init__(self, base_dir: str, retain_history: bool = True):
        super().__init__(base_dir, retain_history)

    def record(self, data: SparseDenseMatmulInputStats) -> None:
        """Adds the statistics of a batch: a row of each stack, or the larger counts."""
        super().record(data)

    def load(self) -> SparseDenseMatmulInputStats:
        """The counts in the latest file of every process; of several the largest."""
        return SparseDenseMatmulInputStats.of(super().load())

    def _generate_file_name(self) -> str:
        self._process_index = jax.process_index()
        return super()._generate_file_name()
