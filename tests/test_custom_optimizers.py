"""Optimizers of the user's own, as functions and as StableHLO text, beside the built-in ones that they repeat."""

import collections
import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import embax
from embax import _warnings
from embax.optimizers._stablehlo import Program

pytestmark = pytest.mark.filterwarnings("ignore:CustomOptimizerSpec has no native row rule:embax.SlowPathWarning")

ZEROS = jax.nn.initializers.zeros
TENTH = jax.nn.initializers.constant(0.1)
BATCH = 12


def sgd(gradient, table, learning_rate):
    return table - learning_rate * gradient


def adagrad(gradient, table, accumulator, learning_rate):
    accumulator = accumulator + gradient * gradient
    return table - jnp.where(accumulator == 0, 0.0, learning_rate * gradient / jnp.sqrt(accumulator)), accumulator


def row_wise_adagrad(gradient, table, accumulator, learning_rate):
    assert accumulator.shape == (1, 1)
    accumulator = accumulator + jnp.mean(gradient * gradient, axis=-1, keepdims=True)
    return table - learning_rate * gradient / (jnp.sqrt(accumulator) + 1e-8), accumulator


def ftrl(gradient, table, accumulator, linear, learning_rate):
    total = accumulator + gradient * gradient
    linear = linear + gradient - (jnp.sqrt(total) - jnp.sqrt(accumulator)) / learning_rate * table
    solution = (jnp.clip(linear, -0.2, 0.2) - linear) / (jnp.sqrt(total) / learning_rate)
    return solution, total, linear


class Unhashable:
    __hash__ = None

    def __call__(self, gradient, table, learning_rate):
        return table


def text_of(rule, dim, slots, rate_shape=(), slot_shape=None):
    shapes = [(1, dim)] * 2 + [slot_shape or (1, dim)] * slots + [rate_shape]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with jax.numpy_rank_promotion("allow"):
        return jax.jit(rule).lower(*arguments).as_text(dialect="stablehlo")


def train(optimizers, dim, backend, steps=3):
    """Tables and slots of each optimizer after some steps with the same ids and gradients, and before them."""
    tables = {n: oracle.table_spec(n, 20, dim, optimizer=optimizer) for n, optimizer in optimizers.items()}
    features = {name: oracle.feature_spec(name, table, BATCH, 2) for name, table in tables.items()}
    specs = embax.prepare_feature_specs_for_training(features, 1, 3)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    first = oracle.tables_of(variables, specs)
    start = np.random.default_rng(1).standard_normal((20, dim)).astype(np.float32)
    variables = embax.stack_and_shard_tables(
        {
            name: embax.EmbeddingVariables(start, type(variables[name].slot)(*map(np.asarray, first[name][1:])))
            for name in optimizers
        },
        specs=specs,
        pad_value=0.0,
    )
    variables = jax.tree.map(jnp.asarray, variables)
    rng = np.random.default_rng(0)
    step_of = jax.jit(functools.partial(embax.apply_gradients, specs=specs), donate_argnames="variables")
    for step in range(steps):
        packed = embax.preprocess(dict.fromkeys(specs, rng.integers(0, 18, (BATCH, 2))), specs=specs)
        gradient = jnp.asarray(rng.standard_normal((BATCH, dim)), jnp.float32)
        with embax.use_backend(backend):
            variables = step_of(dict.fromkeys(specs, gradient), packed, variables=variables, step=step)
    return oracle.tables_of(variables, specs), start


