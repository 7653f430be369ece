"""Two towers: one embeds flights, one aircraft, and the inner product of their vectors is the score of the pair.

Training contrasts the aircraft of a flight with those of the other flights in the batch. Aircraft that fly much are there more
often, so the logarithm of their share is subtracted from their scores: Yi et al., Sampling-Bias-Corrected Neural Modeling for
Large Corpus Item Recommendations, 2019.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import embax
import embax.nnx.embed

from .flights import NEVER, Flights, Ids

DIM, HIDDEN = 32, 128
LEARNING_RATE, TABLE_LEARNING_RATE = 2e-3, 0.05
ENCODING_BATCH = 4096


class Tower(nnx.Module):
    """A vector for each sample, from the ids of its facts. The devices of a mesh share tables and batch."""

    def __init__(
        self, ids: Ids, flights: Flights, batch_size: int, rngs: nnx.Rngs, mesh: jax.sharding.Mesh | None = None
    ):
        tables = {
            table: embax.TableSpec(
                name=table,
                vocabulary_size=flights.rows[table],
                embedding_dim=DIM,
                combiner="mean",
                initializer=jax.nn.initializers.normal(0.1),
                optimizer=embax.AdagradOptimizerSpec(TABLE_LEARNING_RATE, initial_accumulator_value=1e-6),
            )
            for table in dict.fromkeys(flights.tables[name] for name in ids)
        }
        features = {
            name: embax.FeatureSpec(
                name=name,
                table_spec=tables[flights.tables[name]],
                input_shape=(batch_size, column.shape[1]),
                output_shape=(batch_size, DIM),
            )
            for name, column in ids.items()
        }
        self.embed = embax.nnx.embed.SparseCoreEmbed(features, mesh=mesh, rngs=rngs)
        self.linear = nnx.Linear(len(features) * DIM, DIM, rngs=rngs)
        self.hidden = nnx.Linear(len(features) * DIM, HIDDEN, rngs=rngs)
        self.out = nnx.Linear(HIDDEN, DIM, rngs=rngs)

    def __call__(self, packed) -> jax.Array:
        """float32[batch, DIM], from packed ids."""
        facts = jnp.concatenate(list(self.embed(packed).values()), axis=1)
        return self.linear(facts) + self.out(nnx.relu(self.hidden(facts)))


class TwoTower(nnx.Module):
    """A tower for flights and one for aircraft."""

    def __init__(self, flights: Flights, batch_size: int, rngs: nnx.Rngs, mesh: jax.sharding.Mesh | None = None):
        self.flight = Tower(flights.queries, flights, batch_size, rngs, mesh)
        self.aircraft = Tower(flights.aircraft, flights, batch_size, rngs, mesh)


def new_model(flights: Flights, batch_size: int, seed: int, mesh: jax.sharding.Mesh | None = None) -> TwoTower:
    """A fresh model; without a mesh on one device."""
    return TwoTower(flights, batch_size, nnx.Rngs(seed), mesh)


@nnx.jit
def train_step(
    model: TwoTower,
    optimizer: nnx.Optimizer,
    flights,
    aircraft,
    answers: jax.typing.ArrayLike,
    log_share: jax.typing.ArrayLike,
) -> jax.Array:
    """One step on packed ``flights`` and the packed ``aircraft`` that flew them.

    Args:
      model: updated, its tables in place.
      optimizer: of its dense parameters.
      flights: packed facts of the flights of a batch.
      aircraft: packed facts of their aircraft.
      answers: which aircraft that are, int32[batch].
      log_share: float32[batch], logarithm of the share of training flights that each of these aircraft has.

    Returns:
      The mean loss.
    """
    answers, log_share = jnp.asarray(answers), jnp.asarray(log_share)
    again = (answers[:, None] == answers[None, :]) & ~jnp.eye(
        len(answers), dtype=bool
    )  # the right answer, at another place

    def loss(model: TwoTower) -> jax.Array:
        scores = model.flight(flights) @ model.aircraft(aircraft).T - log_share[None, :]
        scores = jnp.where(again, -jnp.inf, scores)
        return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(answers))).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def train(model: TwoTower, flights: Flights, batch_size: int, epochs: int, seed: int) -> list[float]:
    """Trains ``model`` in place on the training slice, with a progress bar, and returns the loss of each step."""
    samples = flights.train.stop
    batches = samples // batch_size
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * batches)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    log_share = np.log(np.bincount(flights.answers[flights.train]) / samples).astype(np.float32)

    shuffle, losses = np.random.default_rng(seed), []
    with tqdm(total=epochs * batches, unit=" steps", mininterval=0.5) as bar:
        for _ in range(epochs):
            for rows in shuffle.permutation(samples)[: batches * batch_size].reshape(batches, batch_size):
                answers = flights.answers[rows]
                queries = model.flight.embed.preprocess(take(flights.queries, rows))
                aircraft = model.aircraft.embed.preprocess(take(flights.aircraft, answers))
                losses.append(float(train_step(model, optimizer, queries, aircraft, answers, log_share[answers])))
                bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
                bar.update()
    return losses


def ranks(model: TwoTower, flights: Flights) -> np.ndarray:
    """The rank of each test flight's aircraft among all aircraft by score, int64[test flights], from 0; NEVER if unknown."""
    answers = flights.answers[flights.test]
    scores = encode(model.flight, take(flights.queries, flights.test)) @ encode(model.aircraft, flights.aircraft).T
    better = scores > np.take_along_axis(scores, answers[:, None], axis=1)
    return np.where(answers >= 0, better.sum(axis=1), NEVER)


def encode(tower: Tower, ids: Ids) -> np.ndarray:
    """The vectors of all samples, float32[n, DIM]. What a server of such a model would put into its index."""
    samples = len(next(iter(ids.values())))
    vectors = []
    for start in range(0, samples, ENCODING_BATCH):
        rows = np.arange(start, start + ENCODING_BATCH).clip(max=samples - 1)  # all batches have one shape
        vectors.append(np.asarray(encode_step(tower, tower.embed.preprocess(take(ids, rows)))))
    return np.concatenate(vectors)[:samples]


@nnx.jit
def encode_step(tower: Tower, packed) -> jax.Array:
    """One batch of vectors."""
    return tower(packed)


def take(ids: Ids, rows: np.ndarray | slice) -> Ids:
    """The facts of some of the samples."""
    return {name: column[rows] for name, column in ids.items()}
