"""A recurrent model of the next word, whose words are looked up in an embedding table: Linen, and sequence features.

The words of all sequences are the samples of the lookup, ``[batch * LENGTH, 1]``; reshaped, their activations are sequences
again, ``[batch, LENGTH, dim]``. Sequences that are shorter are padded with -1, which is no word.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tqdm import tqdm

import embax
import embax.linen.embed

from .text import END, LENGTH, Text

DIM, HIDDEN = 64, 192
DROPOUT = 0.3
LEARNING_RATE, TABLE_LEARNING_RATE, WEIGHT_DECAY = 7e-3, 0.15, 0.01


class NextWord(nn.Module):
    """Log odds of each next word, from the words so far."""

    embed: embax.linen.embed.SparseCoreEmbed
    vocabulary_size: int

    @nn.compact
    def __call__(self, packed, train: bool = False) -> jax.Array:
        """float32[batch, LENGTH, vocabulary] from packed words; ``train`` drops activations out."""
        dropout = nn.Dropout(DROPOUT, deterministic=not train)
        words = embax.unflatten_sequences(self.embed(packed)["word"], LENGTH)
        state = nn.RNN(nn.GRUCell(HIDDEN))(dropout(words))
        return nn.Dense(self.vocabulary_size)(nn.Dense(DIM)(dropout(state)))


def new_model(text: Text, batch_size: int, mesh: jax.sharding.Mesh | None = None) -> NextWord:
    """The model, without its parameters. The devices of a mesh share table and batch; None is one device."""
    words = embax.TableSpec(
        name="word",
        vocabulary_size=len(text.vocabulary),
        embedding_dim=DIM,
        combiner="sum",
        initializer=jax.nn.initializers.normal(0.1),
        optimizer=embax.AdagradOptimizerSpec(TABLE_LEARNING_RATE, initial_accumulator_value=1e-6),
    )
    samples = batch_size * LENGTH
    word = embax.FeatureSpec(name="word", table_spec=words, input_shape=(samples, 1), output_shape=(samples, DIM))
    embed = embax.linen.embed.SparseCoreEmbed(feature_specs={"word": word}, mesh=mesh)
    return NextWord(embed, len(text.vocabulary))


def pack(model: NextWord, sequences: list[np.ndarray], batch_size: int) -> tuple[Any, np.ndarray]:
    """A batch of sequences, filled up with empty ones, so that all batches have one shape and share a compilation.

    Returns:
      The packed words, and the word after each, int32[batch_size, LENGTH], -1 where there is none.
    """
    sequences = [*sequences, *[np.array([END], np.int32)] * (batch_size - len(sequences))]
    words = embax.flatten_sequences([ids[:-1] for ids in sequences], LENGTH)
    following = embax.flatten_sequences([ids[1:] for ids in sequences], LENGTH)
    return model.embed.preprocess({"word": words}), following.reshape(batch_size, LENGTH)


def train(model: NextWord, text: Text, batch_size: int, epochs: int, seed: int) -> tuple[Any, list[float]]:
    """Parameters that ``model`` was trained to on the training part, with a progress bar, and the loss of each step."""
    steps = len(text.train) // batch_size
    key, shuffle = jax.random.key(seed), np.random.default_rng(seed)
    params = model.init(key, pack(model, text.train[:batch_size], batch_size)[0])["params"]
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * steps)
    optimizer = embax.linen.embed.create_optimizer_for_sc_model(
        params, optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    )
    state = params, optimizer.init(params)

    @functools.partial(jax.jit, donate_argnames="state")  # donated: the table stays where it is
    def train_step(state, packed, following, step):
        params, optimizer_state = state

        def loss(params):
            dropout = {"dropout": jax.random.fold_in(key, step)}
            scores: Any = model.apply({"params": params}, packed, train=True, rngs=dropout)
            return -log_likelihood(scores, following).mean(where=following >= 0)

        value, gradients = jax.value_and_grad(loss)(params)  # updates the table as it goes back
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        params = embax.linen.embed.apply_updates_for_sc_model(params, updates)
        return (params, optimizer_state), value

    losses = []
    with tqdm(total=epochs * steps, unit=" steps", mininterval=0.5) as bar:
        for _ in range(epochs):
            for rows in shuffle.permutation(len(text.train))[: steps * batch_size].reshape(steps, batch_size):
                packed, following = pack(model, [text.train[row] for row in rows], batch_size)
                state, value = train_step(state, packed, following, len(losses))
                losses.append(float(value))
                bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                bar.update()
    return state[0], losses


def log_likelihood(scores: jax.Array, following: jax.Array) -> jax.Array:
    """Of each word in ``following``, int32[batch, LENGTH], float32 of that shape; no meaning where there is none."""
    return -optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(following, 0))


def perplexity(model: NextWord, params: Any, sequences: list[np.ndarray], batch_size: int) -> float:
    """The exponential of the mean negative log likelihood of the words of ``sequences``."""

    @jax.jit
    def batch_sums(params, packed, following):
        scores: Any = model.apply({"params": params}, packed)
        there, likelihood = following >= 0, log_likelihood(scores, following)
        return likelihood.sum(where=there), there.sum()

    batches = [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
    sums = np.array([batch_sums(params, *pack(model, batch, batch_size)) for batch in batches], np.float64)
    total, words = sums.sum(axis=0)
    return float(np.exp(-total / words))


def likely(
    model: NextWord, params: Any, text: Text, words: Sequence[str], most: int, batch_size: int
) -> list[tuple[str, float]]:
    """The likeliest next words after the beginning of a paragraph, of at most LENGTH - 1 words, and their probabilities."""
    begun = text.ids(words)
    packed, _ = pack(model, [np.append(begun, END)], batch_size)
    scores: Any = model.apply({"params": params}, packed)
    odds = np.asarray(jax.nn.softmax(scores[0, len(begun) - 1]))
    return [(text.vocabulary[word], float(odds[word])) for word in np.argsort(-odds)[:most]]
