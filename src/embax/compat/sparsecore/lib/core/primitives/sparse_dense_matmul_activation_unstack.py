"""From the activations of a stack to those of its features."""

from typing import Any

import jax
import jax.numpy as jnp

from embax._ops.unstack import split_features
from embax.compat.sparsecore.lib.core.primitives._primitive import define
from embax.compat.sparsecore.lib.core.primitives._sizes import sparsecores_that_divide


def _shapes(
    stacked_activations: Any,
    *,
    per_feature_batch_sizes: tuple[int, ...],
    per_feature_dims: tuple[int, ...],
    num_sparsecores_per_device: int | None = None,
) -> Any:
    del num_sparsecores_per_device
    return [
        stacked_activations.update(shape=shape, dtype=jnp.dtype(jnp.float32), weak_type=False)
        for shape in zip(per_feature_batch_sizes, per_feature_dims, strict=True)
    ]


def _unstack(
    stacked_activations: jax.Array,
    *,
    per_feature_batch_sizes: tuple[int, ...],
    per_feature_dims: tuple[int, ...],
    num_sparsecores_per_device: int | None = None,
) -> list[jax.Array]:
    shapes = tuple(zip(per_feature_batch_sizes, per_feature_dims, strict=True))
    num = sparsecores_that_divide(stacked_activations.shape, shapes, num_sparsecores_per_device)
    activations = split_features(stacked_activations, per_feature_batch_sizes, per_feature_dims, num)
    return [one.astype(jnp.float32) for one in activations]


tpu_sparse_dense_matmul_activation_unstack_primitive = define(
    "sparse_dense_matmul_activation_unstack", _shapes, _unstack, multiple_results=True
)
"""float32[batch, dim] of each feature, of the activations of a stack, in which the SparseCores' slices interleave."""
