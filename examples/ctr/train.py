"""Training and prediction, for any dataset."""

import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import embax.nnx.embed
import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from .dataset import Dataset
from .metrics import Score, score
from .model import ClickModel, embax_ids

DENSE_LEARNING_RATE = 2e-3
PREDICTION_BATCH = 8192
PACKED_AHEAD = 4  # batches that the packing thread may be ahead of the training step
STEPS_IN_FLIGHT = 8  # dispatched steps that may be unfinished: some versions of JAX abort on long queues
VALIDATIONS_PER_EPOCH = 4

T, U = TypeVar("T"), TypeVar("U")


@dataclasses.dataclass
class History:
    """Curves of a training run; positions are samples seen.

    Attributes:
      losses: (position, mean loss since the last entry).
      validations: (position, score on the validation slice).
      samples_per_second: over the training steps alone.
    """

    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    validations: list[tuple[int, Score]] = dataclasses.field(default_factory=list)
    samples_per_second: float = 0.0


def new_model(dataset: Dataset, batch_size: int, steps: int, seed: int) -> tuple[ClickModel, nnx.Optimizer]:
    """A fresh model and its optimizer, whose learning rate falls to zero over ``steps`` along a cosine."""
    model = ClickModel(dataset, batch_size, rngs=nnx.Rngs(seed))
    schedule = optax.cosine_decay_schedule(DENSE_LEARNING_RATE, steps)
    return model, embax.nnx.embed.PartitionedOptimizer(model, optax.adam(schedule))


def train(model: ClickModel, optimizer, dataset: Dataset, *, epochs: int, batch_size: int, seed: int) -> History:
    """Trains ``model`` in place on the training slice."""
    shuffle = np.random.default_rng(seed)
    samples = dataset.rows(dataset.train)
    steps = len(samples) // batch_size
    validate_after = {steps * (i + 1) // VALIDATIONS_PER_EPOCH for i in range(VALIDATIONS_PER_EPOCH)} - {0}
    history, seconds, seen = History(), 0.0, 0
    in_flight, losses = deque(), []
    with tqdm(total=epochs * steps * batch_size, unit="samples", unit_scale=True, smoothing=0.05) as bar:
        for epoch in range(epochs):
            batches = np.split(shuffle.permutation(samples)[: steps * batch_size], steps)
            started = time.perf_counter()
            for step, (packed, dense, labels) in enumerate(_packed(model, dataset, batches), 1):
                in_flight.append(_train_step(model, optimizer, packed, dense, labels))
                seen += batch_size
                if len(in_flight) == STEPS_IN_FLIGHT:
                    losses.append(float(in_flight.popleft()))
                bar.update(batch_size)
                if step in validate_after:
                    losses += map(float, in_flight)
                    in_flight.clear()
                    seconds += time.perf_counter() - started
                    history.losses.append((seen, float(np.mean(losses))))
                    history.validations.append((seen, _validate(model, dataset)))
                    bar.set_postfix_str(f"epoch {epoch + 1}, loss {history.losses[-1][1]:.4f}")
                    losses.clear()
                    started = time.perf_counter()
            seconds += time.perf_counter() - started
    history.samples_per_second = seen / seconds
    return history


def predict(model: ClickModel, dataset: Dataset, part: slice) -> np.ndarray:
    """Probabilities float32[n] of a label of 1 for the samples of ``part``."""
    rows = dataset.rows(part)
    batches = np.split(rows, range(PREDICTION_BATCH, len(rows), PREDICTION_BATCH))
    model.eval()
    probabilities = [np.asarray(_predict_step(model, packed, dense)) for packed, dense, _ in _packed(model, dataset, batches)]
    model.train()
    return np.concatenate(probabilities)


def _validate(model: ClickModel, dataset: Dataset) -> Score:
    return score(dataset.labels[dataset.validation], predict(model, dataset, dataset.validation))


@functools.partial(nnx.jit, donate_argnames=("model", "optimizer"))
def _train_step(model: ClickModel, optimizer, packed, dense: jax.Array, labels: jax.Array) -> jax.Array:
    """One step; the tables are updated in place in the backward pass, the rest by ``optimizer``. Returns the mean loss."""

    def loss(model: ClickModel) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(model(packed, dense), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@functools.partial(nnx.jit, donate_argnames="model")
def _predict_step(model: ClickModel, packed, dense: jax.Array) -> jax.Array:
    return nnx.sigmoid(model(packed, dense))


def _packed(model: ClickModel, dataset: Dataset, batches: Iterable[np.ndarray]) -> Iterator[tuple]:
    """Packed ids, dense inputs and labels of each batch of positions; a thread packs ahead of the one who iterates."""

    def pack(rows: np.ndarray) -> tuple:
        ids, dense, labels = dataset.batch(rows)
        return model.embed.preprocess(embax_ids(ids)), dense, labels

    return _ahead(pack, batches)


def _ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """``map(function, items)`` in one background thread, at most PACKED_AHEAD results early."""
    remaining = iter(items)
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        waiting = deque(thread.submit(function, item) for item in itertools.islice(remaining, PACKED_AHEAD))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(thread.submit(function, item) for item in itertools.islice(remaining, 1))
            yield result
