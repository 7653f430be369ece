"""What every side of a comparison is told. It needs NumPy alone: sides live in environments that share nothing else."""

import dataclasses
import json
import pathlib
from typing import Any, Protocol

import numpy as np

FIRST_VALUE = 0.01
"""The value of every element of all tables at the start."""
FIRST_ACCUMULATOR = 0.1
"""The value of Adagrad's accumulators at the start."""
LEARNING_RATES = {"sgd": 1e-4, "adagrad": 0.01, "rowwise": 0.01}
"""By optimizer. That of SGD is small, so that an id that thousands of samples name does not make its row diverge."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Equal tables with one feature each, the sum of whose rows is looked up, and the batches of a run.

    Args:
        num_tables: tables, and features.
        vocabulary: rows of each table.
        dim: columns of each table.
        batch: samples of a step.
        valency: ids of a sample and feature, summed.
        optimizer: a key of `LEARNING_RATES`.
        data: the folder of `ids.npy`, int32[batches, num_tables, batch, valency], and `targets.npy`, float32[num_tables,
            batch, dim].
        stacked: whether embax stacks the tables.
        random: whether embax draws the tables at random instead of filling them with `FIRST_VALUE`.
    """

    num_tables: int
    vocabulary: int
    dim: int
    batch: int
    valency: int
    optimizer: str
    data: str
    stacked: bool = False
    random: bool = False

    @classmethod
    def from_json(cls, text: str) -> "Setting":
        """The setting that `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """The setting as text."""
        return json.dumps(dataclasses.asdict(self))

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate."""
        return LEARNING_RATES[self.optimizer]

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets, in the memory of this process: read fully, so that no step meets the disk."""
        folder = pathlib.Path(self.data)
        return tuple(np.array(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("ids", "targets"))  # pyright: ignore[reportReturnType]


class Side(Protocol):
    """One way to train the tables of a setting. What a batch becomes in a data loader is made by the constructor.

    A step is: activations, the sums of rows; their gradient, activations minus targets; the optimizer's update.
    """

    def __init__(self, setting: Setting, ids: np.ndarray, targets: np.ndarray): ...

    def make_tables(self) -> None:
        """Makes tables and slots and touches all of their memory."""

    def parts(self) -> dict[str, Any]:
        """What can be timed, as functions of the number of a batch: "step" at least, which ends when all is computed.

        A side whose steps are computed while Python goes on has "begin_step" too, which does not wait for that.
        """
        ...

    def activations(self, number: int) -> np.ndarray:
        """All activations of a batch, in any shape whose last axis divides into those of tables."""
        ...

    def rows(self, table: int, ids: np.ndarray) -> np.ndarray:
        """float32[len(ids), dim] of a table."""
        ...
