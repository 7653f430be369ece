"""Places tables in stacks and features in the batches of stacks."""

import copy
import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from embax._checks import INT32_MAX, INT64_MAX, next_multiple, positive_int
from embax._specs import (
    DEFAULT_ACTIVATION_MEM_BYTES_LIMIT,
    FeatureIdTransformation,
    FeatureSpec,
    StackedTableSpec,
    TableSettingInStack,
    TableSpec,
)
from embax._stacking.plan import feature_leaves, sample_count, table_specs
from embax._topology import num_sparsecores_per_device

SUBLANES = 8
"""Rows of tables on a SparseCore, columns, and entries of partitions are padded to multiples of this."""

MAX_STACK_NAME = 50
"""Characters of a stack's name before it is shortened."""

Limit = Callable[[str, int], int]


def get_default_limits(name: str, batch_size: int) -> int:
    """The default limit of ids, and of distinct ids, that go into one partition of a stack of several tables: 256."""
    del name, batch_size
    return 256


def get_table_specs(feature_specs: Any) -> dict[str, TableSpec]:
    """The tables of a feature tree by name, in order of first appearance.

    Raises:
        ValueError: two features, or two different tables, have one name.
    """
    return table_specs(feature_specs)


def get_stacked_table_specs(feature_specs: Any) -> dict[str, StackedTableSpec]:
    """The stacks of a placed feature tree by name, in order of first appearance.

    Raises:
        ValueError: a table has not been placed.
    """
    stacks = (table.stacked_table_spec for table in table_specs(feature_specs).values())
    return {stack.stack_name: stack for stack in stacks}


@dataclasses.dataclass(frozen=True)
class _Topology:
    """What tables are placed for."""

    num_devices: int
    sparsecores_per_device: int

    @classmethod
    def checked(cls, caller: str, global_device_count: int | None, num_sc_per_device: int | None) -> "_Topology":
        """From the arguments of a public function; None means one device, and its own SparseCores."""
        devices = 1 if global_device_count is None else global_device_count
        sparsecores = num_sparsecores_per_device() if num_sc_per_device is None else num_sc_per_device
        return cls(
            positive_int(caller, "global_device_count", devices), positive_int(caller, "num_sc_per_device", sparsecores)
        )

    @property
    def num_sparsecores(self) -> int:
        return self.num_devices * self.sparsecores_per_device

    def padded_rows(self, table: TableSpec) -> int:
        """Rows of a table in a stack, all SparseCores together."""
        return next_multiple(table.vocabulary_size, SUBLANES * self.num_sparsecores)


def _padded_dim(table: TableSpec) -> int:
    return next_multiple(table.embedding_dim, SUBLANES)


def _place(
    name: str,
    tables: Sequence[TableSpec],
    features: Sequence[FeatureSpec],
    topology: _Topology,
    rotation: int,
    **limits: Any,
) -> None:
    """Makes one stack of `tables`, whose samples are those of `features` in the order given; fills the specs in place."""
    first, num_sparsecores = tables[0], topology.num_sparsecores
    rows = sum(map(topology.padded_rows, tables))
    if rows > INT32_MAX:
        raise ValueError(
            f"Stack {name!r}: {sum(table.vocabulary_size for table in tables)} rows are {rows} when padded for "
            f"{topology.num_devices} devices of {topology.sparsecores_per_device} SparseCores, above the limit of {INT32_MAX}; "
            "split the table, or stack fewer tables."
        )
    stack = StackedTableSpec(
        stack_name=name,
        stack_vocab_size=rows,
        stack_embedding_dim=max(map(_padded_dim, tables)),
        optimizer=first.optimizer,
        combiner=first.combiner,
        total_sample_count=sum(map(sample_count, features)),
        quantization_config=first.quantization_config,
        num_devices=topology.num_devices,
        num_sparsecores_per_device=topology.sparsecores_per_device,
        **limits,
    )
    settings, row_offset = {}, 0
    for number, table in enumerate(tables):
        settings[table.name] = TableSettingInStack(
            stack_name=name,
            padded_vocab_size=topology.padded_rows(table),
            padded_embedding_dim=stack.stack_embedding_dim,
            row_offset_in_shard=row_offset // num_sparsecores,
            shard_rotation=number * rotation % num_sparsecores,
        )
        row_offset += topology.padded_rows(table)
    sample_offset = 0
    for feature in features:
        setting = settings[feature.table_spec.name]
        feature.table_spec._setting_in_stack = setting
        feature.table_spec._stacked_table_spec = stack
        feature._id_transformation = FeatureIdTransformation(
            row_offset=sample_offset,
            col_offset=setting.row_offset_in_shard * num_sparsecores,
            col_shift=setting.shard_rotation,
        )
        sample_offset += sample_count(feature)


