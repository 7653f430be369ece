"""The protobuf messages of placed specs, made while this module is imported; no compiler of protocol buffers is needed.

They are proto3. `EmbeddingSpecProto` holds stacks, a stack its tables, a table its features and its optimizer.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "third_party.py.jax_tpu_embedding.sparsecore_lib_proto"
_TYPES = {
    "bool": _Field.TYPE_BOOL,
    "float": _Field.TYPE_FLOAT,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
}

_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "FeatureSpecProto": {
        "feature_name": (1, "string"),
        "input_shape": (2, "repeated int64"),
        "output_shape": (3, "repeated int64"),
        "row_offset": (4, "int64"),
        "col_offset": (5, "int64"),
        "col_shift": (6, "int64"),
    },
    "OptimizerSpecProto": {
        "type": (1, "OptimizerSpecProto.OptimizerType"),
        "learning_rate": (2, "oneof float"),
        "learning_rate_tag": (3, "oneof string"),
        "float_params": (4, "repeated OptimizerSpecProto.FloatParamsEntry"),
        "bool_params": (5, "repeated OptimizerSpecProto.BoolParamsEntry"),
    },
    "TableSpecProto": {
        "table_name": (1, "string"),
        "vocab_size": (2, "int64"),
        "embedding_dim": (3, "int64"),
        "max_ids_per_partition": (5, "int64"),
        "max_unique_ids_per_partition": (6, "int64"),
        "padded_vocab_size": (7, "int64"),
        "padded_embedding_dim": (8, "int64"),
        "row_offset_in_shard": (9, "int64"),
        "shard_rotation": (10, "int64"),
        "feature_specs": (11, "repeated FeatureSpecProto"),
        "combiner": (12, "string"),
        "optimizer": (13, "OptimizerSpecProto"),
    },
    "StackedTableSpecProto": {
        "stack_name": (1, "string"),
        "stack_vocab_size": (2, "int64"),
        "stack_embedding_dim": (3, "int64"),
        "total_sample_count": (6, "int64"),
        "max_ids_per_partition": (7, "int64"),
        "max_unique_ids_per_partition": (8, "int64"),
        "num_sparsecores": (9, "int64"),
        "table_specs": (10, "repeated TableSpecProto"),
        "activation_mem_bytes_limit": (11, "optional int64"),
    },
    "EmbeddingSpecProto": {"stacked_table_specs": (1, "repeated StackedTableSpecProto")},
}
_OPTIMIZERS = ("OPTIMIZER_TYPE_UNSPECIFIED", "SGD", "ADAGRAD", "ADAM", "FTRL", "F2A", "ADAGRAD_MOMENTUM", "CUSTOM")
_MAPS = {"FloatParamsEntry": "float", "BoolParamsEntry": "bool"}
"""Entries of the maps of an optimizer's parameters, from names to these."""


def _add_fields(message: descriptor_pb2.DescriptorProto, fields: dict[str, tuple[int, str]]) -> None:
    for name, (number, described) in fields.items():
        *qualifier, kind = described.split()
        label = _Field.LABEL_REPEATED if qualifier == ["repeated"] else _Field.LABEL_OPTIONAL
        field = message.field.add(name=name, number=number, label=label)
        if kind in _TYPES:
            field.type = _TYPES[kind]
        else:
            field.type = _Field.TYPE_ENUM if kind.endswith("OptimizerType") else _Field.TYPE_MESSAGE
            field.type_name = f".{_PACKAGE}.{kind}"
        if qualifier == ["oneof"]:
            if not message.oneof_decl:
                message.oneof_decl.add(name="learning_rate_spec")
            field.oneof_index = 0
        elif qualifier == ["optional"]:  # In proto3 a field knows whether it was set if it is alone in a oneof.
            message.oneof_decl.add(name=f"_{name}")
            field.oneof_index, field.proto3_optional = len(message.oneof_decl) - 1, True


def _file() -> descriptor_pb2.FileDescriptorProto:
    name = "jax_tpu_embedding/sparsecore/lib/proto/embedding_spec.proto"
    file = descriptor_pb2.FileDescriptorProto(name=name, package=_PACKAGE, syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        _add_fields(message, fields)
        if message_name == "OptimizerSpecProto":
            for entry_name, kind in _MAPS.items():
                entry = message.nested_type.add(name=entry_name)
                entry.options.map_entry = True
                _add_fields(entry, {"key": (1, "string"), "value": (2, kind)})
            types = message.enum_type.add(name="OptimizerType")
            for number, optimizer in enumerate(_OPTIMIZERS):
                types.value.add(name=optimizer, number=number)
    return file


# A pool of its own: the default one may hold the messages of jax_tpu_embedding, of the same names.
_POOL = descriptor_pool.DescriptorPool()
DESCRIPTOR = _POOL.FindFileByName(_POOL.AddSerializedFile(_file().SerializeToString()).name)


def _class(name: str) -> Any:
    made = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
    made.__module__ = __name__  # So that messages can be pickled.
    return made


FeatureSpecProto = _class("FeatureSpecProto")
OptimizerSpecProto = _class("OptimizerSpecProto")
TableSpecProto = _class("TableSpecProto")
StackedTableSpecProto = _class("StackedTableSpecProto")
EmbeddingSpecProto = _class("EmbeddingSpecProto")
