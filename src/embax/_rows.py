"""Writing tables: single rows by id, and whole tables from given weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._blocks import put_logical, rows_by_number
from embax._format import in_table_format
from embax._matmul import check_variables, place_of_table, valid_ids
from embax._stacking.layout import physical_rows
from embax._stacking.plan import make_plan
from embax._variables import EmbeddingVariables


def write_rows(
    variables: Mapping[str, EmbeddingVariables], table: str, ids: Any, values: Any, *, specs: Any
) -> dict[str, EmbeddingVariables]:
    """Sets rows of one table by id; its slots stay as they are. The inverse of `embax.read_rows`.

    Under `jax.jit` with the variables donated the rows are written in place; outside it the table is copied.

    Args:
        variables: `EmbeddingVariables` of each stack by name, sharded or not.
        table: name of the table.
        ids: integer array of any shape; outside jit every id must be in `[0, vocabulary_size)`, and none may occur twice.
        values: real numbers [*ids.shape, embedding_dim], or of a shape that broadcasts to it.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        The variables with new rows. Inside jit an id outside the vocabulary is left out, and of equal ids one is written.

    Raises:
        ValueError: the table is unknown, an id is not an integer, is outside the vocabulary or occurs twice, or the values are
            no real numbers or have another shape.

    Example:
        >>> variables = embax.write_rows(variables, "movie", [7, 9], 0.0, specs=specs)
    """
    plan, stack, planned = place_of_table(table, specs)
    check_variables(variables, plan, without_slots=[one.name for one in plan.stacks])
    rows = valid_ids(ids, table, planned.vocabulary_size)
    if not isinstance(rows, Tracer):
        unique, counts = np.unique(np.asarray(rows), return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"Table {table!r}: id {unique[counts > 1][0]} occurs {counts.max()} times; give each row one value."
            )
    new = _row_values(table, values, (*rows.shape, planned.embedding_dim))
    stacked, *slots = jax.tree.leaves(variables[stack.name])
    physical = physical_rows(jnp.maximum(rows, 0), planned.rows, stack.shape[0], plan.num_sparsecores)
    physical = jnp.where(rows < 0, stack.shape[0], physical)  # Past the end: dropped.

    def write(stacked, physical, new):
        return stacked.at[physical, : planned.embedding_dim].set(new, mode="drop")

    stacked = rows_by_number(write, stacked, physical, new, writes=True)
    structure = jax.tree.structure(variables[stack.name])
    return {**variables, stack.name: jax.tree.unflatten(structure, [stacked, *slots])}


def _row_values(table: str, values: Any, shape: tuple[int, ...]) -> jax.Array:
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
    given, dtype = values.shape, values.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"Table {table!r}: the values of its rows are {dtype}; they must be real numbers.")
    try:
        fits = np.broadcast_shapes(given, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"Table {table!r}: the values of its rows have the shape {given}; they must have {shape}.")
    return jnp.broadcast_to(jnp.asarray(values).astype(jnp.float32), shape)


def load_tables(
    variables: Mapping[str, EmbeddingVariables], tables: Mapping[str, Any], *, specs: Any
) -> dict[str, EmbeddingVariables]:
    """Puts given weights in the place of whole tables, block by block; their slots stay as they are.

    Args:
        variables: `EmbeddingVariables` of each stack by name, sharded or not. Their tables are donated: use the result only.
        tables: floating point NumPy array [vocabulary_size, embedding_dim], such as a memory map, by the name of its table;
            tables that are left out stay. On several processes all must pass the same.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        The variables with these tables.

    Raises:
        ValueError: a table is unknown, or an array has another shape or no real numbers. Nothing is changed then.

    Example:
        >>> variables = embax.load_tables(variables, {"movie": np.load("movie.npy", mmap_mode="r")}, specs=specs)
    """
    plan = make_plan(specs)
    check_variables(variables, plan, without_slots=[stack.name for stack in plan.stacks])
    if not isinstance(tables, Mapping):
        raise ValueError(f"The tables are a {type(tables).__name__}; they must be a dict of arrays by table name.")
    places = {table.name: (stack, table) for stack in plan.stacks for table in stack.tables}
    arrays = {name: np.asarray(values) for name, values in tables.items()}
    for name, values in arrays.items():
        if name not in places:
            raise ValueError(f"There is no table {name!r}; the tables are {sorted(places)}.")
        planned = places[name][1]
        wanted = (planned.vocabulary_size, planned.embedding_dim)
        if values.shape != wanted or not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"Table {name!r}: the array to load is {values.dtype}{list(values.shape)}; it must be a floating point array "
                f"{list(wanted)}."
            )
    new = dict(variables)
    for name, values in arrays.items():
        stack, planned = places[name]
        stacked, *slots = jax.tree.leaves(new[stack.name])
        stacked = in_table_format(put_logical(stacked, values, planned, plan.num_sparsecores), stack.optimizer)
        new[stack.name] = jax.tree.unflatten(jax.tree.structure(new[stack.name]), [stacked, *slots])
    return new