def _features_of(leaves: Iterable[FeatureSpec], tables: Iterable[TableSpec]) -> list[FeatureSpec]:
    names = {table.name for table in tables}
    return [leaf for leaf in leaves if leaf.table_spec.name in names]


def _check_placed(
    table: TableSpec, features: Iterable[FeatureSpec], global_device_count: int | None, num_sc_per_device: int | None
) -> None:
    """Raises a ValueError unless a stacked table was placed for the topology asked for, and its features with it."""
    stack = table.stacked_table_spec
    placed = (stack.num_devices, stack.num_sparsecores_per_device)
    asked = (global_device_count or placed[0], num_sc_per_device or placed[1])
    if asked != placed:
        raise ValueError(
            f"Table {table.name!r} was placed for (devices, SparseCores a device) {placed} and is now asked for on {asked}; "
            "make new specs for another topology."
        )
    for feature in features:
        if feature._id_transformation is None:
            raise ValueError(
                f"Feature {feature.name!r} has not been placed, but its table {table.name!r} is in stack "
                f"{stack.stack_name!r} already; place all features of a table in one call, or give this one a new TableSpec."
            )


def prepare_feature_specs_for_training(
    feature_specs: Any, global_device_count: int | None = None, num_sc_per_device: int | None = None
) -> Any:
    """Places every table that is not stacked yet in a stack of its own, and its features, by name, one after another.

    Args:
        feature_specs: any pytree of `FeatureSpec`; their tables and placements are filled in place.
        global_device_count: devices that the tables are sharded over; None means 1.
        num_sc_per_device: SparseCores of each; None means those of the first device (4 virtual ones off TPU).

    Returns:
        `feature_specs` itself.

    Raises:
        ValueError: names are not unique, a table is placed in part, or has more rows when padded than int32 can count.
    """
    topology = _Topology.checked("prepare_feature_specs_for_training", global_device_count, num_sc_per_device)
    leaves = feature_leaves(feature_specs)
    tables = table_specs(feature_specs)
    taken = {table.stacked_table_spec.stack_name: table for table in tables.values() if table.is_stacked()}
    for name, table in tables.items():
        if table.is_stacked():
            _check_placed(table, _features_of(leaves, [table]), global_device_count, num_sc_per_device)
            continue
        if name in taken:
            raise ValueError(
                f"Table {name!r} needs a stack of its name, which the stack of table {taken[name].name!r} has already; rename "
                "the table, or give stack_tables another stack_name."
            )
        if table.setting_in_stack.stack_name != name:
            raise ValueError(
                f"Table {name!r} is set to be in stack {table.setting_in_stack.stack_name!r}, but the stack itself is missing; "
                "stack tables only by embax.stack_tables or embax.auto_stack_tables."
            )
        _place(
            name,
            [table],
            sorted(_features_of(leaves, [table]), key=lambda feature: feature.name),
            topology,
            rotation=0,
            max_ids_per_partition=table.max_ids_per_partition,
            max_unique_ids_per_partition=table.max_unique_ids_per_partition,
            suggested_coo_buffer_size_per_device=table.suggested_coo_buffer_size_per_device,
        )
    return feature_specs


