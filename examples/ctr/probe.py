"""What the learned rows of one feature say."""

import dataclasses

import numpy as np

from .dataset import Dataset
from .model import ClickModel
from .train import predict

PROBE_SAMPLES = 2048
FEWEST_SAMPLES = 100  # that an id needs in training to be looked at, unless too few ids have them
FEWEST_IDS, MOST_IDS = 10, 120


@dataclasses.dataclass(frozen=True)
class Probe:
    """The most frequent ids of a feature; all arrays are by id.

    Attributes:
      names: what the ids stand for.
      vectors: float32[ids, dim], their learned rows.
      counts: training samples that have the id.
      observed: share of positive labels among these.
      predicted: mean probability of the same PROBE_SAMPLES training samples, if each had this id and were otherwise
        the same ("partial dependence", Friedman 2001). Hashed crosses of the feature stay as they are.
    """

    names: list[str]
    vectors: np.ndarray
    counts: np.ndarray
    observed: np.ndarray
    predicted: np.ndarray


def probe(model: ClickModel, dataset: Dataset) -> Probe:
    """Looks at the feature that the dataset shows off."""
    feature = dataset.features[dataset.showcase]
    table = dataset.tables[feature.table]
    assert isinstance(feature.ids, np.ndarray), "the showcase is a single-valued feature"
    seen = feature.ids[dataset.train]
    counts = np.bincount(seen, minlength=table.rows)
    positive = np.bincount(seen, dataset.labels[dataset.train], minlength=table.rows)
    ids = np.argsort(-counts, kind="stable")[:MOST_IDS]
    ids = ids[counts[ids] >= min(FEWEST_SAMPLES, counts[ids[:FEWEST_IDS]].min())]

    samples = dataset.take(np.linspace(dataset.train.start, dataset.train.stop - 1, PROBE_SAMPLES).astype(np.int64))
    predicted = []
    for row in ids:
        changed = dataclasses.replace(feature, ids=np.full(PROBE_SAMPLES, row, np.int32))
        what_if = dataclasses.replace(samples, features={**samples.features, dataset.showcase: changed})
        predicted.append(predict(model, what_if, what_if.test).mean())
    return Probe(
        names=[table.names[row] if table.names else f"row {row}" for row in ids],
        vectors=np.asarray(model.embed.rows(feature.table, ids)),
        counts=counts[ids],
        observed=positive[ids] / np.maximum(counts[ids], 1),
        predicted=np.array(predicted),
    )
