"""Whole tables into stacks and back in `embax.compat`, and rows by id, also by the messages that describe a stack."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat_specs import feature, placed, table
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from embax.compat.sparsecore.lib.nn import embedding, table_stacking
from embax.compat.sparsecore.utils import utils


def stacked_features(num_sparsecores, rotation):
    tables = [table("a", 50, 6), table("b", 100, 5), table("c", 9, 20)]
    features = {one.name: feature(one.name, one, num_sparsecores * 4) for one in tables}
    table_stacking.stack_tables(features, ["b", "a"], num_sparsecores // 4, 4, rotation)
    return placed(features, num_sparsecores // 4)


def described(features, num_sparsecores):
    """What `EmbeddingSpecProto` holds, in plain objects."""
    stacks = []
    for name, tables in table_stacking.get_table_stacks(embedding.get_table_specs(features)).items():
        spec = tables[0].stacked_table_spec
        members = [
            SimpleNamespace(
                table_name=one.name,
                vocab_size=one.vocabulary_size,
                embedding_dim=one.embedding_dim,
                row_offset_in_shard=one.setting_in_stack.row_offset_in_shard,
                shard_rotation=one.setting_in_stack.shard_rotation,
            )
            for one in tables
        ]
        stacks.append(
            SimpleNamespace(
                stack_name=name,
                stack_vocab_size=spec.stack_vocab_size,
                stack_embedding_dim=spec.stack_embedding_dim,
                num_sparsecores=num_sparsecores,
                table_specs=members,
            )
        )
    return SimpleNamespace(stacked_table_specs=stacks)


def values_of(features):
    rng = np.random.default_rng(0)
    tables = embedding.get_table_specs(features).values()
    return {one.name: rng.normal(size=(one.vocabulary_size, one.embedding_dim)).astype(np.float32) for one in tables}


@pytest.mark.parametrize(("num_sparsecores", "rotation"), list(itertools.product([4, 16], [None, 0, 2, -1])))
def test_tables_and_their_rows(num_sparsecores, rotation):
    features = stacked_features(num_sparsecores, rotation)
    specs, values = embedding.get_table_specs(features), values_of(features)
    pairs = {name: (value, value + 1) for name, value in values.items()}
    shards = table_stacking.stack_and_shard_tables(specs, pairs, num_sparsecores)
    back = table_stacking.unshard_and_unstack_tables(specs, shards, num_sparsecores)
    jax.tree.map(np.testing.assert_array_equal, back, pairs)
    assert shards["b_a"][0].shape[0] == num_sparsecores
    assert int(np.isnan(shards["c"][0]).sum()) == shards["c"][0].size - 9 * 20

    message = described(features, num_sparsecores)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    sharding = NamedSharding(mesh, P(None, None))
    tables = {name: jax.device_put(value, sharding) for name, value in values.items()}
    whole = table_stacking.stack_and_shard_feature_tables(tables, message)
    for name, array in whole.items():
        assert array.sharding.is_equivalent_to(sharding, 2)
        expected = np.nan_to_num(np.asarray(shards[name][0])).reshape(array.shape)
        np.testing.assert_array_equal(array, expected)
    rows = table_stacking.get_row_ids_in_stacked_tables(message, {"a": [3, 49], "b": [99], "c": [0]})
    np.testing.assert_array_equal(whole["b_a"][jnp.array(rows["b_a"][:2]), :6], values["a"][[3, 49]])
    np.testing.assert_array_equal(whole["b_a"][rows["b_a"][2], :5], values["b"][99])
    jitted = jax.jit(table_stacking.compute_physical_row_ids, static_argnums=range(4))
    place = features["a"].table_spec.setting_in_stack
    ids = jitted(
        num_sparsecores, whole["b_a"].shape[0], place.shard_rotation, place.row_offset_in_shard, jnp.array([3, 49])
    )
    np.testing.assert_array_equal(ids, rows["b_a"][:2])

    spread = {name: jax.device_put(array, NamedSharding(mesh, P("x", None))) for name, array in whole.items()}
    again = table_stacking.unstack_and_unshard_stacked_tables(spread, message, donate=True)
    jax.tree.map(np.testing.assert_array_equal, again, values)
    assert all(array.is_deleted() for array in spread.values())
    again = {name: jax.device_put(value, sharding) for name, value in again.items()}
    table_stacking.stack_and_shard_feature_tables(again, message, delete_input=True)
    assert all(array.is_deleted() for array in again.values())


def test_what_does_not_fit():
    features = stacked_features(4, None)
    message = described(features, 4)
    values = {name: jnp.asarray(value) for name, value in values_of(features).items()}
    stacks = table_stacking.stack_and_shard_feature_tables(values, message)
    with pytest.raises(ValueError, match="There is no stack 'c'"):
        table_stacking.unstack_and_unshard_stacked_tables({"b_a": stacks["b_a"]}, message)
    other = jax.device_put(values["c"], jax.devices()[1])
    with pytest.raises(ValueError, match="have several shardings"):
        table_stacking.stack_and_shard_feature_tables(values | {"c": other}, message)
    with pytest.raises(ValueError, match=r"its tables \['c'\] are missing"):
        table_stacking.stack_and_shard_feature_tables({"a": values["a"], "b": values["b"]}, message)
    with pytest.raises(ValueError, match="id 9 is outside the vocabulary of 9 rows"):
        table_stacking.get_row_ids_in_stacked_tables(message, {"c": [9]})
    with pytest.raises(ValueError, match=r"no tables \['d'\]"):
        table_stacking.get_row_ids_in_stacked_tables(message, {"d": [0]})


def test_shards_of_devices():
    rows = np.arange(64.0).reshape(32, 2)
    shards = utils.shard_emb_table(rows, num_devices=2, num_sc_per_device=4)
    assert isinstance(shards, np.ndarray)
    np.testing.assert_array_equal(shards[1, 4 * 2 + 3], rows[(3 * 2 + 1) * 4 + 2])
    np.testing.assert_array_equal(utils.unshard_emb_table(shards, 4), rows)
    assert isinstance(utils.shard_emb_table(jnp.asarray(rows), num_devices=2, num_sc_per_device=4), jax.Array)
    with pytest.raises(ValueError, match="only MOD is supported"):
        utils.unshard_emb_table(shards, 4, "DIV")
