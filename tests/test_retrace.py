"""A jitted step is traced again exactly when a limit has changed, and its results are right before and after.

The limits are part of the packed batch: of its layout, which is static, and of the shapes of its arrays. So a step retraces
whatever way the specs reach it, also where JAX does not see that specs were changed in place (as static arguments and in
closures).
"""

import copy
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import embax
from embax.nnx.embed import SparseCoreEmbed

BATCH, DIM, ROWS = 8, 8, 30
NAMES = ("a", "b")
LIMITS = {
    "all limits": (20, 18, 64),
    "max_ids_per_partition": (20, 24, 64 * 3),
    "max_unique_ids_per_partition": (24, 18, 64 * 3),
    "suggested_coo_buffer_size_per_device": (24, 24, 64),
}
"""Other limits than those that `make_specs` begins with, all or one of them; the batches of `draw` fit into all."""


def make_specs():
    features = tuple(
        oracle.feature_spec(name, oracle.table_spec(name, ROWS, DIM), batch=BATCH, valency=2) for name in NAMES
    )
    embax.prepare_feature_specs_for_training(features, 1, 2)
    return set_limits(features, 24, 24, 64 * 3)


def set_limits(specs, ids, unique_ids, buffer):
    stats = embax.SparseDenseMatmulInputStats(*(dict.fromkeys(NAMES, value) for value in (ids, unique_ids)))
    for name in NAMES:
        stats.set_required_buffer_size_per_device(name, buffer, 2)
    return embax.update_preprocessing_parameters(specs, stats)


def draw(seed, valency=2):
    return tuple(np.random.default_rng(seed + n).integers(0, ROWS, (BATCH, valency)) for n in range(len(NAMES)))


def check(results, ids, specs, variables):
    tables = oracle.tables_of(variables, specs)
    for name, given, one in zip(NAMES, results, ids, strict=True):
        np.testing.assert_allclose(given, oracle.lookup(tables[name][0], one, "sum"), rtol=1e-5, atol=1e-5)


def follow(step, traces, specs, variables, changed):
    """Calls `step(specs, variables, packed)` under limits that change, stay, and are set anew to what they are."""
    first = (24, 24, 64 * 3)
    for seed, (limits, expected) in enumerate(
        [(None, 1), (None, 1), (first, 1), (changed, 2), (None, 2), (changed, 2), (first, 2), ((30, 29, 64 * 4), 3)]
    ):
        if limits is not None:
            set_limits(specs, *limits)
        ids = draw(seed)
        check(step(specs, variables, embax.preprocess(ids, specs=specs)), ids, specs, variables)
        assert len(traces) == expected, (seed, limits)


@pytest.fixture
def specs():
    return make_specs()


@pytest.fixture
def variables(specs):
    return embax.init_embedding_variables(jax.random.key(0), specs)


@pytest.mark.parametrize("changed", LIMITS.values(), ids=LIMITS.keys())
def test_specs_in_a_closure(specs, variables, changed):
    traces = []

    @jax.jit
    def step(variables, packed):
        traces.append(1)
        return embax.lookup(packed, variables, specs=specs)

    follow(lambda _, variables, packed: step(variables, packed), traces, specs, variables, changed)


@pytest.mark.parametrize("snapshot", [False, True], ids=["changed in place", "snapshot"])
@pytest.mark.parametrize("changed", LIMITS.values(), ids=LIMITS.keys())
def test_specs_as_a_static_argument(specs, variables, changed, snapshot):
    """Also a snapshot that is made anew for every call, equal to those before while no limit changes."""
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(specs, variables, packed):
        traces.append(1)
        return embax.lookup(packed, variables, specs=specs)

    def call(specs, variables, packed):
        return step(copy.deepcopy(specs) if snapshot else specs, variables, packed)

    follow(call, traces, specs, variables, changed)


class Tower(nn.Module):
    """A Linen module around the functional lookup."""

    features: Any
    traces: Any

    @nn.compact
    def __call__(self, variables, packed):
        self.traces()
        scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
        return [scale * activations for activations in embax.lookup(packed, variables, specs=self.features)]


@pytest.mark.parametrize("changed", LIMITS.values(), ids=LIMITS.keys())
def test_a_linen_module(specs, variables, changed):
    traces = []
    tower = Tower(specs, lambda: traces.append(1))
    parameters = tower.init(jax.random.key(0), variables, embax.preprocess(draw(0), specs=specs))
    traces.clear()
    step = jax.jit(tower.apply)
    follow(lambda _, variables, packed: step(parameters, variables, packed), traces, specs, variables, changed)


def test_a_training_step(specs, variables):
    """The update as well as the lookup: the same bits as of a step that was traced for these limits alone."""
    traces = []

    def train(variables, packed):
        traces.append(1)
        activations = embax.lookup(packed, variables, specs=specs)
        gradients = jax.tree.map(jnp.cos, activations)
        return embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)

    step = jax.jit(train)
    for number, limits in enumerate(LIMITS.values()):
        set_limits(specs, *limits)
        packed = embax.preprocess(draw(number), specs=specs)
        expected = jax.jit(lambda *args: train(*args))(variables, packed)
        variables = step(variables, packed)
        jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_an_nnx_layer_whose_buffers_grow():
    """One trace for each growth, and fewer growths than batches."""
    features = [
        oracle.feature_spec("a", oracle.table_spec("a", 2000, suggested_coo_buffer_size_per_device=16), batch=64)
    ]
    layer = SparseCoreEmbed(features, rngs=nnx.Rngs(0), num_sc_per_device=2)
    table = oracle.tables_of(oracle.variables_of(layer), layer.feature_specs)["a"][0]
    traces, layouts = [], []

    @nnx.jit
    def step(layer, packed):
        traces.append(1)
        return layer(packed)

    for valency in (1, 1, 2, 4, 5, 4, 20, 21, 22, 18, 1):
        ids = np.random.default_rng(valency).integers(0, 2000, (64, valency))
        packed = layer.preprocess([ids])
        if not layouts or packed.layout != layouts[-1]:
            layouts.append(packed.layout)
        np.testing.assert_allclose(step(layer, packed)[0], oracle.lookup(table, ids, "sum"), rtol=1e-5, atol=1e-5)
        assert len(traces) == len(layouts)
    assert 2 < len(layouts) < 6


def test_an_nnx_layer_with_fixed_limits():
    """A layer keeps the limits that its specs had when it was made; steps are shared by layers of equal limits only."""
    specs = make_specs()
    traces = []

    @nnx.jit
    def step(layer, packed):
        traces.append(1)
        return layer(packed)

    layer = SparseCoreEmbed(specs, rngs=nnx.Rngs(0), limits="raise")
    for seed, limits in enumerate([None, LIMITS["all limits"], (24, 24, 64 * 3)]):
        if limits is not None:
            set_limits(specs, *limits)
        ids = draw(seed)
        packed = layer.preprocess(ids)
        check(step(layer, packed), ids, layer.feature_specs, oracle.variables_of(layer))
        assert len(traces) == 1
    set_limits(specs, *LIMITS["all limits"])
    other = SparseCoreEmbed(specs, rngs=nnx.Rngs(0), limits="raise")
    check(step(other, other.preprocess(ids)), ids, other.feature_specs, oracle.variables_of(other))
    assert len(traces) == 2
