import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat_specs import feature, placed, table

from embax.compat.sparsecore.lib.nn import embedding, embedding_spec, table_stacking
from embax.compat.sparsecore.utils import utils

OPTIMIZERS = {
    "sgd": embedding_spec.SGDOptimizerSpec,
    "adagrad": embedding_spec.AdagradOptimizerSpec,
    "adam": embedding_spec.AdamOptimizerSpec,
    "adagrad_momentum": embedding_spec.AdagradMomentumOptimizerSpec,
    "ftrl": embedding_spec.FTRLOptimizerSpec,
    "laprop": embedding_spec.LaPropOptimizerSpec,
    "f2a": embedding_spec.F2AOptimizerSpec,
    "custom": embedding_spec.CustomOptimizerSpec,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, monkeypatch):
    make = OPTIMIZERS[name]
    spec = make(0.5)
    assert spec.short_name() == name
    assert spec == make(learning_rate=jnp.float32(0.5))
    assert hash(spec) == hash(make(0.5))
    assert spec != make(0.25)
    slots = {"sgd": 0, "adagrad": 1, "custom": 0}.get(name, 2)
    assert spec.slot_variables_count() == len(spec.slot_variables_initializers()) == slots
    parameters = spec.get_float_params() | spec.get_bool_params()
    constants = {f.name for f in dataclasses.fields(spec)} - {"learning_rate", "rms_clip_threshold"}
    assert parameters.keys() == (constants if name != "custom" else set())
    assert make.from_float_and_bool_params(spec.get_float_params(), spec.get_bool_params(), 0.5) == spec
    counts = {"sgd": 1, "adagrad": 1, "adam": 4, "adagrad_momentum": 6, "ftrl": 5, "laprop": 4, "f2a": 6, "custom": 1}
    for step in (None, 3):
        hyperparameters = spec.get_hyperparameters(step)
        assert [scalar.dtype for scalar in hyperparameters[:5]] == [jnp.float32] * len(hyperparameters[:5])
        assert (len(hyperparameters), {scalar.shape for scalar in hyperparameters}) == (counts[name], {()})

    module = "sparse_dense_matmul_" + ("optimizer_grad" if name == "custom" else f"grad_with_{name}")
    packages = "embax.compat.sparsecore.lib.core.primitives"
    fake = types.ModuleType(f"{packages}.{module}")
    setattr(fake, f"tpu_{module}_primitive", object())
    monkeypatch.setitem(sys.modules, packages, types.ModuleType(packages))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert spec.get_optimizer_primitive() is getattr(fake, f"tpu_{module}_primitive")


def test_optimizers_are_equal_by_type_and_fields():
    assert embedding_spec.FTRLOptimizerSpec(learning_rate_power=-1) != embedding_spec.FTRLOptimizerSpec(
        learning_rate_power=-2
    )
    assert embedding_spec.SGDOptimizerSpec(0.1) != embedding_spec.CustomOptimizerSpec(0.1)
    assert len({embedding_spec.CallablePlaceholder("a"), embedding_spec.CallablePlaceholder("a")}) == 1
    with pytest.raises(RuntimeError, match="'a' was called"):
        embedding_spec.SGDOptimizerSpec(embedding_spec.CallablePlaceholder("a")).get_learning_rate(1)
    with pytest.raises(ValueError, match="rms_clip_threshold is 1.0"):
        embedding_spec.LaPropOptimizerSpec(rms_clip_threshold=1.0)


class Halving:
    def __call__(self, step):
        return 0.5 * step


def test_learning_rates():
    rate = embedding_spec.SGDOptimizerSpec(lambda step: 0.01 / (step + 1)).get_learning_rate
    with jax.numpy_dtype_promotion("standard"):
        traced = jax.jit(jax.vmap(rate))(jnp.arange(20, dtype=jnp.int32))
        assert jax.jit(embedding_spec.SGDOptimizerSpec(Halving()).get_learning_rate)(3) == 1.5
    assert traced.dtype == jnp.float32
    # Rounded once, so that a traced step gives the same bits as an int.
    np.testing.assert_array_equal(traced, np.float32([0.01 / (step + 1) for step in range(20)]))
    np.testing.assert_array_equal(traced, [rate(step) for step in range(20)])
    assert embedding_spec.SGDOptimizerSpec(lambda: 0.25).get_learning_rate() == 0.25
    with pytest.raises(ValueError, match="a function of the step, and step is None"):
        rate()
    with pytest.raises(ValueError, match="needs 2 arguments"):
        embedding_spec.SGDOptimizerSpec(lambda step, other: 0.1).get_learning_rate(1)


def test_a_schedule_of_mixed_dtypes_still_runs():
    def schedule(step):
        return jax.lax.cond(step < 2, lambda: jnp.float32(0.5), lambda: jnp.ones((), jnp.float32) * 0.25)

    rate = jax.jit(embedding_spec.SGDOptimizerSpec(schedule).get_learning_rate)
    assert [rate(jnp.int32(step)) for step in (0, 3)] == [0.5, 0.25]


