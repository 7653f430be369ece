"""The frozen snapshot of placed specs that packing, lookup and update work from."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax

from embax._specs import FeatureSpec, StackedTableSpec, TableSpec
from embax.optimizers import OptimizerSpec


class RowPlacement(NamedTuple):
    """Where the rows of a table lie in its stack (see `layout.py`). A pytree of integers."""

    vocabulary_size: int
    row_offset_in_shard: int
    rotation: int


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """A table and its place in its stack."""

    name: str
    embedding_dim: int
    rows: RowPlacement

    @property
    def vocabulary_size(self) -> int:
        """Rows of the table."""
        return self.rows.vocabulary_size


@dataclasses.dataclass(frozen=True)
class FeaturePlan:
    """A feature's place in its stack.

    `leaf` is its number among the leaves of the feature tree, `valency` the ids a sample where its spec states them.
    """

    name: str
    leaf: int
    table: TablePlan
    output_dim: int
    row_offset: int
    col_offset: int
    col_shift: int
    valency: int | None = None


@dataclasses.dataclass(frozen=True)
class StackPlan:
    """A stack, its tables, and its features in the order of their samples."""

    spec: StackedTableSpec
    tables: tuple[TablePlan, ...]
    features: tuple[FeaturePlan, ...]

    @property
    def name(self) -> str:
        """Name of the stack."""
        return self.spec.stack_name

    @property
    def optimizer(self) -> OptimizerSpec:
        """Optimizer of the stack."""
        return self.spec.optimizer

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stacked table, all devices together."""
        return (self.spec.stack_vocab_size, self.spec.stack_embedding_dim)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the table and its slots, all devices together."""
        row_wise = self.optimizer.row_wise_slots()
        return (self.shape, *(self.shape[:1] if one_value else self.shape for one_value in row_wise))

    @property
    def width(self) -> int:
        """Columns of its tables, where all have the same; else those of the stack."""
        widths = {table.embedding_dim for table in self.tables}
        return widths.pop() if len(widths) == 1 else self.shape[1]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All stacks of a feature tree, and the topology that they were placed for. Hashable: it may be a static argument."""

    stacks: tuple[StackPlan, ...]
    num_devices: int
    num_sparsecores_per_device: int
    num_features: int

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # jit hashes a plan at every call that has it as a static argument.
        return hash((self.stacks, self.num_devices, self.num_sparsecores_per_device, self.num_features))

    @property
    def num_sparsecores(self) -> int:
        """SparseCores of all devices."""
        return self.num_devices * self.num_sparsecores_per_device


def any_features(specs: Any) -> list[FeatureSpec]:
    """The leaves of a feature tree, checked to be features, of any names."""
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
    if not leaves:
        raise ValueError(f"The feature specs are empty ({specs!r}): there must be at least one FeatureSpec.")
    for leaf in leaves:
        if not isinstance(leaf, FeatureSpec):
            raise ValueError(f"The feature specs hold {leaf!r}; every leaf must be a FeatureSpec.")
    return leaves


def feature_leaves(specs: Any) -> list[FeatureSpec]:
    """The leaves of a feature tree, checked to be features of different names."""
    leaves = any_features(specs)
    names = set()
    for leaf in leaves:
        if leaf.name in names:
            raise ValueError(f"Two features are named {leaf.name!r}; feature names must differ.")
        names.add(leaf.name)
    return leaves


def table_specs(specs: Any) -> dict[str, TableSpec]:
    """The tables of a feature tree by name, in order of first appearance among its leaves.

    Raises:
        ValueError: two different tables have one name.
    """
    tables: dict[str, TableSpec] = {}
    for feature in feature_leaves(specs):
        table = feature.table_spec
        known = tables.setdefault(table.name, table)
        if known is not table and known != table:
            fields = [f.name for f in dataclasses.fields(table) if getattr(table, f.name) != getattr(known, f.name)]
            raise ValueError(
                f"Two different tables are named {table.name!r} (one of them used by feature {feature.name!r}): they differ in "
                f"{', '.join(fields)}. Table names must differ, and features that share a table must share its TableSpec (or "
                "have equal ones: an initializer, such as jax.nn.initializers.normal(), is equal only to itself)."
            )
    return tables


def _table_plan(table: TableSpec) -> TablePlan:
    setting = table.setting_in_stack
    rows = RowPlacement(table.vocabulary_size, setting.row_offset_in_shard, setting.shard_rotation)
    return TablePlan(table.name, table.embedding_dim, rows)


def make_plan(specs: Any) -> Plan:
    """The snapshot of the placed feature tree `specs`.

    Raises:
        ValueError: a table has not been placed, or tables were placed for different topologies.
    """
    leaves = feature_leaves(specs)
    tables = {name: (_table_plan(table), table.stacked_table_spec) for name, table in table_specs(specs).items()}
    stacks: dict[str, StackedTableSpec] = {}
    for name, (_, stack) in tables.items():
        if stacks.setdefault(stack.stack_name, stack) != stack:
            raise ValueError(
                f"Table {name!r} holds another version of stack {stack.stack_name!r} than the tables before it; change "
                "stacks only through embax's functions, which keep their tables in step."
            )
    topologies = {(stack.num_devices, stack.num_sparsecores_per_device) for stack in stacks.values()}
    if len(topologies) > 1:
        raise ValueError(
            f"The tables were placed for different (devices, SparseCores a device): {sorted(topologies)}; place all "
            "features of a model in one call."
        )
    features: dict[str, list[FeaturePlan]] = {name: [] for name in stacks}
    ((num_devices, sparsecores_per_device),) = topologies
    num_sparsecores = num_devices * sparsecores_per_device
    for number, leaf in enumerate(leaves):
        table, stack = tables[leaf.table_spec.name]
        place = leaf.id_transformation
        expected = (table.rows.row_offset_in_shard * num_sparsecores, table.rows.rotation)
        if leaf._id_transformation is None or (place.col_offset, place.col_shift) != expected:
            raise ValueError(
                f"Feature {leaf.name!r} has not been placed with its table {table.name!r}; call "
                "embax.prepare_feature_specs_for_training on a tree that holds all features of the table."
            )
        features[stack.stack_name].append(
            FeaturePlan(
                name=leaf.name,
                leaf=number,
                table=table,
                output_dim=leaf.output_shape[-1],
                row_offset=place.row_offset,
                col_offset=place.col_offset,
                col_shift=place.col_shift,
                valency=leaf.input_shape[-1] if len(leaf.input_shape) > 1 else None,
            )
        )
    return Plan(
        stacks=tuple(
            StackPlan(
                spec=stack,
                tables=tuple(table for table, other in tables.values() if other == stack),
                features=tuple(sorted(features[name], key=lambda feature: feature.row_offset)),
            )
            for name, stack in stacks.items()
        ),
        num_devices=num_devices,
        num_sparsecores_per_device=sparsecores_per_device,
        num_features=len(leaves),
    )


def sample_count(feature: FeatureSpec) -> int:
    """Samples of a feature in a global batch, as its spec states them."""
    return math.prod(feature.output_shape[:-1])
