"""The whole run: load, train, judge beside scikit-learn, save, restore in a new process, draw."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import embax.nnx.checkpoint

from . import baselines, criteo, flights
from .dataset import Dataset
from .metrics import Score, score
from .pictures import draw_calibration, draw_curves, draw_embeddings
from .probe import probe
from .train import new_model, predict, train

CHECKPOINT, PREDICTIONS = "checkpoint", "test_predictions.npy"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Attributes:
      data: file in Criteo format, or None for the flights.
      out: folder for everything that is written.
      epochs: passes over the training slice.
      batch_size: samples a step.
      rows_per_column: rows of each table of ``data``.
      seed: of initial values, dropout and shuffling.
    """

    data: Path | None
    out: Path
    epochs: int
    batch_size: int
    rows_per_column: int
    seed: int

    def load(self) -> Dataset:
        """The dataset that was asked for."""
        return flights.load() if self.data is None else criteo.load(self.data, self.rows_per_column)


def run(settings: Settings) -> None:
    """Everything; writes into ``settings.out``."""
    started = time.perf_counter()
    settings.out.mkdir(parents=True, exist_ok=True)
    dataset = settings.load()
    _describe(dataset)

    model, optimizer = new_model(dataset, settings.batch_size, settings.epochs, settings.seed)
    history = train(model, optimizer, dataset, settings.batch_size, settings.epochs, settings.seed)
    print(f"trained at {history.samples_per_second:,.0f} samples/s; now the scikit-learn baselines")
    predicted = predict(model, dataset, dataset.test)
    logistic, trees = baselines.logistic_regression(dataset), baselines.gradient_boosting(dataset)
    labels = dataset.labels[dataset.test]
    by_logistic = logistic(dataset.test)
    _print_scores(
        dataset.split_names[2],
        {
            "embax, DLRM with a wide part": score(labels, predicted),
            "logistic regression, one-hot": score(labels, by_logistic),
            "histogram gradient boosting": score(labels, trees(dataset.test)),
        },
    )

    checkpoint = (settings.out / CHECKPOINT).absolute()
    embax.nnx.checkpoint.save(checkpoint, model, optimizer, overwrite=True)
    np.save(settings.out / PREDICTIONS, predicted)
    _restore_in_new_process(settings)

    pictures = [settings.out / name for name in ("curves.png", "calibration.png", "embeddings.png")]
    logistic_validation = score(dataset.labels[dataset.validation], logistic(dataset.validation))
    draw_curves(history, logistic_validation, dataset, pictures[0])
    draw_calibration({"embax": predicted, "logistic regression": by_logistic}, dataset, pictures[1])
    draw_embeddings(probe(model, dataset), dataset, pictures[2])
    print("written:", *(f"  {path}" for path in (checkpoint, settings.out / PREDICTIONS, *pictures)), sep="\n")
    print(f"{time.perf_counter() - started:.0f} seconds in all")


def check_restore(settings: Settings) -> None:
    """Restores the checkpoint of a run into a model of another seed; exits with 1 if the predictions differ."""
    dataset = settings.load()
    model, optimizer = new_model(dataset, settings.batch_size, settings.epochs, settings.seed + 1)
    embax.nnx.checkpoint.restore((settings.out / CHECKPOINT).absolute(), model, optimizer)
    restored, saved = predict(model, dataset, dataset.test), np.load(settings.out / PREDICTIONS)
    if restored.tobytes() != saved.tobytes():
        differ = np.count_nonzero(restored != saved)
        sys.exit(f"restored in a new process: {differ:,} of {len(saved):,} test predictions DIFFER")
    print(f"restored in a new process: all {len(saved):,} test predictions are identical, bit for bit", flush=True)


def _restore_in_new_process(settings: Settings) -> None:
    """Runs ``check_restore`` in a fresh interpreter; raises CalledProcessError if it fails."""
    given = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "examples.ctr", *options, "--check-restore"], check=True)


def _describe(dataset: Dataset) -> None:
    """What the data is, in a few lines."""
    print(dataset.title)
    print(f"question: which of them are {dataset.positive}?")
    parts = (dataset.train, dataset.validation, dataset.test)
    for role, name, part in zip(("train", "validation", "test"), dataset.split_names, parts, strict=True):
        share = dataset.labels[part].mean()
        print(f"  {role:<10} {part.stop - part.start:>9,} samples, {share:.1%} {dataset.positive}  ({name})")
    rows = sum(table.rows for table in dataset.tables.values())
    print(
        f"  {len(dataset.features)} categorical features on {len(dataset.tables)} tables with {rows:,} rows in all",
        end=", ",
    )
    print(f"{dataset.dense.shape[1]} dense inputs")


def _print_scores(test: str, scores: dict[str, Score]) -> None:
    """The final table."""
    width = max(map(len, scores))
    print(f"\n{'test set: ' + test:<{width}}     AUC  log loss")
    for name, (auc, log_loss) in scores.items():
        print(f"{name:<{width}}  {auc:.4f}    {log_loss:.4f}")
    print()