@pytest.mark.parametrize("backend", ["native", "portable"])
@pytest.mark.parametrize("dim", [8, 5])
def test_a_function_or_its_text_takes_the_steps_of_the_built_in_optimizer(backend, dim):
    pairs = {
        "sgd": (embax.SGDOptimizerSpec(0.1), sgd, ()),
        "adagrad": (embax.AdagradOptimizerSpec(0.1), adagrad, (TENTH,)),
        "ftrl": (embax.FTRLOptimizerSpec(0.1, l1_regularization_strength=0.2), ftrl, (TENTH, ZEROS)),
    }
    optimizers = {}
    for name, (built_in, rule, slots) in pairs.items():
        optimizers[name] = built_in
        optimizers[f"{name} custom"] = embax.CustomOptimizerSpec(
            0.1, rule, slot_variable_initializers_tuple=slots, short_name_str=name
        )
        for shape in ((), (1,), (1, dim)):
            optimizers[f"{name} text {shape}"] = embax.CustomOptimizerSpec(
                lambda: 0.1,
                stablehlo=text_of(rule, dim, len(slots), shape),
                slot_variable_initializers_tuple=slots,
            )
    optimizers["row"] = embax.RowWiseAdagradOptimizerSpec(0.1)
    one_value = {"slot_variable_initializers_tuple": (ZEROS,), "slots_of_one_value": (True,)}
    optimizers["row custom"] = embax.CustomOptimizerSpec(0.1, row_wise_adagrad, **one_value)
    optimizers["row text"] = embax.CustomOptimizerSpec(
        0.1, stablehlo=text_of(row_wise_adagrad, dim, 1, slot_shape=(1, 1)).encode(), **one_value
    )
    tables, start = train(optimizers, dim, backend)
    for name, arrays in tables.items():
        for got, wanted in zip(arrays, tables[name.split()[0]], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6, err_msg=name)
        assert np.abs(arrays[0][:18] - start[:18]).max() > 0.01
        np.testing.assert_array_equal(arrays[0][18:], start[18:])


def test_options_of_the_base_apply_to_a_custom_optimizer():
    options = {"weight_decay": 0.1, "weight_decay_mode": "l2", "clip_gradient_norm": 0.5, "clip_gradient_value": 0.4}
    tables, _ = train(
        {"built in": embax.SGDOptimizerSpec(0.1, **options), "custom": embax.CustomOptimizerSpec(0.1, sgd, **options)},
        8,
        "portable",
    )
    np.testing.assert_allclose(tables["custom"][0], tables["built in"][0], rtol=1e-6)


def test_whether_a_rule_is_elementwise_is_seen():
    assert embax.CustomOptimizerSpec(0.1, sgd).elementwise
    assert embax.CustomOptimizerSpec(0.1, adagrad, slot_variable_initializers_tuple=[ZEROS]).elementwise
    assert embax.CustomOptimizerSpec(
        0.1, stablehlo=text_of(ftrl, 24, 2), slot_variable_initializers_tuple=[ZEROS, ZEROS]
    ).elementwise
    by_column = jnp.arange(8, dtype=jnp.float32)[None]
    for rule in (
        lambda g, w, lr: w - lr * g / jnp.linalg.norm(g),
        lambda g, w, lr: w - lr * g[:, ::-1],
        lambda g, w, lr: w - lr * g * by_column,
        lambda g, w, lr: w - lr * g * jax.lax.broadcasted_iota(jnp.float32, (1, 8), 1),
        lambda g, w, lr: w - lr * jnp.sort(g),
        lambda g, w, lr: w - lr * jnp.cumsum(g, axis=1),
    ):
        assert not embax.CustomOptimizerSpec(0.1, rule).elementwise
    assert not embax.RowWiseAdamOptimizerSpec().elementwise


def test_a_rule_of_whole_rows_is_not_stacked_with_other_widths():
    normalized = embax.CustomOptimizerSpec(0.1, lambda g, w, lr: w - lr * g / jnp.linalg.norm(g))
    for optimizer, stacks in ((normalized, 2), (embax.CustomOptimizerSpec(0.1, sgd), 1)):
        tables = [oracle.table_spec(f"t{dim}", 10, dim, optimizer=optimizer) for dim in (6, 7, 7)]
        tables[2].name = "other"
        features = {table.name: oracle.feature_spec(table.name, table) for table in tables}
        assert len(embax.get_stacked_table_specs(embax.auto_stack_tables(features, 1, 4))) == stacks
    features = {
        name: oracle.feature_spec(name, oracle.table_spec(name, 10, dim, optimizer=normalized))
        for name, dim in (("a", 6), ("b", 7))
    }
    with pytest.raises(
        ValueError, match=r"different embedding_dim: \{'a': 6, 'b': 7\}, and CustomOptimizerSpec takes the row"
    ):
        embax.stack_tables(features, ["a", "b"], 1, 4)


