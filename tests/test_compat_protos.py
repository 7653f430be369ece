import copy
import functools
import pickle

import jax
import pytest
from google.protobuf import descriptor_pb2, text_format

from embax.compat.sparsecore.lib.nn import embedding_proto_utils as proto_utils
from embax.compat.sparsecore.lib.nn import embedding_spec
from embax.compat.sparsecore.lib.proto import embedding_spec_pb2

TYPES = embedding_spec_pb2.OptimizerSpecProto


def fields_of(message):
    return {field.name: field.number for field in message.DESCRIPTOR.fields}


def test_fields_and_numbers():
    assert fields_of(embedding_spec_pb2.EmbeddingSpecProto) == {"stacked_table_specs": 1}
    assert fields_of(embedding_spec_pb2.StackedTableSpecProto) == {
        "stack_name": 1,
        "stack_vocab_size": 2,
        "stack_embedding_dim": 3,
        "total_sample_count": 6,
        "max_ids_per_partition": 7,
        "max_unique_ids_per_partition": 8,
        "num_sparsecores": 9,
        "table_specs": 10,
        "activation_mem_bytes_limit": 11,
    }
    assert fields_of(embedding_spec_pb2.TableSpecProto) == {
        "table_name": 1,
        "vocab_size": 2,
        "embedding_dim": 3,
        "max_ids_per_partition": 5,
        "max_unique_ids_per_partition": 6,
        "padded_vocab_size": 7,
        "padded_embedding_dim": 8,
        "row_offset_in_shard": 9,
        "shard_rotation": 10,
        "feature_specs": 11,
        "combiner": 12,
        "optimizer": 13,
    }
    assert fields_of(embedding_spec_pb2.FeatureSpecProto) == {
        "feature_name": 1,
        "input_shape": 2,
        "output_shape": 3,
        "row_offset": 4,
        "col_offset": 5,
        "col_shift": 6,
    }
    assert fields_of(TYPES) == {
        "type": 1,
        "learning_rate": 2,
        "learning_rate_tag": 3,
        "float_params": 4,
        "bool_params": 5,
    }
    assert dict(TYPES.OptimizerType.items()) == {
        "OPTIMIZER_TYPE_UNSPECIFIED": 0,
        "SGD": 1,
        "ADAGRAD": 2,
        "ADAM": 3,
        "FTRL": 4,
        "F2A": 5,
        "ADAGRAD_MOMENTUM": 6,
        "CUSTOM": 7,
    }
    file = descriptor_pb2.FileDescriptorProto()
    embedding_spec_pb2.DESCRIPTOR.CopyToProto(file)
    assert file.syntax == "proto3"


def test_messages_are_protobuf():
    message = embedding_spec_pb2.EmbeddingSpecProto()
    stack = message.stacked_table_specs.add(stack_name="s", stack_vocab_size=2**40)
    assert not stack.HasField("activation_mem_bytes_limit")
    stack.activation_mem_bytes_limit = 0
    assert stack.HasField("activation_mem_bytes_limit")
    table = stack.table_specs.add(table_name="t")
    assert not table.HasField("optimizer")
    table.optimizer.CopyFrom(TYPES(type=TYPES.FTRL, learning_rate=0.5, bool_params={"b": True}))
    assert table.optimizer.WhichOneof("learning_rate_spec") == "learning_rate"
    # Tag and wire type of field 2, a varint of 2**40.
    assert b"\x10" + b"\x80" * 5 + b"\x20" in stack.SerializeToString()
    for other in (
        type(message).FromString(message.SerializeToString()),
        text_format.Parse(text_format.MessageToString(message), embedding_spec_pb2.EmbeddingSpecProto()),
        copy.deepcopy(message),
        pickle.loads(pickle.dumps(message)),
    ):
        assert other == message
        assert other is not message


def schedule(step):
    return 0.1 / (step + 1)


@pytest.mark.parametrize(
    ("optimizer", "type_", "num_floats"),
    [
        (embedding_spec.SGDOptimizerSpec(0.25), TYPES.SGD, 0),
        (embedding_spec.AdagradOptimizerSpec(0.25, initial_accumulator_value=0.5), TYPES.ADAGRAD, 1),
        (embedding_spec.AdamOptimizerSpec(0.25, beta_1=0.75), TYPES.ADAM, 3),
        (embedding_spec.FTRLOptimizerSpec(0.25, multiply_linear_by_learning_rate=True), TYPES.FTRL, 6),
        (embedding_spec.F2AOptimizerSpec(0.25, rho=0.75), TYPES.F2A, 6),
        (embedding_spec.AdagradMomentumOptimizerSpec(0.25, use_nesterov=True), TYPES.ADAGRAD_MOMENTUM, 6),
    ],
)
def test_optimizers_survive(optimizer, type_, num_floats):
    assert proto_utils.get_optimizer_type(type(optimizer)) == type_
    assert proto_utils.get_optimizer_class(type_) is type(optimizer)
    proto = proto_utils.optimizer_spec_to_proto(optimizer)
    assert proto.type == type_
    assert proto.WhichOneof("learning_rate_spec") == "learning_rate"
    assert proto.learning_rate == 0.25
    assert len(proto.float_params) == num_floats
    back = proto_utils.proto_to_optimizer_spec(proto)
    assert type(back) is type(optimizer)
    assert back.get_bool_params() == optimizer.get_bool_params()
    assert back.get_float_params() == pytest.approx(optimizer.get_float_params(), rel=1e-7)  # They are float32.


