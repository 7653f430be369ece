"""What a click-style training set is to this program, wherever it came from."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class RaggedIds:
    """Ids of a multivalent feature: sample ``i`` has ``values[row_splits[i]:row_splits[i + 1]]``, possibly none.

    Attributes:
      values: int32[number of ids].
      row_splits: int64[samples + 1], from 0 to the number of ids.
    """

    values: np.ndarray
    row_splits: np.ndarray

    @classmethod
    def from_mask(cls, ids: np.ndarray, mask: np.ndarray) -> "RaggedIds":
        """The ids where ``mask`` is true; both are [samples, slots], and the order of a row's ids is kept."""
        return cls(ids[mask].astype(np.int32), np.concatenate([[0], np.cumsum(mask.sum(axis=1))]))

    def take(self, rows: np.ndarray) -> "RaggedIds":
        """The samples at positions ``rows``, int[n], in that order."""
        starts, lengths = self.row_splits[rows], np.diff(self.row_splits)[rows]
        splits = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(splits[-1]) - np.repeat(splits[:-1], lengths)
        return RaggedIds(self.values[np.repeat(starts, lengths) + within], splits)


Ids = np.ndarray | RaggedIds


@dataclasses.dataclass(frozen=True)
class Feature:
    """A categorical feature and the ids that each sample has of it.

    Attributes:
      table: key in ``Dataset.tables``; several features may share a table.
      ids: int32[samples], one id a sample, or RaggedIds.
      is_cross: whether it is a hashed cross, which the model treats as memory ("wide") rather than as meaning ("deep").
    """

    table: str
    ids: Ids
    is_cross: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """The vocabulary of a table. ``names[id]`` says what an id stands for; empty where that is unknown (hashed)."""

    rows: int
    names: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Samples in order of time, so that a split is two positions.

    Attributes:
      title: one line for people.
      positive: what a sample with a label of 1 is, for instance "15 or more minutes late".
      features: categorical features by name.
      tables: vocabularies by name.
      dense: float32[samples, inputs], standardised on the training slice, without missing values.
      labels: float32[samples], 0 or 1.
      train, validation, test: consecutive slices of the samples.
      split_names: what the three slices are, for instance "January to September".
      showcase: the table whose learned rows are worth a picture.
    """

    title: str
    positive: str
    features: Mapping[str, Feature]
    tables: Mapping[str, Table]
    dense: np.ndarray
    labels: np.ndarray
    train: slice
    validation: slice
    test: slice
    split_names: tuple[str, str, str]
    showcase: str

    def batch(self, rows: np.ndarray) -> tuple[dict[str, Ids], np.ndarray, np.ndarray]:
        """Ids by feature, dense inputs [n, inputs] and labels [n] of the samples at positions ``rows``, int[n]."""
        ids = {
            name: feature.ids.take(rows) if isinstance(feature.ids, RaggedIds) else feature.ids[rows]
            for name, feature in self.features.items()
        }
        return ids, self.dense[rows], self.labels[rows]

    def rows(self, part: slice) -> np.ndarray:
        """Positions of the samples of one split, int64[n]."""
        return np.arange(part.start, part.stop)


def standardise(dense: np.ndarray, train: slice) -> np.ndarray:
    """Float32 copy of ``dense`` [samples, inputs] with mean 0 and deviation 1 on the training slice.

    NaN becomes the mean. Values are cut at five deviations from it: one odd reading must not steer the model.
    """
    known = dense[train]
    scale = np.nanstd(known, axis=0)
    scaled = (dense - np.nanmean(known, axis=0)) / np.where(scale > 0, scale, 1.0)
    return np.clip(np.nan_to_num(scaled, nan=0.0), -5.0, 5.0).astype(np.float32)
