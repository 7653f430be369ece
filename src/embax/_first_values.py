"""The arrays of a stack and their first values, made on one device or on those of a mesh, each its own rows."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format

from embax._format import table_format
from embax._mesh import TableMesh
from embax._ops import native
from embax._stacking.layout import physical_rows, put_blocks
from embax._stacking.plan import Plan, RowPlacement, StackPlan, TablePlan
from embax.optimizers import OptimizerSpec
from embax.optimizers._base import Initializer

MIN_CHUNK_ELEMENTS = 1 << 17
"""Elements of a table that are drawn at a time: the more the faster, but drawing takes several times their memory."""

MAX_CHUNK_ELEMENTS = 1 << 20
"""At most as many."""

_THREEFRY = "threefry2x32"


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
    jax.jit, static_argnames=("initializer", "chunk_rows", "dim", "num_sparsecores", "here"), donate_argnames="stacked"
)
def _draw_by_chunks(
    stacked: jax.Array,
    key: jax.Array,
    placement: RowPlacement,
    first: Any = 0,
    *,
    initializer: _ByValue,
    chunk_rows: int,
    dim: int,
    num_sparsecores: int,
    here: int,
) -> jax.Array:
    """Draws a table into its place in `here` SparseCores from `first` on. Each row has a key of its own."""
    rows_of_sparsecore = stacked.shape[0] // here
    rows_of_table = (
        placement.vocabulary_size - 1
    ) // num_sparsecores + 1  # Not rounded up by addition: int32 may end there.
    count = rows_of_table * here

    def draw(chunk, stacked):
        number = chunk * chunk_rows + jnp.arange(chunk_rows, dtype=jnp.int32)
        sparsecore, row = number // rows_of_table, number % rows_of_table
        ids = row * num_sparsecores + (first + sparsecore - placement.rotation) % num_sparsecores
        values = jax.vmap(lambda id: initializer.function(jax.random.fold_in(key, id), (dim,), jnp.float32))(ids)
        rows = sparsecore * rows_of_sparsecore + placement.row_offset_in_shard + row
        valid = (number >= 0) & (number < count) & (ids < placement.vocabulary_size)
        rows = jnp.where(valid, rows, stacked.shape[0])
        return stacked.at[rows, :dim].set(values, mode="drop", unique_indices=True)

    return jax.lax.fori_loop(0, (count - 1) // chunk_rows + 1, draw, stacked)


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


@dataclasses.dataclass(frozen=True)
class _OneDevice:
    """Makes the arrays of a stack on the device of the key."""

    num_sparsecores: int
    format: Format | None

    def fill(self, row: jax.Array, num_rows: int) -> jax.Array:
        """float32[num_rows, dim] of one row."""
        return self._make(_fill, row, num_rows=num_rows)

    def draw(self, stacked: jax.Array, key: jax.Array, placement: RowPlacement, **static: Any) -> jax.Array:
        """The stack with a table drawn into its place."""
        return self._make(_draw_by_chunks, stacked, key, placement, here=self.num_sparsecores, **self._with(static))

    def place(self, stacked: jax.Array, key: jax.Array, table: TablePlan, initializer: Initializer) -> jax.Array:
        """The stack with a table that an initializer makes as a whole."""
        shape = (table.vocabulary_size, min(table.embedding_dim, stacked.shape[1]))
        values = _checked(jnp.asarray(initializer(key, shape, jnp.float32)), shape, table)
        return self._make(_place, stacked, values, table.rows, **self._with({}))

    def flat(self, column: jax.Array) -> jax.Array:
        """float32[rows] from one column."""
        return _one_value_a_row(column)

    def _with(self, static: dict[str, Any]) -> dict[str, Any]:
        return static | {"num_sparsecores": self.num_sparsecores}

    def _make(self, function: Callable[..., jax.Array], *arrays: Any, **static: Any) -> jax.Array:
        if self.format is None:
            return function(*arrays, **static)
        return _in_format(function, self.format, tuple(static.items()))(*arrays)


@dataclasses.dataclass(frozen=True)
class _ManyDevices:
    """Makes the arrays of a stack on the devices of a mesh, each of which makes its own rows."""

    num_sparsecores: int
    mesh: TableMesh
    format: Format | jax.sharding.Sharding

    @property
    def _here(self) -> int:
        return self.num_sparsecores // self.mesh.num_devices

    def fill(self, row: jax.Array, num_rows: int) -> jax.Array:
        """float32[num_rows, dim] of one row."""
        return _fill_on_mesh(self, num_rows)(_anywhere(row))

    def draw(self, stacked: jax.Array, key: jax.Array, placement: RowPlacement, **static: Any) -> jax.Array:
        """The stack with a table drawn into its place."""
        return _draw_on_mesh(self, tuple(static.items()))(stacked, _anywhere(jax.random.key_data(key)), placement)

    def place(self, stacked: jax.Array, key: jax.Array, table: TablePlan, initializer: Initializer) -> jax.Array:
        """The stack with a table that an initializer makes as a whole, divided by XLA where it sees how."""
        # On axes that XLA divides arrays over by itself, whatever those of the mesh are.
        mesh = jax.sharding.Mesh(self.mesh.mesh.devices, self.mesh.mesh.axis_names)
        sharding = jax.sharding.NamedSharding(mesh, self.mesh.sharding(2).spec)
        shape = (table.vocabulary_size, min(table.embedding_dim, stacked.shape[1]))

        def make(stacked, key):
            values = initializer(jax.random.wrap_key_data(key, impl=_THREEFRY), shape, jnp.float32)
            values = jax.lax.with_sharding_constraint(_checked(values, shape, table), sharding)
            return put_blocks(stacked, values, table, self.num_sparsecores)

        made = jax.jit(make, out_shardings=sharding, donate_argnums=0)
        stacked = made(jax.device_put(stacked, sharding), _anywhere(jax.random.key_data(key)))
        return jax.device_put(stacked, self.format)

    def flat(self, column: jax.Array) -> jax.Array:
        """float32[rows] from one column."""
        return jax.jit(_one_value_a_row, out_shardings=self.mesh.sharding(1), donate_argnums=0)(column)


@functools.lru_cache(maxsize=256)
def _fill_on_mesh(devices: _ManyDevices, num_rows: int):
    mesh = devices.mesh
    fill = functools.partial(_fill, num_rows=num_rows // mesh.num_devices)
    return jax.jit(mesh.shard_map(fill, (jax.P(),), mesh.leading), out_shardings=devices.format)


@functools.lru_cache(maxsize=256)
def _draw_on_mesh(devices: _ManyDevices, static: tuple[tuple[str, Any], ...]):
    mesh, here = devices.mesh, devices._here

    def draw(stacked, key, placement):
        first = jax.lax.axis_index(mesh.axis_name) * here
        key = jax.random.wrap_key_data(key, impl=_THREEFRY)
        return _draw_by_chunks(
            stacked, key, placement, first, num_sparsecores=devices.num_sparsecores, here=here, **dict(static)
        )

    mapped = mesh.shard_map(draw, (mesh.leading, jax.P(), jax.P()), mesh.leading)
    return jax.jit(mapped, out_shardings=devices.format, donate_argnums=0)


def _anywhere(array: jax.Array) -> Any:
    """A small array as one that is on no device yet, unless it is traced."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)


