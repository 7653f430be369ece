"""Arrays in and out of Orbax: one Orbax checkpoint a directory, which holds a dict of NumPy arrays."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from embax.checkpoint._errors import CheckpointError

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise ImportError("embax.checkpoint needs Orbax: pip install embax[checkpoint]") from error

CHUNK_BYTES = 16 << 20
"""Orbax writes and reads arrays in pieces of this size; between 4 and 64 MiB the speed is the same."""


class _Borrowed(np.ndarray):
    """An array that Orbax may read without copying it first, since nothing writes to it before the save returns."""

    def __deepcopy__(self, memo: dict) -> "_Borrowed":
        return self


def _checkpointer() -> ocp.Checkpointer:
    # Each process works with Orbax on its own: only one writes, and who reads waits for no other.
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"embax{here}"
    )
    # Rows of floats hardly compress (by 8 %), and compressing them takes five times as long as writing them.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `arrays`, none of them of size 0, to an Orbax checkpoint at `directory`, which does not exist yet."""
    tree = {name: np.asarray(array).view(_Borrowed) for name, array in arrays.items()}
    options = dict.fromkeys(tree, ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES))
    with _checkpointer() as checkpointer:
        checkpointer.save(directory, ocp.args.PyTreeSave(tree, save_args=options))


def read_arrays(directory: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays `names` of the Orbax checkpoint at `directory`: new, writable NumPy arrays.

    Raises:
        CheckpointError: Orbax cannot read it.
    """
    names = list(names)
    options = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
    try:
        with _checkpointer() as checkpointer:
            wanted = ocp.args.PyTreeRestore(dict.fromkeys(names, 0), restore_args=options, partial_restore=True)
            tree = checkpointer.restore(directory, wanted)
        return {name: np.asarray(tree[name]) for name in names}
    except Exception as error:
        raise CheckpointError(
            f"Checkpoint {directory}: Orbax {ocp.__version__} cannot read it, although its files are those that were "
            f"saved: {error}. Use the version of Orbax that it was saved with."
        ) from error
