"""What every model of this program is judged by."""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score


class Score(NamedTuple):
    """Area under the ROC curve (higher is better) and mean negative log likelihood in nats (lower is better)."""

    auc: float
    log_loss: float


def score(labels: np.ndarray, probabilities: np.ndarray) -> Score:
    """The score of ``probabilities``, float[n] in [0, 1], for ``labels``, 0 or 1 [n], both of which occur."""
    return Score(float(roc_auc_score(labels, probabilities)), float(log_loss(labels, probabilities.astype(np.float64))))
