"""Loading."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from embax._blocks import put_logical
from embax._first_values import empty_array
from embax._format import in_table_format
from embax._mesh import TableMesh
from embax._processes import Action, Processes
from embax._stacking.plan import Plan, StackPlan, make_plan, table_specs
from embax._variables import EmbeddingVariables, table_mesh
from embax.checkpoint._describe import check_tables, describe_table, row_wise_names
from embax.checkpoint._errors import CheckpointError
from embax.checkpoint._extra import NamedLeaf, check_leaves, decode, named_leaves
from embax.checkpoint._format import EXTRA_DIRECTORY, Stored, check_array, check_files, read_metadata
from embax.checkpoint._orbax import read_arrays
from embax.checkpoint._save import resolve


def read_table(stored: Stored, name: str, label: str) -> np.ndarray:
    """A table or a slot in logical order, checked: float32[vocabulary_size, embedding_dim], or float32[vocabulary_size]."""
    table = stored.content["tables"][name]
    array = table["arrays"][label]
    values = read_arrays(stored.path / array["directory"], ["value"])["value"]
    one_value = label.removeprefix("slot.") in row_wise_names(table["optimizer"])
    shape = (table["vocabulary_size"], *(() if one_value else (table["embedding_dim"],)))
    check_array(stored, f"{label.replace('.', ' ')} of table {name!r}", values, shape, "float32", array["checksum"])
    return values


LOAD_KINDS = (CheckpointError, FileNotFoundError, ValueError)
"""Errors of a process that all raise."""


def read_stack(
    stored: Stored, plan: Plan, stack: StackPlan, stored_names: Mapping[str, str], over: TableMesh | None
) -> EmbeddingVariables:
    """The variables of a stack, on the devices of a mesh, each its own rows, or on the default device."""
    processes = Processes.of(jax.local_devices()) if over is None else over.processes
    arrays = [empty_array(plan, stack, shape, over) for shape in stack.state_shapes]
    arrays = fill_stack(stored, plan, stack, stored_names, arrays, processes)
    arrays = [in_table_format(array, stack.optimizer) for array in arrays]
    return EmbeddingVariables(arrays[0], stack.optimizer.make_slots(arrays[1:]))


def fill_stack(
    stored: Stored,
    plan: Plan,
    stack: StackPlan,
    stored_names: Mapping[str, str],
    arrays: Sequence[Any],
    processes: Processes,
) -> list[Any]:
    """Puts the tables and slots of a checkpoint into the arrays of a stack, which are donated, or refs, which are written."""
    labels = ("table", *(f"slot.{name}" for name in stack.optimizer.slot_names))
    filled = []
    for label, stacked in zip(labels, arrays, strict=True):
        for table in stack.tables:
            with processes.together(Action.LOAD, LOAD_KINDS):
                values = read_table(stored, stored_names[table.name], label)
            stacked = put_logical(stacked, values, table, plan.num_sparsecores)
            del values
        filled.append(stacked)
    return filled


def read_leaves(stored: Stored, descriptions: Sequence[dict[str, Any]], template: Sequence[NamedLeaf]) -> list[Any]:
    """The leaves of `descriptions`, checked, each as its template is."""
    numbers = {leaf["path"]: str(number) for number, leaf in enumerate(stored.content["extra"] or [])}
    wanted = [numbers[leaf["path"]] for leaf in descriptions if "shape" in leaf and 0 not in leaf["stored"]["shape"]]
    arrays = read_arrays(stored.path / EXTRA_DIRECTORY, wanted) if wanted else {}
    leaves = []
    for leaf, (_, like) in zip(descriptions, template, strict=True):
        array = None
        if "shape" in leaf:
            shape, dtype = leaf["stored"]["shape"], leaf["stored"]["dtype"]
            array = arrays.get(numbers[leaf["path"]])
            if array is None:
                array = np.empty(shape, np.dtype(dtype))
            check_array(stored, f"leaf {leaf['path']}", array, shape, dtype, leaf["checksum"])
        leaves.append(decode(leaf, array, like))
    return leaves


def load(
    path: str | os.PathLike,
    *,
    specs: Any,
    extra: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    sharding_axis: str | tuple[str, ...] | None = None,
) -> tuple[dict[str, EmbeddingVariables], Any]:
    """Loads what `save` saved, after checking every byte of it.

    Tables may be stacked in another way, and for another number of SparseCores, devices and processes, than when they were
    saved. It needs the memory of the largest table beside the result, on the host; each device of a mesh has its own rows only,
    and a block of rows beside them.

    With a mesh of several processes all call it, in their main thread, and each reads the checkpoint; an error on one process
    is an error on all.

    Args:
        path: the directory of the checkpoint.
        specs: pytree of placed `FeatureSpec`. Its tables must be those that were saved: the same names, sizes and
            optimizer classes. Hyperparameters, combiners and features may differ.
        extra: a pytree like the `extra` that was saved, of arrays or `jax.ShapeDtypeStruct`, and Python numbers; None
            leaves `extra` out.
        mesh: the devices that the specs were placed for; None for the default device.
        sharding_axis: the axis of the mesh, or a tuple of axes, that rows are sharded over. None where the mesh has one axis.

    Returns:
        The `EmbeddingVariables` of each stack, float32[stack_vocab_size, stack_embedding_dim] arrays on the default
        device, or with their rows sharded over the mesh, with zeros as padding; and `extra` as it was saved, with NumPy
        arrays where the template has such, and JAX arrays with the template's sharding elsewhere. None without a template.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: the checkpoint is damaged, incomplete or of a newer format, or does not fit `specs` or `extra`.
        ValueError: the specs have not been placed, or for other devices than those of the mesh.

    Example:
        >>> template = jax.eval_shape(make_dense_parameters)
        >>> variables, dense = embax.checkpoint.load("run/step_1000", specs=specs, extra=template)
    """
    plan, tables = make_plan(specs), table_specs(specs)
    over = None if mesh is None and sharding_axis is None else table_mesh(plan, mesh, sharding_axis)
    processes = Processes.of(jax.local_devices()) if over is None else over.processes
    with processes.together(Action.LOAD, LOAD_KINDS):
        stored = read_metadata(resolve(path))
        asked = {name: describe_table(table) for name, table in tables.items()}
        check_tables(stored.path, stored.content["tables"], asked)
        descriptions = stored.content["extra"]
        template = [] if extra is None else named_leaves(extra)
        if extra is None:
            descriptions = []
        elif descriptions is None:
            raise CheckpointError(f"Checkpoint {stored.path} was saved without extra. Load it with extra=None.")
        check_leaves(stored.path, descriptions, template)
        check_files(stored)
        leaves = read_leaves(stored, descriptions, template)
    names = {name: name for name in tables}
    variables = {stack.name: read_stack(stored, plan, stack, names, over) for stack in plan.stacks}
    return variables, None if extra is None else jax.tree.unflatten(jax.tree.structure(extra), leaves)
