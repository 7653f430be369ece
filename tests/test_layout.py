"""The maps between logical and physical rows, and the first values of tables."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embax
from embax._stacking import layout
from embax._stacking.plan import RowPlacement, TablePlan

PLACES = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(0, 8), st.integers(0, 3))


def place(vocabulary, num_sparsecores, rotation, blocks_before):
    """A table of 3 columns, and the shape of a stack that holds it with other tables around."""
    table = TablePlan("t", 3, RowPlacement(vocabulary, 8 * blocks_before, rotation % num_sparsecores))
    rows_per_sparsecore = 8 * blocks_before + (vocabulary // (8 * num_sparsecores) + 2) * 8
    return table, (rows_per_sparsecore * num_sparsecores, 8)


@given(PLACES)
def test_physical_rows_are_distinct_and_on_the_owner(places):
    vocabulary, num, rotation, _ = places
    table, (num_rows, _) = place(*places)
    ids = np.arange(vocabulary)
    rows = layout.physical_rows(ids, table.rows, num_rows, num)
    assert len(set(rows.tolist())) == vocabulary
    np.testing.assert_array_equal(rows // (num_rows // num), (ids + rotation) % num)
    assert int(layout.physical_rows(vocabulary - 1, table.rows, num_rows, num)) == rows[-1]


@given(PLACES)
@settings(max_examples=40)  # JAX compiles each shape.
def test_put_and_take_are_inverse_and_touch_nothing_else(places):
    vocabulary, num, _, _ = places
    table, shape = place(*places)
    values = np.random.default_rng(0).standard_normal((vocabulary, 3)).astype(np.float32)
    stacked = np.full(shape, -1.0, np.float32)
    layout.put_table(stacked, values, table, num)
    np.testing.assert_array_equal(layout.take_table(stacked, table, num), values)
    np.testing.assert_array_equal(layout.take_table(jnp.asarray(stacked), table, num), values)
    rows = layout.physical_rows(np.arange(vocabulary), table.rows, shape[0], num)
    np.testing.assert_array_equal(stacked[rows, :3], values)
    assert (stacked == -1).sum() == stacked.size - values.size


@st.composite
def placed_specs(draw):
    """Features of one to four tables, some stacked and some alone, on any number of devices and SparseCores."""
    devices, sparsecores = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    sizes = st.integers(1, 60) | st.just(8 * devices * sparsecores)
    tables = [
        oracle.table_spec(f"t{number}", draw(sizes), draw(st.integers(1, 8)))
        for number in range(draw(st.integers(1, 4)))
    ]
    specs = {table.name: oracle.feature_spec(table.name, table) for table in tables}
    stacked = draw(st.lists(st.sampled_from(sorted(specs)), unique=True, max_size=4))
    if stacked:
        rotation = draw(st.sampled_from([None, 0, 2, -1]))
        embax.stack_tables(specs, stacked, devices, sparsecores, rotation, stack_name="stack")
    return embax.prepare_feature_specs_for_training(specs, devices, sparsecores)


def rows_of(table):
    """The physical row of each id, by the formula of the layout alone."""
    setting, stack = table.setting_in_stack, table.stacked_table_spec
    N = stack.num_devices * stack.num_sparsecores_per_device
    return [
        ((r % N + setting.shard_rotation) % N) * (stack.stack_vocab_size // N) + r // N + setting.row_offset_in_shard
        for r in range(table.vocabulary_size)
    ]


@given(placed_specs())
@settings(max_examples=60)
def test_row_ids_are_those_of_the_formula_and_inverse(specs):
    names = list(embax.get_table_specs(specs))
    held = {name: {} for name in embax.get_stacked_table_specs(specs)}
    for number, (name, table) in enumerate(embax.get_table_specs(specs).items()):
        rows = rows_of(table)
        ids = np.arange(table.vocabulary_size)
        np.testing.assert_array_equal(embax.physical_row_ids(name, ids, specs=specs), rows)
        assert embax.physical_row_ids(name, table.vocabulary_size - 1, specs=specs) == rows[-1]
        for id_, row in enumerate(rows):
            held[table.stacked_table_spec.stack_name][row] = (number, id_)
    for name, stack in embax.get_stacked_table_specs(specs).items():
        expected = [held[name].get(row, (-1, -1)) for row in range(stack.stack_vocab_size)]
        found = embax.logical_row_ids(name, np.arange(stack.stack_vocab_size), specs=specs)
        np.testing.assert_array_equal(np.stack(found, axis=1), expected)
        index, id_ = embax.logical_row_ids(name, stack.stack_vocab_size - 1, specs=specs)
        assert (index, id_) == expected[-1]
        if id_ >= 0:
            assert embax.physical_row_ids(names[index], id_, specs=specs) == stack.stack_vocab_size - 1


def two_tables(devices=2, sparsecores=3, vocabularies=(10, 60)):
    """Tables a and b of one stack "a_b"."""
    tables = [oracle.table_spec(name, rows, 5) for name, rows in zip("ab", vocabularies, strict=True)]
    specs = [oracle.feature_spec(table.name, table) for table in tables]
    return embax.stack_tables(specs, ["a", "b"], devices, sparsecores)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_row_ids_keep_kind_and_shape(dtype):
    specs = two_tables(vocabularies=(10, 1000))  # More rows than the narrow types hold.
    ids = np.arange(60).reshape(3, 4, 5).astype(dtype)
    expected = np.reshape(rows_of(specs[1].table_spec)[:60], ids.shape)
    rows = embax.physical_row_ids("b", ids, specs=specs)
    assert isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(rows, expected, strict=True)
    back = embax.logical_row_ids("a_b", rows.astype(np.uint32), specs=specs)
    np.testing.assert_array_equal(back.ids, ids)
    np.testing.assert_array_equal(back.table_indices, np.ones_like(ids))
    if ids.itemsize < 8:
        physical, logical = (
            lambda ids: embax.physical_row_ids("b", ids, specs=specs),
            lambda rows: embax.logical_row_ids("a_b", rows, specs=specs),
        )
        for transform in (lambda function: function, jax.jit):
            rows = transform(physical)(jnp.asarray(ids))
            assert isinstance(rows, jax.Array)
            np.testing.assert_array_equal(rows, expected.astype(np.int32), strict=True)
            back = transform(logical)(rows)
            np.testing.assert_array_equal(back.ids, ids.astype(np.int32), strict=True)
            np.testing.assert_array_equal(back.table_indices, np.ones_like(ids, np.int32), strict=True)
    assert isinstance(embax.physical_row_ids("b", 7, specs=specs), int)
    assert isinstance(embax.logical_row_ids("a_b", 7, specs=specs).ids, int)


def test_traced_row_ids_that_cannot_be_checked():
    specs = two_tables()
    bad = np.array([-1, 9, 10, 2**31 - 1, -(2**31)], np.int32)
    rows = jax.jit(lambda ids: embax.physical_row_ids("a", ids, specs=specs))(bad)
    end = specs[0].table_spec.stacked_table_spec.stack_vocab_size
    assert rows.tolist() == [end, rows_of(specs[0].table_spec)[9], end, end, end]
    found = jax.jit(lambda rows: embax.logical_row_ids("a_b", rows, specs=specs))(np.array([-1, 0, end, 2**31 - 1]))
    assert found.ids.tolist() == [-1, 0, -1, -1]
    assert found.table_indices.tolist() == [-1, 0, -1, -1]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (10, "Table 'a': an id is 10, outside the vocabulary of 10 rows (ids 0 to 9). Remove it, map it"),
        (-1, "an id is -1, outside"),
        (2**70, f"an id is {2**70}, outside"),
        (np.int8(-1), "an id is -1, outside"),
        (np.array([[0, 1], [2, 10]]), "an id is 10 at index [1, 1], outside"),
        (np.array([2**64 - 1], np.uint64), f"an id is {2**64 - 1} at index [0], outside"),
        (jnp.array([3, -7]), "an id is -7 at index [1], outside"),
        (1.0, "an id is a float; it must be an int or an integer array"),
        (True, "an id is a bool; it"),
        ([1, 2], "an id is a list; it"),
        (np.array([1.0]), "an id is a float64 array; it"),
        (jnp.array([True]), "an id is a bool array; it"),
    ],
)
def test_ids_without_a_row(ids, text):
    with pytest.raises(ValueError) as error:
        embax.physical_row_ids("a", ids, specs=two_tables())
    assert text in str(error.value)


def test_rows_and_names_that_are_not_there():
    specs = two_tables()
    end = specs[0].table_spec.stacked_table_spec.stack_vocab_size
    for row in (end, -1, np.array([0, end])):
        with pytest.raises(
            ValueError, match=rf"Stack 'a_b': a row is {np.max(row) if np.ndim(row) else row}.*of {end} rows"
        ):
            embax.logical_row_ids("a_b", row, specs=specs)
    with pytest.raises(ValueError, match=r"no table 'c' in the specs; name one of \['a', 'b'\]"):
        embax.physical_row_ids("c", 0, specs=specs)
    with pytest.raises(ValueError, match=r"no stack 'a' in the specs; name one of \['a_b'\]"):
        embax.logical_row_ids("a", 0, specs=specs)


def initialized(num_sparsecores, vocabulary=1000, initializer=None, **fields):
    specs = {"f": oracle.feature_spec("f", oracle.table_spec(vocabulary=vocabulary, initializer=initializer, **fields))}
    embax.prepare_feature_specs_for_training(specs, 1, num_sparsecores)
    return embax.init_embedding_variables(jax.random.key(3), specs), specs


@pytest.mark.parametrize(
    "initializer",
    [
        jax.nn.initializers.normal(1.0),
        jax.nn.initializers.truncated_normal(0.5),
        jax.nn.initializers.uniform(1.0),
        jax.nn.initializers.glorot_uniform(),
        jax.nn.initializers.constant(2.0),
        jax.nn.initializers.zeros,
        lambda key, shape, dtype: jnp.arange(shape[0] * shape[1], dtype=dtype).reshape(shape),
    ],
)
def test_first_values_do_not_depend_on_the_number_of_sparsecores(initializer):
    results = []
    for num in (1, 3, 4):
        variables, specs = initialized(num, vocabulary=70_001, initializer=initializer, dim=5)
        results.append(oracle.tables_of(variables, specs)["table"][0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert results[0].shape == (70_001, 5)


def test_draws_have_the_distribution_asked_for():
    variables, specs = initialized(4, vocabulary=100_000, initializer=jax.nn.initializers.normal(0.5))
    values = oracle.tables_of(variables, specs)["table"][0]
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - 0.5) < 0.005
    assert len(np.unique(values, axis=0)) == 100_000  # No row, and so no chunk, repeats another.


def test_tables_of_one_key_differ_by_name():
    specs = [oracle.feature_spec(name, oracle.table_spec(name)) for name in "ab"]
    embax.prepare_feature_specs_for_training(specs)
    tables = oracle.tables_of(embax.init_embedding_variables(jax.random.key(0), specs), specs)
    assert not (tables["a"][0] == tables["b"][0]).any()


def test_slots_are_initialized_and_typed():
    variables, specs = initialized(4, optimizer=embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=0.3))
    assert isinstance(variables["table"].slot, embax.AdagradSlotVariables)
    np.testing.assert_array_equal(oracle.tables_of(variables, specs)["table"][1], np.float32(0.3))


def test_an_initializer_of_the_wrong_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"Table 'table': an initializer returned float32\[8\]; it must return float32\[1000, 8\]"
    ):
        initialized(4, initializer=lambda key, shape, dtype: jnp.zeros(shape[1], dtype))


def test_unplaced_specs_are_refused():
    specs = {"f": oracle.feature_spec("f", oracle.table_spec())}
    with pytest.raises(ValueError, match="prepare_feature_specs_for_training was not called"):
        embax.init_embedding_variables(jax.random.key(0), specs)


def test_equal_initializers_are_compiled_once():
    from embax._first_values import _draw_by_chunks

    initialized(4, initializer=jax.nn.initializers.truncated_normal(0.125))
    compiled = _draw_by_chunks._cache_size()
    same, _ = initialized(4, initializer=jax.nn.initializers.truncated_normal(0.125))
    assert _draw_by_chunks._cache_size() == compiled
    other, _ = initialized(4, initializer=jax.nn.initializers.truncated_normal(0.25))
    assert _draw_by_chunks._cache_size() == compiled + 1
    np.testing.assert_allclose(other["table"].table, 2 * same["table"].table, rtol=1e-6)


def test_drawing_needs_memory_for_a_chunk_only():
    from embax import _first_values

    for vocabulary, dim, temporary_mb in ((10, 1000, 1), (100_000, 32, 4), (2_000_000, 8, 16), (4_000_000, 64, 32)):
        table = TablePlan("t", dim, RowPlacement(vocabulary, 0, 0))
        rows = _first_values._chunk_rows(table, table.embedding_dim)
        assert rows * dim <= _first_values.MAX_CHUNK_ELEMENTS
        assert rows < 2 * vocabulary
        compiled = _first_values._draw_by_chunks.lower(
            jax.ShapeDtypeStruct((vocabulary, dim), jnp.float32),
            jax.random.key(0),
            table.rows,
            initializer=_first_values._ByValue.of(oracle.NORMAL),
            chunk_rows=rows,
            dim=dim,
            num_sparsecores=1,
            here=1,
        ).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < temporary_mb << 20