def _check_stackable(name: str, tables: Sequence[TableSpec], *, fail_on_excess_padding: bool) -> None:
    """Raises a ValueError unless the tables may share a stack; warns where columns are wasted."""
    seen: set[str] = set()
    for table in tables:
        if table.name in seen:
            raise ValueError(
                f"Table {table.name} is repeated in group {[other.name for other in tables]}; name each once."
            )
        seen.add(table.name)
        if table.is_stacked():
            raise ValueError(
                f"Table {table.name} is already stacked. It is in stack {table.stacked_table_spec.stack_name!r}; stack tables "
                "before their features are prepared for training, and each once."
            )
    for attribute, what in (
        ("optimizer", "optimizers"),
        ("combiner", "combiners"),
        ("quantization_config", "quantization configs"),
    ):
        values = {table.name: getattr(table, attribute) for table in tables}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"Stack {name!r}: its tables have different {what}: {values}; stack only tables that share one."
            )
    dims = {table.name: _padded_dim(table) for table in tables}
    if len(set(dims.values())) > 1:
        message = (
            f"Stack {name!r}: its tables have different padded dimensions: {dims}; all are padded to {max(dims.values())} "
            "columns. Stack only tables of one dimension to waste no memory."
        )
        if fail_on_excess_padding:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


def stack_tables(
    features: Any,
    table_names: Sequence[str],
    global_device_count: int | None = None,
    num_sc_per_device: int | None = None,
    rotation: int | None = None,
    stack_to_max_ids_per_partition: Limit = get_default_limits,
    stack_to_max_unique_ids_per_partition: Limit = get_default_limits,
    stack_name: str | None = None,
    fail_on_excess_padding: bool = False,
    *,
    activation_mem_bytes_limit: int = DEFAULT_ACTIVATION_MEM_BYTES_LIMIT,
) -> Any:
    """Stacks some tables of a feature tree: they are then stored, looked up and updated as one array.

    Args:
        features: pytree of `FeatureSpec`; the placements of these tables and their features are filled in place.
        table_names: tables to stack, in this order.
        global_device_count: devices that the tables are sharded over; None means 1.
        num_sc_per_device: SparseCores of each; None means those of the first device.
        rotation: SparseCores by which each table is rotated against the one before, so that their first rows lie on
            different ones; None means `num_sc_per_device`.
        stack_to_max_ids_per_partition: from the stack's name and its samples in a global batch to the limit of ids in a
            partition; a stack of one table has the table's own limit.
        stack_to_max_unique_ids_per_partition: likewise of distinct ids.
        stack_name: None joins the names of the tables by "_".
        fail_on_excess_padding: whether tables of different padded dimensions are an error rather than a warning.
        activation_mem_bytes_limit: recorded in the stack.

    Returns:
        `features` itself.

    Raises:
        ValueError: a table is unknown, repeated or stacked already, the stack's name is taken, or the tables differ in
            optimizer, combiner or quantization.
    """
    topology = _Topology.checked("stack_tables", global_device_count, num_sc_per_device)
    leaves, known = feature_leaves(features), table_specs(features)
    missing = [name for name in table_names if name not in known]
    if missing or not table_names:
        raise ValueError(f"stack_tables: there are no tables {missing}; name some of {list(known)}.")
    tables = [known[name] for name in table_names]
    name = "_".join(table_names) if stack_name is None else stack_name
    if rotation is not None and (not isinstance(rotation, int) or rotation < -INT32_MAX or rotation > INT32_MAX):
        raise ValueError(f"Stack {name!r}: rotation is {rotation!r}; it must be a number of SparseCores, an int.")
    _check_stackable(name, tables, fail_on_excess_padding=fail_on_excess_padding)
    for other in known.values():
        if other.is_stacked() and other.stacked_table_spec.stack_name == name:
            raise ValueError(
                f"The stack name {name!r} is already used by the stack of table {other.name!r}; choose another."
            )
    members = _features_of(leaves, tables)
    if len(tables) == 1:
        limits = (tables[0].max_ids_per_partition, tables[0].max_unique_ids_per_partition)
    else:
        samples = sum(map(sample_count, members))
        limits = (stack_to_max_ids_per_partition(name, samples), stack_to_max_unique_ids_per_partition(name, samples))
    _place(
        name,
        tables,
        members,
        topology,
        rotation=topology.sparsecores_per_device if rotation is None else rotation,
        max_ids_per_partition=positive_int(f"Stack {name!r}", "max_ids_per_partition", limits[0]),
        max_unique_ids_per_partition=positive_int(f"Stack {name!r}", "max_unique_ids_per_partition", limits[1]),
        activation_mem_bytes_limit=positive_int(
            f"Stack {name!r}", "activation_mem_bytes_limit", activation_mem_bytes_limit, maximum=INT64_MAX
        ),
    )
    return features


