"""Between the activations of a stack and those of its features. The SparseCores' slices of the features interleave."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from embax._preprocess.buffers import PackedLayout, StackLayout
from embax._stacking.plan import StackPlan


def unstack_activations(
    activations: jax.Array, stack: StackPlan, placed: StackLayout, layout: PackedLayout
) -> list[jax.Array]:
    """The activations of each feature of a stack.

    Args:
        activations: float32[S * samples_per_sparsecore, dim].
        stack: the planned stack.
        placed: the same stack in the packed batch.
        layout: the packed batch.

    Returns:
        float32[batch, output_dim] of each feature, in the order of the plan.
    """
    dims = [feature.output_dim for feature in stack.features]
    return split_features(activations, placed.batch_sizes, dims, layout.num_sparsecores_per_device)


def stack_gradients(
    gradients: list[jax.Array], stack: StackPlan, placed: StackLayout, layout: PackedLayout
) -> jax.Array:
    """The transpose of `unstack_activations`: zeros where it takes nothing."""
    return join_features(gradients, stack.spec.stack_embedding_dim, layout.num_sparsecores_per_device)


def split_features(
    activations: jax.Array, batch_sizes: Sequence[int], dims: Sequence[int], num_sparsecores: int
) -> list[jax.Array]:
    """float32[batch, dim] of each feature of a stack, of its activations on `num_sparsecores` SparseCores."""
    by_sparsecore = activations.reshape(num_sparsecores, -1, activations.shape[-1])
    features, start = [], 0
    for batch, dim in zip(batch_sizes, dims, strict=True):
        size = -(-batch // num_sparsecores)
        samples = by_sparsecore[:, start : start + size, :dim]
        features.append(samples.reshape(num_sparsecores * size, dim)[:batch])
        start += size
    return features


def join_features(gradients: Sequence[jax.Array], dim: int, num_sparsecores: int) -> jax.Array:
    """The transpose of `split_features`, of a stack with `dim` columns: zeros where it takes nothing."""
    parts = []
    for gradient in gradients:
        size = -(-gradient.shape[0] // num_sparsecores)
        padding = ((0, num_sparsecores * size - gradient.shape[0]), (0, dim - gradient.shape[-1]))
        if padding != ((0, 0), (0, 0)):
            gradient = jnp.pad(gradient, padding)
        parts.append(gradient.reshape(num_sparsecores, size, dim))
    stacked = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return stacked.reshape(-1, dim)
