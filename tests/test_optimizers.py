"""Every optimizer against its formula in float64, by both lowerings, and against optax where every row is touched."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import embax
from embax._ops.native import ROW_RULES

STEPS = 20

# What runs on the native backend in plain JAX operations is among them.
pytestmark = pytest.mark.filterwarnings("ignore:CustomOptimizerSpec has no native row rule:embax.SlowPathWarning")


# The formulas, as functions (gradient, [table, *slots], step) -> [table, *slots], and one row an optimizer: spec and formula.
def sgd(gradient, state, step):
    return [state[0] - 0.1 * gradient]


def decaying_sgd(gradient, state, step):
    return [state[0] - 0.1 / (1 + step) * gradient]


def divide(numerator, denominator):
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def adagrad(gradient, state, step):
    accumulator = state[1] + gradient**2
    return [state[0] - 0.1 * divide(gradient, np.sqrt(accumulator)), accumulator]


def adagrad_momentum(gradient, state, step, beta2=1.0, exponent=2.0, nesterov=False):
    table, accumulator, momentum = state
    accumulator = beta2 * accumulator + (1 if beta2 == 1 else 1 - beta2) * gradient**2
    scaled = gradient * (accumulator + 1e-10) ** (-1 / exponent)
    momentum = 0.9 * momentum + scaled
    return [table - 0.1 * (0.9 * momentum + scaled if nesterov else momentum), accumulator, momentum]


def adam(gradient, state, step, b1=0.9, b2=0.999):
    table, momentum, velocity = state
    momentum = b1 * momentum + (1 - b1) * gradient
    velocity = b2 * velocity + (1 - b2) * gradient**2
    unbiased = [momentum / (1 - b1 ** (step + 1)), velocity / (1 - b2 ** (step + 1))]
    return [table - 0.1 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8), momentum, velocity]


def ftrl(gradient, state, step, power=-0.5, l1=0.0, l2=0.0, beta=0.0, multiply=False):
    table, accumulator, linear = state
    total = accumulator + gradient**2
    change = total**-power - accumulator**-power
    if multiply:
        linear, l1 = linear + 0.1 * gradient - change * table, 0.1 * l1
        denominator = total**-power + 2 * 0.1 * l2 + beta
    else:
        linear = linear + gradient - change / 0.1 * table
        denominator = (total**-power + beta) / 0.1 + 2 * l2
    return [(np.clip(linear, -l1, l1) - linear) / denominator, total, linear]


def laprop(gradient, state, step):
    table, mu, nu = state
    decay = 0.95 * (1 - 0.95**step) / (1 - 0.95 ** (step + 1))
    nu = nu * decay + (1 - decay) * (gradient**2 + 1e-30)
    mu = 0.9 * mu + np.sqrt(1 - 0.9**2) * gradient / np.sqrt(nu)
    return [table - 0.1 * mu, mu, nu]


def f2a(gradient, state, step, rho=0.5, l1=0.0, l2=0.0, max_multiplier=1e6):
    table, accumulator, count = state
    multiplier = np.minimum((max(step, 1) / (count + 1)) ** rho, max_multiplier)
    moved, accumulator = 0.1 * gradient, accumulator + gradient**2
    moved = multiplier * moved / np.sqrt(accumulator) + 0.1 * (l1 * np.sign(table) + l2 * table)
    return [table - moved, accumulator, count + 1]


def row_wise_adagrad(gradient, state, step):
    table, accumulator = state
    accumulator = accumulator + (gradient**2).mean(axis=1)
    return [table - 0.1 * gradient / (np.sqrt(accumulator)[:, None] + 1e-8), accumulator]


def row_wise_adam(gradient, state, step):
    table, momentum, velocity = state
    momentum = 0.9 * momentum + 0.1 * gradient
    velocity = 0.999 * velocity + 0.001 * (gradient**2).mean(axis=1)
    unbiased = momentum / (1 - 0.9 ** (step + 1)), velocity / (1 - 0.999 ** (step + 1))
    return [table - 0.1 * unbiased[0] / (np.sqrt(unbiased[1])[:, None] + 1e-8), momentum, velocity]


def altered(formula, value=np.inf, norm=np.inf, l2=0.0, decay=0.0):
    """A formula behind clipping of the gradient, L2, and decoupled decay at learning rate 0.1."""

    def step(gradient, state, step):
        gradient = np.clip(gradient, -value, value)
        size = np.linalg.norm(gradient, axis=1, keepdims=True)
        gradient = np.where(size > norm, gradient / np.maximum(size, 1e-300) * min(norm, 1e300), gradient)
        table, *slots = state
        return formula(gradient + l2 * table, [table - 0.1 * decay * table, *slots], step)

    return step


def custom_adagrad(gradient, table, accumulator, learning_rate):
    accumulator = accumulator + gradient * gradient
    return table - jnp.where(accumulator == 0, 0.0, learning_rate * gradient / jnp.sqrt(accumulator)), accumulator


def custom_row_wise_adagrad(gradient, table, accumulator, learning_rate):
    accumulator = accumulator + jnp.mean(gradient * gradient, axis=1, keepdims=True)
    return table - learning_rate * gradient / (jnp.sqrt(accumulator) + 1e-8), accumulator


ZEROS = (jax.nn.initializers.zeros,)

OPTIMIZERS = {
    "sgd": (embax.SGDOptimizerSpec(0.1), sgd),
    "adagrad": (embax.AdagradOptimizerSpec(0.1), adagrad),
    "adagrad_momentum": (embax.AdagradMomentumOptimizerSpec(0.1), adagrad_momentum),
    "adam": (embax.AdamOptimizerSpec(0.1), adam),
    "ftrl": (embax.FTRLOptimizerSpec(0.1), ftrl),
    "laprop": (embax.LaPropOptimizerSpec(0.1), laprop),
    "f2a": (embax.F2AOptimizerSpec(0.1), f2a),
    # Hyperparameters that take other branches of the rules.
    "sgd by schedule": (embax.SGDOptimizerSpec(lambda step: 0.1 / (1 + step.astype(jnp.float32))), decaying_sgd),
    "adagrad from 0": (embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=0.0), adagrad),
    "adagrad_momentum nesterov": (
        embax.AdagradMomentumOptimizerSpec(0.1, beta2=0.9, use_nesterov=True),
        functools.partial(adagrad_momentum, beta2=0.9, nesterov=True),
    ),
    "adagrad_momentum cubic": (
        embax.AdagradMomentumOptimizerSpec(0.1, exponent=3, initial_momentum_value=0.5),
        functools.partial(adagrad_momentum, exponent=3),
    ),
    "adam without decay": (
        embax.AdamOptimizerSpec(lambda: 0.1, beta_1=0, beta_2=0.5),
        functools.partial(adam, b1=0, b2=0.5),
    ),
    "ftrl regularized": (
        embax.FTRLOptimizerSpec(
            0.1, l1_regularization_strength=2.0, l2_regularization_strength=0.3, beta=0.2, initial_linear_value=0.5
        ),
        functools.partial(ftrl, l1=2.0, l2=0.3, beta=0.2),
    ),
    "ftrl multiplied": (
        embax.FTRLOptimizerSpec(0.1, -0.7, 2.0, 0.3, 0.2, multiply_linear_by_learning_rate=True),
        functools.partial(ftrl, power=-0.7, l1=2.0, l2=0.3, beta=0.2, multiply=True),
    ),
    "f2a regularized": (
        embax.F2AOptimizerSpec(
            0.1,
            0.7,
            initial_local_step_value=2,
            l1_regularization_strength=0.01,
            l2_regularization_strength=0.1,
            max_lr_multiplier=1.5,
        ),
        functools.partial(f2a, rho=0.7, l1=0.01, l2=0.1, max_multiplier=1.5),
    ),
    "row_wise_adagrad": (embax.RowWiseAdagradOptimizerSpec(0.1), row_wise_adagrad),
    "row_wise_adam": (embax.RowWiseAdamOptimizerSpec(0.1), row_wise_adam),
    "custom": (
        embax.CustomOptimizerSpec(0.1, custom_adagrad, slot_variable_initializers_tuple=ZEROS),
        adagrad,
    ),
    "custom row-wise": (
        embax.CustomOptimizerSpec(
            0.1, custom_row_wise_adagrad, slot_variable_initializers_tuple=ZEROS, slots_of_one_value=(True,)
        ),
        row_wise_adagrad,
    ),
    # What happens around every rule.
    "sgd clipped by value": (embax.SGDOptimizerSpec(0.1, clip_gradient_value=0.7), altered(sgd, value=0.7)),
    "adagrad clipped by norm": (embax.AdagradOptimizerSpec(0.1, clip_gradient_norm=1.5), altered(adagrad, norm=1.5)),
    "adam decayed": (embax.AdamOptimizerSpec(0.1, weight_decay=0.2), altered(adam, decay=0.2)),
    "row_wise_adagrad with all": (
        embax.RowWiseAdagradOptimizerSpec(
            0.1, clip_gradient_value=1.0, clip_gradient_norm=2.0, weight_decay=0.1, weight_decay_mode="l2"
        ),
        altered(row_wise_adagrad, value=1.0, norm=2.0, l2=0.1),
    ),
}

VOCABULARY, BATCH = 40, 11
SPARSECORES = (1, 3, 4)
KINDS = ("mixed", "hot")
COMBINERS = {"sum": 8, "mean": 5, "sqrtn": 32}  # With a dimension each.


def draw_ids(rng, kind):
    """Ids of one feature: dense with padding, duplicates, an empty sample; or one hot id."""
    if kind == "hot":
        return np.full((BATCH, 3), 7, np.int32)
    ids = rng.integers(0, VOCABULARY - 5, (BATCH, 3)).astype(np.int32)  # The last rows are never touched.
    ids[rng.random(ids.shape) < 0.3] = -1
    ids[2] = -1
    ids[3] = 5
    return ids


def make_features(num_sparsecores, every_combiner):
    """Tables of every optimizer with two features each, and by name of the table its formula and combiner.

    Where not every combiner is taken, which saves most of the time to compile, the optimizers take them by turns.
    """
    features, cases = {}, {}
    for number, (name, (optimizer, formula)) in enumerate(OPTIMIZERS.items()):
        turn = (number + SPARSECORES.index(num_sparsecores)) % len(COMBINERS)
        for combiner in COMBINERS if every_combiner else [list(COMBINERS)[turn]]:
            table = oracle.table_spec(f"{name} {combiner}", VOCABULARY, COMBINERS[combiner], combiner, optimizer)
            cases[table.name] = (formula, combiner)
            for kind in KINDS:
                feature = oracle.feature_spec(f"{table.name} {kind}", table, batch=BATCH)
                features[feature.name] = feature
    return embax.prepare_feature_specs_for_training(features, 1, num_sparsecores), cases


@pytest.mark.parametrize("num_sparsecores", SPARSECORES)
@pytest.mark.parametrize("backend", ["native", "portable"])
def test_twenty_steps_follow_the_formula(backend, num_sparsecores):
    specs, cases = make_features(num_sparsecores, every_combiner=backend == "native")
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    first = oracle.tables_of(variables, specs)
    expected = {name: [array.astype(np.float64) for array in state] for name, state in first.items()}
    ever_touched = np.zeros(VOCABULARY, bool)
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
        ids = {kind: draw_ids(rng, kind) for kind in KINDS}
        weights = {
            kind: rng.uniform(0.1, 2, ids[kind].shape).astype(np.float32) if step % 2 else None for kind in KINDS
        }
        gradients = {
            name: rng.standard_normal((BATCH, spec.output_shape[-1])).astype(np.float32) for name, spec in specs.items()
        }
        packed = embax.preprocess(
            {name: ids[name.split()[-1]] for name in specs},
            {name: weights[name.split()[-1]] for name in specs} if step % 2 else None,
            specs=specs,
        )
        with embax.use_backend(backend):
            activations, variables = train_step(
                variables, packed, jax.tree.map(jnp.asarray, gradients), jnp.int32(step)
            )
        # float64[batch, vocabulary]: how much of each row each sample takes.
        gains = {
            (kind, combiner): oracle.lookup(np.eye(VOCABULARY), ids[kind], combiner, weights[kind])
            for kind in KINDS
            for combiner in COMBINERS
        }
        touched = np.isin(np.arange(VOCABULARY), np.concatenate(list(ids.values())))
        ever_touched |= touched
        for table, (formula, combiner) in cases.items():
            for kind in KINDS:
                wanted = gains[kind, combiner] @ expected[table][0]
                np.testing.assert_allclose(activations[f"{table} {kind}"], wanted, rtol=2e-5, atol=2e-5, err_msg=table)
            gradient = sum(gains[kind, combiner].T @ gradients[f"{table} {kind}"] for kind in KINDS)
            new = formula(gradient[touched], [array[touched] for array in expected[table]], step)
            for array, rows in zip(expected[table], new, strict=True):
                array[touched] = rows
    assert traces == 1  # No later step was compiled again.
    assert not ever_touched.all()
    result = oracle.tables_of(variables, specs)
    for table in cases:
        for got, wanted, before in zip(result[table], expected[table], first[table], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5, err_msg=table)
            np.testing.assert_array_equal(got[~ever_touched], before[~ever_touched])


def prepare(tables):
    """Initial variables of tables by name, and a function that takes a step: ids and gradient are those of every table.

    It returns the new variables, and the arrays of each table.
    """
    features = {name: oracle.feature_spec(name, table, batch=12, valency=1) for name, table in tables.items()}
    specs = embax.prepare_feature_specs_for_training(features)
    jitted = jax.jit(functools.partial(embax.apply_gradients, specs=specs))

    def take_step(variables, ids, gradient, step):
        packed = embax.preprocess(dict.fromkeys(specs, np.asarray(ids)[:, None]), specs=specs)
        variables = jitted(dict.fromkeys(specs, jnp.asarray(gradient, jnp.float32)), packed, variables, step=step)
        return variables, oracle.tables_of(variables, specs)

    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    return variables, oracle.tables_of(variables, specs), take_step


def scaled_by_accumulator(momentum, nesterov):
    return optax.chain(
        optax.scale_by_rss(0.1, eps=1e-10), optax.trace(momentum, nesterov=nesterov), optax.scale_by_learning_rate(0.1)
    )


OPTAX = {
    "sgd": (embax.SGDOptimizerSpec(0.1), optax.sgd(0.1)),
    "adagrad": (embax.AdagradOptimizerSpec(0.1), optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0)),
    "adagrad_momentum": (embax.AdagradMomentumOptimizerSpec(0.1), scaled_by_accumulator(0.9, nesterov=False)),
    "nesterov": (
        embax.AdagradMomentumOptimizerSpec(0.1, momentum=0.8, use_nesterov=True),
        scaled_by_accumulator(0.8, nesterov=True),
    ),
    "adam": (embax.AdamOptimizerSpec(0.1), optax.adam(0.1)),
    "adam, large epsilon": (embax.AdamOptimizerSpec(0.1, 0.8, 0.9, 0.1), optax.adam(0.1, 0.8, 0.9, 0.1)),
    "adamw": (embax.AdamOptimizerSpec(0.1, weight_decay=0.2), optax.adamw(0.1, weight_decay=0.2)),
    "adagrad with l2": (
        embax.AdagradOptimizerSpec(0.1, clip_gradient_value=0.5, weight_decay=0.2, weight_decay_mode="l2"),
        optax.chain(
            optax.clip(0.5),
            optax.add_decayed_weights(0.2),
            optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.0),
        ),
    ),
    "laprop": (
        embax.LaPropOptimizerSpec(0.1),
        optax.chain(
            optax.scale_by_rms(decay=0.95, eps=0.0, bias_correction=True),
            optax.trace(0.9),
            optax.scale_by_learning_rate(0.1 * (1 - 0.9**2) ** 0.5),
        ),
    ),
}


def test_optax_takes_the_same_steps_when_every_row_is_touched(standard_promotion):
    variables, tables, take_step = prepare(
        {name: oracle.table_spec(name, 12, optimizer=spec) for name, (spec, _) in OPTAX.items()}
    )
    dense = {name: jnp.asarray(state[0]) for name, state in tables.items()}
    states = {name: transformation.init(dense[name]) for name, (_, transformation) in OPTAX.items()}
    rng = np.random.default_rng(0)
    for step in range(5):
        ids = rng.permutation(12)
        gradient = jnp.asarray(rng.standard_normal((12, 8)), jnp.float32)
        variables, tables = take_step(variables, ids, gradient, step)
        for name, (_, transformation) in OPTAX.items():
            updates, states[name] = transformation.update(
                jnp.zeros_like(gradient).at[ids].set(gradient), states[name], dense[name]
            )
            dense[name] = optax.apply_updates(dense[name], updates)
            # optax rounds b2 in Adam's bias correction, but not 1 - b2: 6e-6 of each of these steps of 0.1.
            np.testing.assert_allclose(tables[name][0], dense[name], rtol=1e-5, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_with_neutral_hyperparameters_all_are_adagrad(backend):
    same = {
        "adagrad": embax.AdagradOptimizerSpec(0.1),
        "momentum": embax.AdagradMomentumOptimizerSpec(0.1, momentum=0, epsilon=0),
        "f2a": embax.F2AOptimizerSpec(0.1, rho=0),
        "ftrl": embax.FTRLOptimizerSpec(0.1),
        "multiplied": embax.FTRLOptimizerSpec(0.1, multiply_linear_by_learning_rate=True),
    }
    zeros = jax.nn.initializers.zeros  # From elsewhere FTRL differs: its table follows from its slots.
    variables, _, take_step = prepare(
        {n: oracle.table_spec(n, 12, optimizer=o, initializer=zeros) for n, o in same.items()}
    )
    rng = np.random.default_rng(0)
    for step in range(5):
        with embax.use_backend(backend):
            gradient = rng.standard_normal((12, 8))
            variables, tables = take_step(variables, rng.integers(0, 12, 12), gradient, step)
    for name in same:
        np.testing.assert_allclose(tables[name][0], tables["adagrad"][0], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_a_touched_row_with_gradient_0_is_updated(backend):
    variables, _, take_step = prepare({n: oracle.table_spec(n, 12, optimizer=o) for n, (o, _) in OPTIMIZERS.items()})
    with embax.use_backend(backend):
        variables, before = take_step(variables, np.arange(12), np.ones((12, 8)), jnp.int32(5))
        _, after = take_step(variables, np.zeros(12, np.int32), np.zeros((12, 8)), jnp.int32(6))
    for name, (_, formula) in OPTIMIZERS.items():
        wanted = formula(np.zeros((1, 8)), [array[:1].astype(np.float64) for array in before[name]], 6)
        for got, old, row in zip(after[name], before[name], wanted, strict=True):
            np.testing.assert_allclose(got[:1], row, rtol=1e-5, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(got[1:], old[1:])
    np.testing.assert_allclose(after["adam"][1][0], 0.9 * before["adam"][1][0], rtol=1e-6)
    assert (after["adam"][0][0] < before["adam"][0][0]).all()


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_a_denominator_of_0_is_no_step_and_a_nan_stays_in_its_row(backend):
    bare = {
        "adagrad": embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=0),
        "adagrad_momentum": embax.AdagradMomentumOptimizerSpec(0.1, epsilon=0, initial_accumulator_value=0),
        "cubic": embax.AdagradMomentumOptimizerSpec(0.1, epsilon=0, exponent=3, initial_accumulator_value=0),
        "adam": embax.AdamOptimizerSpec(0.1, epsilon=0),
        "ftrl": embax.FTRLOptimizerSpec(0.1, initial_accumulator_value=0),
        "power": embax.FTRLOptimizerSpec(0.1, -0.7, initial_accumulator_value=0),
        "laprop": embax.LaPropOptimizerSpec(0.1, eps=0),
        "f2a": embax.F2AOptimizerSpec(0.1, initial_accumulator_value=0),
    }
    variables, before, take_step = prepare({n: oracle.table_spec(n, 12, optimizer=o) for n, o in bare.items()})
    gradient = np.ones((12, 8))
    gradient[:3] = np.array([0, 1e-30, np.nan])[:, None]  # The square of the second is 0 in float32.
    with embax.use_backend(backend):
        _, after = take_step(variables, np.minimum(np.arange(12), 10), gradient, jnp.int32(0))
    for name in bare:
        table, old = after[name][0], before[name][0]
        np.testing.assert_array_equal(table[[0, 1, 11]], old[[0, 1, 11]], err_msg=name)
        assert np.isnan(table[2]).all(), name
        assert np.isfinite(np.delete(after[name], 2, axis=1)).all(), name
        assert (table[3:11] != old[3:11]).all(), name


def test_f2a_steps_of_the_elements_of_a_row_may_differ():
    variables, before, take_step = prepare({"f": oracle.table_spec("f", 12, optimizer=embax.F2AOptimizerSpec(0.1))})
    table, (accumulator, count) = variables["f"]
    more = jnp.arange(8.0)[None, :]
    variables = {"f": embax.EmbeddingVariables(table, embax.F2ASlotVariables(accumulator, count + more))}
    before["f"][2] = before["f"][2] + more
    _, after = take_step(variables, np.arange(12), np.ones((12, 8)), jnp.int32(5))
    for got, wanted in zip(after["f"], f2a(np.ones((12, 8)), before["f"], 5), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_laprop_without_a_step_does_not_correct_its_mean():
    variables, _, take_step = prepare({"f": oracle.table_spec("f", 12, optimizer=embax.LaPropOptimizerSpec(0.1))})
    _, after = take_step(variables, np.arange(12), np.full((12, 8), 3.0), None)
    np.testing.assert_allclose(after["f"][2], 0.05 * 9, rtol=1e-5)
    np.testing.assert_allclose(after["f"][1], np.sqrt((1 - 0.9**2) / 0.05), rtol=1e-5)


PROGRAM = """
import zlib, jax, jax.numpy as jnp, numpy as np, embax
features = {}
rule = lambda g, w, rate: w - rate * g / jnp.linalg.norm(g)
for optimizer in (embax.SGDOptimizerSpec(0.1, clip_gradient_norm=1.0), embax.AdagradOptimizerSpec(0.1, weight_decay=0.1),
                  embax.AdagradMomentumOptimizerSpec(0.1), embax.AdamOptimizerSpec(0.1), embax.FTRLOptimizerSpec(0.1),
                  embax.LaPropOptimizerSpec(0.1), embax.F2AOptimizerSpec(0.1), embax.RowWiseAdagradOptimizerSpec(0.1),
                  embax.RowWiseAdamOptimizerSpec(0.1), embax.CustomOptimizerSpec(0.1, rule)):
    name = optimizer.short_name()
    table = embax.TableSpec(name=name, vocabulary_size=5_000, embedding_dim=24, combiner="mean",
                            initializer=jax.nn.initializers.normal(1.0), optimizer=optimizer)
    features[name] = embax.FeatureSpec(name=name, table_spec=table, input_shape=(2048, 4), output_shape=(2048, 24))
