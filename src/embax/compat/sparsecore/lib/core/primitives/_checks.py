"""Checks of the operands and parameters of the primitives, while they are traced."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

MOD = 1
"""The only sharding strategy: row `id` lies on SparseCore `id % num_sparsecores`."""

PACKED = ("lhs_row_pointers", "lhs_local_embedding_ids", "lhs_local_sample_ids", "lhs_gains")
"""Names of the arrays that every primitive takes first."""
NUM_MINIBATCHES = "num_minibatches_per_physical_sparse_core"


def check_count(operands: Sequence[Any], names: Sequence[str], primitive: str) -> None:
    """Raises a ValueError unless there is one operand a name."""
    if len(operands) != len(names):
        raise ValueError(f"{primitive} was given {len(operands)} operands; it takes {len(names)}: {', '.join(names)}.")


def check_dtypes(operands: Mapping[str, Any], dtype: Any) -> None:
    """Raises a ValueError unless all operands, by name, have the dtype."""
    for name, operand in operands.items():
        if operand.dtype != dtype:
            raise ValueError(f"{name} is {operand.dtype}; it must be {jnp.dtype(dtype).name}.")


def check_rank(name: str, operand: Any, *ranks: int) -> None:
    """Raises a ValueError unless the operand has one of the ranks."""
    if operand.ndim not in ranks:
        raise ValueError(f"{name} has shape {operand.shape}; its rank must be {' or '.join(map(str, ranks))}.")


def columns_of(operand: Any) -> int:
    """The minor dimension of a matrix; an array of rank 1 has one column."""
    return operand.shape[1] if operand.ndim > 1 else 1


def check_entries(ids: Any, samples: Any, gains: Any) -> None:
    """Raises a ValueError unless ids, samples and gains are of the dtypes and of one shape [entries]."""
    check_dtypes({"lhs_local_embedding_ids": ids, "lhs_local_sample_ids": samples}, jnp.int32)
    check_dtypes({"lhs_gains": gains}, jnp.float32)
    if ids.ndim != 1 or not ids.shape == samples.shape == gains.shape:
        raise ValueError(
            f"lhs_local_embedding_ids, lhs_local_sample_ids and lhs_gains have the shapes {ids.shape}, {samples.shape} and "
            f"{gains.shape}; they must have one shape, of rank 1."
        )


def check_packed(packed: Sequence[Any]) -> None:
    """Raises a ValueError unless the five operands are a packed batch of one stack.

    Args:
        packed: row pointers, ids, samples, gains and the number of minibatches.
    """
    row_pointers, ids, samples, gains, num_minibatches = packed
    check_dtypes({"lhs_row_pointers": row_pointers, NUM_MINIBATCHES: num_minibatches}, jnp.int32)
    check_rank("lhs_row_pointers", row_pointers, 1)
    check_rank(NUM_MINIBATCHES, num_minibatches, 0)
    check_entries(ids, samples, gains)


def check_table(table: Any, *ranks: int) -> None:
    """Raises a ValueError unless the table is float32 of one of the ranks."""
    check_dtypes({"embedding_table": table}, jnp.float32)
    check_rank("embedding_table", table, *ranks)


def check_states(states: Mapping[str, Any], gradient: Any) -> None:
    """Raises a ValueError unless a table, its slots and the gradient of the activations belong together.

    Args:
        states: the table, and behind it its slots, by name.
        gradient: of the activations.
    """
    table, *_ = states.values()
    check_table(table, 1, 2)
    check_dtypes({**states, "activations_grad": gradient}, jnp.float32)
    check_rank("activations_grad", gradient, 1, 2)
    for name, slot in states.items():
        if slot.shape != table.shape:
            raise ValueError(f"{name} has shape {slot.shape}; it must have that of embedding_table, {table.shape}.")
    if columns_of(gradient) != columns_of(table):
        raise ValueError(
            f"activations_grad has shape {gradient.shape}, embedding_table {table.shape}; their minor dimensions must be equal."
        )


def check_limits(max_ids_per_partition: int, max_unique_ids_per_partition: int, sharding_strategy: int) -> None:
    """Raises a ValueError unless the limits are positive and the sharding strategy is `MOD`."""
    limits = {
        "max_ids_per_partition": max_ids_per_partition,
        "max_unique_ids_per_partition": max_unique_ids_per_partition,
    }
    for name, limit in limits.items():
        if limit <= 0:
            raise ValueError(f"{name} is {limit}; it must be positive.")
    if sharding_strategy != MOD:
        raise ValueError(f"sharding_strategy is {sharding_strategy}; it must be {MOD}, which is MOD.")


def check_update(computation_name: str, min_value: float | None = None, max_value: float | None = None) -> None:
    """Raises a ValueError unless the name is one, and the limits of the new rows are in order."""
    if not computation_name:
        raise ValueError("computation_name is empty; it must name the update.")
    if min_value is not None and max_value is not None and min_value > max_value:
        raise ValueError(f"min_value is {min_value}, and max_value {max_value}; they must be in order.")


def check_quantization(quantization_config: tuple[float, float, int] | None) -> None:
    """Raises a ValueError unless this is None or (min, max, buckets) of a range and at least two buckets."""
    if quantization_config is None:
        return
    low, high, buckets = quantization_config
    if buckets < 2:
        raise ValueError(f"quantization_config has {buckets} buckets; there must be at least 2.")
    if low >= high:
        raise ValueError(f"quantization_config has the range [{low}, {high}]; its minimum must be below its maximum.")
