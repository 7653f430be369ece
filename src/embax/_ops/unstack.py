"""Between the activations of a stack and those of its features. The SparseCores' slices of the features interleave."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from embax._ops.geometry import Geometry, StackGeometry


def activations_of_features(activations: jax.Array, stack: StackGeometry, geometry: Geometry) -> list[jax.Array]:
    """Activations as `geometry` asks for them: those of each feature, or of the stack where it names no features.

    Args:
        activations: float32[S * samples_per_sparsecore, dim] of the stack.
        stack: the stack.
        geometry: static.
    """
    if not stack.features:
        return [activations]
    batch_sizes, dims, _ = zip(*stack.features, strict=True)
    return split_features(activations, batch_sizes, dims, geometry.sparsecores_per_device)


def gradient_of_stack(gradients: Sequence[jax.Array], stack: StackGeometry, dim: int, geometry: Geometry) -> jax.Array:
    """The transpose of `activations_of_features`: float32[S * samples_per_sparsecore, dim], zeros where it takes nothing."""
    return join_features(gradients, dim, geometry.sparsecores_per_device) if stack.features else gradients[0]


def only_features_of_all_columns(geometry: Geometry, dims: Sequence[int]) -> Geometry:
    """`geometry` where only stacks whose features all have the columns of their stack, `dims`, name them."""
    each = zip(geometry.stacks, dims, strict=True)
    return geometry.with_features([all(feature.dim == dim for feature in stack.features) for stack, dim in each])


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
