"""Reading and writing tables: single rows by id, and whole tables from given weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._blocks import put_logical, rows_by_number
from embax._format import in_table_format
from embax._matmul import check_variables
from embax._preprocess.arrays import beyond_int64, find, to_numpy
from embax._refs import inside_jit, is_ref, read, write
from embax._stacking.layout import physical_rows
from embax._stacking.plan import Plan, StackPlan, TablePlan, make_plan
from embax._variables import EmbeddingVariables


def read_rows(variables: Mapping[str, EmbeddingVariables], table: str, ids: Any, *, specs: Any) -> jax.Array:
    """Rows of one table by id, as they are stored: not combined, weighted or quantized.

    Args:
        variables: `EmbeddingVariables` of each stack by name.
        table: name of the table.
        ids: integer array of any shape; outside jit every id must be in `[0, vocabulary_size)`.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        float32[*ids.shape, embedding_dim]; inside jit NaN for an id outside the vocabulary.

    Raises:
        ValueError: the table is unknown, or an id is not an integer or is outside the vocabulary.
    """
    plan, stack, planned = place_of_table(table, specs)
    check_variables(variables, plan, without_slots=[one.name for one in plan.stacks])
    rows = valid_ids(ids, table, planned.vocabulary_size)
    values = jax.tree.leaves(variables[stack.name])[0]
    return inside_jit(take_rows, values, rows, table=planned, num_sparsecores=plan.num_sparsecores)


def take_rows(stacked: Any, ids: jax.Array, *, table: TablePlan, num_sparsecores: int) -> jax.Array:
    """float32[*ids.shape, embedding_dim], rows of a table by id; NaN for an id of -1."""
    stacked = read(stacked)
    physical = physical_rows(jnp.maximum(ids, 0), table.rows, stacked.shape[0], num_sparsecores)
    values = rows_by_number(lambda values, rows: values[rows], stacked, physical, writes=False)
    return jnp.where((ids < 0)[..., None], jnp.nan, values[..., : table.embedding_dim])


def _put_rows(stacked: Any, ids: jax.Array, new: jax.Array, *, table: TablePlan, num_sparsecores: int) -> jax.Array:
    """The stack with rows of a table by id; rows of an id of -1 are left out."""
    physical = physical_rows(jnp.maximum(ids, 0), table.rows, stacked.shape[0], num_sparsecores)
    physical = jnp.where(ids < 0, stacked.shape[0], physical)  # Past the end: dropped.

    def put(stacked, physical, new):
        return stacked.at[physical, : table.embedding_dim].set(new, mode="drop")

    return rows_by_number(put, stacked, physical, new, writes=True)


def _put_rows_into_ref(stacked: Any, ids: jax.Array, new: jax.Array, **static: Any) -> None:
    write(stacked, _put_rows(read(stacked), ids, new, **static))


def place_of_table(table: str, specs: Any) -> tuple[Plan, StackPlan, TablePlan]:
    """The plan, and the place of a table in it.

    Raises:
        ValueError: there is no such table.
    """
    plan = make_plan(specs)
    places = {planned.name: (stack, planned) for stack in plan.stacks for planned in stack.tables}
    if not isinstance(table, str) or table not in places:
        raise ValueError(f"There is no table {table!r}; the tables are {sorted(places)}.")
    return plan, *places[table]


def valid_ids(ids: Any, table: str, vocabulary_size: int) -> jax.Array:
    """Ids as int32; -1 for one outside the vocabulary inside jit, where none can be refused."""
    owner, traced = f"Table {table!r}", isinstance(ids, Tracer)
    if not traced and find(ids, Tracer) is not None:
        raise ValueError(f"{owner}: ids are a list of values traced by JAX; make one array of it with jnp.stack.")
    array = ids if traced else to_numpy(owner, ids, "ids", "Make lists of one length, or read one after another.")
    if array.size == 0:
        return jnp.zeros(array.shape, jnp.int32)
    if beyond_int64(array):
        bad = (array < 0) | (array >= vocabulary_size)  # Some are, so that this ends in the error below.
    elif jnp.issubdtype(array.dtype, jnp.integer):
        limit = min(vocabulary_size - 1, jnp.iinfo(array.dtype).max)
        bad = (array < 0) | (array > array.dtype.type(limit))
    else:
        raise ValueError(f"{owner}: ids are {array.dtype}; they must be integers.")
    if not traced and bad.any():
        place = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(
            f"Table {table!r}: id {array[place]} at position {place} is outside the vocabulary, 0 to {vocabulary_size - 1}. Ask "
            "for rows that exist."
        )
    return jnp.where(bad, jnp.int32(-1), array.astype(jnp.int32))


def write_rows(
    variables: Mapping[str, EmbeddingVariables], table: str, ids: Any, values: Any, *, specs: Any
) -> dict[str, EmbeddingVariables]:
    """Sets rows of one table by id; its slots stay as they are. The inverse of `embax.read_rows`.

    Under `jax.jit` with the variables donated the rows are written in place; outside it the table is copied. Refs are written in
    place, inside and outside jit.

    Args:
        variables: `EmbeddingVariables` of each stack by name, sharded or not.
        table: name of the table.
        ids: integer array of any shape; outside jit every id must be in `[0, vocabulary_size)`, and none may occur twice.
        values: real numbers [*ids.shape, embedding_dim], or of a shape that broadcasts to it.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        The variables with new rows; with refs, `variables` itself. Inside jit an id outside the vocabulary is left out, and of
        equal ids one is written.

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
    static = {"table": planned, "num_sparsecores": plan.num_sparsecores}
    if is_ref(stacked):
        inside_jit(_put_rows_into_ref, stacked, rows, new, **static)
        return dict(variables)
    stacked = _put_rows(stacked, rows, new, **static)
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
        variables: `EmbeddingVariables` of each stack by name, sharded or not. Arrays of tables are donated: use the result only.
            Refs are written in place.
        tables: floating point NumPy array [vocabulary_size, embedding_dim], such as a memory map, by the name of its table;
            tables that are left out stay. On several processes all must pass the same.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        The variables with these tables; with refs, of the same refs.

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
        stacked = put_logical(stacked, values, planned, plan.num_sparsecores)
        if not is_ref(stacked):
            stacked = in_table_format(stacked, stack.optimizer)
        new[stack.name] = jax.tree.unflatten(jax.tree.structure(new[stack.name]), [stacked, *slots])
    return new
