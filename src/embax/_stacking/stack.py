"""Places tables in stacks and features in the batches of stacks."""

import copy
from typing import Any

import jax

from embax._checks import INT32_MAX, next_multiple, positive_int
from embax._specs import FeatureIdTransformation, FeatureSpec, StackedTableSpec, TableSettingInStack, TableSpec
from embax._stacking.plan import feature_leaves, sample_count, table_specs
from embax._topology import num_sparsecores_per_device

SUBLANES = 8
"""Rows and columns of tables, and entries of partitions, are padded to multiples of this."""


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


def prepare_feature_specs_for_training(
    feature_specs: Any, global_device_count: int | None = None, num_sc_per_device: int | None = None
) -> Any:
    """Places every table that is not stacked yet in a stack of its own, and the features of each one after another.

    Args:
        feature_specs: any pytree of `FeatureSpec`; their tables and placements are filled in place.
        global_device_count: devices that the tables are sharded over; None means 1.
        num_sc_per_device: SparseCores of each; None means those of the first device (4 virtual ones off TPU).

    Returns:
        `feature_specs` itself.

    Raises:
        ValueError: names are not unique, or a padded table has more rows than int32 can count.
    """
    devices = positive_int("prepare_feature_specs_for_training", "global_device_count", global_device_count or 1)
    if num_sc_per_device is None:
        num_sc_per_device = num_sparsecores_per_device()
    sparsecores = positive_int("prepare_feature_specs_for_training", "num_sc_per_device", num_sc_per_device)
    features_by_table: dict[str, list[FeatureSpec]] = {}
    for feature in feature_leaves(feature_specs):
        features_by_table.setdefault(feature.table_spec.name, []).append(feature)
    for name, table in table_specs(feature_specs).items():
        if table.is_stacked():
            continue
        features = sorted(features_by_table[name], key=lambda feature: feature.name)
        rows = next_multiple(table.vocabulary_size, SUBLANES * devices * sparsecores)
        columns = next_multiple(table.embedding_dim, SUBLANES)
        if rows > INT32_MAX:
            raise ValueError(
                f"Table {name!r}: {table.vocabulary_size} rows are {rows} when padded for {devices} devices of "
                f"{sparsecores} SparseCores, above the limit of {INT32_MAX}; split the table."
            )
        setting = TableSettingInStack(name, rows, columns)
        stack = StackedTableSpec(
            stack_name=name,
            stack_vocab_size=rows,
            stack_embedding_dim=columns,
            optimizer=table.optimizer,
            combiner=table.combiner,
            total_sample_count=sum(sample_count(feature) for feature in features),
            max_ids_per_partition=table.max_ids_per_partition,
            max_unique_ids_per_partition=table.max_unique_ids_per_partition,
            suggested_coo_buffer_size_per_device=table.suggested_coo_buffer_size_per_device,
            quantization_config=table.quantization_config,
            num_devices=devices,
            num_sparsecores_per_device=sparsecores,
        )
        row_offset = 0
        for feature in features:
            feature.table_spec._setting_in_stack = setting
            feature.table_spec._stacked_table_spec = stack
            feature._id_transformation = FeatureIdTransformation(row_offset=row_offset)
            row_offset += sample_count(feature)
    return feature_specs


def copy_feature_specs(feature_specs: Any) -> Any:
    """A tree of equal features over equal tables that can be placed without touching the originals."""
    tables = {name: copy.copy(table) for name, table in table_specs(feature_specs).items()}

    def copy_feature(feature: FeatureSpec) -> FeatureSpec:
        duplicate = copy.copy(feature)
        duplicate.table_spec = tables[feature.table_spec.name]
        return duplicate

    return jax.tree.map(copy_feature, feature_specs, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
