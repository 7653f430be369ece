"""Training and prediction, for any dataset."""

import dataclasses
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import embax

from .dataset import Dataset
from .metrics import Score, score
from .model import ClickModel, embax_ids

DENSE_LEARNING_RATE = 2e-3
# Strong, as flights of a day share their fate and a free model learns the days by heart. Chosen among 0, 0.5, 1.5 and
# 4 by the log loss of October, and of July to September after training up to there.
DENSE_WEIGHT_DECAY = 4.0
PREDICTION_BATCH = 8192
PACKED_AHEAD = 4  # batches that the packing thread may be ahead of the training step
STEPS_IN_FLIGHT = 8  # dispatched steps that may be unfinished: some versions of JAX abort on long queues
VALIDATIONS_PER_EPOCH = 4


@dataclasses.dataclass
class History:
    """Curves of a training run, with an entry for each stretch between two validations.

    Attributes:
      seen: training samples up to the end of the stretch, counting every pass.
      losses: mean training loss in the stretch.
      validations: score on the validation slice after it.
      samples_per_second: of the training steps, the compilation of the first one included.
    """

    seen: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    validations: list[Score] = dataclasses.field(default_factory=list)
    samples_per_second: float = 0.0


def new_model(dataset: Dataset, batch_size: int, epochs: int, seed: int) -> tuple[ClickModel, nnx.Optimizer]:
    """A fresh model and its optimizer, whose learning rate falls to zero over the training along a cosine.

    Raises:
      ValueError: a batch is larger than the training slice.
    """
    samples = dataset.train.stop - dataset.train.start
    if not 0 < batch_size <= samples:
        raise ValueError(
            f"--batch-size is {batch_size}; expected 1 to {samples}, the number of training samples. "
            "Choose a smaller batch."
        )
    steps = epochs * (samples // batch_size)
    model = ClickModel(dataset, batch_size, rngs=nnx.Rngs(seed))
    schedule = optax.cosine_decay_schedule(DENSE_LEARNING_RATE, steps)
    return model, nnx.Optimizer(model, optax.adamw(schedule, weight_decay=DENSE_WEIGHT_DECAY), wrt=nnx.Param)


def train(
    model: ClickModel, optimizer: nnx.Optimizer, dataset: Dataset, batch_size: int, epochs: int, seed: int
) -> History:
    """Trains ``model`` in place on the training slice, with a progress bar."""
    samples, shuffle = dataset.rows(dataset.train), np.random.default_rng(seed)
    steps = len(samples) // batch_size
    history, seconds = History(), 0.0
    with tqdm(total=epochs * steps * batch_size, unit=" samples", unit_scale=True, mininterval=0.5) as bar:
        for _ in range(epochs):
            batches = shuffle.permutation(samples)[: steps * batch_size].reshape(steps, batch_size)
            for stretch in np.array_split(batches, min(steps, VALIDATIONS_PER_EPOCH)):
                started = time.perf_counter()
                losses = _train_on(model, optimizer, dataset, stretch, bar)
                seconds += time.perf_counter() - started
                history.seen.append(bar.n)
                history.losses.append(float(np.mean(losses)))
                validation = predict(model, dataset, dataset.validation)
                history.validations.append(score(dataset.labels[dataset.validation], validation))
                auc = history.validations[-1].auc
                bar.set_postfix_str(f"loss {history.losses[-1]:.4f}, validation AUC {auc:.4f}")
    history.samples_per_second = bar.n / seconds
    return history


def _train_on(
    model: ClickModel, optimizer: nnx.Optimizer, dataset: Dataset, batches: np.ndarray, bar: tqdm
) -> list[float]:
    """A step for each of ``batches``, int64[steps, batch_size] positions; returns their losses."""
    losses = []
    for packed, dense, labels in _packed(model, dataset, batches):
        losses.append(_train_step(model, optimizer, packed, dense, labels))
        if len(losses) > STEPS_IN_FLIGHT:
            bar.set_postfix_str(f"loss {losses[-STEPS_IN_FLIGHT]:.4f}", refresh=False)  # waits for that step
        bar.update(len(labels))
    return [float(loss) for loss in losses]


def predict(model: ClickModel, dataset: Dataset, part: slice) -> np.ndarray:
    """Probabilities float32[n] of a label of 1 for the samples of ``part``."""
    rows = dataset.rows(part)
    batches = np.split(rows, range(PREDICTION_BATCH, len(rows), PREDICTION_BATCH))
    model.eval()
    packed_batches = _packed(model, dataset, batches)
    probabilities = [np.asarray(_predict_step(model, packed, dense)) for packed, dense, _ in packed_batches]
    model.train()
    return np.concatenate(probabilities)


@nnx.jit
def _train_step(model: ClickModel, optimizer: nnx.Optimizer, packed, dense: jax.Array, labels: jax.Array) -> jax.Array:
    """One step: the backward pass updates the tables in place, ``optimizer`` the rest. Returns the mean loss."""

    def loss(model: ClickModel) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(model(packed, dense), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def _predict_step(model: ClickModel, packed, dense: jax.Array) -> jax.Array:
    return nnx.sigmoid(model(packed, dense))


def _packed(model: ClickModel, dataset: Dataset, batches: Iterable[np.ndarray]) -> Iterator[tuple]:
    """Packed ids, dense inputs and labels of each batch of positions; a thread packs ahead of the one who iterates."""
    packer = model.embed.packer  # taken here: nnx.jit takes a model apart for moments while it updates it

    def pack(rows: np.ndarray) -> tuple:
        ids, dense, labels = dataset.batch(rows)
        return packer(embax_ids(ids)), dense, labels

    return embax.prefetch(batches, pack, size=PACKED_AHEAD)
