"""The format of the Criteo click logs: per line a label, 13 integers and 26 hexadecimal values, separated by tabs.

A field other than the label may be empty. The file is plain text or gzip; its first bytes tell, not its name.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from .dataset import Dataset, Feature, Table, standardise
from .hashing import hash_rows

INTEGERS, CATEGORIES = 13, 26
COLUMNS = ["label", *(f"I{i + 1}" for i in range(INTEGERS)), *(f"C{i + 1}" for i in range(CATEGORIES))]
SPLITS = ("first 80%", "next 10%", "last 10%")
CHUNK_LINES = 65_536
REMEDY = "Give --data a file in the format of the Criteo click logs, plain or gzip."
MISSING = 1 << 32  # outside of the 8 hexadecimal digits, so that a missing category is a category of its own

_LABEL, _INTEGER, _CATEGORY = rb"[01]", rb"(?:-?[0-9]{1,18})?", rb"(?:[0-9a-fA-F]{8})?"
_FIELDS = [_LABEL, *[_INTEGER] * INTEGERS, *[_CATEGORY] * CATEGORIES]
_LINE = re.compile(rb"\t".join(_FIELDS))
_EXPECTED = {
    _LABEL: "0 or 1",
    _INTEGER: "an integer of at most 18 digits, or nothing",
    _CATEGORY: "8 hexadecimal digits, or nothing",
}


def load(path: Path, rows_per_column: int) -> Dataset:
    """The dataset of a file: categories hashed into a table per column, the last tenth of the lines as test set.

    Args:
      path: the file. It is read in chunks; 160 bytes a line are kept.
      rows_per_column: number of rows of each of the 26 tables.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is malformed, the file ends early, or it is too small to learn from; the message says where.
    """
    chunks = [_parse(lines, rows_per_column) for lines in _chunks(path)]
    if not chunks:
        raise ValueError(f"{path} holds no lines; expected lines of {len(COLUMNS)} tab-separated fields. {REMEDY}")
    labels, integers, ids = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    size = len(labels)
    train, validation, test = (slice(size * a // 10, size * b // 10) for a, b in ((0, 8), (8, 9), (9, 10)))
    for name, part in zip(SPLITS, (train, validation, test), strict=True):
        if len(np.unique(labels[part])) < 2:
            raise ValueError(
                f"{path}: the {name} of its {size:,} lines (lines {part.start + 1} to {part.stop}) do not have both "
                "labels; expected at least one 0 and one 1 there, to train and to compute an AUC. Give a longer file."
            )
    columns = dict(zip(COLUMNS[-CATEGORIES:], ids.T, strict=True))
    return Dataset(
        title=f"{path.name}: {size:,} lines in Criteo format",
        positive="clicked",
        features={name: Feature(name, column) for name, column in columns.items()},
        tables={name: Table(rows_per_column) for name in columns},
        dense=standardise(integers, train),
        labels=labels,
        train=train,
        validation=validation,
        test=test,
        split_names=SPLITS,
        showcase=max(columns, key=lambda name: np.count_nonzero(np.bincount(columns[name]))),  # the most values,
    )


def _chunks(path: Path) -> Iterator[list[bytes]]:
    """Checked lines without their ends, in lists of at most CHUNK_LINES."""
    if not path.is_file():
        raise FileNotFoundError(f"the data file {path} does not exist or is no file. {REMEDY}")
    chunk, number = [], 0
    with path.open("rb") as plain:
        is_gzip = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        try:
            for number, raw in enumerate(gzip.GzipFile(fileobj=plain) if is_gzip else plain, 1):
                line = raw.rstrip(b"\r\n")
                if not _LINE.fullmatch(line):
                    _explain(path, number, line)
                chunk.append(line)
                if len(chunk) == CHUNK_LINES:
                    yield chunk
                    chunk = []
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}: the gzip stream is damaged or cut off after line {number} ({error}); expected a complete "
                "one. Download or compress the file again (gzip --test checks it)."
            ) from error
    if chunk:
        yield chunk


def _explain(path: Path, number: int, line: bytes) -> NoReturn:
    """Raises the error for a malformed line."""
    remedy = "Correct or remove the line."
    fields = line.split(b"\t")
    if len(fields) != len(COLUMNS):
        raise ValueError(
            f"{path}, line {number}: {len(fields)} tab-separated fields; expected {len(COLUMNS)} "
            f"(a label, {INTEGERS} integers, {CATEGORIES} categories). {remedy}"
        )
    for place, (name, pattern, field) in enumerate(zip(COLUMNS, _FIELDS, fields, strict=True), 1):
        if not re.fullmatch(pattern, field):
            value = field[:40].decode("utf-8", "backslashreplace")
            raise ValueError(
                f"{path}, line {number}, field {place} (column {name}): {value!r}; "
                f"expected {_EXPECTED[pattern]}. {remedy}"
            )
    raise AssertionError("a line whose fields all match must match")


def _parse(lines: list[bytes], rows_per_column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels float32[n], log-scaled integers float32[n, 13] (NaN where missing), ids int32[n, 26]."""
    fields = np.array([line.split(b"\t") for line in lines])
    integers = fields[:, 1 : 1 + INTEGERS]
    values = np.where(integers == b"", b"nan", integers).astype(np.float32)
    categories = fields[:, 1 + INTEGERS :].astype("S8")
    missing = categories == b""
    digits = np.where(missing, b"00000000", categories).view(np.uint8).reshape(*categories.shape, 8).astype(np.uint64)
    nibbles = (digits & 15) + 9 * (digits >> 6)  # "0" is 0x30, "A" 0x41 and "a" 0x61
    hexadecimal = (nibbles << np.arange(28, -4, -4, dtype=np.uint64)).sum(axis=-1)
    hexadecimal[missing] = MISSING
    ids = [hash_rows([column], rows_per_column, salt) for salt, column in enumerate(hexadecimal.T)]
    return fields[:, 0].astype(np.float32), np.sign(values) * np.log1p(np.abs(values)), np.stack(ids, axis=1)
