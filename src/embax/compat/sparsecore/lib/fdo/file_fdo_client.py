"""Statistics in NumPy's archives."""

import jax

from embax.compat.sparsecore.lib.fdo import fdo_client
from embax.compat.sparsecore.lib.nn.embedding import SparseDenseMatmulInputStats
from embax.fdo import NPZFileFDOClient as _Files


class NPZFileFDOClient(_Files, fdo_client.FDOClient):
    """See `embax.fdo.NPZFileFDOClient`.

    Args:
        base_dir: the directory of the files.
    """

    def __init__(self, base_dir: str):
        super().__init__(base_dir)

    def record(self, data: SparseDenseMatmulInputStats) -> None:
        """Adds the statistics of a batch, a row of each stack."""
        super().record(data)

    def load(self) -> SparseDenseMatmulInputStats:
        """The counts in the latest file of every process; of several the largest."""
        return SparseDenseMatmulInputStats.of(super().load())

    def _generate_file_name(self) -> str:
        self._process_index = jax.process_index()
        return super()._generate_file_name()
