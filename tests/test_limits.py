"""Limits that drop, grow and raise: against the definition, and what users see of them."""

import copy
import pickle

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from test_pack import assert_same_as_reference, batches, make_feature, make_table, place

import embax
from embax._preprocess.packer import Packer
from embax._stacking.plan import make_plan


@settings(deadline=None, max_examples=200)
@given(batches(), st.integers(0, 2**32 - 1))
def test_dropping_equals_the_reference_bit_for_bit(batch, seed):
    packer = Packer(batch.specs, limits="drop", num_local_devices=batch.local_devices)
    rng = np.random.default_rng(seed)
    limits = packer._limits.current
    limits[:, 0] = rng.integers(1, 12, len(limits))
    limits[:, 1] = rng.integers(1, 12, len(limits))
    limits[:, 2] = 8 * packer.plan.num_sparsecores_per_device * rng.integers(0, 6, len(limits))
    packed = packer(batch.ids, batch.weights)
    assert_same_as_reference(packer, packed, batch.rows, batch.row_weights, drop=True)


def test_dropping_counts_by_stack_and_by_table():
    tables = [make_table(name, 64, max_ids_per_partition=2) for name in "ab"]
    features = {f"{t.name}{i}": make_feature(f"{t.name}{i}", t) for t in tables for i in range(2)}
    specs = embax.stack_tables(features, ["a", "b"], 1, 1, stack_to_max_ids_per_partition=lambda *_: 6)
    # One SparseCore, one partition: sorted by row, table a comes first.
    ids = {"a0": [[1, 1, 2], [3]], "a1": [[3]], "b0": [[5, 5], [4]], "b1": [[], [7]]}
    packed = embax.preprocess(ids, specs=specs, limits="drop")
    name = packed.layout.stacks[0].name
    assert packed.embedding_ids[:7].tolist()[:6] == [1, 2, 3, 3, 68, 69]
    assert packed.row_pointers[0] == 6
    assert packed.stats.id_drop_counters == {name: 1}
    assert packed.stats.dropped_ids == {"a": 0, "b": 1}
    assert packed.stats.max_ids_per_partition[name].tolist() == [7]  # Before dropping.


def test_duplicates_of_a_dropped_id_count():
    specs = place({"f": make_feature("f", make_table(max_ids_per_partition=1))}, 1, 1)
    packed = embax.preprocess({"f": [[3, 4, 4, 4]]}, specs=specs, limits="drop")
    assert packed.stats.id_drop_counters == {"t": 3}
    assert embax.preprocess({"f": [[3, 3]]}, specs=specs, limits="drop").stats.id_drop_counters == {"t": 0}


def test_nothing_counts_as_dropped_elsewhere():
    specs = place({"f": make_feature("f", make_table())}, 1, 1)
    assert embax.preprocess({"f": [[1]]}, specs=specs).stats.dropped_ids == {}


