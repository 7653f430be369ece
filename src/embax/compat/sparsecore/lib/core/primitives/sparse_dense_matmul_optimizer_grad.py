"""Update of one table by a row rule of the user's, as StableHLO."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.mlir import ir

from embax.compat.sparsecore.lib.core.primitives._checks import (
    NUM_MINIBATCHES,
    PACKED,
    check_dtypes,
    check_limits,
    check_packed,
    check_states,
    check_update,
)
from embax.compat.sparsecore.lib.core.primitives._primitive import define
from embax.compat.sparsecore.lib.core.primitives._update import tpu_runs_minibatches, update
from embax.optimizers import CustomOptimizerSpec

_COMPUTATION_NAME = "sparse_dense_matmul_optimizer_grad"
_NUM_FIRST = len(PACKED) + 2


@dataclasses.dataclass(frozen=True)
class _TextRule(CustomOptimizerSpec):
    """A row rule that takes `num_hyperparameters` behind the slots; they are given where others are given the step."""

    num_hyperparameters: int = dataclasses.field(default=1, kw_only=True)

    def get_hyperparameters(self, step: Any = None) -> tuple[jax.Array, ...]:
        return step if isinstance(step, tuple) else (jnp.ones((), jnp.float32),) * self.num_hyperparameters


@functools.lru_cache(maxsize=256)
def _rule(stablehlo: str | bytes, num_slots: int, num_hyperparameters: int) -> _TextRule:
    slots = (jax.nn.initializers.zeros,) * num_slots
    return _TextRule(
        stablehlo=stablehlo, slot_variable_initializers_tuple=slots, num_hyperparameters=num_hyperparameters
    )


def _shapes(
    *operands: Any,
    num_hyperparameters: int,
    stablehlo: str | bytes | ir.Module,
    max_ids_per_partition: int,
    max_unique_ids_per_partition: int,
    computation_name: str = _COMPUTATION_NAME,
    sharding_strategy: int = 1,
    enable_minibatching: bool = False,
    num_sparsecores_per_device: int | None = None,
) -> Any:
    del enable_minibatching, num_sparsecores_per_device
    states = operands[_NUM_FIRST + num_hyperparameters :]
    if not states:
        wanted = (*PACKED, NUM_MINIBATCHES, "activations_grad", f"{num_hyperparameters} hyperparameters", "the table")
        raise ValueError(
            f"{_COMPUTATION_NAME} was given {len(operands)} operands; it takes {', '.join(wanted)}, and its slots."
        )
    check_packed(operands[: _NUM_FIRST - 1])
    names = ("embedding_table", *(f"slot variable {number}" for number in range(len(states) - 1)))
    check_states(dict(zip(names, states, strict=True)), operands[_NUM_FIRST - 1])
    for number, scalar in enumerate(operands[_NUM_FIRST : _NUM_FIRST + num_hyperparameters]):
        check_dtypes({f"hyperparameter {number}": scalar}, jnp.float32)
        if scalar.shape not in ((), (1,)):
            raise ValueError(f"hyperparameter {number} has shape {scalar.shape}; it must be () or (1,).")
    check_limits(max_ids_per_partition, max_unique_ids_per_partition, sharding_strategy)
    check_update(computation_name)
    if not isinstance(stablehlo, str | bytes | ir.Module):
        raise ValueError(f"stablehlo is a {type(stablehlo).__name__}; it must be text, its bytes, or a module.")
    return [state.update(weak_type=False) for state in states]


def _update(
    *operands: jax.Array,
    in_order: bool = False,
    num_hyperparameters: int,
    stablehlo: str | bytes | ir.Module,
    max_ids_per_partition: int,
    max_unique_ids_per_partition: int,
    computation_name: str = _COMPUTATION_NAME,
    sharding_strategy: int = 1,
    enable_minibatching: bool = False,
    num_sparsecores_per_device: int | None = None,
) -> Any:
    del sharding_strategy
    text = str(stablehlo) if isinstance(stablehlo, ir.Module) else stablehlo
    states = operands[_NUM_FIRST + num_hyperparameters :]
    scalars = operands[_NUM_FIRST : _NUM_FIRST + num_hyperparameters]
    return update(
        operands[: _NUM_FIRST - 1],
        operands[_NUM_FIRST - 1],
        states,
        [scalar.reshape(()) for scalar in scalars],
        _rule(text, len(states) - 1, num_hyperparameters),
        max_ids_per_partition=max_ids_per_partition,
        max_unique_ids_per_partition=max_unique_ids_per_partition,
        computation_name=computation_name,
        enable_minibatching=enable_minibatching,
        num_sparsecores_per_device=num_sparsecores_per_device,
        limits=(None, None),
        in_order=in_order,
    )


def _update_on_tpu(*operands: jax.Array, **params: Any) -> Any:
    return _update(*operands, in_order=tpu_runs_minibatches(), **params)


tpu_sparse_dense_matmul_optimizer_grad_primitive = define(
    "sparse_dense_matmul_optimizer_grad_primitive", _shapes, _update, multiple_results=True, on_tpu=_update_on_tpu
)
"""New table and slots: of row pointers, ids, samples, gains, number of minibatches, gradient, hyperparameters, table, slots.

`main` of the StableHLO takes gradient, table, slots and hyperparameters of shape (1, dim), and returns table and slots.
"""
