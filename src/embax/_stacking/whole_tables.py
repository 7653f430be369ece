"""Whole tables and slots into the arrays of their stacks, and back."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax._checks import next_multiple
from embax._stacking.layout import join_tables, of_table, put_table, take_table
from embax._stacking.placement import SUBLANES
from embax._stacking.plan import Plan, StackPlan, TablePlan, make_plan, table_specs
from embax._stacking.resharding import apply, common_sharding, compiled, for_shape
from embax._stacking.shard_table import refuse_masked


def _check_names(what: str, given: Any, expected: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"The {what}s are a {type(given).__name__}; they must be a mapping from the name of each to its arrays."
        )
    missing = [name for name in expected if name not in given]
    extra = [name for name in given if name not in expected]
    if missing or extra:
        parts = [
            f"{verb} {names}" for verb, names in (("lack", missing), ("have, unknown to the specs,", extra)) if names
        ]
        raise ValueError(f"The {what}s {' and '.join(parts)}; pass exactly those of the specs, {list(expected)}.")


def _check_leaves(owner: str, tree: Any, shape: tuple[int, int]) -> list[Any]:
    """The leaves of a tree of arrays of `shape`, or of its rows alone, one value each."""
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{owner}{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, (np.ndarray, jax.Array)):
            raise ValueError(f"{where} is a {type(leaf).__name__}; it must be a NumPy or JAX array.")
        refuse_masked(where, leaf)
        if leaf.shape not in (shape, shape[:1]):
            raise ValueError(f"{where} has shape {leaf.shape}; the specs say {shape}.")
        leaves.append(leaf)
    return leaves


def _filler(owner: str, pad_value: Any, dtype: np.dtype) -> np.ndarray:
    """`pad_value` as a scalar array of `dtype`."""
    if not isinstance(pad_value, numbers.Real):
        raise ValueError(f"pad_value is {pad_value!r}; it must be a number.")
    value: Any = pad_value
    try:
        number = float(value)
    except OverflowError:  # Python refuses to print some of these.
        raise ValueError(
            f"{owner}: pad_value is a number of type {type(value).__name__} beyond the range of float64, and no {dtype}; "
            "pass pad_value=0."
        ) from None
    if jnp.issubdtype(dtype, jnp.floating):
        with np.errstate(over="ignore"):
            return np.asarray(number, dtype)
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else None
    if info is None or not (number.is_integer() and info.min <= int(value) <= info.max):
        raise ValueError(f"{owner}: pad_value {pad_value} is no {dtype}; pass pad_value=0.")
    return np.asarray(int(value), dtype)


def _stack_leaf(
    plan: Plan, stack: StackPlan, tables: Sequence[TablePlan], values: Sequence[Any], pad_value: Any
) -> Any:
    """One array of a stack from those of its tables, which are ordered by their offset."""
    dtypes = {table.name: value.dtype for table, value in zip(tables, values, strict=True)}
    if len(set(dtypes.values())) > 1:
        given = ", ".join(f"{name!r} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"Stack {stack.name!r}: its tables have different dtypes: {given}; convert them to one.")
    ranks = {table.name: value.ndim for table, value in zip(tables, values, strict=True)}
    if len(set(ranks.values())) > 1:
        given = ", ".join(f"{name!r} {rank}" for name, rank in ranks.items())
        raise ValueError(
            f"Stack {stack.name!r}: an array has one value a row in some of its tables, and columns in others; its dimensions "
            f"are {given}. Pass arrays of one rank."
        )
    shape = stack.shape[: values[0].ndim]
    filler = _filler(f"Stack {stack.name!r}", pad_value, values[0].dtype)
    if all(isinstance(value, np.ndarray) for value in values):
        stacked = np.full(shape, filler)
        for table, value in zip(tables, values, strict=True):
            put_table(stacked, value, table, plan.num_sparsecores)
        return stacked
    sharding = common_sharding([value for value in values if isinstance(value, jax.Array)])
    if sharding is not None:
        sharding = for_shape(sharding, sharding.spec, shape)
    return compiled(join_tables, (tuple(tables), shape, plan.num_sparsecores), sharding, filler, tuple(values))


def stack_and_shard_tables(tables: Mapping[str, Any], *, specs: Any, pad_value: float = float("nan")) -> dict[str, Any]:
    """Whole tables, and slots, as the arrays of their stacks: the shapes and places of `embax.init_embedding_variables`.

    Args:
        tables: for each table of the specs an array [vocabulary_size, embedding_dim], or [vocabulary_size] of one value a row,
            NumPy or JAX, or a tree of them, such as `embax.EmbeddingVariables`; the trees of the tables of a stack have one
            structure, and one dtype and rank a leaf.
        specs: the placed feature tree, with all tables of its stacks.
        pad_value: what rows and columns that belong to no id hold. Training does not read them.

    Returns:
        For each stack the tree of its tables, of arrays [stack_vocab_size, stack_embedding_dim] or [stack_vocab_size]: new
        NumPy arrays where all tables are NumPy, else JAX, sharded as the tables are where they all have one `NamedSharding` and
        it suits.

    Raises:
        ValueError: a table is missing or unknown, has another shape, is a masked array, or differs from the others of its
            stack in structure or dtype; or `pad_value` is no number of the dtype.

    Example:
        >>> stacks = embax.stack_and_shard_tables({"movie": trained}, specs=features)  # doctest: +SKIP
        >>> tables = embax.unshard_and_unstack_tables(stacks, specs=features)  # doctest: +SKIP
    """
    plan = make_plan(specs)
    _check_names("table", tables, [table.name for stack in plan.stacks for table in stack.tables])
    stacks = {}
    for stack in plan.stacks:
        members = sorted(stack.tables, key=lambda table: table.rows.row_offset_in_shard)
        rows = sum(next_multiple(table.vocabulary_size, SUBLANES * plan.num_sparsecores) for table in members)
        if rows != stack.shape[0]:
            raise ValueError(
                f"Stack {stack.name!r} has {stack.shape[0]} rows, but its tables in the specs, {[t.name for t in members]}, have "
                f"{rows}; pass specs with all tables of the stack."
            )
        structures = [jax.tree.structure(tables[table.name]) for table in members]
        for table, structure in zip(members, structures, strict=True):
            if structure != structures[0]:
                raise ValueError(
                    f"Table {table.name!r} has the structure {structure}, but table {members[0].name!r} of the same stack "
                    f"{stack.name!r} has {structures[0]}; they must be one."
                )
        leaves = [
            _check_leaves(f"Table {t.name!r}", tables[t.name], (t.vocabulary_size, t.embedding_dim)) for t in members
        ]
        joined = [_stack_leaf(plan, stack, members, values, pad_value) for values in zip(*leaves, strict=True)]
        stacks[stack.name] = structures[0].unflatten(joined)
    return stacks


def unshard_and_unstack_tables(stacked: Mapping[str, Any], *, specs: Any) -> dict[str, Any]:
    """Whole tables, and slots, from the arrays of their stacks: the inverse of `embax.stack_and_shard_tables`.

    Args:
        stacked: for each stack of the specs an array [stack_vocab_size, stack_embedding_dim], or [stack_vocab_size], NumPy or
            JAX, or a tree of them, such as the variables that training returns.
        specs: the placed feature tree.

    Returns:
        For each table of the specs, in the order of `embax.get_table_specs`, the tree of its stack, of new arrays
        [vocabulary_size, embedding_dim] or [vocabulary_size] of the same kind and dtype. JAX arrays keep a `NamedSharding` that
        suits them; a table whose rows it does not divide is sharded as XLA chooses.

    Raises:
        ValueError: a stack is missing or unknown, has another shape, or is a masked array.
    """
    plan = make_plan(specs)
    _check_names("stack", stacked, [stack.name for stack in plan.stacks])
    tables = {}
    for stack in plan.stacks:
        tree = stacked[stack.name]
        leaves, structure = _check_leaves(f"Stack {stack.name!r}", tree, stack.shape), jax.tree.structure(tree)
        for table in stack.tables:
            options = (table, plan.num_sparsecores)
            taken = [apply(take_table, options, a, of_table(a.shape, table), tuple(range(a.ndim))) for a in leaves]
            tables[table.name] = structure.unflatten(taken)
    return {name: tables[name] for name in table_specs(specs)}
