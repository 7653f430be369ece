"""From the gradients of features to that of their stack."""

from typing import Any

import jax
import jax.numpy as jnp

from embax._ops.unstack import join_features
from embax.compat.sparsecore.lib.core.primitives._primitive import define
from embax.compat.sparsecore.lib.core.primitives._sizes import sparsecores_that_divide


def _shapes(
    *unstacked_gradients: Any,
    stacked_batch_size: int,
    stacked_feature_dim: int,
    num_sparsecores_per_device: int | None = None,
) -> Any:
    del num_sparsecores_per_device
    if not unstacked_gradients:
        raise ValueError("sparse_dense_matmul_gradient_stack was given no gradient; it takes one or more.")
    shape = (stacked_batch_size, stacked_feature_dim)
    return unstacked_gradients[0].update(shape=shape, dtype=jnp.dtype(jnp.float32), weak_type=False)


def _stack(
    *unstacked_gradients: jax.Array,
    stacked_batch_size: int,
    stacked_feature_dim: int,
    num_sparsecores_per_device: int | None = None,
) -> jax.Array:
    shapes = tuple(gradient.shape for gradient in unstacked_gradients)
    num = sparsecores_that_divide((stacked_batch_size, stacked_feature_dim), shapes, num_sparsecores_per_device)
    return join_features([one.astype(jnp.float32) for one in unstacked_gradients], stacked_feature_dim, num)


tpu_sparse_dense_matmul_gradient_stack_primitive = define(
    "sparse_dense_matmul_gradient_stack", _shapes, _stack, multiple_results=False
)
"""float32[batch, dim] of the stack, of the gradients of its features, padded with zeros to its columns."""
