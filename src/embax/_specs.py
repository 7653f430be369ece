"""What a user says about tables and features, and where stacking put them. No JAX operation runs here."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from embax._checks import INT64_MAX, positive_int
from embax.optimizers import OptimizerSpec
from embax.optimizers._base import Initializer

COMBINERS = ("sum", "mean", "sqrtn")
DEFAULT_ACTIVATION_MEM_BYTES_LIMIT = 2048 * 1024
_STACK_LIMITS = ("max_ids_per_partition", "max_unique_ids_per_partition", "suggested_coo_buffer_size_per_device")


def _check_combiner(owner: str, combiner: str) -> None:
    if combiner not in COMBINERS:
        raise ValueError(f"{owner}: combiner is {combiner!r}; it must be one of {', '.join(map(repr, COMBINERS))}.")


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Quantizes rows as they are looked up: clipped to a range, rounded to equally spaced values.

    Args:
        min_value: the smallest value that is represented.
        max_value: the largest value that is represented, above `min_value`.
        num_buckets: the number of values that are represented, both ends included, at least 2.
    """

    min_value: float
    max_value: float
    num_buckets: int

    def __post_init__(self) -> None:
        if positive_int("QuantizationConfig", "num_buckets", self.num_buckets) < 2:
            raise ValueError("QuantizationConfig: num_buckets is 1; it must be at least 2.")
        number = all(isinstance(value, int | float) for value in (self.min_value, self.max_value))
        # In float32, which rows are quantized in: neither the range nor the step between two values may vanish or overflow.
        with np.errstate(over="ignore", under="ignore"):
            step = (
                np.float32(self.max_value - self.min_value) / np.float32(self.num_buckets - 1)
                if number
                else np.float32(0)
            )
        if not (np.isfinite(step) and step > 0):
            raise ValueError(
                f"QuantizationConfig: the range is [{self.min_value!r}, {self.max_value!r}]; min_value must be below "
                "max_value, both finite, and float32 must hold their difference."
            )

    def as_tuple(self) -> tuple[float, float, int]:
        """`(min_value, max_value, num_buckets)`."""
        return (self.min_value, self.max_value, self.num_buckets)


@dataclasses.dataclass(frozen=True)
class FeatureIdTransformation:
    """Where stacking put a feature: its samples in the stack's batch, its ids in the stack's table.

    Args:
        row_offset: first sample of the feature in the batch of its stack.
        col_offset: added to the ids of the feature.
        col_shift: SparseCores by which the ids are rotated.
    """

    row_offset: int = 0
    col_offset: int = 0
    col_shift: int = 0


@dataclasses.dataclass(frozen=True)
class TableSettingInStack:
    """Where stacking put a table: its padded size and its place on every SparseCore.

    Args:
        stack_name: name of the stack.
        padded_vocab_size: rows of the table in the stack, all SparseCores together.
        padded_embedding_dim: columns of the stack.
        row_offset_in_shard: first row of the table on each SparseCore.
        shard_rotation: SparseCore that holds the table's row 0.
    """

    stack_name: str
    padded_vocab_size: int
    padded_embedding_dim: int
    row_offset_in_shard: int = 0
    shard_rotation: int = 0


_changes = itertools.count(1)
_last_change = 0


def note_change() -> None:
    """To be called after fields of a spec were written in another way than by setting them."""
    global _last_change
    _last_change = next(_changes)


def last_change() -> int:
    """A number that is another one after any table's or feature's spec has changed."""
    return _last_change


