"""Between specs and their protobuf messages."""

import numbers
import warnings
from typing import Any

import jax

from embax.compat._placement import checked_num_sc
from embax.compat.sparsecore.lib.nn import embedding_spec
from embax.compat.sparsecore.lib.proto import embedding_spec_pb2

_Types = embedding_spec_pb2.OptimizerSpecProto
_CLASSES: dict[int, type[embedding_spec.OptimizerSpec]] = {
    _Types.SGD: embedding_spec.SGDOptimizerSpec,
    _Types.ADAGRAD: embedding_spec.AdagradOptimizerSpec,
    _Types.ADAM: embedding_spec.AdamOptimizerSpec,
    _Types.FTRL: embedding_spec.FTRLOptimizerSpec,
    _Types.F2A: embedding_spec.F2AOptimizerSpec,
    _Types.ADAGRAD_MOMENTUM: embedding_spec.AdagradMomentumOptimizerSpec,
}
_TYPES = {optimizer: number for number, optimizer in _CLASSES.items()}
_CUSTOM: int = _Types.CUSTOM


def get_optimizer_class(optimizer_type: int) -> type[embedding_spec.OptimizerSpec] | None:
    """The class of an `OptimizerSpecProto.OptimizerType`; None for the types that no class has."""
    return _CLASSES.get(optimizer_type)


def get_optimizer_type(optimizer_class: type[embedding_spec.OptimizerSpec]) -> int:
    """The `OptimizerSpecProto.OptimizerType` of a class, `CUSTOM` where it has none of its own."""
    return _TYPES.get(optimizer_class, _CUSTOM)


def _tag(function: Any) -> str:
    """What a schedule is known by: its tag, or its name, or where it has neither its type and number."""
    if tag := getattr(function, "tag", None):
        return str(tag)
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if name is None or name == "<lambda>":
        return f"{type(function).__name__}_{id(function)}"
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else name


def optimizer_spec_to_proto(opt: embedding_spec.OptimizerSpec | None) -> Any:
    """The `OptimizerSpecProto` of an optimizer, None for None.

    Of a schedule it holds a tag alone; of an optimizer that has no type of its own the learning rate alone.
    """
    if opt is None:
        return None
    proto = _Types(type=get_optimizer_type(type(opt)))
    if proto.type != _CUSTOM:
        proto.float_params.update(opt.get_float_params())
        proto.bool_params.update(opt.get_bool_params())
    if callable(opt.learning_rate):
        proto.learning_rate_tag = _tag(opt.learning_rate)
    elif isinstance(opt.learning_rate, numbers.Real):
        proto.learning_rate = float(opt.learning_rate)
    return proto


def proto_to_optimizer_spec(proto: Any) -> embedding_spec.OptimizerSpec:
    """The optimizer of an `OptimizerSpecProto`.

    Instead of a schedule it has a `CallablePlaceholder`. None is SGD with a learning rate of 0, and what has no type of its
    own is SGD, with a warning if it was another optimizer.
    """
    if proto is None:
        return embedding_spec.SGDOptimizerSpec(learning_rate=0.0)
    rate: Any = proto.learning_rate
    if proto.WhichOneof("learning_rate_spec") == "learning_rate_tag":
        rate = embedding_spec.CallablePlaceholder(proto.learning_rate_tag)
    optimizer = get_optimizer_class(proto.type)
    if optimizer is None:
        if proto.type == _CUSTOM:
            warnings.warn(
                "The message holds an optimizer without a type of its own, LaProp or a custom one, whose parameters it does "
                "not have; SGD takes its place. Give the specs their optimizer again.",
                stacklevel=2,
            )
        return embedding_spec.SGDOptimizerSpec(learning_rate=rate)
    return optimizer.from_float_and_bool_params(dict(proto.float_params), dict(proto.bool_params), learning_rate=rate)


def _table_proto(table: Any) -> Any:
    placed = table.setting_in_stack
    return embedding_spec_pb2.TableSpecProto(
        table_name=table.name,
        vocab_size=table.vocabulary_size,
        embedding_dim=table.embedding_dim,
        padded_vocab_size=placed.padded_vocab_size,
        padded_embedding_dim=placed.padded_embedding_dim,
        row_offset_in_shard=placed.row_offset_in_shard,
        shard_rotation=placed.shard_rotation,
        combiner=table.combiner,
        optimizer=optimizer_spec_to_proto(table.optimizer),
    )


def _feature_proto(feature: Any) -> Any:
    placed = feature.id_transformation
    return embedding_spec_pb2.FeatureSpecProto(
        feature_name=feature.name,
        input_shape=feature.input_shape,
        output_shape=feature.output_shape,
        row_offset=placed.row_offset,
        col_offset=placed.col_offset,
        col_shift=placed.col_shift,
    )


def create_proto_from_feature_specs(
    feature_specs: Any, global_device_count: int | None, num_sparsecore_per_device: int | None = None
) -> Any:
    """The `EmbeddingSpecProto` of placed feature specs.

    Args:
        feature_specs: pytree of `FeatureSpec`.
        global_device_count: devices of all processes; None is what JAX sees.
        num_sparsecore_per_device: None is the number of the first device.

    Returns:
        Stacks, tables and features in the order in which the leaves name them first.

    Raises:
        ValueError: the number of SparseCores is of no device.
    """
    devices = jax.device_count() if global_device_count is None else global_device_count
    num_sparsecores = checked_num_sc(num_sparsecore_per_device) * devices
    proto = embedding_spec_pb2.EmbeddingSpecProto()
    stacks: dict[str, Any] = {}
    tables: dict[tuple[str, str], Any] = {}
    for feature in jax.tree.leaves(feature_specs):
        table = feature.table_spec
        spec = table.stacked_table_spec
        if spec.stack_name not in stacks:
            stacks[spec.stack_name] = proto.stacked_table_specs.add(
                stack_name=spec.stack_name,
                stack_vocab_size=spec.stack_vocab_size,
                stack_embedding_dim=spec.stack_embedding_dim,
                total_sample_count=spec.total_sample_count,
                max_ids_per_partition=spec.max_ids_per_partition,
                max_unique_ids_per_partition=spec.max_unique_ids_per_partition,
                num_sparsecores=num_sparsecores,
                activation_mem_bytes_limit=spec.activation_mem_bytes_limit,
            )
        key = (spec.stack_name, table.name)
        if key not in tables:
            stacks[spec.stack_name].table_specs.append(_table_proto(table))
            tables[key] = stacks[spec.stack_name].table_specs[-1]
        tables[key].feature_specs.append(_feature_proto(feature))
    return proto
