"""Statistics in text files, to be read by people and by other programs."""

import contextlib
import csv
import io
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping

import numpy as np

from embax.fdo._files import FileFDOClient

_HEADER = ["key", "values"]

_field_size_lock = threading.Lock()


@contextlib.contextmanager
def _fields_of_any_size() -> Iterator[None]:
    """Lifts the limit on a field, of 131,072 characters in all of the process, which the counts of 4,000 SparseCores exceed."""
    with _field_size_lock:
        before = csv.field_size_limit(sys.maxsize)
        try:
            yield
        finally:
            csv.field_size_limit(before)


class CSVFileFDOClient(FileFDOClient):
    """Keeps statistics in files `fdo_stats_<process>_<nanoseconds>.csv` of a directory that all processes see.

    Below the header `key,values` a file has a line for each stack, kind of statistics and recorded batch: the name of the
    stack with the suffix `_max_ids`, `_max_unique_ids`, `_required_buffer_size` or `_id_drop_counters`, and the counts,
    separated by blanks. That a file was cut short at the end of a line cannot be told; publishing never leaves such a file.

    Args:
        base_dir: the directory; publishing makes it.
        retain_history: False keeps the largest counts so far in place of a row for each batch.
        process_index: number of this process in the names of its files; None means JAX's, or 0 unless `jax.distributed` is
            initialized.

    Raises:
        ValueError: `process_index` is not an integer of at least 0.

    Example:
        >>> client = embax.fdo.CSVFileFDOClient("run/fdo", retain_history=False)  # doctest: +SKIP
        >>> client.record(packed.stats)  # doctest: +SKIP
        >>> client.publish()  # doctest: +SKIP
        >>> embax.update_preprocessing_parameters(features, client.load())  # doctest: +SKIP
    """

    _extension = "csv"

    def __init__(
        self, base_dir: str | os.PathLike[str], retain_history: bool = True, *, process_index: int | None = None
    ):
        super().__init__(base_dir, retain_history, process_index=process_index)

    def _encode(self, stats: Mapping[str, np.ndarray]) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(_HEADER)
        for key, array in stats.items():
            writer.writerows((key, " ".join(map(str, row))) for row in np.atleast_2d(array).tolist())
        return text.getvalue().encode()

    def _decode(self, content: bytes) -> dict[str, np.ndarray]:
        text = content.decode()
        if not text.endswith("\n"):
            raise ValueError("the last line has no end")
        with _fields_of_any_size():
            header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        if header != _HEADER:
            raise ValueError(f"the header is {header}, not {_HEADER}")
        rows: dict[str, list[list[int]]] = {}
        for line in lines:
            if len(line) != 2 or not re.fullmatch(r"\d+( \d+)*", line[1], re.ASCII):
                raise ValueError(f"the line {','.join(line)[:100]!r} is not a key and counts separated by blanks")
            rows.setdefault(line[0], []).append([int(value) for value in line[1].split(" ")])
        for key, values in rows.items():
            if len(set(map(len, values))) > 1:
                raise ValueError(f"the lines of {key!r} differ in the number of counts")
        return {key: np.array(values[0] if len(values) == 1 else values, np.int64) for key, values in rows.items()}
