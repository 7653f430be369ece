"""The tables and id distributions that are measured."""

import dataclasses
from typing import Any

import jax
import numpy as np

import embax


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
    """

    name: str
    num_tables: int
    vocabulary: int
    dim: int
    batch: int
    valency: int
    exponent: float | None

    def describe(self) -> str:
        """One line about the workload."""
        law = "uniform" if self.exponent is None else f"power law {self.exponent}"
        return f"{self.num_tables} x {self.vocabulary:,} rows x {self.dim}, batch {self.batch}, {self.valency} ids each, {law}"

    def specs(self) -> dict[str, embax.FeatureSpec]:
        """Placed features, with full-slot Adagrad as optimizer."""
        features = {}
        for number in range(self.num_tables):
            name = f"t{number:03}"
            table = embax.TableSpec(
                name=name,
                vocabulary_size=self.vocabulary,
                embedding_dim=self.dim,
                initializer=INITIALIZER,
                optimizer=embax.AdagradOptimizerSpec(learning_rate=0.01, initial_accumulator_value=0.1),
                combiner="sum",
            )
            features[name] = embax.FeatureSpec(
                name=name,
                table_spec=table,
                input_shape=(self.batch, self.valency),
                output_shape=(self.batch, self.dim),
            )
        return embax.prepare_feature_specs_for_training(features)

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
        return [{f"t{number:03}": draw() for number in range(self.num_tables)} for _ in range(count)]


INITIALIZER = jax.nn.initializers.uniform(0.05)

CRITEO = Workload("criteo", 26, 100_000, 32, 4096, 1, 1.05)
WIDE = Workload("wide", 1, 4_000_000, 64, 8192, 4, None)
MULTIHOT = Workload("multihot", 8, 1_000_000, 128, 2048, 20, 1.05)
WORKLOADS = {workload.name: workload for workload in (CRITEO, WIDE, MULTIHOT)}
