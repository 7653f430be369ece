"""Packed batches with a leading dimension of devices, in the places that take them."""

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec

import embax


@pytest.mark.parametrize("minibatching", [False, True])
@pytest.mark.parametrize("where", ["plain", "jit", "pmap", "shard_map"])
def test_lookups_take_them(where, minibatching):
    specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", oracle.table_spec(), 8, 2)}, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    ids = np.arange(16).reshape(8, 2)
    packed = embax.preprocess({"f": ids}, specs=specs, has_leading_dimension=True, enable_minibatching=minibatching)
    assert packed.row_pointers.ndim == packed.gains.ndim == 2

    def call(packed, variables):
        return embax.lookup(packed, variables, specs=specs)["f"]

    if where == "jit":
        call = jax.jit(call)
    elif where == "pmap":
        call = jax.pmap(call, in_axes=(0, None), devices=jax.devices()[:1])
    elif where == "shard_map":
        mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
        split, whole = PartitionSpec("x"), PartitionSpec()
        call = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False))
    table = oracle.tables_of(variables, specs)["table"][0]
    got = np.asarray(call(packed, variables)).reshape(8, 8)
    np.testing.assert_allclose(got, oracle.lookup(table, ids, "sum"), rtol=1e-5, atol=1e-6)
