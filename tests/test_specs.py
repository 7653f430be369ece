"""Specs: fields, checks, equality, placement."""

import copy
import dataclasses

import jax
import numpy as np
import oracle
import pytest

import embax
from embax._stacking.plan import make_plan


def fields_of(specs):
    """All fields of all features and tables: which objects they are."""
    return [
        {name: id(value) for name, value in vars(spec).items()}
        for leaf in jax.tree.leaves(specs)
        for spec in (leaf, leaf.table_spec)
    ]


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
    before, fields = copy.deepcopy(specs["f"].table_spec.stacked_table_spec), fields_of(specs)
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    assert specs["f"].table_spec.stacked_table_spec == before
    assert fields_of(specs) == fields  # Packers are kept by the identity of the fields.


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


TABLE_CHANGES = [
    ("name", "", "TableSpec: name is ''; it must be a non-empty string"),
    ("name", [], r"TableSpec: name is \[\]; it must be a non-empty string"),
    ("vocabulary_size", 0, "Table 'bad': vocabulary_size is 0; it must be an integer from 1 to 2147483647"),
    ("vocabulary_size", 2.5, "Table 'bad': vocabulary_size is 2.5; it must be an integer"),
    ("embedding_dim", "x", "Table 'bad': embedding_dim is 'x'; it must be an integer"),
    ("combiner", "foo", "Table 'bad': combiner is 'foo'; it must be one of 'sum', 'mean', 'sqrtn'"),
    ("max_ids_per_partition", -1, "Table 'bad': max_ids_per_partition is -1; it must be"),
    ("max_unique_ids_per_partition", "x", "Table 'bad': max_unique_ids_per_partition is 'x'; it must be"),
    ("suggested_coo_buffer_size_per_device", 0, "Table 'bad': suggested_coo_buffer_size_per_device is 0; it"),
    ("optimizer", None, "Table 'bad': optimizer is None; it must be one of embax's optimizer specs"),
    ("quantization_config", 3, "Table 'bad': quantization_config is 3; it must be a QuantizationConfig"),
]
FEATURE_CHANGES = [
    ("name", 3, "FeatureSpec: name is 3; it must be a non-empty string"),
    ("output_shape", (0, 8), "Feature 'bad': a size of output_shape is 0; it must be an integer from 1"),
    ("output_shape", (8,), r"Feature 'bad': output_shape is \(8,\); it must be \(batch, embedding_dim\)"),
    ("output_shape", (8, 9), r"Feature 'bad': output_shape is \(8, 9\), wider than the 8 columns of table 'bad'"),
    ("input_shape", None, "Feature 'bad': input_shape is None; it must be a sequence of sizes"),
    ("table_spec", None, "Feature 'bad': table_spec is None; it must be a TableSpec"),
]


def stack_good_tables(specs):
    return embax.stack_tables(specs, ["good", "also good"])


PLACE = [embax.prepare_feature_specs_for_training, embax.auto_stack_tables, stack_good_tables]


@pytest.mark.parametrize("place", PLACE)
@pytest.mark.parametrize(
    ("of_table", "field", "value", "message"),
    [(True, *change) for change in TABLE_CHANGES] + [(False, *change) for change in FEATURE_CHANGES],
)
def test_fields_that_were_set_are_checked_when_they_are_placed(place, of_table, field, value, message):
    specs = [oracle.feature_spec(name, oracle.table_spec(name)) for name in ("good", "also good", "bad")]
    specs[0].input_shape = [10, np.int64(3)]
    setattr(specs[2].table_spec if of_table else specs[2], field, value)
    leaves = specs[:2] if field == "table_spec" else specs
    before = fields_of(leaves)
    with pytest.raises(ValueError, match=message):
        place(specs)
    assert fields_of(leaves) == before


def test_fields_that_were_set_are_normalized_when_they_are_placed():
    table = oracle.table_spec()
    specs = [oracle.feature_spec("f", table)]
    specs[0].input_shape, specs[0].output_shape, table.vocabulary_size = [10, 3], [np.int64(10), 8], np.int64(60)
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    assert (specs[0].input_shape, specs[0].output_shape) == ((10, 3), (10, 8))
    assert type(table.vocabulary_size) is int
    assert type(table.stacked_table_spec.stack_vocab_size) is int
    assert specs[0].table_spec is table


