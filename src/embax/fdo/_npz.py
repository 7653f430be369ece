"""Statistics in NumPy's archives."""

import io
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from embax.fdo._files import FileFDOClient


def _read_array(archive: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    try:
        return archive[key]
    except ValueError:  # NumPy's text on Python objects advises to unpickle them, which runs what the file says.
        raise ValueError(f"{key!r} is no whole array of numbers") from None


class NPZFileFDOClient(FileFDOClient):
    """Keeps statistics in files `fdo_stats_<process>_<nanoseconds>.npz` of a directory that all processes see.

    A file holds an int64 array a stack and kind of statistics, named by the stack and the suffix `_max_ids`,
    `_max_unique_ids`, `_required_buffer_size` or `_id_drop_counters`, with a row for each recorded batch.

    Args:
        base_dir: the directory; publishing makes it.
        process_index: number of this process in the names of its files; None means JAX's, or 0 unless `jax.distributed` is
            initialized.

    Raises:
        ValueError: `process_index` is not an integer of at least 0.

    Example:
        >>> client = embax.fdo.NPZFileFDOClient("run/fdo")  # doctest: +SKIP
        >>> client.record(packed.stats)  # doctest: +SKIP
        >>> client.publish()  # doctest: +SKIP
        >>> embax.update_preprocessing_parameters(features, client.load())  # doctest: +SKIP
    """

    _extension = "npz"

    def __init__(self, base_dir: str | os.PathLike[str], *, process_index: int | None = None):
        super().__init__(base_dir, process_index=process_index)

    def _encode(self, stats: Mapping[str, np.ndarray]) -> bytes:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = dict(stats)  # The suffixes keep their names apart from parameters of savez.
        np.savez(buffer, **arrays)
        return buffer.getvalue()

    def _decode(self, content: bytes) -> dict[str, np.ndarray]:
        file = io.BytesIO(content)
        if not zipfile.is_zipfile(file):  # NumPy would take it for a pickle, and advise to load that.
            raise ValueError("it is no zip archive")
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {key: _read_array(archive, key) for key in archive.files}
