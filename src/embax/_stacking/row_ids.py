"""From the ids of a table to the rows of its stack, and back."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._stacking.layout import logical_rows, physical_rows
from embax._stacking.plan import Plan, StackPlan, TablePlan, make_plan, table_specs


class LogicalRowIds(NamedTuple):
    """What rows of a stack hold. A pytree.

    Args:
        table_indices: integers of the shape of the rows: number of the table among all tables of the specs, in the order of
            `embax.get_table_specs`; -1 for a row of padding.
        ids: likewise, the id in that table; -1 for a row of padding.
    """

    table_indices: Any
    ids: Any


def _find_table(plan: Plan, name: str) -> tuple[StackPlan, TablePlan]:
    for stack in plan.stacks:
        for table in stack.tables:
            if table.name == name:
                return stack, table
    known = [table.name for stack in plan.stacks for table in stack.tables]
    raise ValueError(f"There is no table {name!r} in the specs; name one of {known}.")


def _find_stack(plan: Plan, name: str) -> StackPlan:
    for stack in plan.stacks:
        if stack.name == name:
            return stack
    raise ValueError(f"There is no stack {name!r} in the specs; name one of {[stack.name for stack in plan.stacks]}.")


def _checked(owner: str, what: str, given: Any, limit: int, remedy: str) -> tuple[Any, Any]:
    """What is given, as an array that can index rows, and which of it is in `[0, limit)`.

    The second is None where all is: only what JAX traces, or keeps on other processes, can be outside.

    Raises:
        ValueError: it is not integers, or one that can be read is outside.
    """
    if isinstance(given, int) and not isinstance(given, bool):
        if not 0 <= given < limit:
            raise ValueError(f"{owner}: {what} is {given}, {remedy}")
        return np.int64(given), None
    is_array = isinstance(given, (np.ndarray, np.generic, jax.Array))
    if not is_array or given.dtype.kind not in "iu":
        kind = f"{given.dtype} array" if is_array else type(given).__name__
        raise ValueError(f"{owner}: {what} is a {kind}; it must be an int or an integer array, NumPy or JAX.")
    values: Any = given
    if isinstance(values, jax.Array) and values.dtype.itemsize < 4:
        values = values.astype(jnp.int32)  # JAX refuses to compare narrow types with large limits.
    valid = (values >= 0) & (values < limit)
    if isinstance(values, jax.Array) and (isinstance(values, Tracer) or not values.is_fully_addressable):
        return jnp.where(valid, values, jnp.zeros_like(values)).astype(jnp.int32), valid
    if not np.all(valid):
        values = np.asarray(values)
        index = np.argwhere(~np.asarray(valid))[0].tolist()
        where = f" at index {index}" if index else ""
        raise ValueError(f"{owner}: {what} is {values[tuple(index)]}{where}, {remedy}")
    return values.astype(jnp.int32 if isinstance(values, jax.Array) else np.int64), None


def physical_row_ids(table_name: str, ids: Any, *, specs: Any) -> Any:
    """The rows of a stack that hold the given ids of one of its tables.

    With `N` SparseCores, id `i` lies at row `((i % N + shard_rotation) % N) * (stack_vocab_size / N) + i // N +
    row_offset_in_shard`. `embax.logical_row_ids` is the inverse.

    Args:
        table_name: name of the table.
        ids: int, or integer array of any shape, NumPy or JAX, of ids in `[0, vocabulary_size)`.
        specs: the placed feature tree.

    Returns:
        Rows of the shape of `ids`: an int, a NumPy int64 or a JAX int32 array as `ids` is. Under `jax.jit` the ids cannot be
        checked: one outside the vocabulary gives `stack_vocab_size`, one row past the last, which JAX's scatters drop.

    Raises:
        ValueError: the specs are not placed or have no such table, or an id is not an integer or outside the vocabulary.

    Example:
        >>> rows = embax.physical_row_ids("movie", np.array([3, 5]), specs=features)  # doctest: +SKIP
        >>> variables["movie"].table[rows]  # doctest: +SKIP
    """
    plan = make_plan(specs)
    stack, table = _find_table(plan, table_name)
    size = table.vocabulary_size
    remedy = (
        f"outside the vocabulary of {size} rows (ids 0 to {size - 1}). Remove it, map it (for example id % vocabulary_size), "
        "or give the table more rows."
    )
    array, valid = _checked(f"Table {table_name!r}", "an id", ids, size, remedy)
    rows = physical_rows(array, table.rows, stack.shape[0], plan.num_sparsecores)
    if valid is not None:
        rows = jnp.where(valid, rows, jnp.full_like(rows, stack.shape[0]))
    return operator.index(rows) if isinstance(ids, int) else rows


def logical_row_ids(stack_name: str, rows: Any, *, specs: Any) -> LogicalRowIds:
    """The tables and ids that the given rows of a stack hold: the inverse of `embax.physical_row_ids`.

    Args:
        stack_name: name of the stack.
        rows: int, or integer array of any shape, NumPy or JAX, of rows in `[0, stack_vocab_size)`.
        specs: the placed feature tree, with all tables of the stack.

    Returns:
        `table_indices`, into `list(embax.get_table_specs(specs))`, and `ids`, each of the shape of `rows`: ints, NumPy int64
        or JAX int32 arrays as `rows` is. Both are -1 for a row of padding, and under `jax.jit`, where rows cannot be checked,
        for a row that the stack does not have.

    Raises:
        ValueError: the specs are not placed or have no such stack, or a row is not an integer or outside the stack.

    Example:
        >>> tables = list(embax.get_table_specs(features))  # doctest: +SKIP
        >>> table_index, id_ = embax.logical_row_ids("movie_user", 17, specs=features)  # doctest: +SKIP
        >>> tables[table_index] if id_ >= 0 else "padding"  # doctest: +SKIP
    """
    plan = make_plan(specs)
    stack = _find_stack(plan, stack_name)
    num_rows = stack.shape[0]
    remedy = f"outside the stack of {num_rows} rows (0 to {num_rows - 1}); take rows of the stack's own arrays."
    array, valid = _checked(f"Stack {stack_name!r}", "a row", rows, num_rows, remedy)
    tables = sorted(stack.tables, key=lambda table: table.rows.row_offset_in_shard)
    number, ids, is_row = logical_rows(array, [table.rows for table in tables], num_rows, plan.num_sparsecores)
    names = list(table_specs(specs))
    xp = jnp if isinstance(array, jax.Array) else np
    numbers = xp.asarray([names.index(table.name) for table in tables], array.dtype)
    is_row = is_row if valid is None else is_row & valid
    found = LogicalRowIds(*(xp.where(is_row, part, xp.full_like(part, -1)) for part in (numbers[number], ids)))
    return LogicalRowIds(*map(operator.index, found)) if isinstance(rows, int) else found
