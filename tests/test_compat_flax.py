"""The layers of `embax.compat` against the functional form of embax, on one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compat_specs import feature, of_embax, placed, table
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import embax
from embax.compat.sparsecore.lib.flax.linen import embed as linen_embed
from embax.compat.sparsecore.lib.flax.linen import embed_optimizer
from embax.compat.sparsecore.lib.flax.nnx import embed as nnx_embed
from embax.compat.sparsecore.lib.nn import embedding, embedding_spec, table_stacking

BATCH, SPARSECORES, STEPS = 32, 4, 2


def features_of(devices, optimizer=None, vocabulary=100):
    """Two tables that share a stack, and one of its own."""
    make = functools.partial(table, optimizer=optimizer or embedding_spec.AdamOptimizerSpec(0.1))
    tables = make("a", 50, 6), make("b", vocabulary, 5), make("c", 9, 20, "mean")
    features = {name: feature(name, one, BATCH) for name, one in zip("xyz", tables, strict=True)}
    embedding.auto_stack_tables(features, devices, SPARSECORES)
    return placed(features, devices, SPARSECORES)


def mesh_of(shape, axis_type=jax.sharding.AxisType.Auto):
    devices = np.array(jax.devices()[: math.prod(shape.values())]).reshape(*shape.values())
    return Mesh(devices, tuple(shape), axis_types=(axis_type,) * len(shape))


def ids_of(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, size, (BATCH, 3)) for name, size in (("x", 50), ("y", 100), ("z", 9))}


def loss_of(activations, dense):
    return sum(jnp.sum((jnp.sum(one, axis=1) * dense - 1) ** 2) for one in jax.tree.leaves(activations)) / BATCH


def whole(features, variables, devices):
    num = devices * SPARSECORES
    cut = {
        name: jax.tree.map(lambda a: np.asarray(a).reshape(num, -1, a.shape[1]), state)
        for name, state in variables.items()
    }
    return table_stacking.unshard_and_unstack_tables(embedding.get_table_specs(features), cut, num)


def sharded(features, tables, devices):
    stacks = table_stacking.stack_and_shard_tables(
        embedding.get_table_specs(features), tables, devices * SPARSECORES, 0.0
    )
    return jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, a.shape[2]), stacks)


def initialized(features):
    sharding = NamedSharding(mesh_of({"x": 1}), P("x", None))
    return embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(features), sharding, SPARSECORES, bypass_mesh_check=True
    )


@functools.cache
def expected():
    """First tables; and losses, tables and the dense parameter after some steps, by the functional form of embax."""
    features = features_of(1)
    specs, variables, dense = of_embax(features), initialized(features), jnp.float32(0.5)
    first = whole(features, variables, 1)

    @jax.jit
    def take(variables, dense, packed, step):
        activations = embax.lookup(packed, variables, specs=specs)
        loss, (of_activations, of_dense) = jax.value_and_grad(loss_of, (0, 1))(activations, dense)
        new = embax.apply_gradients(of_activations, packed, variables, specs=specs, step=step, activations=activations)
        return loss, new, dense - jnp.float32(0.1) * of_dense

    losses = []
    for step in range(STEPS):
        loss, variables, dense = take(variables, dense, embax.preprocess(ids_of(step), specs=specs), step)
        losses.append(loss)
    return first, (losses, whole(features, variables, 1), dense)


class LinenModel(nn.Module):
    embed: linen_embed.SparseCoreEmbed

    @nn.compact
    def __call__(self, packed, step=None):
        return loss_of(self.embed(packed, step), self.param("dense", nn.initializers.constant(0.5), ()))


class NNXModel(nnx.Module):
    def __init__(self, features, axis, mesh, **options):
        self.embed = nnx_embed.SparseCoreEmbed(features, axis, mesh, nnx.Rngs(0), **options)
        self.dense = nnx.Param(jnp.float32(0.5))

    def __call__(self, packed, step=None):
        return loss_of(self.embed(packed, step), self.dense.get_value())


def train_linen(features, axis, mesh, tables, devices, **options):
    layer = linen_embed.SparseCoreEmbed(features, axis, mesh, **options)
    assert (layer.num_shards, layer.num_sc_per_device) == (devices, SPARSECORES)
    model = LinenModel(layer)
    packed = layer.preprocess_inputs(0, ids_of(), None)
    shapes = jax.eval_shape(model.init, jax.random.key(0), packed)
    box = shapes["params"]["embed"][linen_embed.EMBEDDING_PARAM_NAME]
    assert box.get_sharding(mesh) == NamedSharding(mesh, P(axis, None))
    shardings = nn.get_sharding(shapes, mesh)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), packed)
    box = params["params"]["embed"][linen_embed.EMBEDDING_PARAM_NAME]
    start = jax.device_put(sharded(features, tables, devices), box.get_sharding(mesh))
    params["params"]["embed"][linen_embed.EMBEDDING_PARAM_NAME] = box.replace(value=start)
    optimizer = embed_optimizer.create_optimizer_for_sc_model(params, optax.sgd(0.1))
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def take(params, state, packed, step):
        loss, gradients = jax.value_and_grad(model.apply)(params, packed, step)
        updates, state = optimizer.update(gradients, state, params)
        return loss, embed_optimizer.apply_updates_for_sc_model(params, updates), state

    losses = []
    for step in range(STEPS):
        loss, params, state = take(params, state, layer.preprocess_inputs(step, ids_of(step), None), step)
        losses.append(loss)
    box = params["params"]["embed"][linen_embed.EMBEDDING_PARAM_NAME]
    assert isinstance(box, linen_embed.WithSparseCoreLayout)
    return losses, whole(features, box.value, devices), params["params"]["dense"]


def train_nnx(features, axis, mesh, tables, devices, **options):
    model = NNXModel(features, axis, mesh, **options)
    optimizer = nnx_embed.PartitionedOptimizer(model, optax.sgd(0.1))
    assert model.embed.num_shards == devices
    start = sharded(features, tables, devices)
    assert jax.tree.structure(start) == jax.tree.structure(model.embed.embedding_table.get_value())
    model.embed.embedding_table.set_value(jax.device_put(start, NamedSharding(mesh, P(axis, None))))
    shardings = [nnx_embed.get_named_sharding(node, mesh) for node in (model, optimizer)]
    data = NamedSharding(mesh, model.embed.data_partition)

    @functools.partial(nnx.jit, in_shardings=(*shardings, data, None), donate_argnums=(0, 1))
    def take(model, optimizer, packed, step):
        loss, gradients = nnx.value_and_grad(lambda model: model(packed, step))(model)
        optimizer.update(model, gradients)
        return loss

    losses = []
    for step in range(STEPS):
        packed, _ = embedding.preprocess_sparse_dense_matmul_input(
            ids_of(step), None, features, devices, devices, num_sc_per_device=SPARSECORES, **options
        )
        losses.append(take(model, optimizer, packed, jnp.int32(step)))
    return losses, whole(features, model.embed.embedding_table.get_value(), devices), model.dense.get_value()


@pytest.mark.parametrize("train", [train_linen, train_nnx])
@pytest.mark.parametrize(
    ("shape", "axis", "axis_type", "options"),
    [
        ({"x": 2}, "x", jax.sharding.AxisType.Auto, {"enable_minibatching": True}),
        ({"p": 2, "q": 2}, "q", jax.sharding.AxisType.Explicit, {}),
        ({"p": 2, "q": 2}, ("q", "p"), jax.sharding.AxisType.Auto, {}),
    ],
    ids=str,
)
def test_steps_are_those_of_the_functional_form(train, shape, axis, axis_type, options, standard_promotion):
    mesh = mesh_of(shape, axis_type)
    devices = math.prod(shape[name] for name in ((axis,) if isinstance(axis, str) else axis))
    first, results = expected()
    got = train(features_of(devices), axis, mesh, first, devices, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), got, results)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(got[1]), strict=True))


def a_layer(devices=2, vocabulary=100, optimizer=None):
    """A Linen layer, its parameters and a batch."""
    features = features_of(devices, optimizer or embedding_spec.SGDOptimizerSpec(0.1), vocabulary)
    layer = linen_embed.SparseCoreEmbed(features, "x", mesh_of({"x": devices}))
    packed = layer.preprocess_inputs(0, ids_of(), None)
    return layer, jax.jit(layer.init)(jax.random.key(0), packed), packed


def updated(layer, variables, packed, gradients):
    """What `tpu_sparse_dense_matmul_grad` makes of the variables."""

    def on_device(gradients, packed, variables):
        return embedding.tpu_sparse_dense_matmul_grad(
            gradients, packed, variables, layer.feature_specs, global_device_count=2, num_sc_per_device=SPARSECORES
        )

    tables, data = layer.embedding_table_partition, layer.data_partition
    in_specs = (data, data, tables)
    return jax.jit(jax.shard_map(on_device, mesh=layer.mesh, in_specs=in_specs, out_specs=tables, check_vma=False))(
        gradients, packed, variables
    )


def test_the_cotangent_of_linen_parameters_is_their_new_value():
    layer, params, packed = a_layer()
    box = params["params"][linen_embed.EMBEDDING_PARAM_NAME]
    assert (box.names, box.mesh) == (("x", None), layer.mesh)
    params = freeze({"params": {linen_embed.EMBEDDING_PARAM_NAME: box.replace(value=freeze(box.value))}})
    activations, vjp = jax.vjp(layer.apply, params, packed)
    assert {name: one.shape for name, one in activations.items()} == {"x": (32, 6), "y": (32, 5), "z": (32, 20)}
    gradients = jax.tree.map(jnp.cos, activations)
    new, _ = vjp(gradients)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    wanted = updated(layer, box.value, packed, gradients)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, new["params"][linen_embed.EMBEDDING_PARAM_NAME].value.unfreeze(), wanted)
    applied = layer.apply(params, gradients, packed, method="apply_gradient")
    assert list(applied) == ["sc_embedding_variables"]
    jax.tree.map(close, applied["sc_embedding_variables"].unfreeze(), wanted)


def test_half_precision_parameters_are_looked_up_and_updated_in_float32():
    layer, params, packed = a_layer()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    activations = jax.jit(layer.apply)(half, packed)
    jax.tree.map(np.testing.assert_array_equal, activations, jax.jit(layer.apply)(rounded, packed))
    assert {one.dtype for one in activations.values()} == {jnp.dtype(jnp.float32)}
    gradients = jax.tree.map(lambda a: jnp.sin(a).astype(jnp.bfloat16), activations)
    new = layer.apply(half, gradients, packed, method="apply_gradient")["sc_embedding_variables"]
    wanted = updated(layer, rounded["params"]["sc_embedding_variables"].value, packed, layer._ensure_float32(gradients))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), new, wanted)
    _, vjp = jax.vjp(lambda params: jax.jit(layer.apply)(params, packed), half)
    (cotangent,) = vjp(layer._ensure_float32(gradients))
    assert {leaf.dtype for leaf in jax.tree.leaves(cotangent)} == {jnp.dtype(jnp.bfloat16)}


def test_the_backward_pass_of_nnx_by_itself():
    mesh = mesh_of({"x": 2})
    layer = nnx_embed.SparseCoreEmbed(features_of(2, embedding_spec.SGDOptimizerSpec(0.1)), "x", mesh, nnx.Rngs(0))
    old = layer.embedding_table.get_value()
    drawn = embedding.init_embedding_variables(
        nnx.Rngs(0).params(),
        embedding.get_table_specs(layer.feature_specs),
        NamedSharding(mesh, layer.embedding_table_partition),
        layer.num_sc_per_device,
        bypass_mesh_check=True,
    )
    jax.tree.map(np.testing.assert_array_equal, old, drawn)
    packed, _ = embedding.preprocess_sparse_dense_matmul_input(ids_of(), None, layer.feature_specs, 2, 2)
    gradients = jax.tree.map(jnp.cos, nnx_embed.embedding_lookup(layer, packed, None))
    of_layer = nnx.state(layer)
    new, of_packed, of_step = nnx_embed.embedding_lookup_bwd((layer, packed, None), ((of_layer, None, None), gradients))
    wanted = updated(layer, old, packed, gradients)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, new["embedding_table"].get_value(), wanted)
    assert of_packed is None
    assert of_step is None
    jax.tree.map(np.testing.assert_array_equal, of_layer["embedding_table"].get_value(), old)  # It was copied.
    # And as a part of what differentiation calls.

    def weighted(layer):
        return sum(jnp.sum(one * gradients[name]) for name, one in layer(packed).items())

    state = nnx.jit(nnx.grad(weighted))(layer)
    jax.tree.map(close, state["embedding_table"].get_value(), wanted)


def test_the_mesh_of_a_linen_layer():
    features = features_of(8)
    layer = linen_embed.SparseCoreEmbed(features)
    assert layer.mesh == Mesh(np.array(jax.devices()), ("sparsecore_sharding",))
    with jax.set_mesh(mesh_of({"p": 2, "q": 4})):
        layer = linen_embed.SparseCoreEmbed(features_of(4), "q")
        assert (layer.mesh, layer.num_shards) == (mesh_of({"p": 2, "q": 4}), 4)
        assert layer.clone().mesh is layer.mesh
        assert linen_embed.SparseCoreEmbed(features, ("p", "q")).num_shards == 8
        with pytest.raises(ValueError, match="pass mesh="):
            jax.eval_shape(lambda: linen_embed.SparseCoreEmbed(features, "q").num_shards)
    with pytest.raises(ValueError, match="pass mesh="):
        linen_embed.SparseCoreEmbed(features, ("p", "q"))
    with pytest.raises(ValueError, match="has the axes"):
        linen_embed.SparseCoreEmbed(features, "y", mesh_of({"x": 8}))
    with pytest.raises(ValueError, match="Only MOD"):
        nnx_embed.SparseCoreEmbed(features, "x", mesh_of({"x": 8}), nnx.Rngs(0), table_sharding_strategy="DIV")


def test_a_second_lookup_in_a_step_is_refused():
    layer, params, packed = a_layer()

    def linen_loss(params):
        return loss_of(layer.apply(params, packed), 1.0) + loss_of(layer.apply(params, packed), 1.0)

    with pytest.raises(ValueError, match="looked up twice"):
        jax.jit(jax.grad(linen_loss))(params)
    model = NNXModel(layer.feature_specs, "x", layer.mesh)
    with pytest.raises(ValueError, match="looked up twice"):
        nnx.jit(nnx.grad(lambda model: model(packed) + model(packed)))(model)


def test_steps_are_in_place():
    """Also with a loss that is linear in the activations."""

    def loss(activations):
        return sum(jnp.sum(one) for one in activations.values())

    temporary = {"linen": [], "nnx": []}
    for vocabulary in (10_000, 40_000):
        layer, params, packed = a_layer(1, vocabulary, embedding_spec.AdagradOptimizerSpec(0.1))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) // 2
        optimizer = embed_optimizer.create_optimizer_for_sc_model(params, optax.sgd(0.1))
        state = optimizer.init(params)

        def linen_step(params, packed, layer=layer, optimizer=optimizer, state=state):
            value, gradients = jax.value_and_grad(lambda params: loss(layer.apply(params, packed)))(params)
            updates, _ = optimizer.update(gradients, state, params)
            return value, embed_optimizer.apply_updates_for_sc_model(params, updates)

        model = nnx_embed.SparseCoreEmbed(layer.feature_specs, "x", layer.mesh, nnx.Rngs(0))

        def nnx_step(model, packed):
            value, gradients = nnx.value_and_grad(lambda model: loss(model(packed)))(model)
            nnx_embed.PartitionedOptimizer(model, optax.sgd(0.1)).update(model, gradients)
            return value

        for name, lowered in (
            ("linen", jax.jit(linen_step, donate_argnums=0).lower(params, packed)),
            ("nnx", nnx.jit(nnx_step, donate_argnums=0).lower(model, packed)),
        ):
            memory = lowered.compile().memory_analysis()
            assert memory.alias_size_in_bytes >= size
            temporary[name].append(memory.temp_size_in_bytes)
    assert temporary["linen"][0] == temporary["linen"][1]
    assert temporary["nnx"][0] == temporary["nnx"][1]
