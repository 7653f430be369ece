"""The primitives inside `jax.shard_map` over several devices."""

import functools

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec
from test_compat_primitives import LIMITS, csr, grad_with

import embax
from embax._stacking.plan import make_plan

BATCH, DIM = 32, 8


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("minibatching", [False, True])
@pytest.mark.parametrize(("axes", "sparsecores"), [({"x": 2}, 4), ({"x": 4}, 2), ({"x": 2, "y": 2}, 4)])
def test_devices_exchange_rows(axes, sparsecores, minibatching, check_vma):
    """As `embax.lookup` and `embax.apply_gradients` do."""
    devices = int(np.prod(list(axes.values())))
    fields = {"max_ids_per_partition": 3, "max_unique_ids_per_partition": 3} if minibatching else {}
    table = oracle.table_spec(vocabulary=200, dim=DIM, optimizer=embax.AdagradOptimizerSpec(0.1), **fields)
    features = {"f": oracle.feature_spec("f", table, BATCH, 6)}
    specs = embax.prepare_feature_specs_for_training(features, devices, sparsecores)
    rng = np.random.default_rng(0)
    packed = embax.preprocess(
        {"f": rng.integers(0, 200, (BATCH, 6))},
        specs=specs,
        limits="grow",
        **({"enable_minibatching": True} if minibatching else {}),
    )
    if minibatching:
        assert packed.num_minibatches[0] > 1
    (stack,) = make_plan(specs).stacks
    values, slot = (rng.uniform(0.1, 1.0, shape).astype(np.float32) for shape in stack.state_shapes)
    state = {stack.name: embax.EmbeddingVariables(values, embax.AdagradSlotVariables(slot))}
    names = tuple(axes) if len(axes) > 1 else next(iter(axes))
    over = PartitionSpec(names)
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:devices], tuple(axes.values())), tuple(axes))
    parameters = {
        "enable_minibatching": minibatching,
        "num_sparsecores_per_device": sparsecores if minibatching else None,
        **LIMITS,
    }

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=over, out_specs=over, check_vma=check_vma)
    def step(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs, axis_name=names)
        new = embax.apply_gradients(activations, packed, variables, specs=specs, axis_name=names)
        minibatches = packed.num_minibatches[0] if minibatching else 1
        batch = (packed.row_pointers, packed.embedding_ids, packed.sample_ids, packed.gains, minibatches)
        array, (slot,) = variables[stack.name]
        looked_up = csr.bind(*batch, array, device_batch_size=BATCH // devices, **parameters)
        return (
            activations["f"],
            new[stack.name],
            looked_up,
            grad_with("adagrad").bind(*batch, array, slot, looked_up, 0.1, **parameters),
        )

    activations, new, looked_up, updated = step(state, packed)
    np.testing.assert_array_equal(looked_up, activations)
    for got, want in zip(updated, jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(got, want)
    assert np.any(np.asarray(updated[0]) != values)
