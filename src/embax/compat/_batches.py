"""Packed batches and their statistics, in the containers of the reference: arrays by the name of the stack."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from embax._preprocess import stats as _stats


class SparseDenseMatmulInput(NamedTuple):
    """The packed arrays, each by the name of the stack: see `embax.PreprocessedInput` for what they hold."""

    lhs_row_pointers: Mapping[str, Any]
    lhs_embedding_ids: Mapping[str, Any]
    lhs_sample_ids: Mapping[str, Any]
    lhs_gains: Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseDenseMatmulInputStats(_stats.SparseDenseMatmulInputStats):
    """Counts of one packed batch: see `embax.SparseDenseMatmulInputStats`. A pytree."""

    def replace(self, **changes: Any) -> "SparseDenseMatmulInputStats":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def of(cls, stats: _stats.SparseDenseMatmulInputStats) -> "SparseDenseMatmulInputStats":
        """The same counts as this class."""
        return cls(**{field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)})

    def get_required_buffer_size_per_device(self, table_name: str, num_sc_per_device: int | None = None) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Entries of a stack that fit the batch on every device, or None for a stack without values."""
        return super().get_required_buffer_size_per_device(table_name, num_sc_per_device)

    def set_required_buffer_size_per_device(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, table_name: str, required_buffer_size_per_device: int, num_sc_per_device: int | None = None
    ) -> None:
        """Sets the entries of a stack that a device needs, equally for each of its SparseCores."""
        super().set_required_buffer_size_per_device(table_name, required_buffer_size_per_device, num_sc_per_device)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreprocessedInput:
    """A packed batch. A pytree.

    Args:
        sparse_dense_matmul_input: its arrays.
        num_minibatches: the number of minibatches, a scalar or an array of equal values, one a local device.
    """

    sparse_dense_matmul_input: SparseDenseMatmulInput
    num_minibatches: Any = dataclasses.field(default_factory=lambda: np.array(1, np.int32))

    def replace(self, **changes: Any) -> "PreprocessedInput":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def lhs_row_pointers(self) -> Mapping[str, Any]:
        """Row pointers by stack."""
        return self.sparse_dense_matmul_input.lhs_row_pointers

    @property
    def lhs_embedding_ids(self) -> Mapping[str, Any]:
        """Embedding ids by stack."""
        return self.sparse_dense_matmul_input.lhs_embedding_ids

    @property
    def lhs_sample_ids(self) -> Mapping[str, Any]:
        """Sample ids by stack."""
        return self.sparse_dense_matmul_input.lhs_sample_ids

    @property
    def lhs_gains(self) -> Mapping[str, Any]:
        """Gains by stack."""
        return self.sparse_dense_matmul_input.lhs_gains


def arrays_of(
    preprocessed_inputs: PreprocessedInput | SparseDenseMatmulInput,
    stacks: Mapping[str, Any],
    variables: Mapping[str, Any],
    enable_minibatching: bool,
) -> tuple[dict[str, list[Any]], Any]:
    """The packed arrays of each stack, and the number of minibatches, None without minibatching."""
    if isinstance(preprocessed_inputs, SparseDenseMatmulInput):
        preprocessed_inputs = PreprocessedInput(preprocessed_inputs)
    arrays = preprocessed_inputs.sparse_dense_matmul_input
    expected = set(stacks)
    for what, given in (("preprocessed inputs", arrays.lhs_row_pointers), ("embedding variables", variables)):
        if set(given) != expected:
            raise ValueError(
                f"The {what} are of the stacks {sorted(given)}, the feature specs have {sorted(expected)}; they must be the same."
            )
    number = preprocessed_inputs.num_minibatches if enable_minibatching else None
    return {name: [array[name] for array in arrays] for name in stacks}, number