def threefry(key: jax.Array) -> jax.Array:
    """A key of the generator whose draws do not depend on what is drawn beside them."""
    if jax.random.key_impl(key) == _THREEFRY:
        return jax.random.wrap_key_data(jax.random.key_data(key), impl=_THREEFRY)
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl=_THREEFRY)


def _checked(values: jax.Array, shape: tuple[int, int], table: TablePlan) -> jax.Array:
    if values.shape != shape or values.dtype != jnp.float32:
        raise ValueError(
            f"Table {table.name!r}: an initializer returned {values.dtype}{list(values.shape)}; it must return "
            f"float32{list(shape)}."
        )
    return values


def _format_of(key: jax.Array, optimizer: OptimizerSpec) -> Format | None:
    """The format that tables of an optimizer have where `key` lies, None for that of any array."""
    if isinstance(key, jax.core.Tracer):
        return None
    format = table_format(jax.sharding.SingleDeviceSharding(min(key.devices(), key=lambda one: one.id)), optimizer)
    return format if isinstance(format, Format) else None


def _chunk_rows(table: TablePlan, dim: int) -> int:
    """Rows of a chunk, a power of two: a small share of a large table, and not many more than a small one has."""
    elements = min(max(table.vocabulary_size * dim // 32, MIN_CHUNK_ELEMENTS), MAX_CHUNK_ELEMENTS)
    by_memory = max(elements // dim, 1)
    return 1 << min(by_memory.bit_length() - 1, (table.vocabulary_size - 1).bit_length())


@functools.partial(jax.jit, donate_argnames="column")
def _one_value_a_row(column: jax.Array) -> jax.Array:
    return column.reshape(-1)


def initialized(
    key: jax.Array,
    devices: _OneDevice | _ManyDevices,
    stack: StackPlan,
    initializers: dict[str, Initializer],
    shape: tuple[int, ...],
) -> jax.Array:
    """One array of a stack; `initializers` by table name. What belongs to no table is 0, or the constant.

    One value a row is made as a matrix of one column, which every initializer can draw.
    """
    num_rows, dim = (*shape, 1)[:2]
    first = initializers[stack.tables[0].name]
    filled = _same_for_every_row(first)
    row = first(key, (1, dim), jnp.float32)[0] if filled else jnp.zeros(dim, jnp.float32)
    stacked = devices.fill(row, num_rows)
    for table in stack.tables:
        initializer = initializers[table.name]
        if filled and initializer is first:
            continue
        table_key = jax.random.fold_in(key, zlib.crc32(table.name.encode()))
        columns = table.embedding_dim if len(shape) == 2 else 1
        if _independent_of_shape(initializer):
            stacked = devices.draw(
                stacked,
                table_key,
                table.rows,
                initializer=_ByValue.of(initializer),
                chunk_rows=_chunk_rows(table, columns),
                dim=columns,
            )
        else:
            stacked = devices.place(stacked, table_key, table, initializer)
    return stacked if len(shape) == 2 else devices.flat(stacked)


def maker_of(plan: Plan, stack: StackPlan, over: TableMesh | None, key: jax.Array | None) -> _OneDevice | _ManyDevices:
    """What makes the arrays of a stack, on the devices of a mesh, or on that of `key`, if any, or the default device."""
    if over is None:
        return _OneDevice(plan.num_sparsecores, None if key is None else _format_of(key, stack.optimizer))
    return _ManyDevices(plan.num_sparsecores, over, table_format(over.sharding(2), stack.optimizer))


def empty_array(plan: Plan, stack: StackPlan, shape: tuple[int, ...], over: TableMesh | None) -> jax.Array:
    """An array of a stack, [rows, dim] or [rows], 0 everywhere, on the devices of a mesh or the default device."""
    devices = maker_of(plan, stack, over, None)
    num_rows, dim = (*shape, 1)[:2]
    if over is None and len(shape) == 1:
        return jnp.zeros(shape, jnp.float32)
    stacked = devices.fill(jnp.zeros(dim, jnp.float32), num_rows)
    return stacked if len(shape) == 2 else devices.flat(stacked)
