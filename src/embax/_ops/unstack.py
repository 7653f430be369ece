"""Between the activations of a stack and those of its features. The SparseCores' slices of the features interleave."""

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
    num = layout.num_sparsecores_per_device
    by_sparsecore = activations.reshape(num, placed.samples_per_sparsecore(num), activations.shape[-1])
    features, start = [], 0
    for feature, batch in zip(stack.features, placed.batch_sizes, strict=True):
        size = -(-batch // num)
        samples = by_sparsecore[:, start : start + size, : feature.output_dim]
        features.append(samples.reshape(num * size, feature.output_dim)[:batch])
        start += size
    return features


def stack_gradients(
    gradients: list[jax.Array], stack: StackPlan, placed: StackLayout, layout: PackedLayout
) -> jax.Array:
    """The transpose of `unstack_activations`: zeros where it takes nothing."""
    num = layout.num_sparsecores_per_device
    dim = stack.spec.stack_embedding_dim
    parts = []
    for gradient, batch in zip(gradients, placed.batch_sizes, strict=True):
        size = -(-batch // num)
        padding = ((0, num * size - batch), (0, dim - gradient.shape[-1]))
        if padding != ((0, 0), (0, 0)):
            gradient = jnp.pad(gradient, padding)
        parts.append(gradient.reshape(num, size, dim))
    stacked = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    return stacked.reshape(num * placed.samples_per_sparsecore(num), dim)
