"""Gradients of NNX models: ordinary recipes of JAX, Flax and optax against a dense reference in float64, or an error."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from test_layers import mesh_of

import embax
import embax.nnx
from embax.nnx.embed import SparseCoreEmbed

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH, DIM, ROWS, RATE, START = 8, 8, 40, 0.3, 0.1
MESHES = pytest.mark.parametrize("devices", [1, 2])


def specs(optimizer=None, rows=ROWS):
    table = oracle.table_spec("t", rows, DIM, "sum", optimizer or embax.AdagradOptimizerSpec(RATE, START))
    return {name: oracle.feature_spec(name, table, BATCH) for name in ("a", "b")}


class Model(nnx.Module):
    def __init__(self, optimizer=None, devices=1, rows=ROWS, **options):
        mesh = {} if devices == 1 else {"mesh": mesh_of(devices)}
        self.embed = SparseCoreEmbed(specs(optimizer, rows), rngs=nnx.Rngs(0), **mesh, **options)
        self.head = nnx.Linear(DIM, DIM, rngs=nnx.Rngs(1))

    def __call__(self, inputs, **options):
        found = self.embed(inputs, **options)
        return self.head(found["a"] + 2 * found["b"])


def draw(seed=0):
    rng = np.random.default_rng(seed)
    ids = {name: rng.integers(-1, 25, (BATCH, 3)).astype(np.int32) for name in "ab"}
    return ids, rng.standard_normal((BATCH, DIM)).astype(np.float32)


def loss_of(model, ids, targets):
    return jnp.mean((model(ids) - targets) ** 2)


def table_of(model):
    return oracle.tables_of(oracle.variables_of(model.embed), model.embed.feature_specs)["t"]


class Dense:
    """The same model on a dense table in float64: gradients by JAX, Adagrad in NumPy, on the rows that a batch touched."""

    def __init__(self, model):
        self.table, self.slot = (array.astype(np.float64) for array in table_of(model))
        self.head = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model.head)))

    @staticmethod
    def lookup(table, ids):
        return jnp.sum(jnp.where((ids >= 0)[..., None], table[jnp.maximum(ids, 0)], 0.0), axis=1)

    def apply(self, table, head, ids):
        found = {name: self.lookup(table, part) for name, part in ids.items()}
        return (found["a"] + 2 * found["b"]) @ head["kernel"] + head["bias"]

    def loss(self, table, head, ids, targets):
        return jnp.mean((self.apply(table, head, ids) - targets) ** 2)

    def update(self, gradient, touched):
        gradient, touched = np.asarray(gradient), np.unique(touched)
        touched = touched[touched >= 0]
        self.slot[touched] += gradient[touched] ** 2
        self.table[touched] -= RATE * gradient[touched] / np.sqrt(self.slot[touched])

    def check(self, model, rtol=2e-4):
        table, slot = table_of(model)
        np.testing.assert_allclose(table, self.table, rtol=rtol, atol=1e-5)
        np.testing.assert_allclose(slot, self.slot, rtol=rtol, atol=1e-5)


def in_float64(function):
    """Calls a function of JAX in float64."""

    @functools.wraps(function)
    def wide(*arguments):
        with jax.enable_x64():
            return jax.tree.map(np.asarray, function(*arguments))

    return wide


def ids_of(ids):
    return np.concatenate([part.ravel() for part in ids.values()])


def optimizer_of(model, tx=None):
    return nnx.Optimizer(model, tx or optax.adam(1e-2), wrt=nnx.Param)


RECIPES = {
    "as it is": (lambda g: g, None),
    "scaled": (lambda g: jax.tree.map(lambda leaf: leaf / 128.0, g), None),
    "clipped by the global norm": (lambda g: g, optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(1e-2))),
    "averaged over microbatches": (lambda g: g, optax.MultiSteps(optax.adam(1e-2), 4)),
    "weight decay": (lambda g: g, optax.adamw(1e-2, weight_decay=0.5)),
}


@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["jit", "eager"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_done_to_gradients_does_not_reach_the_tables(recipe, jit):
    change, tx = RECIPES[recipe]
    model = Model()
    dense, optimizer = Dense(model), optimizer_of(model, tx)

    @jit
    def step(model, optimizer, packed, targets):
        loss, gradients = nnx.value_and_grad(loss_of)(model, packed, targets)
        norm = optax.tree.norm(gradients)
        optimizer.update(model, change(gradients))
        return loss, norm

    for seed in range(2):
        ids, targets = draw(seed)
        head = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model.head)))
        value, (of_table, of_head) = in_float64(jax.value_and_grad(dense.loss, argnums=(0, 1)))(
            dense.table, head, ids, targets
        )
        loss, norm = step(model, optimizer, model.embed.preprocess(ids), targets)
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        np.testing.assert_allclose(norm, optax.tree.norm(of_head), rtol=1e-4)
        dense.update(of_table, ids_of(ids))
    dense.check(model)


@MESHES
def test_a_tied_output_layer(devices):
    """The rows of all items are read as a second lookup: each of the two updates the table, the later lookup first."""
    model = Model(devices=devices)
    dense = Dense(model)
    ids, _ = draw()

    def loss(model, packed):
        logits = model(packed) @ model.embed.rows("t", jnp.arange(ROWS)).T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(BATCH)).mean()

    def dense_loss(table, tied, head):
        logits = dense.apply(table, head, ids) @ tied.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(BATCH)).mean()

    of_batch, of_rows = in_float64(jax.grad(dense_loss, argnums=(0, 1)))(dense.table, dense.table, dense.head)
    nnx.jit(nnx.grad(loss))(model, model.embed.preprocess(ids))
    dense.update(of_rows, np.arange(ROWS))
    dense.update(of_batch, ids_of(ids))
    dense.check(model)
    assert model.embed.step[...] == 1


@MESHES
def test_a_penalty_on_rows_and_a_constant_of_rows(devices):
    model = Model(devices=devices)
    dense = Dense(model)
    ids, targets = draw()
    penalized = np.array([3, 7, 7, 38])

    def loss(model, packed):
        rows = model.embed.rows("t", jnp.asarray(penalized))
        constant = jax.lax.stop_gradient(model.embed.rows("t", [0, 39])).sum()
        return loss_of(model, packed, targets) + 0.5 * jnp.sum(rows**2) * constant

    def dense_loss(table, rows, head):
        return dense.loss(table, head, ids, targets) + 0.5 * jnp.sum(rows[penalized] ** 2) * constant

    constant = dense.table[[0, 39]].sum()
    of_batch, of_rows = in_float64(jax.grad(dense_loss, argnums=(0, 1)))(dense.table, dense.table, dense.head)
    nnx.jit(nnx.grad(loss))(model, model.embed.preprocess(ids))
    dense.update(of_batch, ids_of(ids))
    dense.update(of_rows, penalized)
    dense.check(model)


def test_two_lookups_in_one_loss():
    model = Model()
    dense = Dense(model)
    (first, _), (second, _) = draw(0), draw(1)

    def loss(model, first, second):
        return jnp.mean(model(first) * model(second))

    def dense_loss(one, other, head):
        return jnp.mean(dense.apply(one, head, first) * dense.apply(other, head, second))

    of_first, of_second = in_float64(jax.grad(dense_loss, argnums=(0, 1)))(dense.table, dense.table, dense.head)
    packed = [model.embed.preprocess(ids) for ids in (first, second)]
    nnx.jit(nnx.grad(loss))(model, *packed)
    dense.update(of_second, ids_of(second))
    dense.update(of_first, ids_of(first))
    dense.check(model)


@pytest.mark.parametrize("how", ["eager", "nnx.scan", "lax.scan"])
def test_microbatches_update_one_after_another(how):
    model = Model()
    dense, batches = Dense(model), [draw(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *batches)

    def microbatch(model, batch):
        return nnx.value_and_grad(loss_of)(model, *batch)[1]

    if how == "eager":
        for batch in batches:
            microbatch(model, batch)
    elif how == "nnx.scan":

        @nnx.jit
        def run(model, batches):
            def body(model, batch):
                return model, microbatch(model, batch)

            return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(model, batches)[1]

        run(model, stacked)
    else:
        graph, state = nnx.split(model)

        @jax.jit
        def run(state, batches):
            def body(state, batch):
                model = nnx.merge(graph, state)
                return nnx.state(model), microbatch(model, batch)

            return jax.lax.scan(body, state, batches)[0]

        nnx.update(model, run(state, stacked))
    for ids, targets in batches:
        dense.update(in_float64(jax.grad(dense.loss))(dense.table, dense.head, ids, targets), ids_of(ids))
    dense.check(model)
    assert model.embed.step[...] == 3


@MESHES
@pytest.mark.parametrize("jit", [nnx.jit, lambda step: step], ids=["jit", "eager"])
def test_gradients_of_tables_are_clipped_with_all_others(devices, jit):
    model = Model(devices=devices)
    dense, optimizer = Dense(model), optimizer_of(model, optax.sgd(0.0))
    ids, targets = draw()
    limit = 0.05

    @jit
    def step(model, optimizer, packed):
        loss, (of_dense, tables) = embax.nnx.value_and_grad(loss_of)(model, packed, targets)
        norm = embax.nnx.global_norm(of_dense, tables)
        factor = jnp.minimum(1.0, limit / norm)
        tables = {path: {name: part.scale(factor) for name, part in stacks.items()} for path, stacks in tables.items()}
        optimizer.update(model, of_dense)
        embax.nnx.apply_sparse_gradients(model, tables)
        return loss, norm

    value, gradients = in_float64(jax.value_and_grad(dense.loss, argnums=(0, 1)))(dense.table, dense.head, ids, targets)
    loss, norm = step(model, optimizer, model.embed.preprocess(ids))
    wanted = optax.tree.norm(jax.tree.map(jnp.asarray, gradients))
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(norm, wanted, rtol=1e-4)
    assert wanted > limit
    dense.update(gradients[0] * (limit / float(wanted)), ids_of(ids))
    dense.check(model)
    assert model.embed.step[...] == 1


@MESHES
@pytest.mark.parametrize("how", ["scan over microbatches", "scan inside the loss", "sum", "sum of a scan"])
def test_accumulated_gradients_equal_those_of_one_large_batch(how, devices):
    model = Model(devices=devices)
    dense, batches = Dense(model), [draw(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *batches)

    @nnx.jit
    def step(model, stacked):
        if how == "scan inside the loss":

            def total(model):
                graph, state = nnx.split(model)

                def body(sum, batch):
                    return sum + loss_of(nnx.merge(graph, state, copy=True), *batch), None

                return jax.lax.scan(body, jnp.zeros(()), stacked)[0] / 3

            tables = embax.nnx.value_and_grad(total)(model)[1][1]
        elif how in ("scan over microbatches", "sum of a scan"):

            def body(model, batch):
                return model, embax.nnx.value_and_grad(loss_of)(model, *batch)[1][1]

            tables = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(model, stacked)[1]
            if how == "sum of a scan":
                tables = embax.nnx.sum_sparse_gradients(model, [tables])
        else:
            parts = [
                embax.nnx.value_and_grad(loss_of)(model, *jax.tree.map(lambda leaf, n=n: leaf[n], stacked))[1][1]
                for n in range(3)
            ]
            tables = embax.nnx.sum_sparse_gradients(model, parts)
        factor = 1.0 if how == "scan inside the loss" else 1 / 3
        tables = {path: {name: part.scale(factor) for name, part in stacks.items()} for path, stacks in tables.items()}
        embax.nnx.apply_sparse_gradients(model, tables)
        return embax.nnx.global_norm({}, tables)

    def dense_loss(table):
        return sum(dense.loss(table, dense.head, ids, targets) for ids, targets in batches) / 3

    of_table = in_float64(jax.grad(dense_loss))(dense.table)
    norm = step(model, stacked)
    if how != "scan over microbatches":  # Whose rows occur several times.
        np.testing.assert_allclose(norm, np.linalg.norm(of_table), rtol=1e-4)
    dense.update(of_table, np.concatenate([ids_of(ids) for ids, _ in batches]))
    dense.check(model)


@pytest.mark.parametrize("inner", [nnx.jit, nnx.remat, lambda loss: loss], ids=["jit", "remat", "plain"])
def test_collected_gradients_of_lookups_and_rows_inside_transformations(inner):
    model = Model()
    dense, before = Dense(model), table_of(model)
    ids, targets = draw()

    def loss(model, packed):
        return loss_of(model, packed, targets) + jnp.sum(model.embed.rows("t", jnp.array([1, 2, 2])) ** 2)

    called = inner(loss)
    packed = model.embed.preprocess(ids)
    tables = nnx.jit(embax.nnx.value_and_grad(lambda model, packed: called(model, packed)))(model, packed)[1][1]
    jax.tree.map(np.testing.assert_array_equal, before, table_of(model))
    nnx.jit(nnx.grad(called))(copy.deepcopy(model), packed)  # As it was traced without collecting.

    def dense_loss(table):
        return dense.loss(table, dense.head, ids, targets) + jnp.sum(table[jnp.array([1, 2, 2])] ** 2)

    dense.update(in_float64(jax.grad(dense_loss))(dense.table), [*ids_of(ids), 1, 2])
    embax.nnx.apply_sparse_gradients(model, tables)
    dense.check(model)
    with pytest.raises(
        ValueError, match=r"are of \['other'\]; they must be a dict by the path of a layer.*\['embed'\]"
    ):
        embax.nnx.apply_sparse_gradients(model, {"other": {}})
    with pytest.raises(ValueError, match=r"Layer 'embed' has no stacks \['x'\]"):
        embax.nnx.apply_sparse_gradients(model, {"embed": {"x": tables["embed"]["t"]}})


def test_a_loss_scale_trains_like_float32_and_skipped_steps_do_not_count():
    adam = embax.AdamOptimizerSpec(0.05)
    plain, scaled = Model(adam), Model(adam, skip_nonfinite=True)

    @nnx.jit
    def step(model, packed, targets, scale):
        def loss(model):
            return scale * jnp.mean((model(packed, gradient_scale=scale) - targets) ** 2)

        nnx.grad(loss)(model)

    for seed, scale in enumerate([2.0**10, 3e38, 2.0**8, 2.0**12]):
        ids, targets = draw(seed)
        packed = plain.embed.preprocess(ids)
        step(scaled, packed, 1e3 * targets if scale > 1e38 else targets, jnp.float32(scale))
        if scale < 1e38:
            step(plain, packed, targets, jnp.float32(1.0))
    assert plain.embed.step[...] == scaled.embed.step[...] == 3
    for got, wanted in zip(table_of(scaled), table_of(plain), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_only_what_is_differentiated_is_updated():
    model, (ids, targets) = Model(), draw()
    before = table_of(model)
    packed = model.embed.preprocess(ids)
    model(packed)
    nnx.jit(loss_of)(model, packed, targets)
    nnx.jit(nnx.grad(loss_of, argnums=nnx.DiffState(0, nnx.PathContains("head"))))(model, packed, targets)
    weights = {name: np.ones(part.shape, np.float32) for name, part in ids.items()}
    of_weights = jax.jit(
        jax.grad(lambda weights: jnp.sum(model.embed(ids, weights=weights)["a"] ** 2))
    )  # Not the token.
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_weights(weights)))
    jax.tree.map(np.testing.assert_array_equal, before, table_of(model))
    assert model.embed.step[...] == 0
