"""The pictures that the program leaves behind."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .dataset import Dataset, Ids
from .metrics import Score
from .train import History

BLUE, ORANGE, GREY = "#1f5fa8", "#d9661f", "#8a8a8a"
MOST_BINS, BIN_SAMPLES = 20, 50  # of the calibration
FEWEST_SAMPLES = 100  # that a row needs in training to be drawn, unless too few rows have them
FEWEST_ROWS, MOST_ROWS = 10, 120  # in one picture
NEIGHBOURS = 5


def draw_curves(history: History, logistic: Score, dataset: Dataset, path: Path) -> None:
    """Log loss and AUC against the samples seen; ``logistic`` is the baseline's score on the validation slice."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    validation = dataset.split_names[1]
    passes = np.array(history.seen) / len(dataset.rows(dataset.train))
    scores = history.validations
    left.plot(passes, history.losses, "o-", color=ORANGE, label=f"training, {dataset.split_names[0]}")
    left.plot(passes, [scored.log_loss for scored in scores], "o-", color=BLUE, label=f"validation, {validation}")
    left.axhline(logistic.log_loss, color=GREY, linestyle="--", label=f"logistic regression, {validation}")
    left.set(ylabel="log loss (nats, lower is better)", title="Log loss")
    right.plot(passes, [scored.auc for scored in scores], "o-", color=BLUE, label=f"validation, {validation}")
    right.axhline(logistic.auc, color=GREY, linestyle="--", label=f"logistic regression, {validation}")
    right.set(ylabel="area under the ROC curve (higher is better)", title="AUC")
    for axes in (left, right):
        axes.set_xlabel("passes over the training samples")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"Validation AUC {scores[-1].auc:.3f} after training, logistic regression {logistic.auc:.3f}")
    figure.savefig(path, dpi=130)


def draw_calibration(predictions: dict[str, np.ndarray], dataset: Dataset, path: Path) -> None:
    """Predicted against observed frequency in the test set, in bins of equally many samples."""
    figure = Figure(figsize=(6.5, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    labels = dataset.labels[dataset.test]
    limit, bins_wanted = 0.0, min(MOST_BINS, max(2, len(labels) // BIN_SAMPLES))
    for (name, predicted), colour in zip(predictions.items(), (BLUE, ORANGE), strict=True):
        bins = np.array_split(np.argsort(predicted, kind="stable"), bins_wanted)
        means = np.array([(predicted[rows].mean(), labels[rows].mean()) for rows in bins])
        limit = max(limit, means.max() * 1.1)
        upper.plot(*means.T, "o-", color=colour, label=f"{name}: {predicted.mean():.1%} predicted on average")
        lower.hist(predicted, bins=60, range=(0, 1), histtype="step", color=colour)
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    limit = min(1.0, limit)
    upper.set(xlim=(0, limit), ylim=(0, limit), ylabel="observed share in each bin")
    lower.set(xlabel=f"predicted probability of being {dataset.positive}", ylabel="test samples")
    upper.legend(frameon=False)
    upper.grid(alpha=0.3)
    upper.set_title(f"Test set ({dataset.split_names[2]}): {labels.mean():.1%} were {dataset.positive}")
    figure.savefig(path, dpi=130)


def draw_embeddings(rows: np.ndarray, dataset: Dataset, path: Path) -> None:
    """What the rows of the showcase table have learned, ``rows`` float32[vocabulary, dim].

    Left, their two principal components; right, whether neighbours in all dimensions have similar labels.
    """
    table = dataset.tables[dataset.showcase]
    feature = next(feature for feature in dataset.features.values() if feature.table == dataset.showcase)
    shares, counts = _shares(feature.ids, dataset, table.rows)
    frequent = np.argsort(-counts, kind="stable")[:MOST_ROWS]
    frequent = frequent[counts[frequent] >= min(FEWEST_SAMPLES, counts[frequent[FEWEST_ROWS - 1]])]
    vectors, shares, counts = rows[frequent] - rows[frequent].mean(axis=0), shares[frequent], counts[frequent]
    _, singular, directions = np.linalg.svd(vectors, full_matrices=False)
    explained = singular**2 / (singular**2).sum()
    plane = vectors @ directions[:2].T

    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    nearest = min(NEIGHBOURS, len(frequent) // 5)
    neighbours = shares[np.argsort(distances, axis=1)[:, :nearest]].mean(axis=1)
    correlation = np.corrcoef(shares, neighbours)[0, 1]

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    dots = left.scatter(*plane.T, c=100 * shares, s=12 + 250 * counts / counts.max(), cmap="viridis", alpha=0.85)
    figure.colorbar(dots, ax=left, label=f"% {dataset.positive} in training")
    for place, row in zip(plane, frequent, strict=True):
        name = table.names[row] if table.names else str(row)
        left.annotate(name, place, fontsize=7, xytext=(3, 3), textcoords="offset points")
    left.set(
        title=f"Learned rows of the table {dataset.showcase!r} (area: number of samples)",
        xlabel=f"first principal component ({explained[0]:.0%} of the variance)",
        ylabel=f"second principal component ({explained[1]:.0%})",
    )
    right.scatter(100 * shares, 100 * neighbours, color=BLUE, s=14)
    right.axline((100 * shares.mean(), 100 * shares.mean()), slope=1, color=GREY, linestyle="--")
    right.set(
        title="Each row beside its neighbours",
        xlabel=f"% {dataset.positive} in training",
        ylabel=f"the same of the {nearest} nearest rows in all {rows.shape[1]} dimensions, mean",
    )
    right.grid(alpha=0.3)
    verdict = "have similar rates" if correlation > 0.5 else "do not have clearly similar rates"
    figure.suptitle(f"Rows of {dataset.showcase!r} that lie near each other {verdict} (correlation {correlation:.2f})")
    figure.savefig(path, dpi=130)


def _shares(ids: Ids, dataset: Dataset, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """By id: the share of positive training labels (0 where there is none) and the number of training samples."""
    assert isinstance(ids, np.ndarray)
    counts = np.bincount(ids[dataset.train], minlength=vocabulary)
    positive = np.bincount(ids[dataset.train], dataset.labels[dataset.train], minlength=vocabulary)
    return positive / np.maximum(counts, 1), counts
