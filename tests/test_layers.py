"""Both layers, for Linen and NNX, in what they share: meshes, frozen tables, rows, precision, what JAX may do with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from flax import nnx

import embax
import embax.linen.embed as linen_embed
import embax.nnx.embed as nnx_embed

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH, DIM = 16, 8
OPTIMIZERS = (embax.AdagradOptimizerSpec(0.1), embax.RowWiseAdagradOptimizerSpec(0.1))


def feature_specs(optimizers=OPTIMIZERS, vocabulary=60, batch=BATCH, **fields):
    shared = oracle.table_spec("shared", vocabulary, DIM, "mean", optimizers[0], **fields)
    other = oracle.table_spec("other", vocabulary // 2, DIM, "sum", optimizers[1], **fields)
    return {
        "a": oracle.feature_spec("a", shared, batch),
        "b": oracle.feature_spec("b", shared, batch),
        "c": oracle.feature_spec("c", other, batch),
    }


def draw(seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    ids = {name: rng.integers(-1, 30, (batch, 3)).astype(np.int32) for name in "abc"}
    return ids, rng.standard_normal((batch, DIM)).astype(np.float32)


def loss_of(activations, targets):
    return sum(jnp.mean((leaf.astype(jnp.float32) - targets) ** 2) for leaf in jax.tree.leaves(activations))


class Nnx:
    """A layer and a dense bias under `nnx.jit`."""

    name = "nnx"

    def __init__(self, specs, seed=0, **options):
        class Model(nnx.Module):
            def __init__(self):
                self.embed = nnx_embed.SparseCoreEmbed(specs, rngs=nnx.Rngs(seed), **options)
                self.bias = nnx.Param(jnp.zeros(DIM))

        self.model = Model()
        self.optimizer = nnx_embed.PartitionedOptimizer(self.model, optax.sgd(0.1))
        self.layer = self.model.embed
        if mesh := options.get("mesh"):  # As a step returns them.
            for node in (self.model, self.optimizer):
                shardings = nnx_embed.get_named_sharding(node, mesh)
                nnx.update(node, jax.device_put(nnx.state(node), shardings))

        @functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
        def step(model, optimizer, inputs, targets, number):
            def loss(model):
                activations = model.embed(inputs, number)
                return loss_of(jax.tree.map(lambda leaf: leaf + model.bias.get_value(), activations), targets)

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        self.jitted_step = step
        self.jitted_call = nnx.jit(lambda model, inputs, weights: model.embed(inputs, weights=weights))

    def step(self, inputs, targets, number=None):
        return self.jitted_step(self.model, self.optimizer, inputs, targets, number)

    def __call__(self, inputs, weights=None):
        return self.jitted_call(self.model, inputs, weights)

    def lower(self, inputs, targets):
        return self.jitted_step.lower(self.model, self.optimizer, inputs, targets, jnp.int32(0)).compile().compiled

    @property
    def specs(self):
        return self.layer.feature_specs

    @property
    def variables(self):
        return self.layer.embedding_table.get_value()

    @variables.setter
    def variables(self, new):
        self.layer.embedding_table.set_value(new)

    def rows(self, table, ids):
        return self.layer.rows(table, ids)

    def set_rows(self, table, ids, values):
        self.layer.set_rows(table, ids, values)

    def load(self, tables):
        self.layer.load(tables)


class Linen:
    """The same under `jax.jit`."""

    name = "linen"

    def __init__(self, specs, seed=0, **options):
        self.layer = layer = linen_embed.SparseCoreEmbed(specs, **options)
        self.params = {**layer.init(jax.random.key(seed), self._smallest(specs))["params"], "bias": jnp.zeros(DIM)}
        if mesh := options.get("mesh"):  # As a step returns them.
            self.params = jax.device_put(self.params, nn.get_sharding(self.params, mesh))
        optimizer = linen_embed.create_optimizer_for_sc_model(self.params, optax.sgd(0.1))
        self.state = optimizer.init(self.params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, inputs, targets, number):
            def loss(params):
                activations = layer.apply({"params": params}, inputs, number)
                return loss_of(jax.tree.map(lambda leaf: leaf + params["bias"], activations), targets)

            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return linen_embed.apply_updates_for_sc_model(params, updates), state, value

        self.jitted_step = step
        self.jitted_call = jax.jit(lambda params, inputs, weights: layer.apply({"params": params}, inputs, weights=weights))

    def _smallest(self, specs):
        devices = self.layer.num_shards
        return self.layer.preprocess(jax.tree.map(lambda feature: np.zeros((devices, 1), np.int32), specs))

    def step(self, inputs, targets, number=None):
        self.params, self.state, value = self.jitted_step(self.params, self.state, inputs, targets, number)
        return value

    def __call__(self, inputs, weights=None):
        return self.jitted_call(self.params, inputs, weights)

    def lower(self, inputs, targets):
        return self.jitted_step.lower(self.params, self.state, inputs, targets, jnp.int32(0)).compile()

    @property
    def specs(self):
        return self.layer.placed_specs

    @property
    def variables(self):
        return self.params["sc_embedding_variables"].value

    @variables.setter
    def variables(self, new):
        box = self.params["sc_embedding_variables"]
        self.params = {**self.params, "sc_embedding_variables": box.replace(value=new)}

    def rows(self, table, ids):
        return self.layer.apply({"params": self.params}, table, ids, method="rows")

    def set_rows(self, table, ids, values):
        self.params = self.layer.set_rows(self.params, table, ids, values)

    def load(self, tables):
        self.params = self.layer.load(self.params, tables)


LAYERS = pytest.mark.parametrize("kind", [Nnx, Linen], ids=lambda kind: kind.name)


def mesh_of(*shape, names="xy"):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, tuple(names[: len(shape)]))


def logical(layer):
    variables = jax.tree.map(np.asarray, layer.variables)
    return oracle.tables_of(variables, layer.specs)


def trained(kind, specs, steps=3, start=None, **options):
    layer = kind(specs, **options)
    if start is not None:
        layer.load({name: arrays[0] for name, arrays in start.items()})
    for number in range(steps):
        ids, targets = draw(number)
        loss = layer.step(layer.layer.preprocess(ids), targets, jnp.int32(number))
    return layer, float(loss)


MESHES = {
    "1x2": (mesh_of(1, 2), "x"),
    "explicit 4": (jax.make_mesh((4,), ("x",)), None),
    "2x2": (mesh_of(2, 2), "y"),
    "4 of two axes": (mesh_of(2, 2), ("y", "x")),
}


@functools.cache
def on_one_device():
    layer, loss = trained(Nnx, feature_specs())
    start = logical(Nnx(feature_specs()))
    return start, logical(layer), loss


@LAYERS
@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_trains_like_one_device(kind, mesh):
    start, end, loss = on_one_device()
    devices, axis = MESHES[mesh]
    layer, got = trained(kind, feature_specs(), start=start, mesh=devices, sharding_axis=axis)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    for name, arrays in logical(layer).items():
        for array, wanted, before in zip(arrays, end[name], start[name], strict=True):
            np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)
            assert (wanted != before).any()
    rows = layer.rows("shared", [[3, 59]])
    np.testing.assert_array_equal(rows[0], logical(layer)["shared"][0][[3, 59]])
    for array in jax.tree.leaves(layer.variables):
        assert array.sharding.shard_shape(array.shape)[0] == array.shape[0] // layer.specs["a"].table_spec.stacked_table_spec.num_devices