def split_by_activation_memory(group: Sequence[str], activation_bytes: dict[str, int], limit: int) -> list[list[str]]:
    """Cuts a group of tables, first fit: each joins the first subgroup whose activations stay within `limit` bytes."""
    subgroups: list[list[str]] = []
    used: list[int] = []
    for name in group:
        for number, total in enumerate(used):
            if total + activation_bytes[name] <= limit:
                subgroups[number].append(name)
                used[number] += activation_bytes[name]
                break
        else:
            subgroups.append([name])
            used.append(activation_bytes[name])
    return subgroups


def short_stack_name(name: str) -> str:
    """A name of at most 50 characters as it is, a longer one cut there, with a digest of the whole behind it."""
    if len(name) <= MAX_STACK_NAME:
        return name
    return f"{name[:MAX_STACK_NAME]}...{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def auto_stack_tables(
    features: Any,
    global_device_count: int | None = None,
    num_sc_per_device: int | None = None,
    rotation: int | None = None,
    stack_to_max_ids_per_partition: Limit = get_default_limits,
    stack_to_max_unique_ids_per_partition: Limit = get_default_limits,
    *,
    use_short_stack_names: bool = True,
    activation_mem_bytes_limit: int | None = None,
) -> Any:
    """Stacks all tables that are not stacked yet with those of the same padded dimension, optimizer, combiner, quantization.

    Args:
        features: pytree of `FeatureSpec`; placements are filled in place.
        global_device_count: devices that the tables are sharded over; None means 1.
        num_sc_per_device: SparseCores of each; None means those of the first device.
        rotation: see `stack_tables`.
        stack_to_max_ids_per_partition: see `stack_tables`.
        stack_to_max_unique_ids_per_partition: see `stack_tables`.
        use_short_stack_names: whether names of more than 50 characters are shortened.
        activation_mem_bytes_limit: bytes of activations that a stack may have on a SparseCore; groups above it are cut.
            None means 2 MiB.

    Returns:
        `features` itself.

    Raises:
        ValueError: names are not unique, or a stack has more rows than int32 can count.
    """
    topology = _Topology.checked("auto_stack_tables", global_device_count, num_sc_per_device)
    limit = positive_int(
        "auto_stack_tables",
        "activation_mem_bytes_limit",
        DEFAULT_ACTIVATION_MEM_BYTES_LIMIT if activation_mem_bytes_limit is None else activation_mem_bytes_limit,
        maximum=INT64_MAX,
    )
    leaves = feature_leaves(features)
    groups: dict[Any, list[str]] = {}
    activation_bytes: dict[str, int] = {}
    taken: set[str] = set()
    for name, table in table_specs(features).items():
        if table.is_stacked():
            _check_placed(table, _features_of(leaves, [table]), global_device_count, num_sc_per_device)
            taken.add(table.stacked_table_spec.stack_name)
            continue
        samples = sum(sample_count(feature) // topology.num_sparsecores for feature in _features_of(leaves, [table]))
        activation_bytes[name] = _padded_dim(table) * 4 * samples
        key = (_padded_dim(table), table.optimizer, table.combiner, table.quantization_config)
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        for names in split_by_activation_memory(group, activation_bytes, limit):
            name = "_".join(names)
            name = short_stack_name(name) if use_short_stack_names else name
            while name in taken:
                name += "_"
            taken.add(name)
            stack_tables(
                features,
                names,
                topology.num_devices,
                topology.sparsecores_per_device,
                rotation,
                stack_to_max_ids_per_partition,
                stack_to_max_unique_ids_per_partition,
                name,
                activation_mem_bytes_limit=limit,
            )
    return features


def copy_feature_specs(feature_specs: Any) -> Any:
    """A tree of equal features over equal tables that can be placed without touching the originals."""
    tables = {name: copy.copy(table) for name, table in table_specs(feature_specs).items()}

    def copy_feature(feature: FeatureSpec) -> FeatureSpec:
        return dataclasses.replace(feature, table_spec=tables[feature.table_spec.name])

    return jax.tree.map(copy_feature, feature_specs, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
