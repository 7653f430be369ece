"""A directory that appears at its place complete, or not at all."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.embax-{kind}")


def previous_path(path: Path) -> Path:
    """Where the directory that was at `path` lies for a moment, on file systems that cannot exchange directories."""
    return _hidden(path, "previous")


def sync(path: Path) -> None:
    """Waits until a file or directory is on the disk: a rename must not overtake what it publishes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two directories in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _publish(partial: Path, path: Path) -> None:
    """Moves `partial` to `path`; what was there, if anything, is then gone."""
    replaced = None
    if not path.exists():
        os.rename(partial, path)
    elif _exchange(partial, path):
        replaced = partial
    else:
        replaced = previous_path(path)
        os.rename(path, replaced)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(replaced, path)
            raise
    sync(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)  # if it stays, the next save removes it


def _remove_leftovers(path: Path) -> None:
    """Removes what killed saves to `path` left behind, but not what a running one, which holds a lock, works on."""
    for leftover in path.parent.glob(glob.escape(_hidden(path, "partial-").name) + "*"):
        with contextlib.suppress(OSError), _locked(leftover):
            shutil.rmtree(leftover)
    previous = previous_path(path)
    if previous.exists():
        if path.exists():
            shutil.rmtree(previous)
        else:
            os.rename(previous, path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new, empty directory beside `path` that takes its place when the block ends, and vanishes if it raises.

    Args:
        path: absolute, without symbolic links. A directory there stays as it is until it is replaced in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = _hidden(path, f"partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        with _locked(partial):
            yield partial
            for directory, _, _ in os.walk(partial):
                sync(Path(directory))
            _publish(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
