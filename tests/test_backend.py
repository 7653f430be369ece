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

    assert (NoStep.native_rule, Named.native_rule) == ("", "sgd")
    assert (NoStep().short_name(), Named().short_name()) == ("nostep", "sgd")


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
