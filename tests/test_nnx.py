"""The NNX layer and its optimizer."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import embax
import embax.nnx.embed as nnx_embed
from embax.nnx.embed import EmbeddingVariablesParam, PartitionedOptimizer, SparseCoreEmbed

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH, DIM = 12, 8


def feature_specs(optimizer=None, **fields):
    table = oracle.table_spec("shared", 60, DIM, "mean", optimizer or embax.AdagradOptimizerSpec(0.1), **fields)
    other = oracle.table_spec("other", 30, DIM, "sum", embax.SGDOptimizerSpec(0.1))
    return {
        "a": oracle.feature_spec("a", table, BATCH),
        "b": oracle.feature_spec("b", table, BATCH),
        "c": oracle.feature_spec("c", other, BATCH),
    }


class Model(nnx.Module):
    def __init__(self, seed=0, specs=None, **options):
        rngs = nnx.Rngs(seed)
        self.embed = SparseCoreEmbed(specs or feature_specs(), rngs=rngs, **options)
        self.dense = nnx.Linear(3 * DIM, 1, rngs=rngs)

    def __call__(self, packed):
        activations = self.embed(packed)
        return self.dense(jnp.concatenate([activations[name] for name in "abc"], axis=1))[:, 0]


def loss_of(model, packed, labels):
    return jnp.mean((model(packed) - labels) ** 2)


@nnx.jit
def train_step(model, optimizer, packed, labels):
    loss, gradients = nnx.value_and_grad(loss_of)(model, packed, labels)
    optimizer.update(model, gradients)
    return loss


def draw(rng, batch=BATCH):
    ids = {name: rng.integers(-1, 30, (batch, 3)).astype(np.int32) for name in "abc"}
    return ids, jnp.asarray(rng.standard_normal(batch), jnp.float32)


def test_training_follows_the_functional_form_and_optax():
    model = Model()
    optimizer = PartitionedOptimizer(model, optax.adam(1e-2))
    specs = model.embed.feature_specs
    variables = jax.tree.map(jnp.copy, oracle.variables_of(model.embed))
    kernel, bias = jnp.copy(model.dense.kernel.get_value()), jnp.copy(model.dense.bias.get_value())
    adam = optax.adam(1e-2)
    state = adam.init((kernel, bias))

    def head(activations, dense, labels):
        joined = jnp.concatenate([activations[name] for name in "abc"], axis=1)
        return jnp.mean(((joined @ dense[0] + dense[1])[:, 0] - labels) ** 2)

    rng = np.random.default_rng(0)
    for _ in range(5):
        ids, labels = draw(rng)
        loss = train_step(model, optimizer, model.embed.preprocess(ids), labels)
        packed = embax.preprocess(ids, specs=specs)
        activations = embax.lookup(packed, variables, specs=specs)
        expected, (for_activations, for_dense) = jax.value_and_grad(head, argnums=(0, 1))(
            activations, (kernel, bias), labels
        )
        variables = embax.apply_gradients(for_activations, packed, variables, specs=specs)
        updates, state = adam.update(for_dense, state)
        kernel, bias = optax.apply_updates((kernel, bias), updates)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(model.dense.kernel.get_value(), kernel, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(jax.tree.leaves(oracle.variables_of(model.embed)), jax.tree.leaves(variables), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_optax_sees_the_dense_parameters_only():
    model = Model()
    optimizer = PartitionedOptimizer(model, optax.adam(1e-2))
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer)))
    assert sizes == sorted(
        [1, 1] + 2 * [3 * DIM, 1, 1]
    )  # Steps of nnx and adam; two moments of kernel, bias and token.
    same = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    assert sizes == sorted(leaf.size for leaf in jax.tree.leaves(nnx.state(same)))


def test_a_thousand_steps_compile_once_and_learn():
    model = Model()
    optimizer = PartitionedOptimizer(model, optax.adam(1e-2))
    ids, labels = draw(np.random.default_rng(0))
    losses = [float(train_step(model, optimizer, model.embed.preprocess(ids), labels)) for _ in range(1000)]
    assert losses[-1] < 0.01 * losses[0]


def test_a_growing_batch_recompiles_seldom():
    model = Model()
    traces = 0

    @nnx.jit
    def predict(model, packed):
        nonlocal traces
        traces += 1
        return model(packed)

    for size in range(1, 120):
        ids = {name: [list(range(size % 30)) for _ in range(size % 30)] + [[]] * (120 - size % 30) for name in "abc"}
        predict(model, model.embed.preprocess(ids))
    assert 1 < traces <= 12


def test_without_a_lookup_the_tables_stay():
    model = Model()
    optimizer = PartitionedOptimizer(model, optax.sgd(0.1))
    before = jax.tree.map(np.asarray, oracle.variables_of(model.embed))

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.sum(model.dense.kernel.get_value() ** 2))(model)
        optimizer.update(model, gradients)

    step(model, optimizer)
    jax.tree.map(np.testing.assert_array_equal, before, oracle.variables_of(model.embed))


def test_two_layers_in_one_model():
    class Towers(nnx.Module):
        def __init__(self):
            self.user = Model(seed=0)
            self.item = Model(seed=1)

    model = Towers()
    optimizer = PartitionedOptimizer(model, optax.sgd(0.1))
    ids, _ = draw(np.random.default_rng(0))
    packed = model.user.embed.preprocess(ids)
    before = [np.asarray(oracle.variables_of(tower.embed)["other"].table) for tower in (model.user, model.item)]

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: jnp.mean(model.user(packed) * model.item(packed)))(model)
        optimizer.update(model, gradients)

    step(model, optimizer)
    for tower, old in zip((model.user, model.item), before, strict=True):
        changed = (np.asarray(oracle.variables_of(tower.embed)["other"].table) != old).any(axis=1)
        assert 0 < changed.sum() <= 30


def test_the_step_reaches_the_learning_rate():
    schedule = embax.SGDOptimizerSpec(lambda step: jnp.where(step < 1, 0.0, 0.5))
    specs = {"f": oracle.feature_spec("f", oracle.table_spec(optimizer=schedule), batch=2, valency=1)}
    layer = SparseCoreEmbed(specs, rngs=nnx.Rngs(0))
    packed = layer.preprocess({"f": np.array([[1], [2]])})

    @nnx.jit
    def train(layer, step):
        nnx.grad(lambda layer: jnp.sum(layer(packed, step)["f"]))(layer)

    before = np.asarray(layer.rows("table", [1]))
    for step, rate in ((0, 0.0), (1, 0.5)):
        train(layer, jnp.int32(step))
        np.testing.assert_allclose(layer.rows("table", [1]), before - rate, rtol=1e-6)
    assert layer.step[...] == 2
    # The layer counts by itself.
    other = SparseCoreEmbed(specs, rngs=nnx.Rngs(0))
    for rate in (0.0, 0.5, 1.0):
        nnx.grad(lambda layer: jnp.sum(layer(packed)["f"]))(other)
        np.testing.assert_allclose(other.rows("table", [1]), before - rate, rtol=1e-6)


def test_the_specs_of_the_user_stay_as_they_are():
    specs = feature_specs()
    layer = SparseCoreEmbed(specs, rngs=nnx.Rngs(0), num_sc_per_device=3)
    assert not specs["a"].table_spec.is_stacked()
    assert layer.feature_specs["a"].table_spec.stacked_table_spec.num_sparsecores_per_device == 3
    assert layer.feature_specs["a"].table_spec is layer.feature_specs["b"].table_spec


def test_split_merge_clone_and_eval_shape():
    model = Model()
    ids, _ = draw(np.random.default_rng(0))
    packed = model.embed.preprocess(ids)
    expected = model(packed)
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(packed), expected)
    np.testing.assert_array_equal(nnx.clone(model)(packed), expected)
    abstract = nnx.eval_shape(Model)
    assert abstract.embed.tables["shared"].table.shape == (64, DIM)


def test_rows_and_bad_calls():
    model = Model()
    assert model.embed.rows("shared", [3, 4]).shape == (2, DIM)
    with pytest.raises(ValueError, match=r"ids\['b'\] is missing"):
        model.embed({"a": np.zeros((BATCH, 3), np.int32)})
    with pytest.raises(ValueError, match="Feature 'a'.*id 60"):
        model.embed.preprocess({"a": np.array([[60]]), "b": np.array([[1]]), "c": np.array([[1]])})
    with pytest.raises(ValueError, match="limits is \"shrink\"|limits is 'shrink'"):
        SparseCoreEmbed(feature_specs(), rngs=nnx.Rngs(0), limits="shrink")
    strict = SparseCoreEmbed(feature_specs(), rngs=nnx.Rngs(0), limits="raise")
    many = {name: np.arange(30, dtype=np.int32)[None].repeat(2000, 0) for name in "abc"}
    with pytest.raises(ValueError, match="max_ids_per_partition"):
        strict.preprocess(many)
    assert Model().embed.preprocess(many).stats.max_ids_per_partition["shared"].max() > 256


def test_packing_in_another_thread_while_steps_run():
    model = Model()
    optimizer = PartitionedOptimizer(model, optax.sgd(0.1))
    packer = model.embed.packer
    rng = np.random.default_rng(0)
    batches = [draw(rng) for _ in range(50)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for packed, (ids, labels) in zip(pool.map(lambda batch: packer(batch[0]), batches), batches, strict=True):
            train_step(model, optimizer, packed, labels)
            np.testing.assert_array_equal(packed.row_pointers, packer(ids).row_pointers)


def test_minibatches_change_no_result_of_a_layer():
    ids, labels = draw(np.random.default_rng(0))
    states = []
    for minibatching in (False, True):
        model = Model(specs=feature_specs(max_ids_per_partition=2), enable_minibatching=minibatching)
        optimizer = PartitionedOptimizer(model, optax.sgd(0.1))
        packed = model.embed.preprocess(ids)
        assert (packed.num_minibatches is not None) == minibatching
        train_step(model, optimizer, packed, labels)
        states.append(jax.tree.map(np.asarray, oracle.variables_of(model.embed)))
    assert int(packed.num_minibatches[0]) > 1
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *states)


def test_a_layer_drops_what_is_not_valid():
    layer = SparseCoreEmbed(feature_specs(), rngs=nnx.Rngs(0), validation="drop")
    ids, _ = draw(np.random.default_rng(0))
    spoilt = {name: np.array(leaf) for name, leaf in ids.items()}
    name = next(iter(spoilt))
    spoilt[name][0, 0] = 10**6
    assert layer.preprocess(spoilt).stats.invalid_ids[name] == 1


def custom_rule(gradient, table, accumulator, learning_rate):
    accumulator = accumulator + jnp.mean(gradient * gradient, axis=1, keepdims=True)
    return table - learning_rate * gradient / (jnp.sqrt(accumulator) + 1e-8), accumulator


@pytest.mark.filterwarnings("ignore:CustomOptimizerSpec has no native row rule:embax.SlowPathWarning")
def test_slots_of_one_value_a_row_and_limits_reach_the_layer():
    custom = embax.CustomOptimizerSpec(
        0.1, custom_rule, slot_variable_initializers_tuple=(jax.nn.initializers.zeros,), slots_of_one_value=(True,)
    )
    after = []
    for optimizer in (embax.RowWiseAdagradOptimizerSpec(0.1), custom):
        model = Model(specs=feature_specs(optimizer), embedding_var_limits={"shared": (-0.3, 0.3)})
        dense = PartitionedOptimizer(model, optax.sgd(1e-2))
        before = oracle.tables_of(oracle.variables_of(model.embed), model.embed.feature_specs)
        rng = np.random.default_rng(0)
        for _ in range(3):
            ids, labels = draw(rng)
            train_step(model, dense, model.embed.preprocess(ids), labels)
        after.append(oracle.tables_of(oracle.variables_of(model.embed), model.embed.feature_specs))
    touched = (after[0]["shared"][0] != before["shared"][0]).any(axis=1)
    assert 10 < touched.sum() <= 30
    assert np.abs(after[0]["shared"][0][touched]).max() <= np.float32(0.3) < np.abs(after[0]["other"][0]).max()
    assert np.abs(after[0]["shared"][0][~touched]).max() > 0.3
    for one, other in zip(after[0]["shared"], after[1]["shared"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"embedding_var_limits has \['none'\], which are no stacks"):
        Model(embedding_var_limits={"none": (0, 1)})


def test_a_function_that_closes_over_the_layer_takes_raw_ids():
    layer = SparseCoreEmbed(feature_specs(), rngs=nnx.Rngs(0))
    ids, _ = draw(np.random.default_rng(0))
    served = jax.jit(lambda ids: layer(ids))(ids)
    jax.tree.map(np.testing.assert_array_equal, served, layer(layer.preprocess(ids)))
    np.testing.assert_array_equal(layer.invalid_ids[...], 0)
    jax.jit(lambda ids: layer(ids))({name: leaf + 100 for name, leaf in ids.items()})
    assert (layer.invalid_ids[...] > 0).all()


def test_shardings_and_filters():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    model = Model(mesh=mesh)
    tables, rest = nnx.state(model, nnx_embed.is_embedding_variables, nnx_embed.is_non_embedding_variables)
    names = {path[-1] for path, _ in nnx.to_flat_state(tables)}
    assert names == {"table", "accumulator", "order", "step", "invalid_ids"}
    assert {path[-1] for path, _ in nnx.to_flat_state(rest)} == {"kernel", "bias", "token"}
    for path, variable in nnx.to_flat_state(nnx_embed.get_named_sharding(model, mesh)):
        spec = jax.P("x") if path[-1] in ("table", "accumulator", "order") else jax.P()
        assert {sharding.spec for sharding in jax.tree.leaves(variable.get_raw_value())} == {spec}
    for path, variable in nnx.to_flat_state(tables):
        assert variable.held.sharding.spec == (jax.P("x") if path[-1] in ("table", "accumulator", "order") else jax.P())
    assert issubclass(EmbeddingVariablesParam, nnx.Param)
