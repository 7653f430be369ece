"""Chooses which tables share a stack, and places them and their features. A call that fails leaves all specs as they were."""

import dataclasses
import hashlib
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from embax._checks import INT32_MAX, INT64_MAX, positive_int
from embax._specs import DEFAULT_ACTIVATION_MEM_BYTES_LIMIT, FeatureSpec, StackedTableSpec, TableSpec
from embax._stacking.placement import Topology, commit, copied_features, features_of, padded_dim, place
from embax._stacking.plan import sample_count, table_specs

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


def _check_features_placed(table: TableSpec, leaves: Iterable[FeatureSpec]) -> None:
    """Raises a ValueError unless all features of a stacked table have been placed with it."""
    for feature in features_of(leaves, [table]):
        if feature._id_transformation is None:
            raise ValueError(
                f"Feature {feature.name!r} has not been placed, but its table {table.name!r} is in stack "
                f"{table.stacked_table_spec.stack_name!r} already; place all features of a table in one call, or give this one "
                "a new TableSpec."
            )


def prepare_feature_specs_for_training(
    feature_specs: Any, global_device_count: int | None = None, num_sc_per_device: int | None = None
) -> Any:
    """Places every table that is not stacked yet in a stack of its own, and its features, by name, one after another.

    Args:
        feature_specs: any pytree of `FeatureSpec`; their tables and placements are filled in place.
        global_device_count: devices that the tables are sharded over; None means those of the tables that are placed
            already, or 1.
        num_sc_per_device: SparseCores of each; None means those of the tables that are placed already, or of the first
            device (4 virtual ones off TPU). All devices together have at most 65,536.

    Returns:
        `feature_specs` itself.

    Raises:
        ValueError: names are not unique, a field was set to what its spec does not allow, tables are placed for other counts,
            a table is placed in part, or has more rows when padded than int32 can count. All specs are then as they were.
    """
    leaves = copied_features(feature_specs)
    tables = table_specs(leaves)
    topology = Topology.checked("prepare_feature_specs_for_training", tables, global_device_count, num_sc_per_device)
    taken = {table.stacked_table_spec.stack_name: table for table in tables.values() if table.is_stacked()}
    for name, table in tables.items():
        if table.is_stacked():
            _check_features_placed(table, leaves)
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
        place(
            name,
            [table],
            sorted(features_of(leaves, [table]), key=lambda feature: feature.name),
            topology,
            rotation=0,
            max_ids_per_partition=table.max_ids_per_partition,
            max_unique_ids_per_partition=table.max_unique_ids_per_partition,
            suggested_coo_buffer_size_per_device=table.suggested_coo_buffer_size_per_device,
        )
    commit(feature_specs, leaves)
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
    widths = {table.name: table.embedding_dim for table in tables}
    if len(set(widths.values())) > 1 and not tables[0].optimizer.elementwise:
        raise ValueError(
            f"Stack {name!r}: its tables have different embedding_dim: {widths}, and {type(tables[0].optimizer).__name__} takes "
            "the row as a whole, so that columns of padding would change its steps. Stack only tables of one embedding_dim."
        )
    dims = {table.name: padded_dim(table) for table in tables}
    if len(set(dims.values())) > 1:
        message = (
            f"Stack {name!r}: its tables have different padded dimensions: {dims}; all are padded to {max(dims.values())} "
            "columns. Stack only tables of one dimension to waste no memory."
        )
        if fail_on_excess_padding:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a user asks of stacks beside their tables; `limit_functions` by the name of their argument."""

    rotation: int | None
    limit_functions: dict[str, Limit]
    activation_mem_bytes_limit: int

    @classmethod
    def checked(
        cls, caller: str, rotation: Any, max_ids: Any, max_unique_ids: Any, activation_bytes: Any
    ) -> "_Options":
        """From the arguments of a public function."""
        if rotation is not None:
            try:
                number = operator.index(rotation)
            except TypeError:
                number = None
            if isinstance(rotation, bool) or number is None or abs(number) > INT32_MAX:
                raise ValueError(
                    f"{caller}: rotation is {rotation!r}; it must be a number of SparseCores, an integer from {-INT32_MAX} to "
                    f"{INT32_MAX}, or None for those of a device."
                )
            rotation = number
        functions = {
            "stack_to_max_ids_per_partition": max_ids,
            "stack_to_max_unique_ids_per_partition": max_unique_ids,
        }
        for argument, function in functions.items():
            if not callable(function):
                raise ValueError(
                    f"{caller}: {argument} is {function!r}; it must be a function from a stack's name and its samples to a "
                    "limit, such as lambda name, samples: 256."
                )
        limit = positive_int(caller, "activation_mem_bytes_limit", activation_bytes, maximum=INT64_MAX)
        return cls(rotation, functions, limit)


def _stack(
    name: str, tables: Sequence[TableSpec], leaves: Sequence[FeatureSpec], topology: Topology, options: _Options
) -> None:
    """Places `tables`, and their features among `leaves`, as one stack."""
    members = features_of(leaves, tables)
    if len(tables) == 1:
        limits = [tables[0].max_ids_per_partition, tables[0].max_unique_ids_per_partition]
    else:
        samples = sum(map(sample_count, members))
        limits = [
            positive_int(f"Stack {name!r}", f"the limit that {argument} returns", function(name, samples))
            for argument, function in options.limit_functions.items()
        ]
    place(
        name,
        tables,
        members,
        topology,
        rotation=topology.sparsecores_per_device if options.rotation is None else options.rotation,
        max_ids_per_partition=limits[0],
        max_unique_ids_per_partition=limits[1],
        activation_mem_bytes_limit=options.activation_mem_bytes_limit,
    )


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
        global_device_count: devices that the tables are sharded over; None means those of the tables that are placed
            already, or 1.
        num_sc_per_device: SparseCores of each; None means those of the tables that are placed already, or of the first
            device. All devices together have at most 65,536.
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
        ValueError: a table is unknown, repeated or stacked already, the stack's name is taken, the tables differ in
            optimizer, combiner or quantization, or in `embedding_dim` under a rule that is not elementwise, other tables are
            placed for other counts, or an argument or a limit that a function returns is not what is described here. All
            specs are then as they were.
    """
    leaves = copied_features(features)
    known = table_specs(leaves)
    topology = Topology.checked("stack_tables", known, global_device_count, num_sc_per_device)
    options = _Options.checked(
        "stack_tables",
        rotation,
        stack_to_max_ids_per_partition,
        stack_to_max_unique_ids_per_partition,
        activation_mem_bytes_limit,
    )
    if not isinstance(table_names, Sequence) or isinstance(table_names, str | bytes) or not table_names:
        raise ValueError(
            f"stack_tables: table_names is {table_names!r}; it must be a sequence of names of tables, some of {list(known)}."
        )
    missing = [name for name in table_names if not isinstance(name, str) or name not in known]
    if missing:
        raise ValueError(f"stack_tables: there are no tables {missing}; name some of {list(known)}.")
    if stack_name is not None and (not isinstance(stack_name, str) or not stack_name):
        raise ValueError(
            f"stack_tables: stack_name is {stack_name!r}; it must be a non-empty string, or None to join the names of the tables."
        )
    tables = [known[name] for name in table_names]
    name = "_".join(table_names) if stack_name is None else stack_name
    _check_stackable(name, tables, fail_on_excess_padding=fail_on_excess_padding)
    for other in known.values():
        if other.is_stacked() and other.stacked_table_spec.stack_name == name:
            raise ValueError(
                f"The stack name {name!r} is already used by the stack of table {other.name!r}; choose another."
            )
    _stack(name, tables, leaves, topology, options)
    commit(features, leaves)
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

    Under an optimizer whose rule is not elementwise (see `OptimizerSpec.elementwise`), the dimensions themselves are the same.

    Args:
        features: pytree of `FeatureSpec`; placements are filled in place.
        global_device_count: devices that the tables are sharded over; None means those of the tables that are placed
            already, or 1.
        num_sc_per_device: SparseCores of each; None means those of the tables that are placed already, or of the first
            device. All devices together have at most 65,536.
        rotation: see `stack_tables`.
        stack_to_max_ids_per_partition: see `stack_tables`.
        stack_to_max_unique_ids_per_partition: see `stack_tables`.
        use_short_stack_names: whether names of more than 50 characters are shortened.
        activation_mem_bytes_limit: bytes of activations that a stack may have on a SparseCore; groups above it are cut.
            None means 2 MiB.

    Returns:
        `features` itself.

    Raises:
        ValueError: names are not unique, a stack has more rows than int32 can count, tables are placed for other counts, or an
            argument or a limit that a function returns is not what is described here. All specs are then as they were.
    """
    leaves = copied_features(features)
    tables = table_specs(leaves)
    topology = Topology.checked("auto_stack_tables", tables, global_device_count, num_sc_per_device)
    options = _Options.checked(
        "auto_stack_tables",
        rotation,
        stack_to_max_ids_per_partition,
        stack_to_max_unique_ids_per_partition,
        DEFAULT_ACTIVATION_MEM_BYTES_LIMIT if activation_mem_bytes_limit is None else activation_mem_bytes_limit,
    )
    groups: dict[Any, list[str]] = {}
    activation_bytes: dict[str, int] = {}
    taken: set[str] = set()
    for name, table in tables.items():
        if table.is_stacked():
            _check_features_placed(table, leaves)
            taken.add(table.stacked_table_spec.stack_name)
            continue
        samples = sum(sample_count(feature) // topology.num_sparsecores for feature in features_of(leaves, [table]))
        activation_bytes[name] = padded_dim(table) * 4 * samples
        dim = padded_dim(table) if table.optimizer.elementwise else table.embedding_dim
        key = (dim, table.optimizer, table.combiner, table.quantization_config)
        groups.setdefault(key, []).append(name)
    for group in groups.values():
        for names in split_by_activation_memory(group, activation_bytes, options.activation_mem_bytes_limit):
            name = "_".join(names)
            name = short_stack_name(name) if use_short_stack_names else name
            while name in taken:
                name += "_"
            taken.add(name)
            _stack(name, [tables[table] for table in names], leaves, topology, options)
    commit(features, leaves)
    return features


def copy_feature_specs(feature_specs: Any) -> Any:
    """A tree of equal features over equal tables that can be placed without touching the originals.

    Raises:
        ValueError: as `prepare_feature_specs_for_training`, what it checks of single specs and their names.
    """
    copies = copied_features(feature_specs)
    table_specs(copies)
    structure = jax.tree.structure(feature_specs, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
    return structure.unflatten(copies)
