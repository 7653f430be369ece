"""Specs: fields, checks, equality, placement."""

import copy
import dataclasses

import jax
import oracle
import pytest

import embax


def test_placement_of_a_table_and_its_features():
    table = oracle.table_spec(vocabulary=100, dim=5)
    specs = [oracle.feature_spec("b", table, batch=6), oracle.feature_spec("a", table, batch=4)]
    assert table.setting_in_stack == embax.TableSettingInStack("table", 100, 5)
    assert not table.is_stacked()
    assert embax.prepare_feature_specs_for_training(specs, 2, 4) is specs
    assert table.setting_in_stack == embax.TableSettingInStack(
        "table", 128, 8
    )  # Padded to 8 * 2 devices * 4, and to 8.
    assert table.is_stacked()
    # In the order of their names.
    assert specs[1].id_transformation == embax.FeatureIdTransformation(row_offset=0)
    assert specs[0].id_transformation == embax.FeatureIdTransformation(row_offset=4)
    stack = table.stacked_table_spec
    assert (stack.stack_vocab_size, stack.stack_embedding_dim, stack.total_sample_count) == (128, 8, 10)
    assert (stack.num_devices, stack.num_sparsecores_per_device) == (2, 4)
    assert embax.get_stacked_table_specs(specs) == {"table": stack}
    assert embax.get_table_specs(specs) == {"table": table}


def test_preparing_twice_changes_nothing():
    specs = {"f": oracle.feature_spec("f", oracle.table_spec())}
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    before = copy.deepcopy(specs["f"].table_spec.stacked_table_spec)
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    assert specs["f"].table_spec.stacked_table_spec == before


def test_equal_tables_that_are_different_objects_are_one_table():
    initializer = jax.nn.initializers.zeros
    specs = [oracle.feature_spec(name, oracle.table_spec(initializer=initializer)) for name in "ab"]
    embax.prepare_feature_specs_for_training(specs)
    assert specs[0].table_spec == specs[1].table_spec
    assert specs[1].table_spec.stacked_table_spec.total_sample_count == 20


def test_placement_belongs_to_equality_and_hash():
    initializer = jax.nn.initializers.zeros
    one, other = (oracle.feature_spec("f", oracle.table_spec(initializer=initializer)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    embax.prepare_feature_specs_for_training([one])
    assert one != other
    assert one.table_spec != other.table_spec
    assert hash(one) != hash(other)
    embax.prepare_feature_specs_for_training([other])
    assert one == other
    assert hash(one) == hash(other)


def test_a_stacked_table_spec_is_a_pytree_without_leaves():
    specs = [oracle.feature_spec("f", oracle.table_spec())]
    embax.prepare_feature_specs_for_training(specs)
    stack = specs[0].table_spec.stacked_table_spec
    assert jax.tree.leaves(stack) == []
    assert stack.replace(max_ids_per_partition=9).max_ids_per_partition == 9
    with pytest.raises(dataclasses.FrozenInstanceError):
        stack.combiner = "mean"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocabulary": 0}, "Table 'table': vocabulary_size is 0; it must be an integer from 1 to 2147483647"),
        ({"vocabulary": 2**31}, "Table 'table': vocabulary_size is 2147483648; it must be an integer from 1 to"),
        ({"dim": 2.5}, "Table 'table': embedding_dim is 2.5; it must be an integer"),
        ({"quantization_config": (0, 1, 3)}, "quantization_config is .0, 1, 3.; it must be a QuantizationConfig"),
        ({"combiner": "max"}, "Table 'table': combiner is 'max'; it must be one of 'sum', 'mean', 'sqrtn'"),
        ({"optimizer": "adam"}, "Table 'table': optimizer is 'adam'; it must be one of embax's optimizer specs"),
        ({"initializer": 0.1}, r"Table 'table': initializer is 0.1; it must be a function \(key, shape, dtype\)"),
        ({"max_ids_per_partition": -1}, "Table 'table': max_ids_per_partition is -1; it must be an integer from 1"),
        ({"suggested_coo_buffer_size_per_device": 0}, "suggested_coo_buffer_size_per_device is 0; it must be"),
        ({"name": ""}, "TableSpec: name is ''; it must be a non-empty string"),
    ],
)
def test_bad_tables(fields, message):
    with pytest.raises(ValueError, match=message):
        oracle.table_spec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_shape": (10,)}, r"Feature 'f': output_shape is \(10,\); it must be \(batch, embedding_dim\)"),
        ({"output_shape": (10, 9)}, "output_shape is .10, 9., wider than the 8 columns of table 'table'"),
        ({"input_shape": None}, "Feature 'f': input_shape is None; it must be a sequence of sizes"),
        ({"input_shape": ()}, r"Feature 'f': input_shape is \(\); it must be \(batch, valency\)"),
        ({"input_shape": (0, 3)}, "Feature 'f': a size of input_shape is 0"),
        ({"table_spec": "table"}, "Feature 'f': table_spec is 'table'; it must be a TableSpec"),
    ],
)
def test_bad_features(fields, message):
    arguments = {"name": "f", "table_spec": oracle.table_spec(), "input_shape": (10, 3), "output_shape": (10, 8)}
    with pytest.raises(ValueError, match=message):
        embax.FeatureSpec(**(arguments | fields))