def test_what_does_not_survive():
    assert proto_utils.optimizer_spec_to_proto(None) is None
    assert proto_utils.get_optimizer_class(TYPES.CUSTOM) is None
    assert proto_utils.get_optimizer_class(99) is None
    for optimizer in (
        embedding_spec.LaPropOptimizerSpec(0.25, b1=0.5),
        embedding_spec.CustomOptimizerSpec(0.25, lambda g, w, lr: w),
    ):
        proto = proto_utils.optimizer_spec_to_proto(optimizer)
        assert proto == TYPES(type=TYPES.CUSTOM, learning_rate=0.25)
        with pytest.warns(UserWarning, match="SGD takes its place"):
            back = proto_utils.proto_to_optimizer_spec(proto)
        assert back == embedding_spec.SGDOptimizerSpec(0.25)
    assert proto_utils.proto_to_optimizer_spec(None) == embedding_spec.SGDOptimizerSpec(0.0)
    assert proto_utils.proto_to_optimizer_spec(TYPES(learning_rate=0.5)) == embedding_spec.SGDOptimizerSpec(0.5)


def test_schedules_leave_a_tag():
    class Tagged:
        tag = "warm up"

        def __call__(self, step):
            return step

    unnamed = functools.partial(schedule)
    tags = {
        f"{__name__}.schedule": schedule,
        "warm up": Tagged(),
        "a placeholder": embedding_spec.CallablePlaceholder("a placeholder"),
        f"partial_{id(unnamed)}": unnamed,
    }
    for tag, rate in tags.items():
        proto = proto_utils.optimizer_spec_to_proto(embedding_spec.AdagradOptimizerSpec(rate))
        assert proto.WhichOneof("learning_rate_spec") == "learning_rate_tag"
        assert proto.learning_rate_tag == tag
        back = proto_utils.proto_to_optimizer_spec(proto)
        assert back.learning_rate == embedding_spec.CallablePlaceholder(tag)


def placed_features():
    """Two stacks, one of two tables, by hand."""
    optimizer = embedding_spec.AdagradOptimizerSpec(0.5, initial_accumulator_value=0.25)

    def stack(name, rows):
        return embedding_spec.StackedTableSpec(
            stack_name=name,
            stack_vocab_size=rows,
            stack_embedding_dim=16,
            optimizer=optimizer,
            combiner="mean",
            total_sample_count=48,
            max_ids_per_partition=32,
            max_unique_ids_per_partition=24,
            activation_mem_bytes_limit=4096,
        )

    def table(name, stack, offset, rotation):
        return embedding_spec.TableSpec(
            name=name,
            vocabulary_size=100,
            embedding_dim=14,
            initializer=jax.nn.initializers.zeros,
            optimizer=optimizer,
            combiner="mean",
            _stacked_table_spec=stack,
            _setting_in_stack=embedding_spec.TableSettingInStack(
                stack_name=stack.stack_name,
                padded_vocab_size=128,
                padded_embedding_dim=16,
                row_offset_in_shard=offset,
                shard_rotation=rotation,
            ),
        )

    def feature(name, table, row_offset):
        return embedding_spec.FeatureSpec(
            name=name,
            table_spec=table,
            input_shape=(16, 4),
            output_shape=[16, 14],
            _id_transformation=embedding_spec.FeatureIdTransformation(
                row_offset=row_offset, col_offset=table.setting_in_stack.row_offset_in_shard * 8, col_shift=4
            ),
        )

    both, alone = stack("b_a", 256), stack("c", 128)
    a, b, c = table("a", both, 16, 4), table("b", both, 0, 0), table("c", alone, 0, 0)
    return [feature("z", c, 0), {"y": feature("y", b, 0), "w": feature("w", a, 16)}, feature("x", b, 32)]


FEATURE = """
      feature_specs {{
        feature_name: "{0}" input_shape: 16 input_shape: 4 output_shape: 16 output_shape: 14
        row_offset: {1} col_offset: {2} col_shift: 4
      }}"""
TABLE = """
    table_specs {{
      table_name: "{0}" vocab_size: 100 embedding_dim: 14 padded_vocab_size: 128 padded_embedding_dim: 16
      row_offset_in_shard: {1} shard_rotation: {2} combiner: "mean"
      optimizer {{
        type: ADAGRAD learning_rate: 0.5 float_params {{ key: "initial_accumulator_value" value: 0.25 }}
      }}{3}
    }}"""
STACK = """
  stacked_table_specs {{
    stack_name: "{0}" stack_vocab_size: {1} stack_embedding_dim: 16 total_sample_count: 48 max_ids_per_partition: 32
    max_unique_ids_per_partition: 24 num_sparsecores: 8 activation_mem_bytes_limit: 4096 {2}
  }}"""


def test_a_message_of_features():
    """In the order in which the leaves name stacks and tables first; the keys of a dict are sorted."""
    wanted = STACK.format("c", 128, TABLE.format("c", 0, 0, FEATURE.format("z", 0, 0))) + STACK.format(
        "b_a",
        256,
        TABLE.format("a", 16, 4, FEATURE.format("w", 16, 128))
        + TABLE.format("b", 0, 0, FEATURE.format("y", 0, 0) + FEATURE.format("x", 32, 0)),
    )
    create = functools.partial(proto_utils.create_proto_from_feature_specs, placed_features())
    assert create(2, 4) == text_format.Parse(wanted, embedding_spec_pb2.EmbeddingSpecProto())
    assert create(3, 2).stacked_table_specs[1].num_sparsecores == 6
    assert create(None).stacked_table_specs[0].num_sparsecores == 4 * jax.device_count()
    with pytest.raises(ValueError, match="Invalid num_sc_per_device: 3"):
        create(1, 3)