def refuse_after_placement(spec: Any, placed: bool, field: str, value: Any) -> None:
    """Raises an AttributeError if a field of a placed spec is changed: what was derived from it would not follow."""
    if placed and not field.startswith("_") and field in spec.__dict__ and spec.__dict__[field] != value:
        remedy = (
            "Change the limits of its stack with embax.update_preprocessing_parameters, which keeps its tables in step."
            if field in _STACK_LIMITS
            else "Set it before, or make a new spec."
        )
        raise AttributeError(
            f"{type(spec).__name__} {spec.name!r}: {field} cannot be set to {value!r}, since the spec has been placed for "
            f"training. {remedy}"
        )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StackedTableSpec:
    """Tables that are stored, looked up and updated as one array. A pytree without leaves.

    Args:
        stack_name: name of the stack.
        stack_vocab_size: rows of the stack, a multiple of `8 * num_devices * num_sparsecores_per_device`.
        stack_embedding_dim: columns of the stack, a multiple of 8.
        optimizer: optimizer of all its tables.
        combiner: combiner of all its tables.
        total_sample_count: samples of all its features in a global batch.
        max_ids_per_partition: ids that one SparseCore may send to another.
        max_unique_ids_per_partition: distinct ids that one SparseCore may send to another.
        activation_mem_bytes_limit: bytes of activations a SparseCore that stacking allowed.
        suggested_coo_buffer_size_per_device: entries of the packed buffer of a device; None derives it from
            `max_ids_per_partition`.
        quantization_config: quantization of looked up rows.
        num_devices: devices that the placement was made for.
        num_sparsecores_per_device: SparseCores of each of them.
    """

    stack_name: str
    stack_vocab_size: int
    stack_embedding_dim: int
    optimizer: OptimizerSpec
    combiner: str
    total_sample_count: int
    max_ids_per_partition: int = 256
    max_unique_ids_per_partition: int = 256
    activation_mem_bytes_limit: int = DEFAULT_ACTIVATION_MEM_BYTES_LIMIT
    suggested_coo_buffer_size_per_device: int | None = None
    quantization_config: QuantizationConfig | None = None
    num_devices: int = 1
    num_sparsecores_per_device: int = 1

    def replace(self, **changes) -> "StackedTableSpec":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(eq=True, unsafe_hash=True, kw_only=True)
class TableSpec:
    """Specifies one embedding table.

    Equal and hashed by all its fields, the placement included, which `prepare_feature_specs_for_training` fills in place.

    Args:
        name: name of the table.
        vocabulary_size: number of embedding ids; ids run from 0 to `vocabulary_size - 1`.
        embedding_dim: number of columns.
        initializer: makes the first values, as those of `jax.nn.initializers` do: `(key, shape, dtype) -> array`.
        optimizer: optimizer of the table.
        combiner: how the embeddings of a sample become one: "sum"; "mean", the weighted sum divided by the sum of the
            weights; or "sqrtn", the weighted sum divided by the root of the sum of the squared weights.
        max_ids_per_partition: ids that may be packed into one partition.
        max_unique_ids_per_partition: distinct ids that may be packed into one partition.
        suggested_coo_buffer_size_per_device: entries of the packed buffer of a device.
        quantization_config: quantization of looked up rows.

    Raises:
        ValueError: a size is not positive, the combiner or the optimizer is unknown.
    """

    name: str
    vocabulary_size: int
    embedding_dim: int
    initializer: Initializer
    optimizer: OptimizerSpec
    combiner: str
    max_ids_per_partition: int = 256
    max_unique_ids_per_partition: int = 256
    suggested_coo_buffer_size_per_device: int | None = None
    quantization_config: QuantizationConfig | None = None
    _stacked_table_spec: StackedTableSpec | None = None
    _setting_in_stack: TableSettingInStack | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"TableSpec: name is {self.name!r}; it must be a non-empty string.")
        owner = f"Table {self.name!r}"
        for field in ("vocabulary_size", "embedding_dim", "max_ids_per_partition", "max_unique_ids_per_partition"):
            setattr(self, field, positive_int(owner, field, getattr(self, field)))
        if self.suggested_coo_buffer_size_per_device is not None:
            self.suggested_coo_buffer_size_per_device = positive_int(
                owner, "suggested_coo_buffer_size_per_device", self.suggested_coo_buffer_size_per_device
            )
        _check_combiner(owner, self.combiner)
        if not isinstance(self.optimizer, OptimizerSpec):
            raise ValueError(f"{owner}: optimizer is {self.optimizer!r}; it must be one of embax's optimizer specs.")
        if not isinstance(self.quantization_config, QuantizationConfig | None):
            raise ValueError(
                f"{owner}: quantization_config is {self.quantization_config!r}; it must be a QuantizationConfig."
            )
        if not callable(self.initializer):
            raise ValueError(
                f"{owner}: initializer is {self.initializer!r}; it must be a function (key, shape, dtype) -> array, such "
                "as jax.nn.initializers.truncated_normal(0.02)."
            )

    def __setattr__(self, field: str, value: Any) -> None:
        refuse_after_placement(self, self.__dict__.get("_stacked_table_spec") is not None, field, value)
        super().__setattr__(field, value)
        note_change()

    @property
    def setting_in_stack(self) -> TableSettingInStack:
        """The place of this table in its stack; before stacking, alone and without padding."""
        if self._setting_in_stack is None:
            return TableSettingInStack(self.name, self.vocabulary_size, self.embedding_dim)
        return self._setting_in_stack

    @property
    def stacked_table_spec(self) -> StackedTableSpec:
        """The stack that this table belongs to.

        Raises:
            ValueError: the table has not been stacked yet.
        """
        if self._stacked_table_spec is None:
            raise ValueError(
                f"Table {self.name!r} has not been placed: embax.prepare_feature_specs_for_training was not called."
            )
        return self._stacked_table_spec

    def is_stacked(self) -> bool:
        """Whether the table has been placed in a stack."""
        return self._stacked_table_spec is not None


