"""The maps between logical and physical rows, and the first values of tables."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
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
    from embax._variables import _draw_by_chunks

    initialized(4, initializer=jax.nn.initializers.truncated_normal(0.125))
    compiled = _draw_by_chunks._cache_size()
    same, _ = initialized(4, initializer=jax.nn.initializers.truncated_normal(0.125))
    assert _draw_by_chunks._cache_size() == compiled
    other, _ = initialized(4, initializer=jax.nn.initializers.truncated_normal(0.25))
    assert _draw_by_chunks._cache_size() == compiled + 1
    np.testing.assert_allclose(other["table"].table, 2 * same["table"].table, rtol=1e-6)


def test_drawing_needs_memory_for_a_chunk_only():
    from embax import _variables

    for vocabulary, dim in ((10, 1000), (2_000_000, 8)):
        table = TablePlan("t", dim, RowPlacement(vocabulary, 0, 0))
        rows = _variables._chunk_rows(table)
        assert rows * dim <= _variables.CHUNK_ELEMENTS
        assert rows < 2 * vocabulary
        compiled = _variables._draw_by_chunks.lower(
            jax.ShapeDtypeStruct((vocabulary, dim), jnp.float32),
            jax.random.key(0),
            table.rows,
            initializer=_variables._ByValue.of(oracle.NORMAL),
            chunk_rows=rows,
            dim=dim,
            num_sparsecores=1,
        ).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 32 << 20
