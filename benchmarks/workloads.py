"""The tables and id distributions that are measured."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from benchmarks.sides.setting import Setting

HOT_ID = 7


@dataclasses.dataclass(frozen=True)
class Workload:
    """Equal tables with one feature each.

    Args:
        name: name of the workload.
        num_tables: tables, and features.
        vocabulary: rows of each table.
        dim: columns of each table.
        batch: samples of a step.
        valency: ids of a sample and feature, summed.
        exponent: of the power law that ids are drawn from; None draws them uniformly.
        hot: whether the first id of every sample is the same.
        stacked: whether embax stacks the tables.
    """

    name: str
    num_tables: int
    vocabulary: int
    dim: int
    batch: int
    valency: int
    exponent: float | None
    hot: bool = False
    stacked: bool = False

    def describe(self) -> str:
        """One line about the workload."""
        law = "uniform" if self.exponent is None else f"power law {self.exponent}"
        hot = ", of which one is the same in all samples" if self.hot else ""
        stacked = ", stacked by embax" if self.stacked else ""
        tables = f"{self.num_tables} x {self.vocabulary:,} rows x {self.dim}"
        ids = "1 id" if self.valency == 1 else f"{self.valency} ids"
        return f"{tables}, batch {self.batch}, {ids} each{hot}, {law}{stacked}"

    @property
    def table_bytes(self) -> int:
        """Bytes of all tables, without slots."""
        return 4 * self.num_tables * self.vocabulary * self.dim

    def state_bytes(self, optimizer: str) -> int:
        """Bytes of all tables and slots."""
        slots = {"sgd": 0, "adagrad": self.dim, "rowwise": 1}[optimizer]
        return self.table_bytes + 4 * self.num_tables * self.vocabulary * slots

    def setting(self, optimizer: str = "adagrad", data: str = "", **options: Any) -> Setting:
        """What sides are told about the workload, with the folder that `write` has filled."""
        fields = ("num_tables", "vocabulary", "dim", "batch", "valency", "stacked")
        return Setting(**{f: getattr(self, f) for f in fields}, optimizer=optimizer, data=data, **options)

    def specs(self) -> Any:
        """Placed features of embax, each table by itself, with full-slot Adagrad as optimizer."""
        from benchmarks.sides.embax_side import specs_of

        return specs_of(dataclasses.replace(self, stacked=False).setting())

    def batches(self, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
        """`count` batches of ids: int32[batch, valency] of each feature."""
        rng = np.random.default_rng(seed)
        shape = (self.batch, self.valency)
        if self.exponent is None:
            draw: Any = lambda: rng.integers(0, self.vocabulary, shape, dtype=np.int32)  # noqa: E731
        else:
            weights = np.arange(1, self.vocabulary + 1, dtype=np.float64) ** -self.exponent
            cumulative = np.cumsum(weights / weights.sum())
            # Frequent ids lie anywhere in the table, as those of hashed categories do.
            place = np.random.default_rng(1).permutation(self.vocabulary).astype(np.int32)
            draw = lambda: place[np.minimum(np.searchsorted(cumulative, rng.random(shape)), self.vocabulary - 1)]  # noqa: E731
        batches = [{f"t{number:03}": draw() for number in range(self.num_tables)} for _ in range(count)]
        if self.hot:
            for ids in (ids for batch in batches for ids in batch.values()):
                ids[:, 0] = HOT_ID
        return batches

    def write(self, folder: pathlib.Path, count: int = 8) -> np.ndarray:
        """Fills a folder with `count` batches and with targets, for all sides; returns the ids."""
        folder.mkdir(parents=True, exist_ok=True)
        ids = np.stack([np.stack(list(batch.values())) for batch in self.batches(count)])
        targets = np.random.default_rng(2).standard_normal((self.num_tables, self.batch, self.dim), np.float32)
        np.save(folder / "ids.npy", ids)
        np.save(folder / "targets.npy", targets)
        return ids


CRITEO = Workload("criteo", 26, 100_000, 32, 4096, 1, 1.05, stacked=True)
WIDE = Workload("wide", 1, 4_000_000, 64, 8192, 4, None)
MULTIHOT = Workload("multihot", 8, 1_000_000, 128, 2048, 20, 1.05)
SMALL = Workload("small", 512, 1_000, 16, 2048, 1, 1.05, stacked=True)
HOT = dataclasses.replace(WIDE, name="hot", hot=True)
HUGE = Workload("huge", 1, 16_777_216, 128, 8192, 4, None)
WORKLOADS = {workload.name: workload for workload in (CRITEO, WIDE, MULTIHOT, SMALL, HOT, HUGE)}