@dataclasses.dataclass(eq=True, unsafe_hash=True, kw_only=True)
class FeatureSpec:
    """Specifies one embedding feature: ids that are looked up in a table.

    Equal and hashed by all its fields, the placement included, which `prepare_feature_specs_for_training` fills in place.

    Args:
        name: name of the feature.
        table_spec: table that its ids are looked up in; features may share one.
        input_shape: `[batch, valency]`; of more sizes the last is the valency. It may be left out for ragged ids.
        output_shape: `[batch, embedding_dim]` of the activations.

    Raises:
        ValueError: a shape has a wrong rank, or the activations are wider than the table.
    """

    name: str
    table_spec: TableSpec
    input_shape: Sequence[int]
    output_shape: Sequence[int]
    _id_transformation: FeatureIdTransformation | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"FeatureSpec: name is {self.name!r}; it must be a non-empty string.")
        owner = f"Feature {self.name!r}"
        if not isinstance(self.table_spec, TableSpec):
            raise ValueError(f"{owner}: table_spec is {self.table_spec!r}; it must be a TableSpec.")
        for field in ("input_shape", "output_shape"):
            shape = getattr(self, field)
            if not isinstance(shape, Sequence) or isinstance(shape, str):
                raise ValueError(f"{owner}: {field} is {shape!r}; it must be a sequence of sizes, such as (batch, 8).")
            sizes = (positive_int(owner, f"a size of {field}", size, maximum=INT64_MAX) for size in shape)
            setattr(self, field, tuple(sizes))
        if not self.input_shape:
            raise ValueError(f"{owner}: input_shape is (); it must be (batch, valency), or (batch,) for ragged ids.")
        if len(self.output_shape) < 2:
            raise ValueError(f"{owner}: output_shape is {self.output_shape}; it must be (batch, embedding_dim).")
        if self.output_shape[-1] > self.table_spec.embedding_dim:
            raise ValueError(
                f"{owner}: output_shape is {self.output_shape}, wider than the {self.table_spec.embedding_dim} columns of "
                f"table {self.table_spec.name!r}; its last size must be at most that."
            )

    def __setattr__(self, field: str, value: Any) -> None:
        refuse_after_placement(self, self.__dict__.get("_id_transformation") is not None, field, value)
        super().__setattr__(field, value)
        note_change()

    @property
    def id_transformation(self) -> FeatureIdTransformation:
        """Where stacking put this feature; before stacking, no transformation."""
        return self._id_transformation or FeatureIdTransformation()
