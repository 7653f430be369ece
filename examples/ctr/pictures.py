"""The pictures that the program leaves behind."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .dataset import Dataset
from .metrics import Score
from .probe import Probe
from .train import History

BLUE, ORANGE, GREY = "#1f5fa8", "#d9661f", "#8a8a8a"
MOST_BINS, BIN_SAMPLES = 20, 50  # of the calibration


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
    upper.set(xlim=(0, limit), ylim=(0, limit), ylabel=f"observed share, {bins_wanted} bins of equally many samples")
    lower.set(xlabel=f"predicted probability of being {dataset.positive}", ylabel="test samples")
    upper.legend(frameon=False)
    upper.grid(alpha=0.3)
    upper.set_title(f"{dataset.split_names[2]} (test): {labels.mean():.1%} {dataset.positive}")
    figure.savefig(path, dpi=130)


def draw_embeddings(probe: Probe, dataset: Dataset, path: Path) -> None:
    """Left, the two principal components of the learned rows; right, what the rows do beside what was observed."""
    vectors = probe.vectors - probe.vectors.mean(axis=0)
    _, singular, directions = np.linalg.svd(vectors, full_matrices=False)
    explained = singular**2 / (singular**2).sum()
    plane = vectors @ directions[:2].T
    predicted, observed = 100 * probe.predicted, 100 * probe.observed

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    sizes = 12 + 250 * probe.counts / probe.counts.max()  # areas
    colours = {"c": predicted, "cmap": "viridis", "alpha": 0.85}
    dots = left.scatter(*plane.T, s=sizes, **colours)
    right.scatter(observed, predicted, s=sizes, **colours)
    figure.colorbar(dots, ax=left, label=f"effect: % predicted {dataset.positive}, all else equal")
    for name, *places in zip(probe.names, plane, np.stack([observed, predicted], axis=1), strict=True):
        for axes, place in zip((left, right), places, strict=True):
            axes.annotate(name, place, fontsize=7, xytext=(3, 3), textcoords="offset points")
    left.set(
        title=f"Learned rows: first component and effect correlate {abs(_correlation(plane[:, 0], predicted)):.2f}",
        xlabel=f"first principal component ({explained[0]:.0%} of the variance)",
        ylabel=f"second principal component ({explained[1]:.0%})",
    )
    right.axline((observed.mean(), observed.mean()), slope=1, color=GREY, linestyle="--")
    right.set(
        title=f"Effect and raw frequency correlate {_correlation(observed, predicted):.2f}",
        xlabel=f"% {dataset.positive} in training",
        ylabel="effect: % predicted, all else equal",
    )
    right.grid(alpha=0.3)
    least, most = predicted.argmin(), predicted.argmax()
    figure.suptitle(
        f"The same samples, each with another {dataset.showcase!r}: {predicted[least]:.0f}% ({probe.names[least]}) "
        f"to {predicted[most]:.0f}% ({probe.names[most]}) predicted {dataset.positive}"
    )
    figure.savefig(path, dpi=130)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])
