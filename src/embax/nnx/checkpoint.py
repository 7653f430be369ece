"""Checkpoints of whole NNX models. Needs the extras `embax[flax]` and `embax[checkpoint]`."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from embax._processes import Action, Processes
from embax._stacking.plan import make_plan, table_specs
from embax.checkpoint._describe import check_tables, describe_table
from embax.checkpoint._errors import CheckpointError
from embax.checkpoint._extra import NamedLeaf, check_leaves, named_leaves
from embax.checkpoint._format import Stored, check_files, read_metadata
from embax.checkpoint._load import LOAD_KINDS, fill_stack, read_leaves, read_table
from embax.checkpoint._save import TableGroup, resolve, write_checkpoint
from embax.nnx._ref_variables import EmbeddingVariable, InvalidIds, UpdateOrder
from embax.nnx.embed import SparseCoreEmbed


def _layers(model: nnx.Module) -> dict[str, SparseCoreEmbed]:
    """The embedding layers of a model by path."""
    found = ((".".join(map(str, path)), node) for path, node in nnx.iter_graph(model))
    return {path: node for path, node in found if isinstance(node, SparseCoreEmbed)}


def _groups(layers: dict[str, SparseCoreEmbed]) -> list[TableGroup]:
    """The tables of all layers, under their own names where only one layer has a table of that name."""
    names = {path: list(table_specs(layer.feature_specs)) for path, layer in layers.items()}
    count = Counter(name for of_layer in names.values() for name in of_layer)
    groups = []
    for path, layer in layers.items():
        stored = {name: name if count[name] == 1 else f"{path}/{name}" for name in names[path]}
        groups.append(TableGroup(layer.feature_specs, layer.embedding_table, stored))
    everything = Counter(name for group in groups for name in group.stored_names.values())
    if everything and max(everything.values()) > 1:
        name = everything.most_common(1)[0][0]
        raise ValueError(f"Two tables of the model would be stored as {name!r}; rename one of them.")
    return groups


def _rest(node: Any) -> nnx.State:
    """The state of a model or an optimizer without the tables, and without what the next step sets anew."""
    return nnx.state(node, nnx.Not(nnx.Any(EmbeddingVariable, UpdateOrder, InvalidIds)))


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _leaves(what: str, state: nnx.State) -> list[NamedLeaf]:
    """The leaves of a state, named as `model.dense.kernel`."""
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        leaves += named_leaves(_value(variable), ".".join((what, *map(str, path))))
    return leaves


def _with_leaves(state: nnx.State, leaves: list[Any]) -> nnx.State:
    """The state with other leaves, in the order of `_leaves`."""
    flat, rest = [], iter(leaves)
    for path, variable in nnx.to_flat_state(state):
        value = jax.tree.map(lambda _: next(rest), _value(variable))
        flat.append((path, variable.replace(value) if isinstance(variable, nnx.Variable) else value))
    return nnx.from_flat_state(flat)


def save(
    path: str | os.PathLike, model: nnx.Module, optimizer: nnx.Optimizer | None = None, *, overwrite: bool = False
) -> None:
    """Saves a model with any number of `SparseCoreEmbed`, and its optimizer, as one checkpoint.

    Tables and slots are stored as `embax.checkpoint.save` does, under their own names, or as `layer.path/name` where
    several layers have a table of that name. Everything else, the state of random number generators included, is stored
    by its path in the model. Of several processes all call it, as they do `embax.checkpoint.save`.

    Args:
        path: a directory on a local file system, which is created.
        model: the model.
        optimizer: None, or its optimizer, such as a `PartitionedOptimizer`.
        overwrite: replace a checkpoint that is at `path`; it stays until the new one is complete.

    Raises:
        FileExistsError: there is something at `path` that may not be replaced.
        ValueError: the model holds something that is no array.
        CheckpointError: writing failed.

    Example:
        >>> embax.nnx.checkpoint.save("run/step_1000", model, optimizer)
    """
    extra = _leaves("model", _rest(model))
    if optimizer is not None:
        extra += _leaves("optimizer", _rest(optimizer))
    write_checkpoint(resolve(path), _groups(_layers(model)), extra, overwrite)


def restore(path: str | os.PathLike, model: nnx.Module, optimizer: nnx.Optimizer | None = None) -> None:
    """Restores what `save` saved into a model of the same structure, and its optimizer, in place.

    Nothing is changed unless all of the checkpoint has been read and found intact and fitting; therefore tables are read twice.
    Tables are written into the refs of the model, so the memory of one table is needed beside the model. The number of
    SparseCores, devices and processes, and the stacking of the tables, may differ from those of the saved model. Of several
    processes all call it, in their main thread, and each reads the checkpoint; if one finds it damaged or not fitting, nothing
    is changed on any.

    Args:
        path: the directory of the checkpoint.
        model: the model to restore into.
        optimizer: None, which leaves a stored optimizer out, or the optimizer to restore into.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: the checkpoint is damaged, incomplete or of a newer format, or does not fit the model.

    Example:
        >>> model = Model(features, rngs=nnx.Rngs(0))
        >>> optimizer = embax.nnx.embed.PartitionedOptimizer(model, optax.adam(1e-3))
        >>> embax.nnx.checkpoint.restore("run/step_1000", model, optimizer)
    """
    layers = _layers(model)
    meshes = [layer._shell.mesh for layer in layers.values()]
    several = [mesh.processes for mesh in meshes if mesh is not None and not mesh.processes.alone]
    processes = several[0] if several else Processes.of(jax.local_devices())
    with processes.together(Action.LOAD, LOAD_KINDS):
        groups = _groups(layers)
        stored, leaves, count = _read_all_but_tables(resolve(path), groups, model, optimizer)
        for name, table in stored.content["tables"].items():
            for label in table["arrays"]:
                read_table(stored, name, label)

    for group in groups:
        plan = make_plan(group.specs)
        for stack in plan.stacks:
            refs = jax.tree.leaves(group.variables[stack.name])
            fill_stack(stored, plan, stack, group.stored_names, refs, processes)
    nnx.update(model, _with_leaves(_rest(model), leaves[:count]))
    if optimizer is not None:
        nnx.update(optimizer, _with_leaves(_rest(optimizer), leaves[count:]))


def _read_all_but_tables(
    path: Path, groups: list[TableGroup], model: nnx.Module, optimizer: nnx.Optimizer | None
) -> tuple[Stored, list[Any], int]:
    """A checkpoint that fits and whose files are intact, its leaves, and how many of them are the model's."""
    stored = read_metadata(path)
    asked = {
        group.stored_names[name]: describe_table(table)
        for group in groups
        for name, table in table_specs(group.specs).items()
    }
    check_tables(stored.path, stored.content["tables"], asked)
    if stored.content["extra"] is None:
        raise CheckpointError(f"Checkpoint {stored.path} holds tables alone. Load it with embax.checkpoint.load.")
    states = {"model": _rest(model)} | ({} if optimizer is None else {"optimizer": _rest(optimizer)})
    template = [leaf for what, state in states.items() for leaf in _leaves(what, state)]
    descriptions = [
        leaf for leaf in stored.content["extra"] if optimizer is not None or not leaf["path"].startswith("optimizer.")
    ]
    if optimizer is not None and not any(leaf["path"].startswith("optimizer.") for leaf in descriptions):
        raise CheckpointError(f"Checkpoint {stored.path} was saved without an optimizer. Restore it without one.")
    check_leaves(stored.path, descriptions, template)
    check_files(stored)
    return stored, read_leaves(stored, descriptions, template), len(_leaves("model", states["model"]))
