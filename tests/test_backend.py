"""Which backend a computation gets, and what is said about it."""

import dataclasses
import subprocess
import sys
import warnings
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import embax
from embax._ops import native


class NoSlots(NamedTuple):
    pass


@dataclasses.dataclass(frozen=True)
class SignSGD(embax.OptimizerSpec):
    """An optimizer of the user's own, in Python alone."""

    Slots: ClassVar = NoSlots

    def slot_variables_initializers(self):
        return NoSlots()

    def update_rows(self, gradient, table, slots, hyperparameters):
        return table - hyperparameters[0] * jnp.sign(gradient), slots


class FakeDevice:
    platform = "cuda"


def test_default_backend(monkeypatch):
    assert embax.default_backend() == embax.default_backend(jax.devices("cpu")[0]) == "native"
    with embax.use_backend("portable"):
        assert embax.default_backend() == "portable"
    assert embax.default_backend(FakeDevice()) == "portable"
    with pytest.raises(ValueError, match="default_backend: the device is 'cpu'; it must be one of jax.devices"):
        embax.default_backend("cpu")
    monkeypatch.setenv("EMBAX_BACKEND", "portable")
    assert embax.default_backend() == "portable"
    monkeypatch.setenv("EMBAX_BACKEND", "fast")
    with pytest.raises(ValueError, match="EMBAX_BACKEND is 'fast'; it must be one of 'native', 'portable'"):
        embax.default_backend()


def test_an_optimizer_without_a_native_rule_says_so_once():
    table = oracle.table_spec(optimizer=SignSGD(0.5))
    specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", table, 2, 1)}, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": np.array([[3], [8]])}, specs=specs)
    gradients = {"f": jnp.asarray([[2.0] * 8, [-3.0] * 8])}
    with pytest.warns(
        embax.SlowPathWarning, match="SignSGD has no native row rule: its updates run in plain JAX operations"
    ):
        new = embax.apply_gradients(gradients, packed, variables, specs=specs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = jax.jit(lambda v: embax.apply_gradients(gradients, packed, v, specs=specs))(variables)
    before, after = (oracle.tables_of(state, specs)["table"][0] for state in (variables, new))
    np.testing.assert_allclose(after[3], before[3] - 0.5, rtol=1e-6)
    np.testing.assert_allclose(after[8], before[8] + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(oracle.tables_of(again, specs)["table"][0], after)


def test_a_rule_of_ones_own_is_not_replaced_by_that_of_the_base():
    class NoStep(embax.SGDOptimizerSpec):
        def update_rows(self, gradient, table, slots, hyperparameters):
            return table, slots

    class Named(embax.SGDOptimizerSpec):
        pass

    class MoreHyperparameters(embax.AdagradOptimizerSpec):
        def get_hyperparameters(self, step=None):
            return *super().get_hyperparameters(step), jnp.float32(0.5)

    class ClaimsARule(MoreHyperparameters):
        native_rule = "adagrad"

    class OtherSlots(embax.AdagradOptimizerSpec):
        native_rule = "adagrad"

        def row_wise_slots(self):
            return (True,)

    rules = [optimizer.native_rule for optimizer in (NoStep, Named, MoreHyperparameters)]
    assert rules == ["", "sgd", ""]
    assert (NoStep().short_name(), Named().short_name()) == ("nostep", "sgd")
    assert not native.has_rule(OtherSlots())
    with pytest.raises(
        ValueError, match="ClaimsARule: get_hyperparameters returned 2 numbers; the native rule 'adagrad' takes 1"
    ):
        step_of(ClaimsARule())


def step_of(optimizer):
    """Takes a step with an optimizer."""
    table = oracle.table_spec(optimizer=optimizer)
    specs = embax.prepare_feature_specs_for_training({"f": oracle.feature_spec("f", table, 2, 1)}, 1, 4)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    packed = embax.preprocess({"f": np.array([[3], [8]])}, specs=specs)
    return embax.apply_gradients({"f": jnp.ones((2, 8))}, packed, variables, specs=specs)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda table: (table[:, :1], ()), r"returned as new table float32\[8, 1\]; it must be float32\[.*, 8\]"),
        (lambda table: (table.astype(jnp.bfloat16), ()), r"returned as new table bfloat16\[8, 8\]; it must be float32"),
        (
            lambda table: (table, (table,)),
            "the row rule returned 2 arrays; it must return 1, the new table, in this order",
        ),
        (lambda table: table, "update_rows returned .*; it must return the new table, and a tuple of the new slots"),
    ],
)
def test_what_a_rule_of_ones_own_returns_is_checked(result, message):
    class Wrong(embax.SGDOptimizerSpec):
        def update_rows(self, gradient, table, slots, hyperparameters):
            return result(jnp.zeros((8, 8)))

    with embax.use_backend("portable"), pytest.raises(ValueError, match=f"Wrong: .*{message}"):
        step_of(Wrong())


def test_slots_without_names_are_a_tuple():
    class Plain(SignSGD):
        def slot_variables_initializers(self):
            return (jax.nn.initializers.zeros,)

        def update_rows(self, gradient, table, slots, hyperparameters):
            return table - gradient, (slots[0] + 1,)

    with embax.use_backend("portable"):
        new = step_of(Plain())
    assert isinstance(new["table"].slot, tuple)
    assert float(new["table"].slot[0].sum()) == 16


def test_a_warning_that_is_an_error_is_one_each_time():
    class Another(SignSGD):
        def update_rows(self, gradient, table, slots, hyperparameters):
            return table, slots

    for _ in range(2):
        with pytest.raises(embax.SlowPathWarning, match="Another has no native row rule"):
            step_of(Another())


def test_choosing_the_portable_backend_is_silent():
    code = """
import jax, numpy as np, embax
table = embax.TableSpec(name="t", vocabulary_size=50, embedding_dim=8, initializer=jax.nn.initializers.zeros,
    optimizer=embax.SGDOptimizerSpec(0.1), combiner="sum")
specs = {"f": embax.FeatureSpec(name="f", table_spec=table, input_shape=(4, 1), output_shape=(4, 8))}
embax.prepare_feature_specs_for_training(specs, 1, 4)
variables = embax.init_embedding_variables(jax.random.key(0), specs)
packed = embax.preprocess({"f": np.arange(4)}, specs=specs)
embax.apply_gradients(embax.lookup(packed, variables, specs=specs), packed, variables, specs=specs)
"""
    environment = {"EMBAX_BACKEND": "portable", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