specs = embax.prepare_feature_specs_for_training(features, 1, 4)
variables = embax.init_embedding_variables(jax.random.key(0), specs)
rng = np.random.default_rng(0)
batches = [{f: rng.zipf(1.3, (2048, 4)) % 5_000 for f in specs} for _ in range(3)]
for ids in batches:  # Limits grow before anything compiles.
    embax.preprocess(ids, specs=specs, limits="grow")
for step, ids in enumerate(batches):
    packed = embax.preprocess(ids, specs=specs, limits="grow")
    activations = embax.lookup(packed, variables, specs=specs)
    variables = embax.apply_gradients(activations, packed, variables, specs=specs, step=step)
print([zlib.crc32(np.asarray(array).tobytes()) for array in jax.tree.leaves(variables)])
"""


@pytest.mark.parametrize(("backend", "runs"), [("native", "122"), ("portable", "12")])
def test_the_same_bits_for_any_number_of_threads_and_on_repetition(backend, runs):
    results = set()
    for threads in runs:
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "EMBAX_NUM_THREADS": threads, "EMBAX_BACKEND": backend}
        run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True, capture_output=True, text=True)
        results.add(run.stdout)
    assert len(results) == 1


STEP_NUMBERS = [0, 1, 10, 10**6]


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 0.999999), (0.99999, 0.9999)])
def test_adam_corrects_the_bias_as_in_float64(betas):
    spec = embax.AdamOptimizerSpec(0.1, *betas, epsilon=1e-3)
    traced = jax.jit(spec.get_hyperparameters)
    b1, b2 = (float(np.float32(beta)) for beta in betas)
    for t in STEP_NUMBERS:
        wanted = [0.1 * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1)), b1, b2, 1e-3 * np.sqrt(1 - b2 ** (t + 1))]
        for step in (t, np.int64(t)):
            np.testing.assert_allclose(spec.get_hyperparameters(step), wanted, rtol=1e-6)
        np.testing.assert_allclose(traced(jnp.int32(t)), wanted, rtol=1e-6)


@pytest.mark.parametrize("beta_2", [0.5, 0.999, 0.9999, 0.999999])
def test_the_first_step_of_adam_is_the_learning_rate(beta_2):
    spec = embax.AdamOptimizerSpec(0.1, beta_2=beta_2)
    gradient, zeros = jnp.array([[-3.0, 1e-3, 100.0]]), jnp.zeros((1, 3))
    table, _ = spec.update_rows(gradient, zeros, (zeros, zeros), spec.get_hyperparameters(0))
    np.testing.assert_allclose(table, -0.1 * jnp.sign(gradient), rtol=2e-5)  # 1e-5 of it from epsilon.


@pytest.mark.parametrize("b2", [0.0, 0.95, 0.9999])
def test_the_decay_rate_of_laprop(b2):
    spec = embax.LaPropOptimizerSpec(0.1, b2=b2)
    b2 = float(np.float32(b2))
    for t in STEP_NUMBERS:
        wanted = b2 * (1 - b2**t) / (1 - b2 ** (t + 1))
        np.testing.assert_allclose(spec.get_decay_rate(t), wanted, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(spec.get_decay_rate)(jnp.int32(t)), wanted, rtol=1e-6)
    assert spec.get_decay_rate() == np.float32(b2)


def test_steps_that_are_missing_or_negative():
    for spec in (embax.AdamOptimizerSpec(), embax.F2AOptimizerSpec()):
        name = type(spec).__name__
        variables, _, take_step = prepare({"f": oracle.table_spec(optimizer=spec)})
        with pytest.raises(
            ValueError, match=f"{name}: the formula needs the number of the step, and no step was given. Pass"
        ):
            take_step(variables, np.arange(12), np.ones((12, 8)), None)
        for step in (-1, 1.5, "1", np.zeros(1, np.int32)):
            with pytest.raises(ValueError, match=f"{name}: the step is .*; it must be an integer scalar that counts"):
                spec.get_hyperparameters(step)


def test_hyperparameters_are_in_the_order_of_the_native_rules():
    built_in = [spec for spec, _ in OPTIMIZERS.values() if not isinstance(spec, embax.CustomOptimizerSpec)]
    for spec in built_in:
        hyperparameters = spec.get_hyperparameters(jnp.int32(3))
        _, slots, count = ROW_RULES[spec.native_rule]
        assert (list(spec.row_wise_slots()), len(hyperparameters)) == (slots, count)
        assert {(scalar.shape, scalar.dtype) for scalar in hyperparameters} == {((), np.dtype(np.float32))}
    for spec, wanted in (
        (embax.AdagradMomentumOptimizerSpec(0.5, 0.6, 0.7, 0.8, 0.9, True), [0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        (embax.FTRLOptimizerSpec(0.5, -0.6, 0.7, 0.8, 0.9), [0.5, -0.6, 0.7, 0.8, 0.9, 0]),
        (embax.LaPropOptimizerSpec(0.5, 0.6, 0.7, 0.8), [0.5, 0.6, 0.0, 0.8]),
        (embax.F2AOptimizerSpec(0.5, 0.6, 0, 0, 0.7, 0.8, 0.9), [0.5, 0.6, 0.7, 0.8, 0.9, 0]),
    ):
        np.testing.assert_array_equal(spec.get_hyperparameters(0), np.array(wanted, np.float32))


def test_specs_are_equal_by_type_and_fields():
    assert embax.AdagradOptimizerSpec(0.1) == embax.AdagradOptimizerSpec(0.1)
    assert hash(embax.AdagradOptimizerSpec(0.1)) == hash(embax.AdagradOptimizerSpec(0.1))
    assert embax.AdagradOptimizerSpec(0.1) != embax.AdagradOptimizerSpec(0.1, initial_accumulator_value=0.2)
    assert embax.SGDOptimizerSpec(0.1) != embax.AdagradOptimizerSpec(0.1)
    # Their hashes are the same.
    assert embax.SGDOptimizerSpec(-1.0) != embax.SGDOptimizerSpec(-2.0)
    assert embax.FTRLOptimizerSpec(learning_rate_power=-1) != embax.FTRLOptimizerSpec(learning_rate_power=-2)


SLOTS = [  # Optimizer, its short name, its slots and their initial values.
    (embax.SGDOptimizerSpec(), "sgd", embax.SGDSlotVariables()),
    (embax.AdagradOptimizerSpec(), "adagrad", embax.AdagradSlotVariables(accumulator=0.1)),
    (
        embax.AdagradMomentumOptimizerSpec(initial_momentum_value=0.5),
        "adagrad_momentum",
        embax.AdagradMomentumSlotVariables(accumulator=0.1, momentum=0.5),
    ),
    (embax.AdamOptimizerSpec(), "adam", embax.AdamSlotVariables(momentum=0, velocity=0)),
    (embax.FTRLOptimizerSpec(initial_linear_value=0.5), "ftrl", embax.FTRLSlotVariables(accumulator=0.1, linear=0.5)),
    (embax.LaPropOptimizerSpec(initial_slot_value=0.5), "laprop", embax.LaPropSlotVariables(mu=0.5, nu=0.5)),
    (embax.F2AOptimizerSpec(initial_local_step_value=3), "f2a", embax.F2ASlotVariables(accumulator=0.1, local_step=3)),
]


@pytest.mark.parametrize(("spec", "name", "slots"), SLOTS)
def test_slots(spec, name, slots):
    initializers = spec.slot_variables_initializers()
    assert type(initializers) is type(slots) is spec.Slots
    assert (spec.short_name(), spec.slot_variables_count()) == (name, len(slots))
    for initializer, value in zip(initializers, slots, strict=True):
        np.testing.assert_array_equal(initializer(jax.random.key(0), (2, 3), jnp.float32), np.full((2, 3), value, "f4"))


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        (embax.SGDOptimizerSpec(), (0.001,)),
        (embax.AdagradOptimizerSpec(), (0.001, 0.1)),
        (embax.AdagradMomentumOptimizerSpec(), (0.001, 0.9, 1.0, 1e-10, 2.0, False, 0.1, 0.0)),
        (embax.AdamOptimizerSpec(), (0.001, 0.9, 0.999, 1e-8)),
        (embax.FTRLOptimizerSpec(), (0.01, -0.5, 0.0, 0.0, 0.0, 0.1, 0.0, False)),
        (embax.LaPropOptimizerSpec(), (0.001, 0.9, 0.95, 1e-30, None, 0.0)),
        (embax.F2AOptimizerSpec(), (0.01, 0.5, 0.1, 0.0, 0.0, 0.0, 1e6)),
    ],
)
def test_defaults_are_those_of_the_reference(spec, fields):
    assert tuple(getattr(spec, f.name) for f in dataclasses.fields(spec) if not f.kw_only) == fields


BAD_FIELDS = [
    (embax.AdagradOptimizerSpec, "initial_accumulator_value", -1, "a number of at least 0"),
    (embax.AdagradMomentumOptimizerSpec, "momentum", 1, "a number from 0 to less than 1"),
    (embax.AdagradMomentumOptimizerSpec, "beta2", 1.5, "a number from 0 to 1"),
    (embax.AdagradMomentumOptimizerSpec, "epsilon", -1e-9, "a number of at least 0"),
    (embax.AdagradMomentumOptimizerSpec, "exponent", 0, "a number above 0"),
    (embax.AdagradMomentumOptimizerSpec, "use_nesterov", 1, "True or False"),
    (embax.AdagradMomentumOptimizerSpec, "initial_accumulator_value", -0.1, "a number of at least 0"),
    (embax.AdagradMomentumOptimizerSpec, "initial_momentum_value", float("inf"), "a number that is finite"),
    (embax.AdamOptimizerSpec, "beta_1", -0.1, "a number from 0 to less than 1"),
    (embax.AdamOptimizerSpec, "beta_2", 1 - 1e-9, r"a number from 0 to less than 1 \(in float32\)"),
    (embax.AdamOptimizerSpec, "beta_2", None, "a number from 0 to less than 1"),
    (embax.AdamOptimizerSpec, "epsilon", -1, "a number of at least 0"),
    (embax.FTRLOptimizerSpec, "learning_rate", 0.0, "a number above 0, since FTRL divides by it"),
    (embax.FTRLOptimizerSpec, "learning_rate_power", 0.5, "a number of at most 0"),
    (embax.FTRLOptimizerSpec, "l1_regularization_strength", -1, "a number of at least 0"),
    (embax.FTRLOptimizerSpec, "l2_regularization_strength", -1, "a number of at least 0"),
    (embax.FTRLOptimizerSpec, "beta", -1, "a number of at least 0"),
    (embax.FTRLOptimizerSpec, "initial_accumulator_value", -1, "a number of at least 0"),
    (embax.FTRLOptimizerSpec, "initial_linear_value", "0", "a number that is finite"),
    (embax.FTRLOptimizerSpec, "multiply_linear_by_learning_rate", "yes", "True or False"),
    (embax.LaPropOptimizerSpec, "b1", 1.0, "a number from 0 to less than 1"),
    (embax.LaPropOptimizerSpec, "b2", 2, "a number from 0 to less than 1"),
    (embax.LaPropOptimizerSpec, "eps", float("nan"), "a number of at least 0"),
    (embax.LaPropOptimizerSpec, "rms_clip_threshold", 1.0, "None. Clip the gradients"),
    (embax.LaPropOptimizerSpec, "initial_slot_value", -1, "a number of at least 0"),
    (embax.F2AOptimizerSpec, "rho", -0.5, "a number of at least 0"),
    (embax.F2AOptimizerSpec, "initial_accumulator_value", -1, "a number of at least 0"),
    (embax.F2AOptimizerSpec, "initial_local_step_value", -1, "a number of at least 0"),
    (embax.F2AOptimizerSpec, "l1_regularization_strength", -1, "a number of at least 0"),
    (embax.F2AOptimizerSpec, "l2_regularization_strength", -1, "a number of at least 0"),
    (embax.F2AOptimizerSpec, "max_lr_multiplier", 0, "a number above 0"),
]


@pytest.mark.parametrize(("optimizer", "field", "value", "limits"), BAD_FIELDS)
def test_fields_out_of_range(optimizer, field, value, limits):
    with pytest.raises(ValueError, match=f"{optimizer.__name__}: {field} is {value!r}; it must be {limits}"):
        optimizer(**{field: value})


def test_learning_rates():
    assert embax.SGDOptimizerSpec(0.5).get_learning_rate() == np.float32(0.5)
    assert embax.SGDOptimizerSpec(lambda: 0.25).get_learning_rate() == np.float32(0.25)
    schedule = embax.SGDOptimizerSpec(lambda step: 0.1 * step)
    assert schedule.get_learning_rate(2) == np.float32(0.2)
    adam = embax.AdamOptimizerSpec(lambda step: 0.1 * (step + 1), beta_1=0, beta_2=0)
    assert adam.get_hyperparameters(1)[0] == np.float32(0.2)
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