@pytest.mark.parametrize("place", PLACE[:2])
def test_a_table_that_does_not_fit_leaves_all_as_they_were(place):
    sizes = {"a": 50, "b": 2**31 - 1}
    specs = [oracle.feature_spec(name, oracle.table_spec(name, rows, dim=8)) for name, rows in sizes.items()]
    specs[1].table_spec.combiner = "mean"  # So that they are not stacked.
    before = fields_of(specs)
    with pytest.raises(ValueError, match="Stack 'b': 2147483647 rows are 2147483648 when padded for 2 devices"):
        place(specs, 2)
    assert fields_of(specs) == before
    specs[1].table_spec.vocabulary_size = 60
    place(specs, 1)  # Other counts than in the call that failed.
    assert {stack.num_devices for stack in embax.get_stacked_table_specs(specs).values()} == {1}


def test_counts_left_out_are_those_of_placed_tables():
    def three():
        specs = [oracle.feature_spec(name, oracle.table_spec(name)) for name in "abc"]
        return embax.stack_tables(specs, ["a"], 2, 3)

    for place in (
        embax.prepare_feature_specs_for_training,
        embax.auto_stack_tables,
        lambda specs, *counts: embax.stack_tables(specs, ["b", "c"], *counts),
    ):
        for counts in ((), (2,), (None, 3), (2, 3)):
            specs = place(three(), *counts)
            stacks = embax.get_stacked_table_specs(specs).values()
            assert {(stack.num_devices, stack.num_sparsecores_per_device) for stack in stacks} == {(2, 3)}
            assert make_plan(specs).num_sparsecores == 6
        for counts, wanted in (((1,), r"\(1, 3\)"), ((None, 4), r"\(2, 4\)"), ((1, 4), r"\(1, 4\)")):
            specs = three()
            before = fields_of(specs)
            with pytest.raises(
                ValueError,
                match=rf"table 'a' was placed for \(devices, SparseCores a device\) \(2, 3\) and is now asked for on {wanted}; "
                "leave global_device_count and num_sc_per_device out",
            ):
                place(specs, *counts)
            assert fields_of(specs) == before


def test_tables_that_were_placed_for_different_counts():
    specs = [oracle.feature_spec(name, oracle.table_spec(name)) for name in "abc"]
    embax.stack_tables(specs[:1], ["a"], 2, 3)
    embax.stack_tables(specs[1:2], ["b"], 1, 3)
    with pytest.raises(
        ValueError,
        match=r"placed for different \(devices, SparseCores a device\): table 'a' for \(2, 3\), table 'b' for \(1, 3\); make",
    ):
        embax.prepare_feature_specs_for_training(specs)


@pytest.mark.parametrize("counts", [(1, 2**16 + 1), (2**14, 5), (10**5, 10**7)])
def test_too_many_sparsecores(counts):
    specs = [oracle.feature_spec("f", oracle.table_spec())]
    before = fields_of(specs)
    message = (
        f"global_device_count={counts[0]} devices of num_sc_per_device={counts[1]} SparseCores are "
        f"{counts[0] * counts[1]} SparseCores, above the limit of 65536 in all"
    )
    for place in (
        embax.prepare_feature_specs_for_training,
        embax.auto_stack_tables,
        lambda specs, *counts: embax.stack_tables(specs, ["table"], *counts),
    ):
        with pytest.raises(ValueError, match=message):
            place(specs, *counts)
    assert fields_of(specs) == before
    embax.prepare_feature_specs_for_training(specs, 2**14, 4)


def test_the_valency_is_the_last_size_of_the_input_shape():
    ids = np.arange(40) % 50
    for input_shape, valency in (((40,), None), ((40, 3), 3), ((2, 20, 1), 1), ((40, 1, 3), 3)):
        feature = embax.FeatureSpec(
            name="f", table_spec=oracle.table_spec(), input_shape=input_shape, output_shape=(40, 8)
        )
        embax.prepare_feature_specs_for_training(feature)
        assert make_plan(feature).stacks[0].features[0].valency == valency
        if valency == 3:
            with pytest.raises(ValueError, match="input_shape has one id a sample; here it has 3"):
                embax.preprocess(ids, specs=feature)
        else:
            embax.preprocess(ids, specs=feature)


@pytest.mark.parametrize("place", PLACE)
def test_what_is_no_feature_tree(place):
    for specs, message in (
        (3, "The feature specs hold 3; every leaf must be a FeatureSpec"),
        (["ta"], "The feature specs hold 'ta'; every leaf must be"),
        (None, r"The feature specs are empty \(None\): there must be at least one FeatureSpec"),
    ):
        with pytest.raises(ValueError, match=message):
            place(specs)