def test_slots_have_names():
    named = collections.namedtuple("Slots", ["mean", "spread"])
    spec = embax.CustomOptimizerSpec(0.1, ftrl, None, named(TENTH, ZEROS), "mine")
    assert spec.slot_variables_initializers() == named(TENTH, ZEROS)
    assert (spec.short_name(), spec.slot_variables_count()) == ("mine", 2)
    unnamed = embax.CustomOptimizerSpec(0.1, ftrl, slot_variable_initializers_tuple=[TENTH, ZEROS])
    assert unnamed.slot_variables_initializers()._fields == ("slot_0", "slot_1")
    assert unnamed == embax.CustomOptimizerSpec(0.1, ftrl, slot_variable_initializers_tuple=(TENTH, ZEROS))
    assert hash(unnamed) == hash(embax.CustomOptimizerSpec(0.1, ftrl, slot_variable_initializers_tuple=(TENTH, ZEROS)))


OPERATIONS = [
    lambda x: jnp.abs(x) + jnp.ceil(x) - jnp.floor(x) + jnp.round(x),
    lambda x: jnp.exp(x) + jnp.expm1(x) + jnp.log(jnp.abs(x)) + jnp.log1p(jnp.abs(x)),
    lambda x: jnp.sin(x) + jnp.cos(x) + jnp.tan(x) + jnp.tanh(x) + jax.nn.sigmoid(x) + jax.lax.erf(x),
    lambda x: jnp.sqrt(jnp.abs(x)) + jax.lax.rsqrt(jnp.abs(x)) + jnp.cbrt(x) + x**3 + jnp.abs(x) ** 0.3,
    lambda x: jnp.where((x > 0) & (x < 1) | ~jnp.isfinite(x) ^ (x >= 2), x, -x) + jnp.sign(x),
    lambda x: jnp.arctan2(x, x + 3) + jnp.maximum(x, 0.5) + jnp.minimum(x, -0.5) + jnp.remainder(x, 0.7),
    lambda x: jnp.clip(x, -1, 1) + jax.lax.clamp(0.0, x, 0.5) + x * (x != 1.0) + x * (x <= 0.0) + x * (x == 0.0),
    lambda x: x * jnp.sum(x) + jnp.max(x, axis=1, keepdims=True) - jnp.min(x) + jnp.prod(x) + x.mean(),
    lambda x: x * jnp.linalg.norm(x) + jax.nn.softmax(x),
    lambda x: x[:, ::1] * jnp.concatenate([x[:, 3:], x[:, :3]], axis=1) + x.T.reshape(1, -1),
    lambda x: x * jnp.arange(8, dtype=jnp.float32)[None] * jnp.array([[1.0, 2, 3, 4, 5, 6, 7, 8.5]]),
    lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda: x, lambda: x * 2.0),
    lambda x: jax.lax.switch(jnp.int32(1), [lambda: x, lambda: x * 3.0, lambda: x]),
    lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y * 0.5 + x, x),
    lambda x: x * (jnp.argmax(x, axis=1)[:, None].astype(jnp.float32)),
    lambda x: jnp.dot(x, x.T) * x[:, ::-1] + jnp.pad(x, ((0, 0), (1, 1)))[:, 2:] + jnp.sinh(x) + jnp.arctan(x),
    lambda x: jax.lax.scan(lambda c, y: (c + y, c * y), jnp.zeros(1), x.T)[1].T,
    lambda x: jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & ~0xFF, jnp.float32),
    lambda x: jnp.sort(x) + jnp.cumsum(x, axis=1) + x.at[0, 2].set(1.0),
    lambda x: x * jnp.asarray([[1, 2, 3, 4, 5, 6, 7, 8]], jnp.bfloat16).astype(jnp.float32),
    lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) + x.astype(jnp.int32).astype(jnp.float32),
]


