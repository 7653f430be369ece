"""What the Linen layer has of its own: the parameter and its box, the optimizer of a model, the names of JAX SparseCore."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn

import embax
from embax import _warnings
from embax.linen import embed_optimizer
from embax.linen.embed import (
    EMBEDDING_PARAM_NAME,
    SparseCoreEmbed,
    apply_updates_for_sc_model,
    create_optimizer_for_sc_model,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH, DIM = 8, 8


def specs_of(*names, optimizer=None, vocabulary=40):
    optimizer = optimizer or embax.SGDOptimizerSpec(0.5)
    return {
        name: oracle.feature_spec(name, oracle.table_spec(name, vocabulary, DIM, "sum", optimizer), BATCH)
        for name in names
    }


def draw(*names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 40, (BATCH, 3)).astype(np.int32) for name in names}


class Model(nn.Module):
    """Two embedding layers of one scope, made elsewhere, and a dense layer."""

    user: SparseCoreEmbed
    item: SparseCoreEmbed

    @nn.compact
    def __call__(self, user, item):
        joined = jnp.concatenate([self.user(user)["user"], self.item(item)["item"]], axis=1)
        return nn.Dense(1)(joined)[:, 0]


def test_a_model_of_two_layers_trains():
    user, item = SparseCoreEmbed(specs_of("user")), SparseCoreEmbed(specs_of("item"))
    model = Model(user, item)
    batch = (user.preprocess(draw("user")), item.preprocess(draw("item")))
    params = model.init(jax.random.key(0), *batch)["params"]
    assert params["user"][EMBEDDING_PARAM_NAME].value["user"].table.shape == (64, DIM)
    assert params["item"][EMBEDDING_PARAM_NAME].value["item"].slot == embax.SGDSlotVariables()
    optimizer = create_optimizer_for_sc_model(params, optax.adam(1e-2))
    state = optimizer.init(params)
    # Adam has two moments of kernel and bias, and nothing of tables.
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * (2 * DIM + 1) + 1
    labels = jnp.asarray(np.random.default_rng(0).standard_normal(BATCH), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        def loss_of(params):
            return jnp.mean((model.apply({"params": params}, *batch) - labels) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return apply_updates_for_sc_model(params, updates), state, loss

    losses = []
    for _ in range(200):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    assert losses[-1] < 0.01 * losses[0]
    assert step._cache_size() == 1
    assert embed_optimizer.apply_updates_for_sc_model is apply_updates_for_sc_model


def test_the_gradient_of_the_parameter_is_its_new_value():
    layer = SparseCoreEmbed(specs_of("f"))
    packed = layer.preprocess_inputs(0, draw("f"), None)
    variables = layer.init(jax.random.key(0), packed)
    gradients = jax.grad(lambda params: jnp.sum(layer.apply({"params": params}, packed)["f"] ** 2))(variables["params"])
    assert jax.tree.structure(gradients) == jax.tree.structure(variables["params"])
    activations = layer.apply(variables, packed)
    updated = layer.apply(variables, {"f": 2 * activations["f"]}, packed, method="apply_gradient")
    assert list(updated) == [EMBEDDING_PARAM_NAME]
    jax.tree.map(
        np.testing.assert_array_equal, updated[EMBEDDING_PARAM_NAME].value, gradients[EMBEDDING_PARAM_NAME].value
    )
    expected = embax.apply_gradients(
        {"f": 2 * activations["f"]}, packed, variables["params"][EMBEDDING_PARAM_NAME].value, specs=layer.placed_specs
    )
    jax.tree.map(np.testing.assert_array_equal, updated[EMBEDDING_PARAM_NAME].value, expected)
    # Without its box the parameter works as well, and then its gradient is always taken over.
    unboxed = nn.meta.unbox(variables["params"])
    plain = jax.grad(lambda params: jnp.sum(layer.apply({"params": params}, packed)["f"] ** 2))(unboxed)
    taken = apply_updates_for_sc_model(unboxed, plain)
    jax.tree.map(np.testing.assert_array_equal, taken[EMBEDDING_PARAM_NAME], expected)


def test_partitions_and_shardings():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    layer = SparseCoreEmbed(specs_of("f", optimizer=embax.RowWiseAdagradOptimizerSpec(0.1)), "y", mesh)
    assert (layer.num_shards, layer.data_partition, layer.embedding_table_partition) == (
        2,
        jax.P("y"),
        jax.P("y", None),
    )
    packed = layer.preprocess(draw("f"))
    assert packed.gains.sharding == jax.sharding.NamedSharding(mesh, jax.P("y"))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), packed)
    assert nn.get_partition_spec(shapes)["params"][EMBEDDING_PARAM_NAME] == jax.P("y", None)
    shardings = nn.get_sharding(shapes, mesh)
    variables = jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), packed)
    one_by_one = layer.init(jax.random.key(0), packed)
    jax.tree.map(np.testing.assert_array_equal, variables, one_by_one)
    for jitted, eager in zip(jax.tree.leaves(variables), jax.tree.leaves(one_by_one), strict=True):
        assert jitted.sharding == eager.sharding == jax.sharding.NamedSharding(mesh, jax.P("y"))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params, packed):
        gradients = jax.grad(lambda params: jnp.sum(layer.apply({"params": params}, packed)["f"]))(params)
        return apply_updates_for_sc_model(params, gradients)

    params = variables["params"]
    for _ in range(3):
        params = step(params, packed)
    assert step._cache_size() == 1
    table = layer.bind({"params": params}).embedding_table["f"].table
    assert (np.asarray(table) != np.asarray(one_by_one["params"][EMBEDDING_PARAM_NAME].value["f"].table)).any()


def test_the_step_reaches_the_optimizer():
    schedule = embax.SGDOptimizerSpec(lambda step: jnp.where(step < 1, 0.0, 0.5))
    layer = SparseCoreEmbed(specs_of("f", optimizer=schedule))
    packed = layer.preprocess({"f": np.full((BATCH, 1), 3)})
    params = layer.init(jax.random.key(0), packed)["params"]
    before = np.asarray(layer.apply({"params": params}, "f", [3], method="rows"))
    for step, rate in ((0, 0.0), (1, 0.5)):
        new = jax.jit(jax.grad(lambda params, step: jnp.sum(layer.apply({"params": params}, packed, step)["f"])))(
            params, jnp.int32(step)
        )
        np.testing.assert_allclose(
            layer.apply({"params": new}, "f", [3], method="rows"), before - rate * BATCH, rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match="is a function of the step, and no step was given"):
        jax.grad(lambda params: jnp.sum(layer.apply({"params": params}, packed)["f"]))(params)


def test_two_lookups_in_one_step_are_never_silent(monkeypatch):
    monkeypatch.setattr(_warnings, "_told", set())
    layer = SparseCoreEmbed(specs_of("f"))
    packed = layer.preprocess(draw("f"))
    params = layer.init(jax.random.key(0), packed)["params"]
    before = jax.tree.map(np.asarray, params[EMBEDDING_PARAM_NAME].value)

    def look_up(params):
        return layer.apply({"params": params}, packed)["f"]

    def twice(params, look_up=look_up):
        return jnp.sum(look_up(params) * look_up(params))

    with pytest.raises(ValueError, match="Stack 'f' is looked up twice in one differentiated step"):
        jax.jit(jax.grad(twice))(params)
    with pytest.raises(ValueError, match="looked up 2 times in one differentiated step"):
        apply_updates_for_sc_model(params, jax.grad(twice)(params))

    # Where the trace does not show it, the tables stay, and what follows is NaN, or an error outside jit.
    hidden = functools.partial(twice, look_up=jax.jit(look_up))
    with pytest.warns(embax.SlowPathWarning, match="received other arrays than the backward pass returned"):
        after = jax.jit(lambda params: apply_updates_for_sc_model(params, jax.grad(hidden)(params)))(params)
    jax.tree.map(np.testing.assert_array_equal, before, after[EMBEDDING_PARAM_NAME].value)
    assert np.isnan(jax.jit(look_up)(after)).all()
    with pytest.raises(ValueError, match="looked up 2 times in one differentiated step"):
        look_up(after)
    # A model that is differentiated without a lookup keeps its tables.
    unused = apply_updates_for_sc_model(params, jax.grad(lambda params: jnp.zeros(()))(params))
    jax.tree.map(np.testing.assert_array_equal, before, unused[EMBEDDING_PARAM_NAME].value)


def test_copies_of_a_module_share_its_limits():
    layer = SparseCoreEmbed(specs_of("f"))
    many = {"f": np.arange(40)[None].repeat(BATCH * 50, 0)}
    grown = layer.preprocess(many).layout
    assert layer.clone().preprocess(draw("f")).layout.stacks[0].capacity == grown.stacks[0].capacity
    strict = layer.clone(limits="raise")
    with pytest.raises(ValueError, match="max_ids_per_partition"):
        strict.preprocess(many)
    other = layer.clone(feature_specs=list(specs_of("g").values()))
    assert isinstance(other.placed_specs, list)
    params = layer.init(jax.random.key(0), layer.preprocess(draw("f")))["params"]
    with pytest.raises(ValueError, match="There is no 'sc_embedding_variables' in the parameters"):
        layer.load({"layer": params}, {})
    with pytest.raises(ValueError, match="The gradients have the structure"):
        layer.apply({"params": params}, [], layer.preprocess(draw("f")), method="apply_gradient")


def test_hosts_agree_on_minibatches():
    specs = {"f": oracle.feature_spec("f", oracle.table_spec("f", 4000, DIM, max_ids_per_partition=8), 64)}
    ids = {"f": np.arange(640).reshape(64, 10)}
    member = embax.ThreadAllReduce(1).member(0)
    agreed, alone = (
        SparseCoreEmbed(specs, enable_minibatching=True).preprocess_inputs(5, ids, None, interface)
        for interface in (member, None)
    )
    np.testing.assert_array_equal(agreed.num_minibatches, alone.num_minibatches)
    assert int(agreed.num_minibatches[0]) > 1
