"""A strict environment: no silent promotion of dtypes or ranks, several devices, every shape annotation checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Set to another platform to test on that one.

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No test asserts on a clock.
hypothesis.settings.register_profile("embax", deadline=None)
hypothesis.settings.load_profile("embax")

# Before anything imports embax. The example shows, in test_types.py, that a wrong shape is caught.
jaxtyping.install_import_hook(["embax", "shapes_example"], "shape_checks.check_shapes")


@pytest.fixture
def standard_promotion():
    """JAX as users run it, for third-party code that mixes dtypes, such as the bias correction of `optax.adam`."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