@pytest.mark.filterwarnings("ignore:The StableHLO text of a row rule:embax.SlowPathWarning")
@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_text_is_read_as_what_was_written(number, standard_promotion):
    rule = OPERATIONS[number]
    text = jax.jit(rule).lower(jax.ShapeDtypeStruct((1, 8), jnp.float32)).as_text(dialect="stablehlo")
    program = Program.parse(text)
    for seed in range(3):
        x = jnp.asarray(np.random.default_rng(seed).standard_normal((1, 8)), jnp.float32)
        np.testing.assert_allclose(program(x)[0], rule(x), rtol=1e-6, atol=1e-6)
        rows = jnp.stack([x, 2 * x])
        np.testing.assert_allclose(
            jax.jit(jax.vmap(lambda x: program(x)[0]))(rows), jax.vmap(rule)(rows), rtol=1e-5, atol=1e-5
        )


def test_text_with_limits():
    spec = embax.CustomOptimizerSpec
    text = spec.lower_to_stablehlo(sgd, 8)
    assert "module" in text
    assert "stablehlo" in text
    assert spec.wrap_stablehlo_with_limits(text.encode(), 8, 0, 1) == text
    gradient, table, rate = jnp.full((1, 8), 3.0), jnp.zeros((1, 8)), jnp.full((1, 8), 0.5)
    for limited in (
        spec.wrap_stablehlo_with_limits(text, 8, 0, 1, min_value=-1.0),
        spec.lower_to_stablehlo(sgd, 8, 0, 1, -1.0, 4.0),
    ):
        assert limited != text
        np.testing.assert_array_equal(Program.parse(limited)(gradient, table, rate)[0], np.full((1, 8), -1.0))
        np.testing.assert_array_equal(Program.parse(limited)(gradient, table + 2, rate)[0], np.full((1, 8), 0.5))
    frozen = Program.parse(spec.lower_to_stablehlo(lambda gradient, table, rate: table, 8))
    np.testing.assert_array_equal(frozen(gradient, table, rate)[0], table)  # Takes arguments that it does not use.
    with_slot = spec.lower_to_stablehlo(adagrad, 8, 1, 1, max_value=0.1)
    new = Program.parse(with_slot)(gradient, table + 2, jnp.ones((1, 8)), rate)
    np.testing.assert_allclose(new, [np.full((1, 8), 0.1), np.full((1, 8), 10.0)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "custom_computation_fn is None, and stablehlo is None; one of them must state the row rule"),
        ({"custom_computation_fn": 3}, "custom_computation_fn is 3, and stablehlo is None"),
        (
            {"custom_computation_fn": lambda g, w, a, lr: w, "slot_variable_initializers_tuple": (ZEROS,)},
            "the row rule returned 1 arrays; it must return 2, the new table, slot_0, in this order",
        ),
        (
            {"custom_computation_fn": lambda g, w, lr: (w, g)},
            "the row rule returned 2 arrays; it must return 1, the new table",
        ),
        (
            {"custom_computation_fn": lambda g, w, lr: w.sum()},
            r"returned as new table float32\[\]; it must be float32\[1, 61\]",
        ),
        (
            {"custom_computation_fn": lambda g, w, lr: w.astype(jnp.int32)},
            r"returned as new table int32\[1, 61\]; it must be float32",
        ),
        ({"custom_computation_fn": lambda g, w, lr: None}, r"returned as new table NoneType\[\]; it must be float32"),
        (
            {
                "custom_computation_fn": lambda g, w, a, lr: (w, g),
                "slot_variable_initializers_tuple": (ZEROS,),
                "slots_of_one_value": (True,),
            },
            r"returned as new slot_0 float32\[1, 61\]; it must be float32\[1, 1\]",
        ),
        (
            {"custom_computation_fn": lambda g, w: w},
            "does not take 3 arguments .*; it is called with gradient, table, slots",
        ),
        (
            {"custom_computation_fn": sgd, "slot_variable_initializers_tuple": 3},
            "initializers_tuple is 3; it must be a tuple",
        ),
        ({"custom_computation_fn": sgd, "slot_variable_initializers_tuple": (0.1,)}, "it must be a tuple of functions"),
        (
            {"custom_computation_fn": sgd, "slots_of_one_value": (True,)},
            "it must be .*, or a bool for each of the 0 slots",
        ),
        ({"stablehlo": "module {"}, "stablehlo cannot be read .*; it must be StableHLO text with a function main"),
        ({"stablehlo": b"\xff\xfe"}, "stablehlo cannot be read"),
        ({"stablehlo": 7}, "stablehlo cannot be read"),
        ({"stablehlo": "module {}"}, "stablehlo cannot be read"),
        (
            {"stablehlo": text_of(adagrad, 8, 1)},
            "text takes 4 arguments; the optimizer has 3: gradient, table, slots and the",
        ),
        (
            {
                "stablehlo": jax.jit(lambda g, w, lr: w - g * lr)
                .lower(*[jax.ShapeDtypeStruct((8,), jnp.float32)] * 3)
                .as_text()
            },
            r"have the shapes \[\(8,\), \(8,\), \(8,\)\]; the first, the gradient, must be of one row, \[1, dim\]",
        ),
        ({"stablehlo": text_of(lambda g, w, lr: w, 8, 0)}, "takes 1 arguments; .* give it keep_unused=True"),
        (
            {"stablehlo": text_of(sgd, 8, 0).replace("f32", "f64")},
            "main takes or returns a tensor<1x8xf64>, and must do float32",
        ),
        ({"stablehlo": text_of(sgd, 8, 0).replace("1x8x", "1x0x")}, "must do float32 of fixed shapes alone"),
        ({"custom_computation_fn": sgd, "slots_of_one_value": True}, "slots_of_one_value is True; it must be"),
        ({"custom_computation_fn": Unhashable()}, "the row rule or an initializer has no hash"),
    ],
)
def test_bad_rules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"CustomOptimizerSpec: .*{message}"):
        embax.CustomOptimizerSpec(0.1, **arguments)


