"""Lookup of a packed batch in one table."""

from typing import Any

import jax

from embax._ops.across_devices import lookup_across
from embax._ops.backend import use_backend
from embax.compat.sparsecore.lib.core.primitives._batch import make_batch, sharded_axis
from embax.compat.sparsecore.lib.core.primitives._checks import (
    NUM_MINIBATCHES,
    PACKED,
    check_count,
    check_limits,
    check_packed,
    check_quantization,
    check_table,
)
from embax.compat.sparsecore.lib.core.primitives._primitive import define


def _shapes(
    *operands: Any,
    device_batch_size: int,
    max_ids_per_partition: int,
    max_unique_ids_per_partition: int,
    sharding_strategy: int = 1,
    quantization_config: tuple[float, float, int] | None = None,
    enable_minibatching: bool = False,
    num_sparsecores_per_device: int | None = None,
) -> Any:
    del enable_minibatching, num_sparsecores_per_device
    check_count(operands, (*PACKED, NUM_MINIBATCHES, "embedding_table"), "sparse_dense_matmul_csr")
    *packed, table = operands
    check_packed(packed)
    check_table(table, 1, 2)
    check_limits(max_ids_per_partition, max_unique_ids_per_partition, sharding_strategy)
    check_quantization(quantization_config)
    return table.update(shape=(device_batch_size, *table.shape[1:]), weak_type=False)


def _look_up(
    *operands: jax.Array,
    device_batch_size: int,
    max_ids_per_partition: int,
    max_unique_ids_per_partition: int,
    sharding_strategy: int = 1,
    quantization_config: tuple[float, float, int] | None = None,
    enable_minibatching: bool = False,
    num_sparsecores_per_device: int | None = None,
) -> jax.Array:
    del sharding_strategy
    *packed, table = operands
    batch, geometry = make_batch(
        packed,
        table,
        device_batch_size,
        name="sparse_dense_matmul_csr",
        max_ids_per_partition=max_ids_per_partition,
        max_unique_ids_per_partition=max_unique_ids_per_partition,
        enable_minibatching=enable_minibatching,
        num_sparsecores=num_sparsecores_per_device,
        quantization=quantization_config,
    )
    return lookup_across(batch, [table], geometry, sharded_axis())[0][0]


def _look_up_off_tpu(*operands: jax.Array, quantization_config: Any = None, **params: Any) -> jax.Array:
    if quantization_config is None:
        return _look_up(*operands, **params)
    # Users see in the compiled module that rows of up to 256 buckets pass through 8 bits, which a C++ kernel would hide.
    with use_backend("portable"):
        return _look_up(*operands, quantization_config=quantization_config, **params)


tpu_sparse_dense_matmul_csr_primitive = define(
    "sparse_dense_matmul_csr", _shapes, _look_up_off_tpu, multiple_results=False, on_tpu=_look_up
)
"""Activations of one stack: of row pointers, ids, samples, gains, number of minibatches and table."""
