"""Saving."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from embax._matmul import check_variables
from embax._stacking.plan import make_plan, table_specs
from embax._variables import EmbeddingVariables
from embax.checkpoint._describe import describe_features, describe_table
from embax.checkpoint._directory import atomic_directory
from embax.checkpoint._errors import CheckpointError
from embax.checkpoint._extra import NamedLeaf, encode, named_leaves
from embax.checkpoint._format import EXTRA_DIRECTORY, METADATA_FILE, array_checksum, array_directory, write_metadata
from embax.checkpoint._orbax import write_arrays
from embax._blocks import take_logical


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
    if jax.process_count() > 1:
        raise ValueError(f"Checkpoint {path}: checkpoints of {jax.process_count()} processes are not supported.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / METADATA_FILE).exists():
        raise FileExistsError(f"{path} exists and is no embax checkpoint. Choose another path, or remove it first.")
    if not overwrite:
        raise FileExistsError(
            f"There is a checkpoint at {path} already. Pass overwrite=True to replace it once the new one is complete."
        )


def _write_tables(directory: Path, group: TableGroup) -> dict[str, Any]:
    """Writes the arrays of a group one after another; returns what the metadata say about its tables."""
    plan, specs = make_plan(group.specs), table_specs(group.specs)
    described = {}
    for stack in plan.stacks:
        labels = ("table", *(f"slot.{name}" for name in stack.optimizer.slot_names))
        for table in stack.tables:
            name, arrays = group.stored_names[table.name], {}
            for label, stacked in zip(labels, jax.tree.leaves(group.variables[stack.name]), strict=True):
                values = take_logical(stacked, table, plan.num_sparsecores)
                arrays[label] = {"directory": array_directory(name, label), "checksum": array_checksum(values)}
                write_arrays(directory / arrays[label]["directory"], {"value": values})
                del values
            described[name] = {**describe_table(specs[table.name]), "arrays": arrays}
    return described


def write_checkpoint(
    path: Path, groups: Sequence[TableGroup], extra: Sequence[NamedLeaf] | None, overwrite: bool
) -> None:
    """Writes a checkpoint of table groups and leaves; see `save`."""
    _check_destination(path, overwrite)
    for group in groups:
        check_variables(group.variables, make_plan(group.specs))
    described, arrays = (None, {}) if extra is None else encode(extra)
    try:
        with atomic_directory(path) as directory:
            content: dict[str, Any] = {"tables": {}, "features": [], "extra": described}
            for group in groups:
                content["tables"].update(_write_tables(directory, group))
                content["features"] += describe_features(group.specs, group.stored_names)
            if arrays:
                write_arrays(directory / EXTRA_DIRECTORY, arrays)
            write_metadata(directory, content)
            _check_destination(path, overwrite)  # again: it took a while
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
    another number of SparseCores. The checkpoint appears at `path` once it is complete and on the disk; a save that
    fails or is killed changes nothing there. It needs the memory of the largest table beside the variables.

    Args:
        path: a directory on a local file system, which is created.
        variables: `EmbeddingVariables` of each stack by name.
        specs: pytree of placed `FeatureSpec`.
        extra: None, or a pytree of arrays, PRNG keys and Python numbers: dense parameters, optimizer state.
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
