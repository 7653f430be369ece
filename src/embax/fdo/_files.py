"""Statistics in files of one directory, one file a process and publication, whatever the format."""

import abc
import dataclasses
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from embax._preprocess.arrays import to_numpy
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax.fdo._client import FDOClient

_SUFFIXES = {
    field.name: field.metadata["suffix"]
    for field in dataclasses.fields(SparseDenseMatmulInputStats)
    if "suffix" in field.metadata
}
"""By field that is stored; none ends with another, so that a key tells stack and field."""


def _counts(what: str, value: Any) -> np.ndarray:
    """`value` as int64 of rank 1 or 2, or a ValueError."""
    allowed = "must be integers of at least 0 and below 2**63, in an array of rank 1 or 2."
    array = np.atleast_1d(to_numpy(what, value, "counts", f"They {allowed}"))
    good = array.ndim <= 2 and array.size > 0 and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())
    if not good or (array % 1 != 0).any() or array.min() < 0 or array.max() >= 2**63:
        raise ValueError(f"{what} is {value!r}; it {allowed}")
    return array.astype(np.int64)


def _rows(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """All rows of some arrays; of one array the array itself."""
    arrays = list(arrays)
    return arrays[0] if len(arrays) == 1 else np.vstack(arrays)


def _maximum(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Of each column the largest count in any row of any array."""
    return np.vstack(list(arrays)).max(axis=0)


class FileFDOClient(FDOClient):
    """Keeps statistics in files `fdo_stats_<process>_<nanoseconds>.<extension>`; a subclass says how one is written."""

    _extension: str

    def __init__(
        self, base_dir: str | os.PathLike[str], retain_history: bool = True, *, process_index: int | None = None
    ):
        if process_index is not None and (
            isinstance(process_index, bool) or not isinstance(process_index, int) or process_index < 0
        ):
            raise ValueError(
                f"{type(self).__name__}: process_index is {process_index!r}; it must be an integer of at least 0, or None."
            )
        self._base_dir = Path(base_dir)
        self._retain_history = retain_history
        self._process_index = process_index
        self._lock = threading.Lock()  # Threads that pack may record.
        self._recorded: dict[str, list[np.ndarray]] = {}
        self._last_time = 0

    @abc.abstractmethod
    def _encode(self, stats: Mapping[str, np.ndarray]) -> bytes:
        """The content of a file."""

    @abc.abstractmethod
    def _decode(self, content: bytes) -> dict[str, Any]:
        """What `_encode` was given, or any exception for content that it did not make."""

    def record(self, stats: SparseDenseMatmulInputStats) -> None:
        """Adds the statistics of a batch: a row of each stack, or with `retain_history=False` the larger counts.

        Args:
            stats: such as the `stats` of a packed batch.

        Raises:
            ValueError: it is no statistics, a count is negative or not an integer, or a stack has another number of counts
                than before. Nothing is recorded then.
        """
        if not isinstance(stats, SparseDenseMatmulInputStats):
            raise ValueError(
                f"{type(self).__name__}.record was given a {type(stats).__name__}; it takes SparseDenseMatmulInputStats, the "
                "stats of a batch that embax.preprocess has just packed."
            )
        new = {}
        for field, suffix in _SUFFIXES.items():
            by_stack = getattr(stats, field)
            if not isinstance(by_stack, Mapping):
                raise ValueError(
                    f"{field} of the stats is a {type(by_stack).__name__}; it must map names of stacks to counts."
                )
            for stack, value in by_stack.items():
                if not isinstance(stack, str) or not stack or "\0" in stack:
                    raise ValueError(
                        f"{field} has a stack named {stack!r}; a name must be a string, not empty, without NUL."
                    )
                new[stack + suffix] = _counts(f"{field} of stack {stack!r}", value)
        with self._lock:
            for key, array in new.items():
                known = self._recorded.get(key)
                if known and known[0].shape[-1] != array.shape[-1]:
                    raise ValueError(
                        f"{key}: {array.shape[-1]} counts are recorded after {known[0].shape[-1]} in earlier batches. Their "
                        "number follows from the devices and SparseCores: use a new client and directory for other ones."
                    )
            for key, array in new.items():
                rows = [*self._recorded.get(key, ()), array]
                self._recorded[key] = rows if self._retain_history else [_maximum(rows)]

    def publish(self) -> None:
        """Writes what was recorded and loaded so far to a new file, which replaces the earlier ones of this process.

        The file appears whole or not at all.

        Raises:
            ValueError: nothing was recorded.
        """
        with self._lock:
            if not self._recorded:
                raise ValueError(
                    f"{type(self).__name__} has nothing to publish in {str(self._base_dir)!r}: record the stats of a packed "
                    "batch first."
                )
            self._write_to_file({key: _rows(arrays) for key, arrays in self._recorded.items()})

    def _write_to_file(self, stats: Mapping[str, np.ndarray]) -> None:
        """Writes a new file, whole or not at all."""
        content = self._encode(stats)
        path = Path(self._generate_file_name())
        self._base_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> SparseDenseMatmulInputStats:
        """Reads the latest file of every process; what was recorded here and not published is forgotten.

        On several processes, wait before loading until all have published, else they continue with different limits:
        `jax.experimental.multihost_utils.sync_global_devices("published")`.

        Returns:
            The counts, int64: of one file as they are stored, a row a batch; of several the largest, one a column.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: a file was not written by such a client, or not to its end; or files differ in the number of counts.
        """
        merged = self._read_from_file(str(self._base_dir / f"fdo_stats*.{self._extension}"))
        fields: dict[str, dict[str, Any]] = {field: {} for field in _SUFFIXES}
        for key, array in merged.items():
            field, suffix = next((field, suffix) for field, suffix in _SUFFIXES.items() if key.endswith(suffix))
            fields[field][key.removesuffix(suffix)] = array
        with self._lock:
            self._recorded = {key: [array] for key, array in merged.items()}
        return SparseDenseMatmulInputStats(**fields)

    def _generate_file_name(self) -> str:
        """Where to publish; each file of a client is later than the one before, however coarse the clock."""
        self._last_time = max(time.time_ns(), self._last_time + 1)
        process = self._process_index
        if process is None:
            # Asking starts JAX's backends, so ask only where there can be several processes.
            process = jax.process_index() if jax.distributed.is_initialized() else 0
        return str(self._base_dir / f"fdo_stats_{process}_{self._last_time}.{self._extension}")

    def _get_latest_files_by_process(self, files: Iterable[str]) -> list[str]:
        """Of each process the path with the latest time; paths that are not named as files of this client are left out."""
        latest: dict[int, tuple[int, str]] = {}
        for path in files:
            match = re.fullmatch(rf"fdo_stats_(\d+)_(\d+)\.{self._extension}", os.path.basename(path), re.ASCII)
            if match:
                process, nanoseconds = map(int, match.groups())
                latest[process] = max(latest.get(process, (-1, "")), (nanoseconds, str(path)))
        return [path for _, (_, path) in sorted(latest.items())]

    def _read_from_file(self, pattern: str) -> dict[str, np.ndarray]:
        """The counts of the latest files by key; `pattern` names them in the error when there are none."""
        directory = Path(pattern).parent
        names = os.listdir(directory) if directory.is_dir() else []
        paths = self._get_latest_files_by_process(str(directory / name) for name in names)
        if not paths:
            raise FileNotFoundError(f"There are no files {pattern!r}: record and publish statistics there first.")
        by_key: dict[str, dict[str, np.ndarray]] = {}
        for path in paths:
            for key, array in self._read(path).items():
                by_key.setdefault(key, {})[path] = array
        for key, arrays in by_key.items():
            widths = {path: array.shape[-1] for path, array in arrays.items()}
            if len(set(widths.values())) > 1:
                raise ValueError(
                    f"{key}: the files differ in the number of counts: {widths}. They are of runs on different devices or "
                    "SparseCores: remove those of the earlier run, or give each run a directory."
                )
        merge = _rows if len(paths) == 1 else _maximum
        return {key: merge(arrays.values()) for key, arrays in by_key.items()}

    def _read(self, path: str) -> dict[str, np.ndarray]:
        content = Path(path).read_bytes()
        try:
            stats = self._decode(content)
            if not stats:
                raise ValueError("it holds no statistics")
        except Exception as error:  # Whatever its bytes make the parser raise.
            raise ValueError(
                f"{path!r} is not a complete file of {type(self).__name__} ({type(error).__name__}: {error}); remove it, and "
                "publish again."
            ) from error
        for key in stats:
            if not key.endswith(tuple(_SUFFIXES.values())):
                raise ValueError(
                    f"{path!r} holds the key {key!r}; a key must be the name of a stack and one of the suffixes "
                    f"{list(_SUFFIXES.values())}. Remove the file, or name its keys so."
                )
        return {key: _counts(f"{path!r}: {key}", value) for key, value in stats.items()}
