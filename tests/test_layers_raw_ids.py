"""Raw ids inside jit: both layers pack them there, on one device and on several, as the host would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from test_layers import LAYERS, Nnx, draw, like, logical, loss_of, mesh_of, one_table

import embax
import embax.nnx.embed as nnx_embed

pytestmark = pytest.mark.usefixtures("standard_promotion")


@LAYERS
@pytest.mark.parametrize("mesh", [None, "2 devices"])
def test_steps_on_raw_ids_are_steps_on_packed_ones(kind, mesh):
    options = {} if mesh is None else {"mesh": mesh_of(2)}
    raw, packed = kind(one_table(), **options), kind(one_table(), **options)
    for number in range(2):
        ids, targets = like(one_table(), draw(number))
        assert raw.step(ids, targets) == packed.step(packed.layer.preprocess(ids), targets)
    jax.tree.map(np.testing.assert_array_equal, logical(raw), logical(packed))


@LAYERS
@pytest.mark.parametrize("devices", [1, 2])
def test_ids_that_are_not_valid_are_counted(kind, devices):
    layer = kind(one_table(), **({} if devices == 1 else {"mesh": mesh_of(devices)}))
    ids, _ = like(one_table(), draw())
    bad = {"a": ids["a"].copy(), "b": ids["b"]}
    bad["a"][[0, -1], 0] = 60, -2
    wanted = {"a": ids["a"].copy(), "b": ids["b"]}
    wanted["a"][[0, -1], 0] = -1
    if kind is Nnx:
        got = layer(bad)
        counts = layer.layer.invalid_ids[...]
    else:
        got, sown = jax.jit(functools.partial(layer.layer.apply, mutable="intermediates"))(
            {"params": layer.params}, bad
        )
        (counts,) = sown["intermediates"]["invalid_ids"]
    np.testing.assert_array_equal(counts, [2, 0])
    jax.tree.map(np.testing.assert_array_equal, got, layer(layer.layer.preprocess(wanted)))


def test_a_scan_over_batches():
    """Steps of a scan with the model as carry give what the same steps give one by one."""

    def model_and_optimizer():
        class Model(nnx.Module):
            def __init__(self):
                self.embed = nnx_embed.SparseCoreEmbed(one_table(), rngs=nnx.Rngs(0))

        model = Model()
        return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def step(model, optimizer, batch):
        ids, targets = batch
        value, gradients = nnx.value_and_grad(lambda model: loss_of(model.embed(ids), targets))(model)
        optimizer.update(model, gradients)
        return value

    batches = [like(one_table(), draw(number)) for number in range(3)]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *batches)
    one_by_one, at_once = model_and_optimizer(), model_and_optimizer()
    single = nnx.jit(step)
    wanted = [single(*one_by_one, batch) for batch in batches]

    @nnx.jit
    def epoch(model, optimizer, batches):
        def body(carry, batch):
            model, optimizer = carry
            return carry, step(model, optimizer, batch)

        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))((model, optimizer), batches)[1]

    np.testing.assert_allclose(epoch(*at_once, stacked), wanted, rtol=1e-6)
    tables = [oracle.variables_of(pair[0].embed) for pair in (at_once, one_by_one)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), *tables)


@pytest.mark.parametrize("devices", [1, 4])
def test_weights_have_gradients(devices):
    """Against the lookup of a dense table and JAX's own gradient; the tables are updated in the same step."""
    options = {} if devices == 1 else {"mesh": mesh_of(devices)}
    layer = Nnx(one_table(), **options)
    (table, *_), (ids, targets) = logical(layer)["shared"], like(one_table(), draw())
    rng = np.random.default_rng(3)
    weights = {name: rng.uniform(0.5, 1.5, part.shape).astype(np.float32) for name, part in ids.items()}

    def dense(weights):
        def mean(ids, weights):
            weights = jnp.where(ids >= 0, weights, 0.0)
            total = jnp.sum(weights, axis=1, keepdims=True)
            return jnp.einsum("bv,bvd->bd", weights / jnp.where(total == 0, 1.0, total), table[jnp.maximum(ids, 0)])

        return loss_of(jax.tree.map(mean, ids, weights), targets)

    @nnx.jit
    def ours(model, weights):
        loss = lambda model, weights: loss_of(model.embed(ids, weights=weights), targets)  # noqa: E731
        return nnx.grad(loss, argnums=(0, 1))(model, weights)[1]

    old = layer.variables
    packed = layer.layer.preprocess(ids, weights)
    activations = layer(packed)
    got = ours(layer.model, weights)
    new = layer.variables
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), got, jax.grad(dense)(weights))
    gradients = jax.grad(lambda activations: loss_of(activations, targets))(activations)
    if devices == 1:
        wanted = embax.apply_gradients(gradients, packed, old, specs=layer.specs)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new, wanted)
    changed = np.any(np.asarray(new["shared"].table) != old["shared"].table, axis=1)
    assert 0 < changed.sum() <= len(np.unique([ids["a"], ids["b"]]))


def test_a_thousand_steps_on_several_devices():
    """Nobody waits for a step: the layer does, in time."""
    specs = one_table(batch=4)
    layer = Nnx(specs, mesh=mesh_of(4))
    ids, targets = like(specs, draw(batch=4))
    losses = [layer.step(layer.layer.preprocess(ids), targets) for _ in range(1000)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_batch_on_several_devices_must_divide():
    layer = Nnx(one_table(), mesh=mesh_of(4))
    ids = {"a": np.zeros((6, 3), np.int32), "b": np.zeros((8, 3), np.int32)}
    with pytest.raises(ValueError, match=r"ids\['a'\] have a batch of 6, which does not divide by the 4 devices"):
        layer(ids)
    with pytest.raises(ValueError, match="batch of 6, which does not divide by the 4 devices"):
        layer.layer.preprocess(ids)
    ragged = embax.Ragged(np.zeros(4, np.int32), np.array([0, 1, 2, 3, 4]))
    with pytest.raises(ValueError, match=r"ids\['a'\] are a Ragged inside jit, which cannot be divided over 4 devices"):
        layer({"a": ragged, "b": ids["b"]})
    with pytest.raises(ValueError, match="the ids have no samples to divide over 4 devices .* pack it outside jit"):
        layer({name: array[:0] for name, array in ids.items()})