def test_a_table_before_and_after_it_is_placed():
    one = table("t", vocabulary=100, dim=6)
    assert one.setting_in_stack == embedding_spec.TableSettingInStack("t", 100, 6, 0, 0)
    assert not one.is_stacked()
    features = [feature("f", one)]
    with pytest.raises(AssertionError, match="Table t is not stacked"):
        one.stacked_table_spec  # noqa: B018
    with pytest.raises(AssertionError, match="Feature f is not placed"):
        features[0].id_transformation  # noqa: B018
    with pytest.raises(ValueError, match="embedding.prepare_feature_specs_for_training was not called"):
        embedding.get_stacked_table_specs(features)
    before = hash(features[0])
    one.max_ids_per_partition = 7
    placed(features, devices=2)
    stack = embedding_spec.StackedTableSpec("t", 128, 8, one.optimizer, "sum", 16, max_ids_per_partition=7)
    assert one.stacked_table_spec == stack
    assert hash(one.stacked_table_spec) == hash(stack)
    assert stack.replace(total_sample_count=3).total_sample_count == 3
    assert "t" in jax.tree.leaves(stack)
    assert one.setting_in_stack == embedding_spec.TableSettingInStack("t", 128, 8, 0, 0)
    assert features[0].id_transformation == embedding_spec.FeatureIdTransformation(0, 0, 0)
    assert hash(features[0]) != before
    assert embedding.get_stacked_table_specs(features) == {"t": stack}
    for field in ("max_ids_per_partition", "vocabulary_size"):
        with pytest.raises(AttributeError, match=f"{field} cannot be set to 3"):
            setattr(one, field, 3)


def test_stacking():
    tables = [table(name, vocabulary, dim=dim) for name, vocabulary, dim in [("a", 50, 8), ("b", 100, 6), ("c", 9, 20)]]
    features = {name: feature(name, one) for name, one in zip("xyz", tables, strict=True)}
    for arguments, message in (
        (["a", "b", "a"], "Table a is repeated in group"),
        (["a", "nothing"], "there are no tables"),
    ):
        with pytest.raises(ValueError, match=message):
            table_stacking.stack_tables(features, arguments, 2, 4)
    with pytest.raises(ValueError, match="different padded dimensions"):
        table_stacking.stack_tables(features, ["a", "c"], 2, 4, fail_on_excess_padding=True)
    assert not any(one.is_stacked() for one in tables)
    limits = {"stack_to_max_ids_per_partition": lambda name, samples: samples}
    assert table_stacking.stack_tables(features, ["b", "a"], 2, 4, stack_name="s", **limits) is None
    assert tables[0].stacked_table_spec is tables[1].stacked_table_spec
    assert tables[0].stacked_table_spec.max_ids_per_partition == 32
    assert tables[0].setting_in_stack == embedding_spec.TableSettingInStack("s", 64, 8, 16, 4)
    assert features["x"].id_transformation == embedding_spec.FeatureIdTransformation(0, 128, 4)
    with pytest.raises(ValueError, match="Table b is already stacked."):
        table_stacking.stack_tables(features, ["c", "b"], 2, 4)
    with pytest.raises(ValueError, match="'s' is already used"):
        table_stacking.stack_tables(features, ["c"], 2, 4, stack_name="s")
    embedding.auto_stack_tables(features, 2, 4)
    assert table_stacking.get_table_stacks(embedding.get_table_specs(features)) == {"s": tables[:2], "c": tables[2:]}
    others = [feature("x", table("a")), feature("y", table("b", optimizer=embedding_spec.SGDOptimizerSpec(0.2)))]
    with pytest.raises(ValueError, match="different optimizers: .*SGD.*0.1.*SGD.*0.2"):
        table_stacking.stack_tables(others, ["a", "b"], 1, 4)
    dims, rows = table_stacking.round_up_dim_and_vocab_size({"b": table("b", 100, 6)}, 16)
    assert (dims, rows) == ({"b": 8}, {"b": 128})
    settings = table_stacking.compute_table_to_setting_in_stack("s", ["b", "a"], 8, {"a": 64, "b": 128}, 8, 4)
    assert settings == {one.name: one.setting_in_stack for one in (tables[1], tables[0])}
    split = table_stacking._split_groups_by_memory_limit
    assert split([["a", "b", "c"], ["d"]], {"a": 5, "b": 7, "c": 3, "d": 99}, 10) == [["a", "c"], ["b"], ["d"]]
    assert table_stacking._next_largest_multiple(9, 8) == 16


def test_sparsecores_of_devices():
    class Kind:
        def __init__(self, device_kind):
            self.device_kind = device_kind

    assert utils.num_sparsecores_per_device() == 4
    kinds = [utils.num_sparsecores_per_device(Kind(kind)) for kind in ("TPU v5", "TPU v6e", "cpu")]
    assert kinds == [4, 2, 4]
    with pytest.raises(ValueError, match="kind 'abacus' is not known"):
        utils.num_sparsecores_per_device(Kind("abacus"))
    with pytest.raises(ValueError, match="has no device_kind"):
        utils.num_sparsecores_per_device(object())
    with pytest.raises(ValueError, match="Invalid num_sc_per_device"):
        embedding.compute_row_pointers_size_per_device(global_device_count=1, num_sc_per_device=3)
