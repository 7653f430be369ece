"""Saving."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from embax._blocks import logical_blocks, take_logical
from embax._matmul import check_variables
from embax._processes import Action, Processes, all_processes
from embax._stacking.layout import of_table
from embax._stacking.plan import TablePlan, make_plan, table_specs
from embax._variables import EmbeddingVariables
from embax.checkpoint._describe import describe_features, describe_table
from embax.checkpoint._directory import atomic_directory
from embax.checkpoint._errors import CheckpointError
from embax.checkpoint._extra import NamedLeaf, encode, named_leaves, whole_leaves
from embax.checkpoint._format import EXTRA_DIRECTORY, METADATA_FILE, array_checksum, array_directory, write_metadata
from embax.checkpoint._orbax import write_arrays


class TableGroup(NamedTuple):
    """Tables under one feature tree: those of a layer.

    Args:
        specs: pytree of placed `FeatureSpec`.
        variables: `EmbeddingVariables` of each stack by name.
        stored_names: name in the checkpoint of each table by its own name.
    """

    specs: Any
    variables: Mapping[str, EmbeddingVariables]
    stored_names: Mapping[str, str]


def resolve(path: str | os.PathLike) -> Path:
    """`path` without symbolic links, so that what a link points to is replaced, and not the link."""
    text = os.fspath(path)
    if "://" in text:
        raise ValueError(f"Checkpoint {text}: embax saves to local directories only, and replaces them in one step.")
    return Path(os.path.realpath(text))


def _check_destination(path: Path, overwrite: bool) -> None:
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / METADATA_FILE).exists():
        raise FileExistsError(f"{path} exists and is no embax checkpoint. Choose another path, or remove it first.")
    if not overwrite:
        raise FileExistsError(
            f"There is a checkpoint at {path} already. Pass overwrite=True to replace it once the new one is complete."
        )


_SAME_KINDS = (CheckpointError, FileExistsError, ValueError)


def _gather(stacked: Any, table: TablePlan, num_sparsecores: int, processes: Processes) -> np.ndarray | None:
    """A table or slot by row, None where another process writes it."""
    if processes.alone or isinstance(stacked, np.ndarray) or stacked.sharding.is_fully_addressable:
        return take_logical(stacked, table, num_sparsecores) if processes.is_first else None
    with processes.together(Action.SAVE):
        values = np.empty(of_table(stacked.shape, table), np.float32) if processes.is_first else None
    for rows, block in logical_blocks(stacked, table, num_sparsecores):
        if values is None:
            block.block_until_ready()  # One block at a time, as on the process that writes.
        else:
            values[rows] = np.asarray(block)
    return values


def _write_tables(directory: Path, group: TableGroup, processes: Processes) -> dict[str, Any]:
    """Writes the arrays of a group one after another; returns what the metadata say about its tables, to whoever writes."""
    plan, specs = make_plan(group.specs), table_specs(group.specs)
    described = {}
    for stack in plan.stacks:
        labels = ("table", *(f"slot.{name}" for name in stack.optimizer.slot_names))
        for table in stack.tables:
            name, arrays = group.stored_names[table.name], {}
            for label, stacked in zip(labels, jax.tree.leaves(group.variables[stack.name]), strict=True):
                values = _gather(stacked, table, plan.num_sparsecores, processes)
                with processes.together(Action.SAVE):
                    if values is not None:
                        arrays[label] = {"directory": array_directory(name, label), "checksum": array_checksum(values)}
                        write_arrays(directory / arrays[label]["directory"], {"value": values})
                del values
            described[name] = {**describe_table(specs[table.name]), "arrays": arrays}
    return described


def write_checkpoint(
    path: Path, groups: Sequence[TableGroup], extra: Sequence[NamedLeaf] | None, overwrite: bool
) -> None:
    """Writes a checkpoint of table groups and leaves; see `save`."""
    processes = all_processes()
    with processes.together(Action.SAVE, _SAME_KINDS):
        if processes.is_first:
            _check_destination(path, overwrite)
        for group in groups:
            check_variables(group.variables, make_plan(group.specs))
    described, arrays = None, {}
    if extra is not None:
        extra = whole_leaves(extra)
        with processes.together(Action.SAVE, _SAME_KINDS):
            if processes.is_first:
                described, arrays = encode(extra)
    try:
        with contextlib.ExitStack() as writing:
            directory = path
            with processes.together(Action.SAVE):
                if processes.is_first:
                    directory = writing.enter_context(atomic_directory(path))
            content: dict[str, Any] = {"tables": {}, "features": [], "extra": described}
            for group in groups:
                content["tables"].update(_write_tables(directory, group, processes))
                content["features"] += describe_features(group.specs, group.stored_names)
            with processes.together(Action.SAVE, _SAME_KINDS):
                if processes.is_first:
                    if arrays:
                        write_arrays(directory / EXTRA_DIRECTORY, arrays)
                    write_metadata(directory, content)
                    _check_destination(path, overwrite)  # again: it took a while
                    writing.close()
    except FileExistsError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"Saving the checkpoint {path} failed: {error}. Nothing was changed there; check the free space and the "
            "permissions, and save again."
        ) from error


def save(
    path: str | os.PathLike,
    variables: Mapping[str, EmbeddingVariables],
    *,
    specs: Any,
    extra: Any = None,
    overwrite: bool = False,
) -> None:
    """Saves tables, slots, and anything else that belongs to them, as one checkpoint.

    Tables are stored by row and without padding, so that the checkpoint can be loaded with other stacks, and for
    another number of SparseCores, devices and processes. The checkpoint appears at `path` once it is complete and on the
    disk; a save that fails or is killed changes nothing there. It needs the memory of the largest table beside the variables;
    tables on several devices are gathered a block of rows at a time.

    Of several processes all call it, in their main thread, with the same variables and structure of `extra`; the first one
    writes. It returns when the checkpoint is complete, and an error on one process is an error on all.

    Args:
        path: a directory on a local file system, which is created.
        variables: `EmbeddingVariables` of each stack by name, sharded or not.
        specs: pytree of placed `FeatureSpec`.
        extra: None, or a pytree of arrays, PRNG keys and Python numbers: dense parameters, optimizer state. What every
            process has for itself is stored as the first one has it.
        overwrite: replace a checkpoint that is at `path`; it stays until the new one is complete.

    Raises:
        FileExistsError: there is something at `path` that may not be replaced.
        ValueError: the variables do not belong to the specs, or a leaf of `extra` cannot be stored.
        CheckpointError: writing failed.

    Example:
        >>> embax.checkpoint.save("run/step_1000", variables, specs=specs, extra={"dense": dense, "step": 1000})
    """
    names = {name: name for name in table_specs(specs)}
    leaves = None if extra is None else named_leaves(extra)
    write_checkpoint(resolve(path), [TableGroup(specs, variables, names)], leaves, overwrite)