def test_a_small_buffer_holds_what_fits():
    # 800 ids of gain 1, and room for 64 of them.
    table = oracle.table_spec(
        vocabulary=4096,
        initializer=jax.nn.initializers.ones,
        suggested_coo_buffer_size_per_device=64,
        max_ids_per_partition=800,
        max_unique_ids_per_partition=800,
    )
    specs = place({"f": oracle.feature_spec("f", table, batch=8, valency=100)}, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": np.arange(800).reshape(8, 100)}, specs=specs, limits="drop")
    assert packed.stats.id_drop_counters == {"table": 800 - 64}
    activations = embax.lookup(packed, variables, specs=specs)["f"]
    assert float(activations[:, 0].sum()) == 64


def test_gains_are_those_of_the_whole_sample():
    specs = place({"f": make_feature("f", make_table(max_ids_per_partition=2, combiner="mean"))}, 1, 1)
    packed = embax.preprocess({"f": np.array([[0, 1, 2, 3]])}, specs=specs, limits="drop")
    assert packed.gains[:2].tolist() == [0.25, 0.25]


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize(
    "ids",
    [
        pytest.param(np.full((64, 20), 7), id="one id"),
        pytest.param(np.arange(64 * 20).reshape(64, 20) % 250 * 4, id="one SparseCore"),
    ],
)
def test_growing_limits_are_exact_under_any_skew(ids, backend):
    table = oracle.table_spec(vocabulary=1000, max_ids_per_partition=8, max_unique_ids_per_partition=8)
    specs = place({"f": oracle.feature_spec("f", table, batch=64, valency=20)}, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": ids}, specs=specs, limits="grow")
    with pytest.raises(embax.LimitExceededError):
        embax.preprocess({"f": ids}, specs=specs)
    gradient = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    (rows,) = oracle.tables_of(variables, specs)["table"]
    with embax.use_backend(backend):
        activations = embax.lookup(packed, variables, specs=specs)["f"]
        new = embax.apply_gradients({"f": jnp.asarray(gradient)}, packed, variables, specs=specs)
    np.testing.assert_allclose(activations, oracle.lookup(rows, ids, "sum"), rtol=1e-5, atol=1e-5)
    wanted, touched = oracle.row_gradients(1000, [(ids, None, gradient)], "sum")
    (new_rows,) = oracle.tables_of(new, specs)["table"]
    np.testing.assert_allclose(new_rows, rows - 0.1 * wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(new_rows[~touched], rows[~touched])


def test_the_exception_mends_itself():
    tables = [make_table(name, 64) for name in "ab"]
    features = {t.name: make_feature(t.name, t) for t in tables}
    limit = {"stack_to_max_ids_per_partition": lambda *_: 2, "stack_to_max_unique_ids_per_partition": lambda *_: 1}
    specs = embax.stack_tables(features, ["a", "b"], 1, 2, **limit)
    ids = {"a": np.arange(12).reshape(4, 3), "b": np.arange(12).reshape(4, 3)}
    with pytest.raises(embax.LimitExceededError, match="stack_to_max_ids_per_partition= to the stacking") as raised:
        embax.preprocess(ids, specs=specs)
    assert isinstance(raised.value, ValueError)
    embax.update_preprocessing_parameters(specs, raised.value.stats)
    packed = embax.preprocess(ids, specs=specs)
    assert packed.stats.max_ids_per_partition["a_b"].max() == packed.layout.stacks[0].max_ids_per_partition
    assert (
        packed.stats.max_unique_ids_per_partition["a_b"].max() == packed.layout.stacks[0].max_unique_ids_per_partition
    )


def test_growth_beyond_the_specs_is_told_once(caplog):
    packer = Packer(place({"f": make_feature("f", make_table(vocabulary=100_000))}, 1, 1))
    notices = []
    for size in (10, 10, 1000, 10_000, 50_000):
        packer({"f": np.arange(size).reshape(-1, 1)})
        notices.append([r.getMessage() for r in caplog.records if (r.name, r.levelname) == ("embax", "WARNING")])
    assert notices[1] == []
    assert notices[2] == notices[4]
    (text,) = notices[4]
    assert (
        "first of all those of stack 't', and these limits grow: from [256, 256, 256] to [1288, 1288, 1288] (ids"
        in text
    )


def test_growth_of_the_first_batch_is_told_too(caplog):
    packer = Packer(place({"f": make_feature("f", make_table(vocabulary=1000, max_ids_per_partition=1))}, 1, 1))
    packer({"f": np.arange(100).reshape(-1, 1)})
    assert "from [1, 256, 8] to [160, 160, 168]" in caplog.text


def test_stacks_near_their_limits_grow_together():
    tables = [make_table(name, 5000) for name in ("a", "b", "c")]
    packer = Packer(place({t.name: make_feature(t.name, t) for t in tables}, 1, 1))

    def capacities(**sizes):
        packed = packer({name: np.arange(size).reshape(-1, 1) for name, size in sizes.items()})
        return {stack.name: stack.capacity for stack in packed.layout.stacks}

    first = capacities(a=1000, b=1000, c=1000)
    # a outgrows its limit, b comes within an eighth of its own, c stays far from it.
    second = capacities(a=first["a"] + 8, b=first["b"] - 80, c=900)
    assert second["a"] > first["a"]
    assert second["b"] > first["b"]
    assert second["c"] == first["c"]
    # A large one first: what needs less later neither shrinks nor grows.
    assert capacities(a=10, b=10, c=10) == second


def test_the_exception_travels_between_processes():
    specs = place({"f": make_feature("f", make_table(max_ids_per_partition=1))}, 1, 1)
    with pytest.raises(embax.LimitExceededError) as raised:
        embax.preprocess({"f": [[1, 2]]}, specs=specs)
    for copied in (pickle.loads(pickle.dumps(raised.value)), copy.copy(raised.value)):
        assert type(copied) is embax.LimitExceededError
        assert str(copied) == str(raised.value)
        assert copied.stats.max_ids_per_partition["t"].tolist() == [2]


def test_limits_are_part_of_the_layout():
    table = make_table(max_ids_per_partition=24, max_unique_ids_per_partition=23)
    specs = place({"f": make_feature("f", table)}, 1, 2)
    stack = embax.preprocess({"f": [[1]]}, specs=specs).layout.stacks[0]
    assert (stack.max_ids_per_partition, stack.max_unique_ids_per_partition) == (24, 23)
    assert stack.capacity == 24 * 2 * 2
    assert make_plan(specs).stacks[0].spec.max_ids_per_partition == 24
