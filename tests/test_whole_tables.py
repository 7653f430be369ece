"""Whole tables into stacks and shards, and back, against the formulas in plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_layout import placed_specs, rows_of, two_tables

import embax


def values_of(specs, dtype=np.float32):
    """For each table values that say where they belong: table, row, column."""
    return {
        name: (number * 10_000 + np.arange(table.vocabulary_size * table.embedding_dim))
        .reshape(table.vocabulary_size, table.embedding_dim)
        .astype(dtype)
        for number, (name, table) in enumerate(embax.get_table_specs(specs).items())
    }


def stacked_by_loops(tables, specs, pad_value):
    stacks = {
        name: np.full((stack.stack_vocab_size, stack.stack_embedding_dim), pad_value, np.float32)
        for name, stack in embax.get_stacked_table_specs(specs).items()
    }
    for name, table in embax.get_table_specs(specs).items():
        stack = stacks[table.stacked_table_spec.stack_name]
        for id_, row in enumerate(rows_of(table)):
            for column in range(table.embedding_dim):
                stack[row, column] = tables[name][id_, column]
    return stacks


def assert_equal_trees(found, expected):
    assert list(found) == list(expected)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), found, expected)


@given(placed_specs())
@settings(max_examples=60)
def test_stacking_is_that_of_the_formula_and_inverse(specs):
    tables = values_of(specs)
    stacks = embax.stack_and_shard_tables(tables, specs=specs)
    assert_equal_trees(stacks, stacked_by_loops(tables, specs, np.nan))
    assert_equal_trees(embax.unshard_and_unstack_tables(stacks, specs=specs), tables)
    for name, stack in stacks.items():  # The maps of ids agree.
        found = embax.logical_row_ids(name, np.arange(len(stack)), specs=specs)
        for row, (table, id_) in enumerate(zip(*found, strict=True)):
            if id_ < 0:
                assert np.isnan(stack[row]).all()
            else:
                values = list(tables.values())[table][id_]
                np.testing.assert_array_equal(stack[row, : len(values)], values)
                assert np.isnan(stack[row, len(values) :]).all()
    again = embax.stack_and_shard_tables(
        embax.unshard_and_unstack_tables(stacks, specs=specs), specs=specs, pad_value=np.nan
    )
    assert_equal_trees(again, stacks)


@pytest.mark.parametrize("rotation", [None, 0, 2, -1])
@pytest.mark.parametrize(("devices", "sparsecores"), [(1, 1), (2, 3), (5, 1)])
def test_jax_arrays_give_what_numpy_arrays_give(devices, sparsecores, rotation):
    tables = [
        oracle.table_spec(f"t{number}", rows, dim) for number, (rows, dim) in enumerate([(5, 8), (70, 3), (48, 8)])
    ]
    specs = [oracle.feature_spec(table.name, table) for table in tables]
    embax.stack_tables(specs, ["t1", "t0", "t2"], devices, sparsecores, rotation)
    values = values_of(specs)
    expected = embax.stack_and_shard_tables(values, specs=specs, pad_value=-1)
    stack = functools.partial(embax.stack_and_shard_tables, specs=specs, pad_value=-1)
    unstack = functools.partial(embax.unshard_and_unstack_tables, specs=specs)
    for transform in (lambda function: function, jax.jit):
        stacks = transform(stack)(jax.tree.map(jnp.asarray, values))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(stacks))
        assert_equal_trees(stacks, expected)
        tables = transform(unstack)(stacks)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tables))
        assert sorted(tables) == sorted(values)
        assert_equal_trees({name: tables[name] for name in values}, values)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16, np.int8, np.uint32, np.float32])
def test_dtypes_are_kept(dtype):
    specs = two_tables()
    values = values_of(specs, dtype)
    stacks = embax.stack_and_shard_tables(values, specs=specs, pad_value=0)
    assert stacks["a_b"].dtype == dtype
    assert_equal_trees(embax.unshard_and_unstack_tables(stacks, specs=specs), values)
    if dtype != np.float64:
        on_device = embax.stack_and_shard_tables(jax.tree.map(jnp.asarray, values), specs=specs, pad_value=0)
        assert_equal_trees(on_device, stacks)
        assert_equal_trees(embax.unshard_and_unstack_tables(on_device, specs=specs), values)


def test_variables_of_a_model_survive_the_round_trip():
    tables = [
        oracle.table_spec(name, rows, 5, optimizer=embax.AdagradOptimizerSpec(0.1))
        for name, rows in (("a", 40), ("b", 9), ("c", 30))
    ]
    specs = {table.name: oracle.feature_spec(table.name, table) for table in tables}
    embax.stack_tables(specs, ["b", "a"], 1, 3)
    embax.prepare_feature_specs_for_training(specs, 1, 3)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    logical = embax.unshard_and_unstack_tables(variables, specs=specs)
    assert list(logical) == ["a", "b", "c"]
    assert isinstance(logical["a"], embax.EmbeddingVariables)
    assert isinstance(logical["a"].slot, embax.AdagradSlotVariables)
    for name, arrays in oracle.tables_of(variables, specs).items():
        for found, expected in zip(jax.tree.leaves(logical[name]), arrays, strict=True):
            np.testing.assert_array_equal(found, expected, strict=True)
    # What trains on is the same with any padding, even NaN.
    ids = {"a": np.array([[39, 3, -1]]), "b": np.array([[8, 8, 0]]), "c": np.array([[1, 29, 2]])}
    packed = embax.preprocess(ids, specs=specs)
    again = embax.stack_and_shard_tables(logical, specs=specs)
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    trained = []
    for start in (variables, again):
        activations = embax.lookup(packed, start, specs=specs)
        new = embax.apply_gradients(activations, packed, start, specs=specs, activations=activations)
        trained.append((activations, embax.unshard_and_unstack_tables(new, specs=specs)))
    jax.tree.map(np.testing.assert_array_equal, *trained)
    assert (trained[0][1]["c"].table != logical["c"].table).any()


def mesh_of(devices, axis_type):
    return jax.make_mesh((devices,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:devices])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_sharded_arrays(devices, axis_type):
    # The rows of "a" do not divide by the devices, those of "b" do.
    specs = two_tables(devices, 3, vocabularies=(11, 64))
    values = values_of(specs)
    expected = embax.stack_and_shard_tables(values, specs=specs)
    mesh = mesh_of(devices, axis_type)
    by_rows = NamedSharding(mesh, P("x", None))
    stacks = jax.device_put(expected, by_rows)
    tables = embax.unshard_and_unstack_tables(stacks, specs=specs)
    assert_equal_trees(tables, values)
    assert tables["b"].sharding.is_equivalent_to(by_rows, 2)
    if devices > 1:
        assert not tables["a"].sharding.is_equivalent_to(by_rows, 2)
    # Each of these goes back: tables of the two shardings above, replicated ones, and a part on one device.
    replicated = jax.device_put(values, NamedSharding(mesh, P()))
    for given_tables in (tables, replicated, {"a": values["a"], "b": tables["b"]}):
        again = embax.stack_and_shard_tables(given_tables, specs=specs)
        assert_equal_trees(again, expected)
        assert len(again["a_b"].sharding.device_set) == devices
    jitted = jax.jit(lambda stacks: embax.unshard_and_unstack_tables(stacks, specs=specs))(stacks)
    assert_equal_trees(jitted, values)
    assert_equal_trees(jax.jit(lambda tables: embax.stack_and_shard_tables(tables, specs=specs))(jitted), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_tables_of_one_sharding_keep_it(axis_type):
    specs = two_tables(4, 2, vocabularies=(12, 64))
    values = values_of(specs)
    by_rows = NamedSharding(mesh_of(4, axis_type), P("x"))
    stacks = embax.stack_and_shard_tables(jax.device_put(values, by_rows), specs=specs)
    assert stacks["a_b"].sharding.is_equivalent_to(by_rows, 2)
    assert_equal_trees(stacks, embax.stack_and_shard_tables(values, specs=specs))


def test_results_are_new_arrays():
    """One SparseCore moves nothing, but a result that aliases its input would change with it, or be donated with it."""
    specs = embax.prepare_feature_specs_for_training(oracle.feature_spec("f", oracle.table_spec("t", 16, 8)), 1, 1)
    table = np.ones((16, 8), np.float32)
    results = [
        embax.stack_and_shard_tables({"t": table}, specs=specs)["t"],
        embax.unshard_and_unstack_tables({"t": table}, specs=specs)["t"],
        embax.shard_table(table, num_devices=1, num_sparsecores_per_device=1),
        embax.unshard_table(table[None], num_sparsecores_per_device=1),
    ]
    table[:] = 2
    assert all((result == 1).all() for result in results)
    on_device = jnp.asarray(table)
    result = embax.unshard_and_unstack_tables({"t": on_device}, specs=specs)["t"]
    on_device.delete()
    assert (result == 2).all()


def test_names_that_do_not_fit():
    specs = two_tables()
    values = values_of(specs)
    with pytest.raises(ValueError, match=r"The tables lack \['b'\]; pass exactly those of the specs, \['a', 'b'\]"):
        embax.stack_and_shard_tables({"a": values["a"]}, specs=specs)
    with pytest.raises(ValueError, match=r"The tables lack \['a'\] and have, unknown to the specs, \['c'\]; pass"):
        embax.stack_and_shard_tables({"c": values["a"], "b": values["b"]}, specs=specs)
    with pytest.raises(ValueError, match=r"The tables are a list; they must be a mapping"):
        embax.stack_and_shard_tables([], specs=specs)
    with pytest.raises(
        ValueError, match=r"The stacks lack \['a_b'\] and have, unknown to the specs, \['a', 'b'\]; pass"
    ):
        embax.unshard_and_unstack_tables(values, specs=specs)
    with pytest.raises(
        ValueError, match=r"Stack 'a_b' has \d+ rows, but its tables in the specs, \['a'\], have \d+; pass"
    ):
        embax.stack_and_shard_tables({"a": values["a"]}, specs=specs[:1])
    stacks = embax.stack_and_shard_tables(values, specs=specs)
    assert_equal_trees(embax.unshard_and_unstack_tables(stacks, specs=specs[:1]), {"a": values["a"]})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b: b[:-1], "Table 'b' has shape (59, 5); the specs say (60, 5)."),
        (lambda b: b[None], "Table 'b' has shape (1, 60, 5); the specs say (60, 5)."),
        (lambda b: b.tolist()[0][0], "Table 'b' is a float; it must be a NumPy or JAX array."),
        (
            lambda b: {"table": b},
            "Table 'b' has the structure PyTreeDef({'table': *}), but table 'a' of the same stack",
        ),
        (
            lambda b: np.ma.masked_array(b, b > 3),
            "Table 'b' is a masked array, whose mask would be lost. Fill the masked places: array.filled(0).",
        ),
        (lambda b: b.astype(np.float16), "its tables have different dtypes: 'a' float32, 'b' float16; convert them"),
    ],
)
def test_tables_that_do_not_fit(change, text):
    specs = two_tables()
    values = values_of(specs)
    with pytest.raises(ValueError) as error:
        embax.stack_and_shard_tables(values | {"b": change(values["b"])}, specs=specs)
    assert text in str(error.value)


def test_leaves_are_named_by_their_path():
    specs = two_tables()
    good = {name: embax.EmbeddingVariables(a, {"m": a}) for name, a in values_of(specs).items()}
    bad = good | {"b": embax.EmbeddingVariables(good["b"].table, {"m": good["a"].table})}
    with pytest.raises(ValueError, match=r"Table 'b'\.slot\['m'\] has shape \(10, 5\); the specs say \(60, 5\)"):
        embax.stack_and_shard_tables(bad, specs=specs)
    stacks = embax.stack_and_shard_tables(good, specs=specs)
    stacks["a_b"] = stacks["a_b"]._replace(table=stacks["a_b"].table[1:])
    with pytest.raises(ValueError, match=r"Stack 'a_b'\.table has shape \(\d+, 8\); the specs say \(\d+, 8\)"):
        embax.unshard_and_unstack_tables(stacks, specs=specs)


@pytest.mark.parametrize(
    ("pad_value", "dtype", "text"),
    [
        (np.nan, np.int32, "Stack 'a_b': pad_value nan is no int32; pass pad_value=0."),
        (0.5, np.int32, "pad_value 0.5 is no int32"),
        (-1, np.uint8, "pad_value -1 is no uint8"),
        (300, np.int8, "pad_value 300 is no int8"),
        ("0", np.float32, "pad_value is '0'; it must be a number."),
        (10**400, np.float32, "pad_value is a number of type int beyond the range of float64, and no float32; pass"),
        pytest.param(
            -(10**5000),
            np.int32,
            "pad_value is a number of type int beyond the range of float64, and no int32; pass",
            id="unprintable",
        ),
        (2**63, np.int64, "pad_value 9223372036854775808 is no int64"),
    ],
)
def test_padding_that_the_dtype_does_not_hold(pad_value, dtype, text):
    specs = two_tables()
    with pytest.raises(ValueError) as error:
        embax.stack_and_shard_tables(values_of(specs, dtype), specs=specs, pad_value=pad_value)
    assert text in str(error.value)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 4), st.integers(1, 3))
@settings(max_examples=40)
def test_one_table_into_shards_and_back(D, S, rows, dim):
    table = np.random.default_rng(0).standard_normal((rows * D * S, dim)).astype(np.float32)
    shards = embax.shard_table(table, num_devices=D, num_sparsecores_per_device=S)
    assert shards.shape == (D, S * rows, dim)
    for c in range(D):
        for s in range(S):
            for v in range(rows):
                np.testing.assert_array_equal(shards[c, s * rows + v], table[(v * D + c) * S + s])
    np.testing.assert_array_equal(embax.unshard_table(shards, num_sparsecores_per_device=S), table, strict=True)


def test_shards_hold_what_a_stack_without_padding_holds():
    specs = embax.prepare_feature_specs_for_training(oracle.feature_spec("f", oracle.table_spec("t", 48, 8)), 2, 3)
    table = values_of(specs)
    shards = embax.shard_table(table["t"], num_devices=2, num_sparsecores_per_device=3)
    stacks = embax.stack_and_shard_tables(table, specs=specs)
    np.testing.assert_array_equal(shards.reshape(48, 8), stacks["t"])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit, None], ids=str)
def test_shards_in_jax(axis_type):
    table = np.arange(24 * 3).reshape(24, 3).astype(jnp.bfloat16)
    expected = embax.shard_table(table, num_devices=2, num_sparsecores_per_device=3)
    given_table = jnp.asarray(table)
    if axis_type is not None:
        mesh = mesh_of(2, axis_type)
        given_table = jax.device_put(table, NamedSharding(mesh, P("x")))
    shard = functools.partial(embax.shard_table, num_devices=2, num_sparsecores_per_device=3)
    unshard = functools.partial(embax.unshard_table, num_sparsecores_per_device=3)
    for transform in (jax.jit, lambda function: function):
        shards = transform(shard)(given_table)
        assert isinstance(shards, jax.Array)
        np.testing.assert_array_equal(shards, expected, strict=True)
        np.testing.assert_array_equal(transform(unshard)(shards), table, strict=True)
    if axis_type is not None:
        assert shards.sharding.is_equivalent_to(NamedSharding(mesh, P("x", None, None)), 3)
        assert unshard(shards).sharding.is_equivalent_to(NamedSharding(mesh, P("x", None)), 2)


def test_tables_that_do_not_divide():
    table = np.zeros((50, 3))
    with pytest.raises(
        ValueError, match=r"a table of 50 rows does not divide by 2 devices of 3 SparseCores; pad it to 54 rows"
    ):
        embax.shard_table(table, num_devices=2, num_sparsecores_per_device=3)
    with pytest.raises(ValueError, match=r"50 rows of a device do not divide by 3 SparseCores; pass the number"):
        embax.unshard_table(table[None], num_sparsecores_per_device=3)
    with pytest.raises(ValueError, match=r"the table is an array of shape \(50,\); it must be .* \[vocabulary, dim\]"):
        embax.shard_table(table[:, 0], num_devices=1, num_sparsecores_per_device=1)
    with pytest.raises(ValueError, match=r"the shards are a list; they must be .* \[devices, rows, dim\]"):
        embax.unshard_table([table], num_sparsecores_per_device=1)
    with pytest.raises(ValueError, match=r"shard_table: num_devices is 0; it must be an integer from 1"):
        embax.shard_table(table, num_devices=0, num_sparsecores_per_device=1)


def test_the_largest_int64_as_padding():
    specs = two_tables()
    stacks = embax.stack_and_shard_tables(values_of(specs, np.int64), specs=specs, pad_value=2**63 - 1)
    assert stacks["a_b"].max() == 2**63 - 1


def test_masked_arrays_are_refused():
    specs = two_tables()
    stack = embax.stack_and_shard_tables(values_of(specs), specs=specs)["a_b"]
    with pytest.raises(
        ValueError, match=r"Stack 'a_b' is a masked array, whose mask would be lost\. Fill .*\.filled\(0\)"
    ):
        embax.unshard_and_unstack_tables({"a_b": np.ma.masked_invalid(stack)}, specs=specs)
    table = np.ma.masked_array(np.zeros((6, 3)), mask=True)
    with pytest.raises(ValueError, match="shard_table: the table is a masked array, whose mask would be lost"):
        embax.shard_table(table, num_devices=2, num_sparsecores_per_device=3)
    with pytest.raises(ValueError, match="unshard_table: the array of shards is a masked array"):
        embax.unshard_table(table[None], num_sparsecores_per_device=3)


@pytest.mark.parametrize("array", [np.zeros, jnp.zeros])
def test_empty_tables(array):
    for shape, shards in (((0, 3), (2, 0, 3)), ((6, 0), (2, 3, 0)), ((0, 0), (2, 0, 0))):
        sharded = embax.shard_table(array(shape), num_devices=2, num_sparsecores_per_device=3)
        assert sharded.shape == shards
        assert embax.unshard_table(sharded, num_sparsecores_per_device=3).shape == shape
    with pytest.raises(
        ValueError, match=r"the shards are an array of shape \(0, 0, 3\), those of no device; pass those"
    ):
        embax.unshard_table(array((0, 0, 3)), num_sparsecores_per_device=3)
