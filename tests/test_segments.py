"""Searches in lists that ascend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from embax._ops.segments import count_up_to

LIMITS = np.iinfo(np.int32)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 9, 1000])
@pytest.mark.parametrize("distinct", [1, 5, 2000])
@pytest.mark.parametrize("padding", [0, 4])
def test_counts_of_what_is_no_larger(size, distinct, padding):
    rng = np.random.default_rng(size)
    ascending = np.sort(rng.integers(0, distinct, size, dtype=np.int32))
    if padding:
        ascending[size - size // padding :] = LIMITS.max  # As behind the end of a list of rows.
    values = np.concatenate([rng.integers(-2, distinct + 2, 300), [LIMITS.min, LIMITS.max]]).astype(np.int32)
    counts = jax.jit(count_up_to)(jnp.asarray(ascending), jnp.asarray(values))
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, np.searchsorted(ascending, values, side="right"))
