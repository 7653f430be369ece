"""The native lowering: the C++ kernels as XLA FFI calls."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax import _native
from embax._ops.geometry import Geometry, optimizer_of
from embax._ops.row_update import RowLimits
from embax.optimizers import OptimizerSpec

ROW_RULES: dict[str, tuple[int, list[bool], int]] = _native.row_rules()
"""Number of the rule, for each slot whether it has one value a row, and the number of its hyperparameters, by
`OptimizerSpec.native_rule`."""


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@functools.cache
def register() -> None:
    """Registers the kernels with XLA, once.

    Raises:
        ValueError: the environment variable EMBAX_SIMD is no instruction set.
    """
    simd = os.environ.get("EMBAX_SIMD") or INSTRUCTION_SETS[0]
    if simd not in INSTRUCTION_SETS:
        raise ValueError(
            f"The environment variable EMBAX_SIMD is {simd!r}; it must be one of {', '.join(map(repr, INSTRUCTION_SETS))}."
        )
    for name, capsule in _native.ffi_handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def has_rule(optimizer: OptimizerSpec) -> bool:
    """Whether the optimizer's row rule is written in C++, for these slots."""
    rule = ROW_RULES.get(optimizer.native_rule)
    return rule is not None and rule[1] == list(optimizer.row_wise_slots())


def _quantization(geometry: Geometry) -> np.ndarray:
    """float32[3 * stacks]: minimum, maximum and step; step 0 where a stack is not quantized."""
    triples = []
    for stack in geometry.stacks:
        if stack.quantization is None:
            triples += [0.0, 0.0, 0.0]
        else:
            low, high, buckets = stack.quantization
            triples += [low, high, (high - low) / (buckets - 1)]
    return np.array(triples, np.float32)


def _packed_attributes(geometry: Geometry) -> dict[str, Any]:
    return {
        "num_sparsecores": np.int64(geometry.num_sparsecores),
        "sparsecores_per_device": np.int64(geometry.sparsecores_per_device),
        "max_minibatches": np.int64(geometry.max_minibatches),
        "stacks": geometry.offsets(),
    }


def lookup(packed: Sequence[jax.Array], tables: Sequence[jax.Array], geometry: Geometry) -> Sequence[jax.Array]:
    """`lookup_p` on CPU.

    Args:
        packed: the arrays of the batch.
        tables: float32[rows, dim] of each stack, or float32[rows].
        geometry: static; features that it names have all columns of their stack.

    Returns:
        The activations of all features or stacks, see `lookup_stacks`.
    """
    register()
    shapes = [
        jax.ShapeDtypeStruct((num_samples, *table.shape[1:]), table.dtype)
        for stack, table in zip(geometry.stacks, tables, strict=True)
        for num_samples in [feature.num_samples for feature in stack.features] or [geometry.num_samples(stack)]
    ]
    first_rows = [row for stack in geometry.stacks for row in [feature.first_row for feature in stack.features] or [0]]
    return jax.ffi.ffi_call("embax_lookup", shapes)(
        *packed,
        *tables,
        **_packed_attributes(geometry),
        gathered=geometry.gathered,
        quantization=_quantization(geometry),
        num_features=np.array(geometry.num_arrays(), np.int64),
        first_rows=np.array([-1 if row is None else row for row in first_rows], np.int64),
    )


def _row_options(geometry: Geometry, limits: Sequence[RowLimits]) -> np.ndarray:
    """float32[6 * stacks]: see `RowOptions` in `csrc/kernels/rows.h`; infinite where there is no limit."""
    options = []
    for stack, (low, high) in zip(geometry.stacks, limits, strict=True):
        optimizer = optimizer_of(stack)
        clips = (optimizer.clip_gradient_value, optimizer.clip_gradient_norm)
        options += [
            *(np.inf if clip is None else clip for clip in clips),
            optimizer.l2,
            -np.inf if low is None else low,
            np.inf if high is None else high,
            stack.width,
        ]
    return np.array(options, np.float32)


def update(
    packed: Sequence[jax.Array],
    hyperparameters: jax.Array,
    operands: Sequence[jax.Array],
    *,
    geometry: Geometry,
    num_hyperparameters: Sequence[int],
    limits: Sequence[RowLimits],
) -> Sequence[jax.Array]:
    """`update_p` on CPU: the results take the place of the tables and slots.

    Args:
        packed: the arrays of the batch.
        hyperparameters: those of all stacks.
        operands: gradients, tables and slots, and what orders the update. None is reshaped, which would copy it.
        geometry: static; features that it names have all columns of their stack.
        num_hyperparameters: of each stack: those of its rule, and one more where rows decay apart from it.
        limits: of each stack.

    Returns:
        Table and slots of each stack.
    """
    num_gradients = geometry.num_arrays()
    first_state = len(packed) + 1 + sum(num_gradients)
    return _in_place(
        "embax_update",
        [*packed, hyperparameters, *operands],
        first_state,
        geometry,
        num_hyperparameters,
        limits,
        **_packed_attributes(geometry),
        num_features=np.array(num_gradients, np.int64),
    )


