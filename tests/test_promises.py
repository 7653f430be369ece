"""Where embax differs from the reference on purpose: no lost id, no abort, no silent wrong row. One test for each promise."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import embax
from embax.nnx.embed import SparseCoreEmbed


def place(sparsecores=4, batch=4, valency=3, **fields):
    table = oracle.table_spec(**({"vocabulary": 50} | fields))
    features = {"f": oracle.feature_spec("f", table, batch=batch, valency=valency)}
    return embax.prepare_feature_specs_for_training(features, 1, sparsecores)


def activations_of(ids, specs, weights=None, **options):
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": ids}, None if weights is None else {"f": weights}, specs=specs, **options)
    return embax.lookup(packed, variables, specs=specs)["f"], oracle.tables_of(variables, specs)["table"][0]


@pytest.mark.parametrize("bad", [50, 51, 64, 2**31, 2**32 + 7, 2**62, -2, -(2**32)])
@pytest.mark.parametrize("ragged", [False, True])
def test_an_id_outside_the_vocabulary_is_refused(bad, ragged):
    ids = np.array([[1, 2], [3, bad]])
    with pytest.raises(ValueError, match=rf"Feature 'f', sample 1, position 1: id {bad} is outside .* has 50 rows"):
        embax.preprocess({"f": list(ids) if ragged else ids}, specs=place())


def test_int64_ids_are_not_cut():
    specs = place(vocabulary=50)
    wide, table = activations_of(np.array([[7, 49]] * 4, np.int64), specs)
    np.testing.assert_allclose(wide[0], table[7] + table[49], rtol=1e-6)
    with pytest.raises(ValueError, match=f"id {2**32 + 7}"):
        embax.preprocess({"f": np.array([[2**32 + 7]])}, specs=specs)


@pytest.mark.parametrize("ids", [np.ones((2, 2)), [[1.0, 2.0]], [np.array([1.5])], np.array([[True]])])
def test_ids_that_are_no_integers_are_refused(ids):
    with pytest.raises(ValueError, match="must be integers"):
        embax.preprocess({"f": ids}, specs=place())


def test_padding_contributes_nothing():
    got, table = activations_of(np.array([[3, -1, -1], [-1, -1, -1], [-1, 4, 3], [1, 1, -1]]), place(combiner="mean"))
    wanted = [table[3], 0 * table[0], (table[3] + table[4]) / 2, table[1]]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_what_aborted_the_process_is_an_exception():
    """In a process of its own, so that an abort would be seen."""
    code = """
import jax, numpy as np, embax
table = embax.TableSpec(name="t", vocabulary_size=50, embedding_dim=8, initializer=jax.nn.initializers.zeros,
    optimizer=embax.SGDOptimizerSpec(0.1), combiner="sum", max_ids_per_partition=1, max_unique_ids_per_partition=1)
specs = {"f": embax.FeatureSpec(name="f", table_spec=table, input_shape=(4, 3), output_shape=(4, 8))}
embax.prepare_feature_specs_for_training(specs, 2, 4)
for ids in (np.arange(24).reshape(8, 3) * 8 % 48, np.arange(21).reshape(7, 3), np.full((8, 3), 99)):
    try:
        embax.preprocess({"f": ids}, specs=specs)
    except ValueError as error:
        print(str(error).split(",")[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    limit, batch, ids = done.stdout.splitlines()
    assert limit == "Stack 't': a SparseCore of local device 0 has 3 ids for the rows of SparseCore 0"
    assert batch == "Feature 'f' has a batch of 7"
    assert ids == "Feature 'f'"


def test_limits_of_a_layer_grow_by_themselves():
    specs = {"f": oracle.feature_spec("f", oracle.table_spec(vocabulary=5000, max_ids_per_partition=1), batch=4)}
    layer = SparseCoreEmbed(specs, rngs=nnx.Rngs(0))
    table = oracle.tables_of(oracle.variables_of(layer), layer.feature_specs)["table"][0]
    for size in (1, 100, 1000):
        ids = np.arange(4 * size).reshape(4, size)
        np.testing.assert_allclose(
            layer(layer.preprocess({"f": ids}))["f"], oracle.lookup(table, ids, "sum"), rtol=2e-3, atol=2e-3
        )


def test_nothing_is_dropped_unless_asked_for():
    specs = place(sparsecores=1, max_ids_per_partition=2)
    ids = {"f": np.array([[1, 2, 3]])}
    with pytest.raises(embax.LimitExceededError, match=r"3 ids .* max_ids_per_partition=2"):
        embax.preprocess(ids, specs=specs)
    assert embax.preprocess(ids, specs=specs, limits="drop").stats.dropped_ids == {"table": 1}


def test_an_unknown_combiner_lists_the_combiners():
    with pytest.raises(ValueError, match="combiner is 'max'; it must be one of 'sum', 'mean', 'sqrtn'"):
        oracle.table_spec(combiner="max")


def test_a_mean_of_weights_that_sum_to_zero_is_zero():
    for weights in (np.zeros((4, 2)), np.array([[2.0, -2.0]] * 4)):
        got, _ = activations_of(np.array([[1, 2]] * 4), place(combiner="mean"), weights)
        np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, 1e39])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match=r"Feature 'f', sample 0, position 1: the weight is .*must be finite"):
        embax.preprocess({"f": [[1, 2]]}, {"f": [[1.0, weight]]}, specs=place())


