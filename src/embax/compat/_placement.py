"""Specs of the reference as those of embax, which are placed, packed and looked up; and what was placed, back."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax

import embax
from embax._checks import INT32_MAX, next_multiple
from embax.compat.sparsecore.lib.nn.embedding_spec import (
    FeatureIdTransformation,
    FeatureSpec,
    StackedTableSpec,
    TableSettingInStack,
    TableSpec,
)
from embax.compat.sparsecore.utils import utils


@dataclasses.dataclass(frozen=True, repr=False)
class _Optimizer(embax.OptimizerSpec):
    """Stands for an optimizer of the reference while tables are placed and ids packed, which it only is compared in."""

    reference: Any = None

    native_rule: ClassVar[str] = "sgd"

    def __repr__(self) -> str:
        return repr(self.reference)

    def slot_variables_initializers(self) -> tuple[()]:
        return ()


_STACK_FIELDS = [field.name for field in dataclasses.fields(StackedTableSpec) if field.name != "optimizer"]


def checked_num_sc(num_sc_per_device: int | None) -> int:
    """The number given, if a device may have so many SparseCores, or that of the first device."""
    if num_sc_per_device is None:
        return utils.num_sparsecores_per_device()
    if num_sc_per_device not in utils.NUM_SC_PER_DEVICE_MAP.values():
        raise ValueError(
            f"Invalid num_sc_per_device: {num_sc_per_device}; it must be one of "
            f"{sorted(set(utils.NUM_SC_PER_DEVICE_MAP.values()))}."
        )
    return num_sc_per_device


def feature_leaves(feature_specs: Any) -> list[FeatureSpec]:
    """The features of a tree.

    Raises:
        ValueError: a leaf is no `FeatureSpec`.
    """
    leaves = jax.tree.leaves(feature_specs, is_leaf=lambda leaf: isinstance(leaf, FeatureSpec))
    for leaf in leaves:
        if not isinstance(leaf, FeatureSpec):
            raise ValueError(f"The feature specs hold {leaf!r}; every leaf must be a FeatureSpec.")
    return leaves


def sample_count(feature: FeatureSpec) -> int:
    """Samples of a feature in a global batch, as its spec states them."""
    return math.prod(feature.output_shape[:-1])


def _stack_to_embax(stack: StackedTableSpec, num_devices: int, num_sparsecores_per_device: int, **changes: Any) -> Any:
    fields = {name: getattr(stack, name) for name in _STACK_FIELDS} | changes
    return embax.StackedTableSpec(
        optimizer=_Optimizer(reference=stack.optimizer),
        num_devices=num_devices,
        num_sparsecores_per_device=num_sparsecores_per_device,
        **fields,
    )


def _table_to_embax(table: TableSpec, stack: Any, setting: TableSettingInStack | None, **changes: Any) -> Any:
    fields = {
        "name": table.name,
        "vocabulary_size": table.vocabulary_size,
        "embedding_dim": table.embedding_dim,
        "combiner": table.combiner,
        "max_ids_per_partition": table.max_ids_per_partition,
        "max_unique_ids_per_partition": table.max_unique_ids_per_partition,
        "suggested_coo_buffer_size_per_device": table.suggested_coo_buffer_size_per_device,
        "quantization_config": table.quantization_config,
    }
    return embax.TableSpec(
        initializer=jax.nn.initializers.zeros,  # Not used, and not compared.
        optimizer=_Optimizer(reference=table.optimizer),
        _stacked_table_spec=stack,
        _setting_in_stack=setting,
        **(fields | changes),
    )


def _feature_to_embax(feature: FeatureSpec, table: Any, place: FeatureIdTransformation | None) -> Any:
    samples = max(sample_count(feature), 1)
    return embax.FeatureSpec(
        name=feature.name,
        table_spec=table,
        input_shape=(samples,),
        output_shape=(samples, min(feature.output_shape[-1], table.embedding_dim)),
        _id_transformation=place,
    )


def place(
    features: Sequence[FeatureSpec], num_devices: int, sparsecores: int, function: Callable[[list[Any]], Any]
) -> None:
    """Places features and their tables by a function of embax, and writes to them what it wrote to embax's.

    Args:
        features: changed in place, where `function` raises nothing.
        num_devices: devices that the tables are placed for.
        sparsecores: SparseCores of each.
        function: takes the features as a list of `embax.FeatureSpec`, and fills their placements in.
    """
    tables = {id(feature.table_spec): feature.table_spec for feature in features}
    copies = {}
    for key, table in tables.items():
        stack = table._stacked_table_spec
        stack = None if stack is None else _stack_to_embax(stack, num_devices, sparsecores)
        copies[key] = _table_to_embax(table, stack, table._setting_in_stack)
    placed = [_feature_to_embax(f, copies[id(f.table_spec)], f._id_transformation) for f in features]
    before = {key: copy._stacked_table_spec for key, copy in copies.items()}
    function(placed)
    stacks: dict[str, StackedTableSpec] = {}
    for key, table in tables.items():
        new = copies[key]._stacked_table_spec
        if new is not before[key]:
            # One object for all tables of a stack.
            fields = {name: getattr(new, name) for name in _STACK_FIELDS}
            table._stacked_table_spec = stacks.setdefault(
                new.stack_name, StackedTableSpec(optimizer=new.optimizer.reference, **fields)
            )
        table._setting_in_stack = copies[key]._setting_in_stack
    for feature, copy in zip(features, placed, strict=True):
        feature._id_transformation = copy._id_transformation


def stack_of(table: TableSpec) -> StackedTableSpec:
    """The stack of a table.

    Raises:
        ValueError: the table has not been stacked.
    """
    if table._stacked_table_spec is None:
        raise ValueError(
            f"Table {table.name!r} has not been placed: embedding.prepare_feature_specs_for_training was not called"
        )
    return table._stacked_table_spec


def features_to_pack(features: Iterable[FeatureSpec], num_devices: int, sparsecores: int, *, any_id: bool) -> list[Any]:
    """The features as `embax.FeatureSpec`, placed for so many devices, whatever else their specs say.

    The reference places an id by the transformation of its feature alone, so that specs made by hand need not agree with
    themselves. Here the place of each table follows from it.

    Args:
        features: features of placed tables; one without a transformation has that of no offsets.
        num_devices: devices of the placement.
        sparsecores: SparseCores of each.
        any_id: whether ids may be as large as int32 counts, rather than below the vocabulary.

    Raises:
        ValueError: a table is not placed, or an offset is no multiple of the SparseCores.
    """
    num_sparsecores = num_devices * sparsecores
    features = list(features)
    places = [feature._id_transformation or FeatureIdTransformation() for feature in features]
    rows: dict[str, int] = {}
    for feature, place_ in zip(features, places, strict=True):
        stack = stack_of(feature.table_spec)
        if place_.col_offset % num_sparsecores:
            raise ValueError(
                f"Feature {feature.name!r}: its col_offset is {place_.col_offset}, no multiple of the {num_sparsecores} "
                "SparseCores; place its table for these."
            )
        least = next_multiple(feature.table_spec.vocabulary_size, num_sparsecores) + place_.col_offset
        if any_id:
            least = INT32_MAX // num_sparsecores * num_sparsecores
        else:
            least = max(least, next_multiple(stack.stack_vocab_size, num_sparsecores))
        rows[stack.stack_name] = max(rows.get(stack.stack_name, 0), least)
    tables: dict[tuple[str, int, int], Any] = {}
    names: set[str] = set()
    packed = []
    for feature, place_ in zip(features, places, strict=True):
        table = feature.table_spec
        stack = stack_of(table)
        key = (table.name, place_.col_offset, place_.col_shift)
        if key not in tables:
            name = table.name
            while name in names:
                name += "'"
            names.add(name)
            num_rows = rows[stack.stack_name]
            setting = TableSettingInStack(
                stack_name=stack.stack_name,
                padded_vocab_size=num_rows,
                padded_embedding_dim=stack.stack_embedding_dim,
                row_offset_in_shard=place_.col_offset // num_sparsecores,
                shard_rotation=place_.col_shift,
            )
            of_embax = _stack_to_embax(stack, num_devices, sparsecores, stack_vocab_size=num_rows)
            vocabulary = num_rows - place_.col_offset if any_id else table.vocabulary_size
            tables[key] = _table_to_embax(table, of_embax, setting, name=name, vocabulary_size=vocabulary)
        packed.append(_feature_to_embax(feature, tables[key], place_))
    return packed
