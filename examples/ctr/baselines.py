"""What scikit-learn makes of the same features and the same training slice."""

from collections.abc import Callable

import numpy as np
import scipy.sparse
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from .dataset import Dataset, RaggedIds

# Chosen among 0.003, 0.01, 0.03 and 0.1 by the log loss of October of a fit on the months before it.
INVERSE_REGULARISATION = 0.03
# What HistGradientBoostingClassifier takes as a category; beyond, the id is read as a number.
MAX_CATEGORIES = 255

Predict = Callable[[slice], np.ndarray]  # probabilities float64[n] of the samples of a slice


def logistic_regression(dataset: Dataset) -> Predict:
    """A logistic regression on the one-hot ids of all features, crosses included, and the dense inputs."""
    return _fit(LogisticRegression(C=INVERSE_REGULARISATION, max_iter=300), one_hot(dataset), dataset)


def gradient_boosting(dataset: Dataset) -> Predict:
    """Boosted trees on the dense inputs and the single-valued features, without the crosses."""
    columns, categorical = [dataset.dense], [False] * dataset.dense.shape[1]
    for feature in dataset.features.values():
        if not feature.is_cross and not isinstance(feature.ids, RaggedIds):
            columns.append(feature.ids[:, None])
            categorical.append(dataset.tables[feature.table].rows <= MAX_CATEGORIES)
    trees = HistGradientBoostingClassifier(categorical_features=categorical, random_state=0)
    return _fit(trees, np.hstack(columns).astype(np.float32), dataset)


def _fit(model: LogisticRegression | HistGradientBoostingClassifier, inputs, dataset: Dataset) -> Predict:
    model.fit(inputs[dataset.train], dataset.labels[dataset.train])
    return lambda part: model.predict_proba(inputs[part])[:, 1]


def one_hot(dataset: Dataset) -> scipy.sparse.csr_matrix:
    """float64[samples, dense inputs + rows of each feature's table]; several ids of a sample share a weight of 1."""
    blocks = [scipy.sparse.csr_matrix(dataset.dense.astype(np.float64))]
    for feature in dataset.features.values():
        if isinstance(feature.ids, RaggedIds):
            ids, splits = feature.ids.values, feature.ids.row_splits
            lengths = np.diff(splits)
            weights = np.repeat(1.0 / np.maximum(lengths, 1), lengths)
        else:
            ids, splits, weights = feature.ids, np.arange(len(feature.ids) + 1), np.ones(len(feature.ids))
        shape = (len(splits) - 1, dataset.tables[feature.table].rows)
        blocks.append(scipy.sparse.csr_matrix((weights, ids, splits), shape=shape))
    return scipy.sparse.csr_matrix(scipy.sparse.hstack(blocks, format="csr"))