def test_bad_trees():
    table = oracle.table_spec()
    with pytest.raises(ValueError, match="Two features are named 'f'; feature names must differ"):
        embax.prepare_feature_specs_for_training([oracle.feature_spec("f", table), oracle.feature_spec("f", table)])
    other = oracle.table_spec(vocabulary=51)
    with pytest.raises(ValueError, match="Two different tables are named 'table' .one of them used by feature 'g'"):
        embax.prepare_feature_specs_for_training([oracle.feature_spec("f", table), oracle.feature_spec("g", other)])
    with pytest.raises(ValueError, match="The feature specs are empty"):
        embax.prepare_feature_specs_for_training({})
    with pytest.raises(ValueError, match="every leaf must be a FeatureSpec"):
        embax.prepare_feature_specs_for_training([table])
    with pytest.raises(ValueError, match="prepare_feature_specs_for_training was not called"):
        embax.get_stacked_table_specs([oracle.feature_spec("f", table)])
    with pytest.raises(ValueError, match="2147483647 rows are 2147483648 when padded for 1 devices of 4 SparseCores"):
        embax.prepare_feature_specs_for_training(
            [oracle.feature_spec("f", oracle.table_spec(vocabulary=2**31 - 1))], 1, 4
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_value": 1.0, "max_value": 1.0}, r"the range is \[1.0, 1.0\]; min_value must be below max_value"),
        ({"max_value": float("nan")}, "min_value must be below max_value, both finite"),
        ({"max_value": "b"}, "min_value must be below max_value"),
        ({"max_value": 1e-50}, "float32 must hold their difference"),
        ({"min_value": -1e300, "max_value": 1e300}, "float32 must hold their difference"),
        ({"num_buckets": 1}, "num_buckets is 1; it must be at least 2"),
    ],
)
def test_bad_quantization(fields, message):
    with pytest.raises(ValueError, match=message):
        embax.QuantizationConfig(**({"min_value": 0.0, "max_value": 1.0, "num_buckets": 256} | fields))


def test_quantization_as_tuple():
    assert embax.QuantizationConfig(0.0, 15.0, 256).as_tuple() == (0.0, 15.0, 256)


def test_placed_specs_cannot_be_changed():
    table = oracle.table_spec()
    specs = [oracle.feature_spec("f", table)]
    table.vocabulary_size = 60  # Before placement they may.
    embax.prepare_feature_specs_for_training(specs)
    for spec, field, value in (
        (table, "vocabulary_size", 70),
        (table, "combiner", "mean"),
        (specs[0], "output_shape", (1, 2)),
    ):
        with pytest.raises(AttributeError, match=f"'{spec.name}': {field} cannot be set to .* placed for training"):
            setattr(spec, field, value)
    table.vocabulary_size = 60


def test_what_was_placed_apart_is_refused():
    table = oracle.table_spec()
    specs = [oracle.feature_spec("f", table)]
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    late = [*specs, oracle.feature_spec("late", table)]
    with pytest.raises(
        ValueError, match="Feature 'late' has not been placed, but its table 'table' is in stack 'table' already"
    ):
        embax.prepare_feature_specs_for_training(late, 1, 4)
    with pytest.raises(ValueError, match="Feature 'late' has not been placed with its table 'table'"):
        embax.preprocess([[[1]], [[1]]], specs=late)
    with pytest.raises(
        ValueError, match=r"placed for \(devices, SparseCores a device\) \(1, 4\) and is now asked for on \(1, 2\)"
    ):
        embax.prepare_feature_specs_for_training(specs, 1, 2)
    other = [oracle.feature_spec("g", oracle.table_spec("other"))]
    embax.stack_tables(other, ["other"], stack_name="table")
    other.append(oracle.feature_spec("f", oracle.table_spec()))
    with pytest.raises(
        ValueError, match="Table 'table' needs a stack of its name, which the stack of table 'other' has"
    ):
        embax.prepare_feature_specs_for_training(other)


def test_two_tables_of_one_name_differ_in_a_field_that_is_named():
    one, two = oracle.table_spec(initializer=jax.nn.initializers.normal()), oracle.table_spec(combiner="mean")
    with pytest.raises(ValueError, match="they differ in initializer, combiner. Table names must differ"):
        embax.prepare_feature_specs_for_training([oracle.feature_spec("f", one), oracle.feature_spec("g", two)])
