"""Every optimizer against its formula in float64, by both lowerings, and against optax where every row is touched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import embax

STEPS = 20


# One row an optimizer: the spec, and its formula as a function (gradient, [table, *slots], step) -> [table, *slots].
def sgd(gradient, state, step):
    return [state[0] - 0.1 * gradient]


def decaying_sgd(gradient, state, step):
    return [state[0] - 0.1 / (1 + step) * gradient]


def adagrad(gradient, state, step):
    accumulator = state[1] + gradient**2
    moved = np.divide(gradient, np.sqrt(accumulator), out=np.zeros_like(gradient), where=gradient != 0)
    return [state[0] - 0.1 * moved, accumulator]


OPTIMIZERS = {
    "sgd": (embax.SGDOptimizerSpec(0.1), sgd),
    "sgd with a schedule": (embax.SGDOptimizerSpec(lambda step: 0.1 / (1 + step.astype(jnp.float32))), decaying_sgd),
    "adagrad": (embax.AdagradOptimizerSpec(0.1), adagrad),
    "adagrad from 0": (embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=0.0), adagrad),
}

VOCABULARY = 40


def draw_ids(rng, kind, batch=11):
    """Ids of one feature: dense with padding, duplicates, an empty sample; or one hot id."""
    if kind == "hot":
        return np.full((batch, 3), 7, np.int32)
    ids = rng.integers(0, VOCABULARY - 5, (batch, 3)).astype(np.int32)  # The last rows are never touched.
    ids[rng.random(ids.shape) < 0.3] = -1
    ids[2] = -1
    ids[3] = 5
    return ids


def make_features(num_sparsecores):
    """Tables of every optimizer, combiner and kind of ids, with one or two features each."""
    features, cases = {}, {}
    for name, (optimizer, formula) in OPTIMIZERS.items():
        for combiner in ("sum", "mean", "sqrtn"):
            dim = {"sum": 8, "mean": 5, "sqrtn": 32}[combiner]
            table = oracle.table_spec(f"{name} {combiner}", VOCABULARY, dim, combiner, optimizer)
            cases[table.name] = (formula, combiner)
            for kind in ("mixed", "hot"):
                feature = oracle.feature_spec(f"{table.name} {kind}", table, batch=11)
                features[feature.name] = feature
    return embax.prepare_feature_specs_for_training(features, 1, num_sparsecores), cases


@pytest.mark.parametrize("num_sparsecores", [1, 3, 4])
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_twenty_steps_follow_the_formula(backend, num_sparsecores):
    specs, cases = make_features(num_sparsecores)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    expected = {
        name: [array.astype(np.float64) for array in state]
        for name, state in oracle.tables_of(variables, specs).items()
    }
    first = oracle.tables_of(variables, specs)
    ever_touched = {name: np.zeros(VOCABULARY, bool) for name in cases}
    rng = np.random.default_rng(0)
    traces = 0

    @functools.partial(jax.jit, donate_argnames="variables")
    def train_step(variables, packed, gradients, step):
        nonlocal traces
        traces += 1
        activations = embax.lookup(packed, variables, specs=specs)
        return activations, embax.apply_gradients(
            gradients, packed, variables, specs=specs, step=step, activations=activations
        )

    for step in range(STEPS):
        ids = {name: draw_ids(rng, name.split()[-1]) for name in specs}
        weights = (
            {name: rng.uniform(0.1, 2, ids[name].shape).astype(np.float32) for name in specs} if step % 2 else None
        )
        gradients = {
            name: jnp.asarray(rng.standard_normal((11, spec.output_shape[-1])), jnp.float32)
            for name, spec in specs.items()
        }
        packed = embax.preprocess(ids, weights, specs=specs)
        with embax.use_backend(backend):
            activations, variables = train_step(variables, packed, gradients, jnp.int32(step))
        for table, (formula, combiner) in cases.items():
            of_table = [f"{table} {kind}" for kind in ("mixed", "hot")]
            given = [(ids[name], None if weights is None else weights[name], gradients[name]) for name in of_table]
            for name, (feature_ids, feature_weights, _) in zip(of_table, given, strict=True):
                wanted = oracle.lookup(expected[table][0], feature_ids, combiner, feature_weights)
                np.testing.assert_allclose(activations[name], wanted, rtol=2e-5, atol=2e-5)
            gradient, touched = oracle.row_gradients(VOCABULARY, given, combiner)
            new = formula(gradient, expected[table], step)
            expected[table] = [np.where(touched[:, None], n, o) for n, o in zip(new, expected[table], strict=True)]
            ever_touched[table] |= touched
    assert traces == 1
    result = oracle.tables_of(variables, specs)
    for table in cases:
        untouched = ~ever_touched[table]
        assert untouched.any()
        for got, wanted, before in zip(result[table], expected[table], first[table], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5, err_msg=table)
            np.testing.assert_array_equal(got[untouched], before[untouched])


@pytest.mark.parametrize(
    ("spec", "transformation"),
    [
        (embax.SGDOptimizerSpec(0.1), optax.sgd(0.1)),
        (embax.AdagradOptimizerSpec(0.1), optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0)),
    ],
)
def test_optax_takes_the_same_steps_when_every_row_is_touched(spec, transformation):
    specs = {
        "f": oracle.feature_spec("f", oracle.table_spec(vocabulary=12, dim=8, optimizer=spec), batch=12, valency=1)
    }
    embax.prepare_feature_specs_for_training(specs)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    dense = jnp.asarray(oracle.tables_of(variables, specs)["table"][0])
    state = transformation.init(dense)
    rng = np.random.default_rng(0)
    for _ in range(5):
        ids = rng.permutation(12).astype(np.int32)[:, None]
        gradient = jnp.asarray(rng.standard_normal((12, 8)), jnp.float32)
        packed = embax.preprocess({"f": ids}, specs=specs)
        variables = embax.apply_gradients({"f": gradient}, packed, variables, specs=specs)
        updates, state = transformation.update(jnp.zeros_like(dense).at[ids[:, 0]].set(gradient), state)
        dense = optax.apply_updates(dense, updates)
    np.testing.assert_allclose(oracle.tables_of(variables, specs)["table"][0], dense, rtol=1e-5, atol=1e-6)


def test_specs_are_equal_by_type_and_fields():
    assert embax.AdagradOptimizerSpec(0.1) == embax.AdagradOptimizerSpec(0.1)
    assert hash(embax.AdagradOptimizerSpec(0.1)) == hash(embax.AdagradOptimizerSpec(0.1))
    assert embax.AdagradOptimizerSpec(0.1) != embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=0.2)
    assert embax.SGDOptimizerSpec(0.1) != embax.AdagradOptimizerSpec(0.1)
    assert embax.SGDOptimizerSpec(-1.0) != embax.SGDOptimizerSpec(-2.0)  # Their hashes are the same.


def test_slots():
    spec = embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=0.25)
    initializers = spec.slot_variables_initializers()
    assert isinstance(initializers, embax.AdagradSlotVariables)
    assert spec.slot_variables_count() == 1
    assert float(initializers.accumulator(jax.random.key(0), (1,), jnp.float32)[0]) == 0.25
    assert embax.SGDOptimizerSpec().slot_variables_initializers() == embax.SGDSlotVariables()
    assert (spec.short_name(), embax.SGDOptimizerSpec().short_name()) == ("adagrad", "sgd")


def test_learning_rates():
    assert embax.SGDOptimizerSpec(0.5).get_learning_rate() == np.float32(0.5)
    assert embax.SGDOptimizerSpec(lambda: 0.25).get_learning_rate() == np.float32(0.25)
    schedule = embax.SGDOptimizerSpec(lambda step: 0.1 * step)
    assert schedule.get_learning_rate(2) == np.float32(0.2)
    with pytest.raises(ValueError, match="function of the step, and no step was given. Pass step="):
        schedule.get_learning_rate()
    with pytest.raises(ValueError, match="takes 2 arguments; it must take none, or the step alone"):
        embax.SGDOptimizerSpec(lambda step, rate: rate)
    for rate in ("0.1", float("nan"), True):
        with pytest.raises(ValueError, match="learning_rate is .*; it must be a number"):
            embax.SGDOptimizerSpec(rate)
    for schedule in (max, lambda *, step: step):
        with pytest.raises(ValueError, match="SGDOptimizerSpec: the learning rate schedule .* takes unknown"):
            embax.SGDOptimizerSpec(schedule)
    with pytest.raises(ValueError, match=r"returned an array of shape \(1,\); it must return a scalar"):
        embax.SGDOptimizerSpec(lambda: np.ones(1)).get_learning_rate()
    with pytest.raises(ValueError, match="initial_accumulator_value is -1; it must be a number of at least 0"):
        embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=-1)