def test_text_for_rows_of_another_width_is_refused_before_anything_is_lost():
    optimizer = embax.CustomOptimizerSpec(0.1, stablehlo=text_of(lambda g, w, lr: w - lr * g / g.sum(), 16, 0))
    specs = {"f": oracle.feature_spec("f", oracle.table_spec(optimizer=optimizer), 2, 1)}
    embax.prepare_feature_specs_for_training(specs, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": np.array([[3], [8]])}, specs=specs)
    step = jax.jit(functools.partial(embax.apply_gradients, specs=specs), donate_argnames="variables")
    with pytest.raises(
        ValueError, match=r"text is for arguments of the shapes \[\(1, 16\), .*; a row of the stack, or a slot"
    ):
        step({"f": jnp.ones((2, 8))}, packed, variables=variables)
    assert not jax.tree.leaves(variables)[0].is_deleted()


def test_elementwise_text_serves_tables_of_any_width():
    text = embax.CustomOptimizerSpec(0.1, stablehlo=text_of(sgd, 16, 0, (1, 16)))
    for dim in (5, 8, 16, 24):
        tables, _ = train({"built in": embax.SGDOptimizerSpec(0.1), "text": text}, dim, "portable")
        np.testing.assert_allclose(tables["text"][0], tables["built in"][0], rtol=1e-6)


def test_a_rule_may_be_for_as_many_columns_as_its_table_has():
    by_column = jnp.linspace(0.5, 2, 5, dtype=jnp.float32)[None]
    rules = {
        "scaled": lambda g, w, lr: w - lr * g * by_column,
        "by width": lambda g, w, lr: w - lr * g / g.shape[1] ** 0.5,
        "text": None,
    }
    text = text_of(rules["scaled"], 5, 0)
    optimizers = {name: embax.CustomOptimizerSpec(0.1, rule, None if rule else text) for name, rule in rules.items()}
    assert not any(optimizer.elementwise for optimizer in optimizers.values())
    tables, start = train({"plain": embax.SGDOptimizerSpec(0.1), **optimizers}, 5, "portable")
    moved = tables["plain"][0] - start
    np.testing.assert_allclose(tables["scaled"][0] - start, moved * by_column, atol=1e-6)
    np.testing.assert_allclose(tables["text"][0], tables["scaled"][0], rtol=1e-6)
    np.testing.assert_allclose(tables["by width"][0] - start, moved / 5**0.5, atol=1e-6)
    with pytest.raises((TypeError, ValueError), match="shapes"):
        train({"scaled": optimizers["scaled"]}, 8, "portable")


@pytest.mark.parametrize("backend", ["native", "portable"])
def test_text_that_is_not_read_runs_row_by_row(backend, monkeypatch):
    def sorting(gradient, table, accumulator, learning_rate):
        order = jnp.argsort(gradient, axis=1)
        return table - learning_rate * jnp.sort(gradient, axis=1), accumulator + jnp.cumsum(gradient, axis=1) + order

    slots = {"slot_variable_initializers_tuple": (ZEROS,)}
    with jax.numpy_dtype_promotion("standard"):
        text = text_of(sorting, 8, 1)
    assert Program.parse(text).unread
    monkeypatch.setattr(_warnings, "_told", set())
    with pytest.warns(
        embax.SlowPathWarning, match="has the operation .*, which embax does not read: it runs over one row"
    ):
        of_text = embax.CustomOptimizerSpec(0.1, stablehlo=text, **slots)
    with jax.numpy_dtype_promotion("standard"):
        of_function = embax.CustomOptimizerSpec(of_text.learning_rate, sorting, **slots)
        tables, _ = train({"text": of_text, "function": of_function}, 8, backend)
    assert not of_text.elementwise
    limited = Program.parse(embax.CustomOptimizerSpec.wrap_stablehlo_with_limits(text, 8, 1, 1, max_value=0.5))
    row = jnp.arange(8, dtype=jnp.float32)[None]
    wanted = np.minimum(row - 0.1 * row, 0.5)
    np.testing.assert_allclose(limited(row[:, ::-1], row, row, jnp.full((1, 8), 0.1))[0], wanted, rtol=1e-6)
    for got, wanted in zip(tables["text"], tables["function"], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_equal_specs_are_found_and_travel():
    first = collections.namedtuple("First", ["mean"])
    second = collections.namedtuple("Second", ["spread"])
    one, other = (
        embax.CustomOptimizerSpec(0.1, adagrad, slot_variable_initializers_tuple=slots(ZEROS))
        for slots in (first, second)
    )
    assert one != other  # Their slots have other names.
    text = text_of(sgd, 8, 0)
    assert embax.CustomOptimizerSpec(0.1, stablehlo=text) == embax.CustomOptimizerSpec(0.1, stablehlo=text.encode())
    spec = embax.CustomOptimizerSpec(0.1, adagrad, slot_variable_initializers_tuple=(jnp.zeros_like,))
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec


@pytest.mark.parametrize(
    "arguments",
    [
        (8, 1, 1, 2.0, 1.0),
        (8, 1, 1, float("nan"), None),
        (8, 1, 1, None, None, (True, False)),
        (0,),
        (8, -1),
        (8, 1, -1),
    ],
)
def test_bad_counts_and_limits_of_text_are_refused(arguments):
    with pytest.raises(ValueError, match="lower_to_stablehlo: "):
        embax.CustomOptimizerSpec.lower_to_stablehlo(adagrad, *arguments)


def test_text_of_a_slot_of_one_value():
    text = embax.CustomOptimizerSpec.lower_to_stablehlo(row_wise_adagrad, 8, 1, slots_of_one_value=(True,))
    assert Program.parse(text).shapes == ((1, 8), (1, 8), (1, 1), (1, 8))
    assert Program.parse(embax.CustomOptimizerSpec.wrap_stablehlo_with_limits(text, 8, 1, 1, 0.0)).shapes[2] == (1, 1)
