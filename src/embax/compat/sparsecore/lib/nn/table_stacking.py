"""Stacking of tables, and whole tables into the arrays of stacks and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from embax._checks import next_multiple
from embax._stacking import layout, stack
from embax._stacking.placement import SUBLANES
from embax._stacking.plan import RowPlacement, TablePlan
from embax._stacking.resharding import apply, common_sharding, compiled, for_shape
from embax._stacking.stack import get_default_limits as get_default_limits
from embax.compat import _placement
from embax.compat.sparsecore.lib.nn.embedding_spec import (
    DEFAULT_ACTIVATION_MEM_BYTES_LIMIT as DEFAULT_ACTIVATION_MEM_BYTES_LIMIT,
)
from embax.compat.sparsecore.lib.nn.embedding_spec import FeatureSpec, TableSettingInStack, TableSpec

LimitsCallable: TypeAlias = Callable[[str, int], int]


def _next_largest_multiple(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return next_multiple(value, multiple)


def round_up_dim_and_vocab_size(tables: Mapping[str, TableSpec], num_sc: int) -> tuple[dict[str, int], dict[str, int]]:
    """The padded dimension and the padded vocabulary of each table, by name.

    Args:
        tables: by name.
        num_sc: SparseCores of all devices.
    """
    dims = {name: next_multiple(table.embedding_dim, SUBLANES) for name, table in tables.items()}
    rows = {name: next_multiple(table.vocabulary_size, SUBLANES * num_sc) for name, table in tables.items()}
    return dims, rows


def _split_groups_by_memory_limit(
    groups: Sequence[Sequence[str]], table_to_activation_mem_bytes: Mapping[str, int], activation_mem_bytes_limit: int
) -> list[list[str]]:
    """Cuts each group of tables, first fit, so that the activations of each part stay within the limit."""
    return [
        part
        for group in groups
        for part in stack.split_by_activation_memory(
            group, dict(table_to_activation_mem_bytes), activation_mem_bytes_limit
        )
    ]


def compute_table_to_setting_in_stack(
    stack_name: str,
    table_names: Sequence[str],
    padded_embedding_dim: int,
    table_to_padded_vocab_size: Mapping[str, int],
    num_shards: int,
    rotation: int,
) -> dict[str, TableSettingInStack]:
    """The place of each table in a stack.

    Args:
        stack_name: name of the stack.
        table_names: its tables, in order.
        padded_embedding_dim: columns of the stack.
        table_to_padded_vocab_size: padded vocabularies by name.
        num_shards: SparseCores of all devices.
        rotation: SparseCores by which each table is rotated against the one before.
    """
    settings, rows = {}, 0
    for number, name in enumerate(table_names):
        settings[name] = TableSettingInStack(
            stack_name=stack_name,
            padded_vocab_size=table_to_padded_vocab_size[name],
            padded_embedding_dim=padded_embedding_dim,
            row_offset_in_shard=rows // num_shards,
            shard_rotation=number * rotation % num_shards,
        )
        rows += table_to_padded_vocab_size[name]
    return settings


def stack_tables(
    features: Any,
    table_names: Sequence[str],
    global_device_count: int,
    num_sc_per_device: int,
    rotation: int | None = None,
    stack_to_max_ids_per_partition: LimitsCallable = get_default_limits,
    stack_to_max_unique_ids_per_partition: LimitsCallable = get_default_limits,
    stack_name: str | None = None,
    fail_on_excess_padding: bool = False,
    *,
    activation_mem_bytes_limit: int = DEFAULT_ACTIVATION_MEM_BYTES_LIMIT,
) -> None:
    """Stacks some tables of a feature tree, in place: see `embax.stack_tables`."""

    def place(copies: list[Any]) -> None:
        stack.stack_tables(
            copies,
            table_names,
            global_device_count,
            num_sc_per_device,
            rotation,
            stack_to_max_ids_per_partition,
            stack_to_max_unique_ids_per_partition,
            stack_name,
            fail_on_excess_padding,
            activation_mem_bytes_limit=activation_mem_bytes_limit,
        )

    _placement.place(_placement.feature_leaves(features), global_device_count, num_sc_per_device, place)


def auto_stack_tables(
    features: Any,
    global_device_count: int,
    num_sc_per_device: int,
    rotation: int | None = None,
    stack_to_max_ids_per_partition: LimitsCallable = get_default_limits,
    stack_to_max_unique_ids_per_partition: LimitsCallable = get_default_limits,
    *,
    use_short_stack_names: bool = True,
    activation_mem_bytes_limit: int | None = DEFAULT_ACTIVATION_MEM_BYTES_LIMIT,
) -> None:
    """Stacks all tables of a feature tree that are not stacked yet, in place: see `embax.auto_stack_tables`."""

    def place(copies: list[Any]) -> None:
        stack.auto_stack_tables(
            copies,
            global_device_count,
            num_sc_per_device,
            rotation,
            stack_to_max_ids_per_partition,
            stack_to_max_unique_ids_per_partition,
            use_short_stack_names=use_short_stack_names,
            activation_mem_bytes_limit=activation_mem_bytes_limit,
        )

    _placement.place(_placement.feature_leaves(features), global_device_count, num_sc_per_device, place)


def _is_table(leaf: Any) -> bool:
    return isinstance(leaf, TableSpec)


def _table_leaves(table_specs: Any) -> list[TableSpec]:
    return [
        leaf.table_spec if isinstance(leaf, FeatureSpec) else leaf
        for leaf in jax.tree.leaves(table_specs, is_leaf=lambda leaf: isinstance(leaf, (TableSpec, FeatureSpec)))
    ]


def get_table_stacks(table_specs: Any) -> dict[str, list[TableSpec]]:
    """The tables of each stack by its name, in the order of the tree."""
    stacks: dict[str, list[TableSpec]] = {}
    for table in _table_leaves(table_specs):
        stacks.setdefault(table.setting_in_stack.stack_name, []).append(table)
    return stacks


def _table_plan(table: Any, name: str, setting: Any) -> TablePlan:
    """The place of a table, from its spec and setting, or from its message, which is both."""
    vocabulary = table.vocabulary_size if isinstance(table, TableSpec) else table.vocab_size
    rows = RowPlacement(vocabulary, setting.row_offset_in_shard, setting.shard_rotation)
    return TablePlan(name, table.embedding_dim, rows)


def _join(
    tables: Sequence[TablePlan], values: Sequence[Any], shape: tuple[int, int], num_shards: int, pad_value: Any
) -> Any:
    """The array of a stack from those of its tables; `tables` and `values` in any one order."""
    order = sorted(range(len(tables)), key=lambda number: tables[number].rows.row_offset_in_shard)
    values = [jnp.asarray(values[number]) for number in order]
    tables = tuple(tables[number] for number in order)
    filler = np.asarray(pad_value, values[0].dtype)
    sharding = common_sharding(values)
    if sharding is not None:
        sharding = for_shape(sharding, sharding.spec, shape)
    return compiled(layout.join_tables, (tables, shape, num_shards), sharding, filler, tuple(values))


def _take(array: Any, table: TablePlan, num_shards: int) -> Any:
    return apply(
        layout.take_table, (table, num_shards), jnp.asarray(array), layout.of_table(array.shape, table), (0, 1)
    )


def stack_and_shard_tables(
    table_specs: Any, tables: Any, num_shards: int, pad_value: float = float("nan")
) -> dict[str, Any]:
    """Whole tables as the arrays of their stacks, by SparseCore.

    Args:
        table_specs: tree of the tables, stacked.
        tables: a tree like it, of arrays [vocabulary_size, embedding_dim] or trees of such, as of a table and its slots.
        num_shards: SparseCores of all devices.
        pad_value: what belongs to no table.

    Returns:
        For each stack the tree of its tables, of arrays [num_shards, rows of a SparseCore, columns of the stack].

    Raises:
        ValueError: the tables have another structure.
    """
    structure = jax.tree.structure(table_specs, is_leaf=_is_table)
    by_name = dict(zip([t.name for t in _table_leaves(table_specs)], structure.flatten_up_to(tables), strict=True))
    stacked = {}
    for name, members in get_table_stacks(table_specs).items():
        spec = _placement.stack_of(members[0])
        shape = (spec.stack_vocab_size, spec.stack_embedding_dim)
        plans = [_table_plan(table, table.name, table.setting_in_stack) for table in members]

        def join(*values: Any, plans: Any = plans, shape: Any = shape) -> Any:
            return _join(plans, values, shape, num_shards, pad_value).reshape(num_shards, -1, shape[1])

        stacked[name] = jax.tree.map(join, *(by_name[table.name] for table in members))
    return stacked


def unshard_and_unstack_tables(table_specs: Any, stacked_tables: Mapping[str, Any], num_shards: int) -> Any:
    """Whole tables from the arrays of their stacks: the inverse of `stack_and_shard_tables`.

    Args:
        table_specs: tree of the tables, stacked.
        stacked_tables: for each stack an array [num_shards, rows of a SparseCore, columns], or a tree of such.
        num_shards: SparseCores of all devices.

    Returns:
        A tree like `table_specs`, of arrays [vocabulary_size, embedding_dim] or trees of such.

    Raises:
        ValueError: a stack is missing.
    """

    def take(table: TableSpec) -> Any:
        setting = table.setting_in_stack
        plan = _table_plan(table, table.name, setting)
        return jax.tree.map(
            lambda array: _take(array.reshape(-1, array.shape[-1]), plan, num_shards),
            _stack_in(stacked_tables, setting.stack_name),
        )

    return jax.tree.map(take, table_specs, is_leaf=_is_table)


def _stack_in(stacked_tables: Mapping[str, Any], name: str) -> Any:
    if name not in stacked_tables:
        raise ValueError(f"There is no stack {name!r} among the stacked tables, which are {sorted(stacked_tables)}.")
    return stacked_tables[name]


def _unstack_and_unshard_stacked_table(
    stacked_table: jax.Array, stacked_table_specs: Any, donate: bool = False
) -> dict[str, jax.Array]:
    """The tables of one stack by name; see `unstack_and_unshard_stacked_tables`.

    Args:
        stacked_table: [rows of the stack, columns].
        stacked_table_specs: its `StackedTableSpecProto`.
        donate: whether the array is deleted.
    """
    tables = {
        table.table_name: _take(
            stacked_table, _table_plan(table, table.table_name, table), stacked_table_specs.num_sparsecores
        )
        for table in stacked_table_specs.table_specs
    }
    if donate:
        stacked_table.delete()
    return tables


def unstack_and_unshard_stacked_tables(
    stacked_tables: Mapping[str, jax.Array], embedding_specs: Any, donate: bool = False
) -> dict[str, jax.Array]:
    """Whole tables from the arrays of their stacks, as their stored description says.

    Args:
        stacked_tables: for each stack an array [rows of the stack, columns].
        embedding_specs: `EmbeddingSpecProto`.
        donate: whether the arrays are deleted.

    Returns:
        For each table an array [vocabulary_size, embedding_dim], with the sharding of its stack where that divides it.

    Raises:
        ValueError: a stack is missing.
    """
    tables = {}
    for spec in embedding_specs.stacked_table_specs:
        tables |= _unstack_and_unshard_stacked_table(_stack_in(stacked_tables, spec.stack_name), spec, donate)
    return tables


def stack_and_shard_feature_tables(
    feature_tables: Mapping[str, jax.Array], embedding_specs: Any, delete_input: bool = False
) -> dict[str, jax.Array]:
    """The arrays of stacks from whole tables: the inverse of `unstack_and_unshard_stacked_tables`.

    Args:
        feature_tables: for each table an array [vocabulary_size, embedding_dim], all of one sharding.
        embedding_specs: `EmbeddingSpecProto`.
        delete_input: whether the arrays are deleted.

    Returns:
        For each stack an array [rows of the stack, columns] with the sharding of the tables, 0 where there is no table.

    Raises:
        ValueError: a table is missing, or they have several shardings.
    """
    shardings: list[Any] = []
    for array in feature_tables.values():
        if array.sharding not in shardings:
            shardings.append(array.sharding)
    if len(shardings) > 1:
        raise ValueError(f"The tables have several shardings: {shardings}; give all of them one.")
    stacked = {}
    for spec in embedding_specs.stacked_table_specs:
        names = [table.table_name for table in spec.table_specs]
        if missing := [name for name in names if name not in feature_tables]:
            raise ValueError(f"Stack {spec.stack_name!r}: its tables {missing} are missing.")
        plans = [_table_plan(table, table.table_name, table) for table in spec.table_specs]
        shape = (spec.stack_vocab_size, spec.stack_embedding_dim)
        values = [feature_tables[name] for name in names]
        stacked[spec.stack_name] = _join(plans, values, shape, spec.num_sparsecores, 0)
        if delete_input:
            for value in values:
                value.delete()
    return stacked


def compute_physical_row_ids(
    num_sparse_cores: int, stack_vocab_size: int, shard_rotation: int, row_offset_in_shard: int, row_ids: Any
) -> Any:
    """The rows of a stack that hold ids of a table: int or integer array, also under `jax.jit`.

    Args:
        num_sparse_cores: SparseCores of all devices.
        stack_vocab_size: rows of the stack.
        shard_rotation: of the table.
        row_offset_in_shard: of the table.
        row_ids: ids, in the vocabulary of the table.
    """
    return layout.physical_rows(
        row_ids, RowPlacement(0, row_offset_in_shard, shard_rotation), stack_vocab_size, num_sparse_cores
    )


def get_row_ids_in_stacked_table(stack_table_spec: Any, table_spec: Any, row_ids: Sequence[int]) -> list[int]:
    """The rows of a stack that hold ids of one of its tables.

    Args:
        stack_table_spec: `StackedTableSpecProto`.
        table_spec: `TableSpecProto`.
        row_ids: ids.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    for id_ in row_ids:
        if not 0 <= id_ < table_spec.vocab_size:
            raise ValueError(
                f"Table {table_spec.table_name!r}: id {id_} is outside the vocabulary of {table_spec.vocab_size} rows."
            )
    return [
        compute_physical_row_ids(
            stack_table_spec.num_sparsecores,
            stack_table_spec.stack_vocab_size,
            table_spec.shard_rotation,
            table_spec.row_offset_in_shard,
            id_,
        )
        for id_ in row_ids
    ]


def get_row_ids_in_stacked_tables(
    embedding_spec_proto: Any, row_ids: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """The rows of stacks that hold ids of tables.

    Args:
        embedding_spec_proto: `EmbeddingSpecProto`.
        row_ids: ids by the name of the table.

    Returns:
        By the name of the stack the rows of its tables, one table after another.

    Raises:
        ValueError: a table is unknown, or an id is outside its vocabulary.
    """
    rows: dict[str, list[int]] = {}
    unknown = set(row_ids)
    for spec in embedding_spec_proto.stacked_table_specs:
        for table in spec.table_specs:
            if table.table_name in row_ids:
                unknown.remove(table.table_name)
                found = get_row_ids_in_stacked_table(spec, table, row_ids[table.table_name])
                rows.setdefault(spec.stack_name, []).extend(found)
    if unknown:
        raise ValueError(f"There are no tables {sorted(unknown)} in the description.")
    return rows
