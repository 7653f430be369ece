"""The form on disk, version 1.

A checkpoint is a directory of Orbax checkpoints and `embax.json`:

    embax.json                  what is stored, and the checksums
    <table>.table/              Orbax checkpoint {"value": float32[vocabulary_size, embedding_dim]}, by row, unpadded
    <table>.slot.<slot>/        the same for each slot; float32[vocabulary_size] of one that has one value a row
    extra/                      Orbax checkpoint {"0": ..., "1": ...}: the leaves of what was saved beside the tables

Each array has a checksum of its values as they were in memory, each file one of its bytes, `embax.json` one of its
content. All are CRC-32, which finds every single flipped bit and every burst of up to 32 bits.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from embax.checkpoint._directory import previous_path, sync
from embax.checkpoint._errors import DAMAGED, CheckpointError

METADATA_FILE = "embax.json"
EXTRA_DIRECTORY = "extra"
FORMAT = "embax checkpoint"
VERSION = 1
_BLOCK_BYTES = 1 << 20


class Stored(NamedTuple):
    """A checkpoint whose metadata have been read and found intact."""

    path: Path
    content: dict[str, Any]


def array_directory(table: str, label: str) -> str:
    """The directory of an array: the table's name, made fit for a file name, and `table` or `slot.<slot>`."""
    name = quote(table, safe="")
    if len(name) > 160:  # a file name has at most 255 bytes, and Orbax appends to it while it writes
        name = f"{name[:140]}-{zlib.crc32(table.encode()):08x}"
    return f"{name}.{label}"


def array_checksum(array: np.ndarray) -> str:
    """CRC-32 of the values in C order."""
    return f"crc32:{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def _file_record(path: Path) -> dict[str, Any]:
    size = checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "checksum": f"crc32:{checksum:08x}"}


def _checksum_of(document: dict[str, Any]) -> str:
    return f"crc32:{zlib.crc32(json.dumps(document, sort_keys=True).encode()):08x}"


def write_metadata(directory: Path, content: dict[str, Any]) -> None:
    """Writes `embax.json` with `content`, to which the checksums of all files in `directory` are added."""
    files = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            sync(path)
            files[path.relative_to(directory).as_posix()] = _file_record(path)
    document = {"format": FORMAT, "version": VERSION, "content": {**content, "files": files}}
    text = json.dumps({**document, "checksum": _checksum_of(document)}, indent=1, sort_keys=True)
    metadata = directory / METADATA_FILE
    metadata.write_text(text + "\n", encoding="utf-8")
    sync(metadata)


def read_metadata(path: Path) -> Stored:
    """Reads and checks `embax.json`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: it is no embax checkpoint, damaged, or of a newer format.
    """
    if not path.exists():
        aside = previous_path(path)
        hint = f" A checkpoint that was about to be replaced lies at {aside}: rename it." if aside.exists() else ""
        raise FileNotFoundError(f"There is no checkpoint at {path}.{hint}")
    try:
        raw = (path / METADATA_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} is no complete embax checkpoint: {METADATA_FILE} cannot be read ({error.strerror}). {DAMAGED}"
        ) from error
    try:
        document = json.loads(raw)
        checksum = document.pop("checksum")
        intact = checksum == _checksum_of(document) and document["format"] == FORMAT
        version, content = int(document["version"]), document["content"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"Checkpoint {path}: {METADATA_FILE} is damaged ({error}). {DAMAGED}") from error
    if not intact:
        raise CheckpointError(f"Checkpoint {path}: {METADATA_FILE} has not its own checksum; it is damaged. {DAMAGED}")
    if version > VERSION:
        raise CheckpointError(
            f"Checkpoint {path} is of format version {version}; this embax reads versions up to {VERSION}. Update "
            "embax."
        )
    return Stored(path, content)


def check_files(stored: Stored) -> None:
    """Checks every byte of the checkpoint, so that Orbax is never handed a damaged file.

    Raises:
        CheckpointError: a file is missing or is not as it was saved.
    """
    for name, expected in stored.content["files"].items():
        try:
            found = _file_record(stored.path / name)
        except OSError as error:
            raise CheckpointError(
                f"Checkpoint {stored.path}: file {name} cannot be read ({error.strerror}). {DAMAGED}"
            ) from error
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(
                f"Checkpoint {stored.path}: file {name} has {found['bytes']} bytes, and was saved with "
                f"{expected['bytes']}. {DAMAGED}"
            )
        if found != expected:
            raise CheckpointError(
                f"Checkpoint {stored.path}: file {name} has checksum {found['checksum']}, and was saved with "
                f"{expected['checksum']}. {DAMAGED}"
            )


def check_array(stored: Stored, what: str, array: np.ndarray, shape: Any, dtype: str, checksum: str) -> None:
    """Checks an array that Orbax returned.

    Raises:
        CheckpointError: it is not as it was saved.
    """
    if array.shape != tuple(shape) or str(array.dtype) != dtype or array_checksum(array) != checksum:
        raise CheckpointError(
            f"Checkpoint {stored.path}: {what} is not as it was saved ({dtype}{list(shape)}, checksum {checksum}); "
            f"Orbax read {array.dtype}{list(array.shape)}, checksum {array_checksum(array)}. {DAMAGED}"
        )