def test_optimizers_are_equal_by_type_and_fields():
    specs = [
        embax.SGDOptimizerSpec(0.1),
        embax.SGDOptimizerSpec(-1),
        embax.SGDOptimizerSpec(-2),  # hash(-1) == hash(-2)
        embax.AdagradOptimizerSpec(0.1),
        embax.AdagradOptimizerSpec(0.1, 0.2),
    ]
    assert all((a == b) == (i == j) for i, a in enumerate(specs) for j, b in enumerate(specs))
    assert embax.AdagradOptimizerSpec(0.1) == embax.AdagradOptimizerSpec(0.1)


def test_stacking_is_part_of_equality_and_hash():
    one, other = place()["f"], place(max_ids_per_partition=99)["f"]
    same = place()["f"]
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    embax.update_preprocessing_parameters({"f": same}, embax.SparseDenseMatmulInputStats({"table": np.array([7])}))
    assert one != same
    assert hash(one) != hash(same)


def test_the_step_reaches_the_optimizer():
    specs = {
        "f": oracle.feature_spec("f", oracle.table_spec(optimizer=embax.SGDOptimizerSpec(lambda step: step * 1.0)))
    }
    layer = SparseCoreEmbed(specs, rngs=nnx.Rngs(0))
    packed = layer.preprocess({"f": np.array([[3]] * 10)})

    def loss(layer, step):
        return layer(packed, step=step)["f"].sum()

    before = oracle.tables_of(oracle.variables_of(layer), layer.feature_specs)["table"][0]
    for step, moved in ((0, 0.0), (5, 50.0)):
        nnx.grad(loss)(layer, step)
        after = oracle.tables_of(oracle.variables_of(layer), layer.feature_specs)["table"][0]
        np.testing.assert_allclose(before[3] - after[3], moved, rtol=1e-5)


@pytest.mark.parametrize("sparsecores", [None, 1, 3, 5, 6, 12])
def test_any_number_of_sparsecores(sparsecores):
    specs = place(sparsecores)
    assert specs["f"].table_spec.stacked_table_spec.num_sparsecores_per_device == (sparsecores or 4)
    ids = np.arange(12).reshape(4, 3)
    got, table = activations_of(ids, specs)
    np.testing.assert_allclose(got, oracle.lookup(table, ids, "sum"), rtol=1e-5, atol=1e-6)


def test_a_lookup_runs_on_cpu():
    assert jax.devices()[0].platform == "cpu"
    got, _ = activations_of(np.array([[1]] * 4), place())
    assert bool(jnp.isfinite(got).all())


def test_native_code_prints_nothing():
    code = """
import jax, numpy as np, embax
table = embax.TableSpec(name="t", vocabulary_size=50, embedding_dim=8, initializer=jax.nn.initializers.zeros,
    optimizer=embax.SGDOptimizerSpec(0.1), combiner="sum", max_ids_per_partition=1)
specs = {"f": embax.FeatureSpec(name="f", table_spec=table, input_shape=(4, 3), output_shape=(4, 8))}
embax.prepare_feature_specs_for_training(specs, 1, 4)
for limits in ("drop", "grow"):
    for size in (1, 10, 1000):
        embax.preprocess({"f": np.arange(4 * size).reshape(4, size) % 50}, specs=specs, limits=limits)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == ""
    notices = done.stderr.splitlines()
    assert len(notices) == 1
    assert notices[0].startswith("A batch is beyond the limits of the specs, first of all those of stack 't'")