def _in_place(
    target: str,
    operands: Sequence[jax.Array],
    first_state: int,
    geometry: Geometry,
    num_hyperparameters: Sequence[int],
    limits: Sequence[RowLimits],
    **attributes: Any,
) -> Sequence[jax.Array]:
    """Calls a kernel that updates the tables and slots among its operands, from `first_state` on."""
    register()
    optimizers = [optimizer_of(stack) for stack in geometry.stacks]
    for optimizer, given in zip(optimizers, num_hyperparameters, strict=True):
        wanted = ROW_RULES[optimizer.native_rule][2]
        if given != wanted + optimizer.decays_weights:
            raise ValueError(
                f"{type(optimizer).__name__}: get_hyperparameters returned {given - optimizer.decays_weights} numbers; the "
                f"native rule {optimizer.native_rule!r} takes {wanted}. State a row rule of your own, update_rows, and no "
                "native_rule."
            )
    num_states = sum(1 + optimizer.slot_variables_count() for optimizer in optimizers)
    states = operands[first_state : first_state + num_states]
    # Of what orders the update an element each: whole arrays could not be overwritten before it, as by the gradients that are
    # computed from them.
    after = [array.reshape(-1)[0] for array in operands[first_state + num_states :] if array.size]
    operands = [*operands[: first_state + num_states], *([jnp.stack(after)] if after else [])]
    return jax.ffi.ffi_call(
        target,
        [jax.ShapeDtypeStruct(state.shape, state.dtype) for state in states],
        input_output_aliases={first_state + k: k for k in range(num_states)},
    )(
        *operands,
        **attributes,
        rules=np.array([ROW_RULES[optimizer.native_rule][0] for optimizer in optimizers], np.int64),
        num_hyperparameters=np.array(num_hyperparameters, np.int64),
        options=_row_options(geometry, limits),
    )


def apply_rows(
    hyperparameters: jax.Array,
    operands: Sequence[jax.Array],
    *,
    geometry: Geometry,
    num_hyperparameters: Sequence[int],
    limits: Sequence[RowLimits],
) -> Sequence[jax.Array]:
    """`apply_rows_p` on CPU; `operands` are the rows of each stack, and behind them what `update` takes."""
    num_stacks = len(geometry.stacks)
    return _in_place(
        "embax_apply_rows", [hyperparameters, *operands], 1 + 2 * num_stacks, geometry, num_hyperparameters, limits
    )


def _lists(target: str, operands: Sequence[jax.Array], shapes, geometry: Geometry, num_rows: Sequence[int]):
    register()
    attributes = _packed_attributes(geometry)
    return jax.ffi.ffi_call(target, shapes)(*operands, **attributes, num_rows=np.array(num_rows, np.int64))


def distinct_rows(packed: Sequence[jax.Array], geometry: Geometry, num_rows: Sequence[int]) -> Sequence[jax.Array]:
    """`distinct_rows_p` on CPU."""
    shapes = [jax.ShapeDtypeStruct(packed[1].shape, np.int32)]
    for stack in geometry.stacks:
        shapes += [jax.ShapeDtypeStruct((size,), np.int32) for size in (stack.capacity, geometry.num_devices)]
    return _lists("embax_distinct_rows", packed, shapes, geometry, num_rows)


def row_gradients(
    packed: Sequence[jax.Array], gradients: Sequence[jax.Array], geometry: Geometry, num_rows: Sequence[int]
) -> Sequence[jax.Array]:
    """`row_gradients_p` on CPU."""
    shapes = []
    for stack, gradient in zip(geometry.stacks, gradients, strict=True):
        shapes += [jax.ShapeDtypeStruct((size,), np.int32) for size in (stack.capacity, geometry.num_devices)]
        shapes.append(jax.ShapeDtypeStruct((stack.capacity, *gradient.shape[1:]), np.float32))
    return _lists("embax_row_gradients", [*packed, *gradients], shapes, geometry, num_rows)


def take_rows(array: jax.Array, places: jax.Array) -> jax.Array:
    """`take_rows_p` on CPU."""
    register()
    shape = jax.ShapeDtypeStruct((places.shape[0], *array.shape[1:]), array.dtype)
    return jax.ffi.ffi_call("embax_take_rows", shape)(array, places)
