"""A DLRM with a wide part: embeddings meet pairwise, hashed crosses add straight to the log odds.

Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019;
Cheng et al., Wide & Deep Learning for Recommender Systems, 2016.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import embax
import embax.nnx.embed

from .dataset import Dataset, Ids, RaggedIds

DEEP_DIM, WIDE_DIM = 16, 1
BOTTOM_WIDTH, TOP_WIDTHS = 64, (128, 64)
DROPOUT = 0.2
DEEP_INITIALIZER = jax.nn.initializers.truncated_normal(0.02)  # one object, so that equal tables share a compilation
# The loss is a mean over the batch, so the gradient of a row that one sample names is about 1e-4: the accumulator
# starts at the square of a few of those. At its default of 0.1 a row would hardly move within these few epochs.
ACCUMULATOR_START = 1e-6
DEEP_LEARNING_RATE, WIDE_LEARNING_RATE = 0.005, 0.03


def feature_specs(dataset: Dataset, batch_size: int) -> dict[str, embax.FeatureSpec]:
    """What embax has to know about each feature; features that share a table share its spec."""
    wide = {feature.table for feature in dataset.features.values() if feature.is_cross}
    tables = {
        name: embax.TableSpec(
            name=name,
            vocabulary_size=table.rows,
            embedding_dim=WIDE_DIM if name in wide else DEEP_DIM,
            combiner="mean",
            initializer=jax.nn.initializers.zeros if name in wide else DEEP_INITIALIZER,
            optimizer=embax.AdagradOptimizerSpec(
                learning_rate=WIDE_LEARNING_RATE if name in wide else DEEP_LEARNING_RATE,
                initial_accumulator_value=ACCUMULATOR_START,
            ),
        )
        for name, table in dataset.tables.items()
    }
    return {
        name: embax.FeatureSpec(
            name=name,
            table_spec=tables[feature.table],
            input_shape=(batch_size,) if isinstance(feature.ids, RaggedIds) else (batch_size, 1),
            output_shape=(batch_size, tables[feature.table].embedding_dim),
        )
        for name, feature in dataset.features.items()
    }


def embax_ids(ids: dict[str, Ids]) -> dict[str, embax.Ragged | np.ndarray]:
    """A batch of ids in the forms that embax takes: Ragged, or int32[batch]."""
    return {
        name: embax.Ragged(column.values, column.row_splits) if isinstance(column, RaggedIds) else column
        for name, column in ids.items()
    }


class ClickModel(nnx.Module):
    """Log odds of the label from the ids and the dense inputs of a sample."""

    def __init__(self, dataset: Dataset, batch_size: int, rngs: nnx.Rngs):
        features = dataset.features
        self.deep = tuple(name for name in features if not features[name].is_cross)
        self.wide = tuple(name for name in features if features[name].is_cross)
        self.embed = embax.nnx.embed.SparseCoreEmbed(feature_specs(dataset, batch_size), rngs=rngs)
        inputs, vectors = dataset.dense.shape[1], len(self.deep) + 1
        self.bottom = nnx.Linear(inputs, BOTTOM_WIDTH, rngs=rngs)
        self.bottom_out = nnx.Linear(BOTTOM_WIDTH, DEEP_DIM, rngs=rngs)
        widths = (vectors * (vectors - 1) // 2 + vectors * DEEP_DIM + inputs, *TOP_WIDTHS)
        self.top = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.top_out = nnx.Linear(widths[-1], 1, kernel_init=jax.nn.initializers.normal(0.01), rngs=rngs)
        self.wide_dense = nnx.Linear(inputs, 1, kernel_init=jax.nn.initializers.zeros, rngs=rngs)
        self.dropout = nnx.Dropout(DROPOUT, rngs=rngs)

    def __call__(self, packed, dense: jax.Array) -> jax.Array:
        """float32[batch] log odds, from packed ids and ``dense``, float32[batch, inputs]."""
        activations = self.embed(packed)
        summary = self.bottom_out(nnx.relu(self.bottom(dense)))
        vectors = jnp.stack([summary, *(activations[name] for name in self.deep)], axis=1)
        first, second = np.triu_indices(vectors.shape[1], k=1)
        interactions = jnp.einsum("bid,bjd->bij", vectors, vectors)[:, first, second]
        hidden = jnp.concatenate([interactions, vectors.reshape(len(dense), -1), dense], axis=1)
        for layer in self.top:
            hidden = self.dropout(nnx.relu(layer(hidden)))
        log_odds = self.top_out(hidden) + self.wide_dense(dense)
        return sum((activations[name] for name in self.wide), start=log_odds)[:, 0]
