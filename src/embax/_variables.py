"""The tables and slots of all stacks, and their first values."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax.experimental.layout import Format

from embax._format import table_format
from embax._ops import native
from embax._stacking.layout import physical_rows
from embax._stacking.plan import Plan, RowPlacement, StackPlan, TablePlan, make_plan, table_specs
from embax.optimizers import OptimizerSpec
from embax.optimizers._base import Initializer

CHUNK_ELEMENTS = 1 << 20
"""Elements of a table that are drawn at a time. The values depend on it: changing it changes what a key draws."""


class EmbeddingVariables(NamedTuple):
    """The variables of one stack.

    Args:
        table: float32[rows, dim].
        slot: slot variables of the optimizer, a NamedTuple of arrays like `table`, or float32[rows] of one value a row.
    """

    table: Any
    slot: Any


def _made_by(initializer: Initializer, *makers) -> bool:
    """Whether one of `makers`, functions of `jax.nn.initializers`, returned `initializer`."""
    code = getattr(initializer, "__code__", None)
    return code is not None and any(code is maker.__code__ for maker in makers)


def _same_for_every_row(initializer: Initializer) -> bool:
    init = jax.nn.initializers
    return _made_by(initializer, init.zeros, init.ones, init.constant(0.0))


def _independent_of_shape(initializer: Initializer) -> bool:
    init = jax.nn.initializers
    return _made_by(initializer, init.uniform(), init.normal(), init.truncated_normal())


@dataclasses.dataclass(frozen=True)
class _ByValue:
    """An initializer that is equal to others of the same code and parameters, so that tables share one compilation."""

    code: Any
    parameters: Any
    function: Initializer = dataclasses.field(compare=False)

    @classmethod
    def of(cls, initializer: Initializer) -> "_ByValue":
        """Of one that `jax.nn.initializers` made."""
        cells = getattr(initializer, "__closure__", None) or ()
        parameters: Any = tuple(cell.cell_contents for cell in cells)
        try:
            hash(parameters)
        except TypeError:  # Such as an array for the standard deviation.
            parameters = initializer
        return cls(getattr(initializer, "__code__", None), parameters, initializer)


@functools.partial(jax.jit, static_argnames="num_rows")
def _fill(row: jax.Array, num_rows: int) -> jax.Array:
    """float32[num_rows, dim] whose rows are all `row`, in memory pages that suit random access where there are such."""

    def native_fill(row):
        native.register()
        shape = jax.ShapeDtypeStruct((num_rows, row.shape[0]), row.dtype)
        return jax.ffi.ffi_call("embax_fill", shape)(row)

    def portable_fill(row):
        return jnp.broadcast_to(row[None], (num_rows, row.shape[0]))

    return jax.lax.platform_dependent(row, cpu=native_fill, default=portable_fill)


@functools.partial(
    jax.jit, static_argnames=("initializer", "chunk_rows", "dim", "num_sparsecores"), donate_argnames="stacked"
)
def _draw_by_chunks(
    stacked: jax.Array,
    key: jax.Array,
    placement: RowPlacement,
    *,
    initializer: _ByValue,
    chunk_rows: int,
    dim: int,
    num_sparsecores: int,
) -> jax.Array:
    """Draws a table into its place; chunk `c` holds rows from `c * chunk_rows` on and has a key of its own."""
    num_rows = stacked.shape[0]

    def draw(chunk, stacked):
        values = initializer.function(jax.random.fold_in(key, chunk), (chunk_rows, dim), jnp.float32)
        ids = chunk * chunk_rows + jnp.arange(chunk_rows, dtype=jnp.int32)
        rows = physical_rows(ids, placement, num_rows, num_sparsecores)
        rows = jnp.where(ids < placement.vocabulary_size, rows, num_rows)
        return stacked.at[rows, :dim].set(values, mode="drop", unique_indices=True)

    chunks = (placement.vocabulary_size - 1) // chunk_rows + 1  # Not rounded up by addition: int32 may end there.
    return jax.lax.fori_loop(0, chunks, draw, stacked)


@functools.partial(jax.jit, static_argnames="num_sparsecores", donate_argnames="stacked")
def _place(stacked: jax.Array, values: jax.Array, placement: RowPlacement, *, num_sparsecores: int) -> jax.Array:
    ids = jnp.arange(values.shape[0], dtype=jnp.int32)
    rows = physical_rows(ids, placement, stacked.shape[0], num_sparsecores)
    return stacked.at[rows, : values.shape[1]].set(values, unique_indices=True)


@functools.lru_cache(maxsize=256)
def _in_format(function: Callable[..., jax.Array], format: Format, static: tuple[tuple[str, Any], ...]):
    """A jitted function of the above that returns its array in a format. The array that it changes is donated."""
    donated = () if function is _fill else (0,)
    return jax.jit(functools.partial(function, **dict(static)), out_shardings=format, donate_argnums=donated)


def _make(function: Callable[..., jax.Array], format: Format | None, *arrays: Any, **static: Any) -> jax.Array:
    if format is None:
        return function(*arrays, **static)
    return _in_format(function, format, tuple(static.items()))(*arrays)


def _format_of(key: jax.Array, optimizer: OptimizerSpec) -> Format | None:
    """The format that tables of an optimizer have where `key` lies, None for that of any array."""
    if isinstance(key, jax.core.Tracer):
        return None
    format = table_format(jax.sharding.SingleDeviceSharding(min(key.devices(), key=lambda one: one.id)), optimizer)
    return format if isinstance(format, Format) else None


def _chunk_rows(table: TablePlan, dim: int) -> int:
    """Rows of a chunk, a power of two: about `CHUNK_ELEMENTS` elements, and not many more than the table has."""
    by_memory = max(CHUNK_ELEMENTS // dim, 1)
    return 1 << min(by_memory.bit_length() - 1, (table.vocabulary_size - 1).bit_length())


@functools.partial(jax.jit, donate_argnames="column")
def _one_value_a_row(column: jax.Array) -> jax.Array:
    return column.reshape(-1)


def _initialize(
    key: jax.Array, plan: Plan, stack: StackPlan, initializers: dict[str, Initializer], shape: tuple[int, ...]
) -> jax.Array:
    """One array of a stack; `initializers` by table name. What belongs to no table is 0, or the constant.

    One value a row is made as a matrix of one column, which every initializer can draw.
    """
    num_rows, dim = (*shape, 1)[:2]
    format = _format_of(key, stack.optimizer)
    first = initializers[stack.tables[0].name]
    filled = _same_for_every_row(first)
    row = first(key, (1, dim), jnp.float32)[0] if filled else jnp.zeros(dim, jnp.float32)
    stacked = _make(_fill, format, row, num_rows=num_rows)
    for table in stack.tables:
        initializer = initializers[table.name]
        if filled and initializer is first:
            continue
        table_key = jax.random.fold_in(key, zlib.crc32(table.name.encode()))
        columns = table.embedding_dim if len(shape) == 2 else 1
        if _independent_of_shape(initializer):
            stacked = _make(
                _draw_by_chunks,
                format,
                stacked,
                table_key,
                table.rows,
                initializer=_ByValue.of(initializer),
                chunk_rows=_chunk_rows(table, columns),
                dim=columns,
                num_sparsecores=plan.num_sparsecores,
            )
        else:
            wanted = (table.vocabulary_size, columns)
            values = jnp.asarray(initializer(table_key, wanted, jnp.float32))
            if values.shape != wanted or values.dtype != jnp.float32:
                raise ValueError(
                    f"Table {table.name!r}: an initializer returned {values.dtype}{list(values.shape)}; it must return "
                    f"float32{list(wanted)}."
                )
            stacked = _make(_place, format, stacked, values, table.rows, num_sparsecores=plan.num_sparsecores)
    return stacked if len(shape) == 2 else _one_value_a_row(stacked)


def init_embedding_variables(rng: jax.Array, specs: Any) -> dict[str, EmbeddingVariables]:
    """The first values of all tables and slots.

    The values of a table depend on the key and the table's name and sizes alone, not on the number of devices or
    SparseCores or on what it is stacked with. Initializers of `jax.nn.initializers` that draw each element independently
    (uniform, normal, truncated_normal) and constants need no more than some 10 MB
    beside the result; on a TPU also a copy of one array in the default format, whose rows have a multiple of 128 columns.

    Args:
        rng: a PRNG key.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        For each stack its `EmbeddingVariables`: float32[stack_vocab_size, stack_embedding_dim] arrays, and
        float32[stack_vocab_size] of slots of one value a row, whose initializer is called for a matrix of one column. They
        lie on the device of `rng`, on TPUs in the format of `embax.table_format`.

    Raises:
        ValueError: the specs have not been placed, or an initializer returned another shape or dtype.
    """
    plan = make_plan(specs)
    if plan.num_devices != 1:
        raise ValueError(
            f"The specs were placed for {plan.num_devices} devices; tables are made on one device. Place them with "
            "global_device_count=1."
        )
    initializers = {name: table.initializer for name, table in table_specs(specs).items()}
    variables = {}
    for stack in plan.stacks:
        slots = stack.optimizer.slot_variables_initializers()
        values = [
            _initialize(jax.random.fold_in(rng, number), plan, stack, by_table, shape)
            for number, (by_table, shape) in enumerate(
                zip([initializers, *(dict.fromkeys(initializers, s) for s in slots)], stack.state_shapes, strict=True)
            )
        ]
        variables[stack.name] = EmbeddingVariables(values[0], stack.optimizer.make_slots(values[1:]))
    return variables
