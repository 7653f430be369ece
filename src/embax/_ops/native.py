"""The native lowering: the C++ kernels as XLA FFI calls."""

import functools
import os

import jax
import numpy as np

from embax import _native
from embax._ops.geometry import Geometry
from embax.optimizers import OptimizerSpec

ROW_RULES: dict[str, tuple[int, int, int]] = _native.row_rules()
"""Number of the rule, of its slots and of its hyperparameters, by `OptimizerSpec.native_rule`."""


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
    """Whether the optimizer's row rule is written in C++."""
    return optimizer.native_rule in ROW_RULES


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


def lower_lookup(context, *operands, geometry: Geometry):
    """MLIR of `lookup_p` on CPU."""
    register()
    return jax.ffi.ffi_lowering("embax_lookup")(
        context,
        *operands,
        num_sparsecores=np.int64(geometry.num_sparsecores),
        max_minibatches=np.int64(geometry.max_minibatches),
        stacks=geometry.offsets(),
        quantization=_quantization(geometry),
    )


def lower_update(context, *operands, geometry: Geometry, optimizers: tuple[OptimizerSpec, ...]):
    """MLIR of `update_p` on CPU: the results take the place of the tables and slots."""
    register()
    first_state = 6 + len(optimizers)
    num_states = len(context.avals_out)
    return jax.ffi.ffi_lowering("embax_update", operand_output_aliases={first_state + k: k for k in range(num_states)})(
        context,
        *operands,
        num_sparsecores=np.int64(geometry.num_sparsecores),
        max_minibatches=np.int64(geometry.max_minibatches),
        stacks=geometry.offsets(),
        rules=np.array([ROW_RULES[optimizer.native_rule][0] for optimizer in optimizers], np.int64),
    )
