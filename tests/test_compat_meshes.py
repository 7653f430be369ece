"""Lookups and updates of `embax.compat` on several devices: one axis of a mesh, several, one of several, and `jax.pmap`."""

import functools
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embax.compat.sparsecore.lib.nn import embedding, embedding_spec, table_stacking

SPARSECORES = 4


def features_of(devices, batch=32, max_ids=256):
    """Three features over two tables that share a stack, and one of another."""
    tables = [
        embedding_spec.TableSpec(
            name=name,
            vocabulary_size=vocabulary,
            embedding_dim=dim,
            initializer=jax.nn.initializers.normal(1.0),
            optimizer=embedding_spec.AdagradOptimizerSpec(0.1),
            combiner=combiner,
        )
        for name, vocabulary, dim, combiner in (("a", 50, 6, "sum"), ("b", 100, 5, "sum"), ("c", 9, 20, "mean"))
    ]
    features = {
        f"f{number}": embedding_spec.FeatureSpec(
            name=f"f{number}",
            table_spec=table,
            input_shape=[batch, 3],
            output_shape=[batch, table.embedding_dim],
        )
        for number, table in enumerate([*tables, tables[0]])
    }
    embedding.auto_stack_tables(features, devices, SPARSECORES, stack_to_max_ids_per_partition=lambda *_: max_ids)
    embedding.prepare_feature_specs_for_training(features, devices, SPARSECORES)
    return features


def by_sparsecore(variables, num):
    return {name: jax.tree.map(lambda a: a.reshape(num, -1, a.shape[-1]), state) for name, state in variables.items()}


def step_of(features, devices, minibatching):
    def step(packed, variables, gradients):
        options = {
            "global_device_count": devices,
            "num_sc_per_device": SPARSECORES,
            "enable_minibatching": minibatching,
        }
        activations = embedding.tpu_sparse_dense_matmul(packed, variables, features, **options)
        new = embedding.tpu_sparse_dense_matmul_grad(gradients, packed, variables, features, **options)
        return activations, new

    return step


@functools.cache
def problem():
    """Ids, gradients and tables of all cases, and what a step on one device makes of them."""
    features = features_of(1)
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, one.table_spec.vocabulary_size, (32, 3)) for name, one in features.items()}
    gradients = {name: rng.normal(size=one.output_shape).astype(np.float32) for name, one in features.items()}
    specs = embedding.get_table_specs(features)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), P("x", None))
    variables = embedding.init_embedding_variables(jax.random.key(0), specs, sharding, SPARSECORES, True)
    packed, _ = embedding.preprocess_sparse_dense_matmul_input(ids, None, features, 1, 1, num_sc_per_device=SPARSECORES)
    activations, new = jax.jit(step_of(features, 1, False))(packed, variables, gradients)
    whole = functools.partial(table_stacking.unshard_and_unstack_tables, specs, num_shards=SPARSECORES)
    old, new = (whole(by_sparsecore(state, SPARSECORES)) for state in (variables, new))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    return ids, gradients, old, (activations, new)


@pytest.mark.parametrize(
    ("shape", "axes", "minibatching"),
    [
        ({"x": 4}, "x", True),
        ({"p": 2, "q": 2}, ("p", "q"), False),
        ({"p": 1, "q": 2}, ("p", "q"), True),
        ({"p": 2, "q": 4}, "q", False),
        ({"pmap": 2}, None, True),
        ({"pmap": 4}, None, False),
    ],
    ids=str,
)
def test_a_step_on_several_devices_is_that_on_one(shape, axes, minibatching):
    """The axes of a shard_map, of which the tables are sharded over `axes`, or pmap of arrays with a leading dimension."""
    ids, gradients, tables, expected = problem()
    names = (axes,) if isinstance(axes, str) else axes or ("pmap",)
    devices = math.prod(shape[name] for name in names)
    features = features_of(devices, max_ids=3 if minibatching else 256)
    specs = embedding.get_table_specs(features)
    shards = table_stacking.stack_and_shard_tables(specs, tables, SPARSECORES * devices, 0.0)
    packed, _ = embedding.preprocess_sparse_dense_matmul_input(
        ids,
        None,
        features,
        devices,
        devices,
        num_sc_per_device=SPARSECORES,
        has_leading_dimension=axes is None,
        enable_minibatching=minibatching,
    )
    assert (packed.num_minibatches.max() > 1) == minibatching
    assert packed.lhs_gains["c"].ndim == (2 if axes is None else 1)
    step = step_of(features, devices, minibatching)
    if axes is None:
        gradients, shards = (
            jax.tree.map(lambda a: np.asarray(a).reshape(devices, -1, a.shape[-1]), tree)
            for tree in (gradients, shards)
        )
        step = jax.pmap(step, devices=jax.devices()[:devices])
    else:
        mesh = Mesh(np.array(jax.devices()[: math.prod(shape.values())]).reshape(*shape.values()), tuple(shape))
        shards = jax.tree.map(lambda a: np.asarray(a).reshape(-1, a.shape[-1]), shards)
        step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False))
    activations, new = step(packed, shards, gradients)
    activations = {name: np.asarray(a).reshape(32, -1) for name, a in activations.items()}
    new = table_stacking.unshard_and_unstack_tables(
        specs, by_sparsecore(new, SPARSECORES * devices), SPARSECORES * devices
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), (activations, new), expected)


def test_axes_that_cannot_be_told():
    ids, _, _, _ = problem()
    features = features_of(2)
    packed, _ = embedding.preprocess_sparse_dense_matmul_input(ids, None, features, 2, 2, num_sc_per_device=SPARSECORES)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("p", "q"))
    sharding = NamedSharding(mesh, P("p", None))
    variables = embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(features), sharding, SPARSECORES, bypass_mesh_check=True
    )
    call = functools.partial(
        embedding.tpu_sparse_dense_matmul,
        feature_specs=features,
        global_device_count=2,
        num_sc_per_device=SPARSECORES,
    )
    with pytest.raises(ValueError, match=r"sharded over 2 devices, and which of the axes \('p', 'q'\)"):
        jax.jit(jax.shard_map(call, mesh=mesh, in_specs=P("p"), out_specs=P("p"), check_vma=False))(packed, variables)
