"""Runs a map between layouts on whole arrays: NumPy on the host, JAX compiled, with the sharding of what it got kept."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def _is_explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


def common_sharding(arrays: Sequence[jax.Array]) -> NamedSharding | None:
    """The sharding that all arrays have, if they have one, and it is known: traced arrays carry explicit ones alone."""
    shardings: set[Any] = {jax.typeof(a).sharding if isinstance(a, Tracer) else a.sharding for a in arrays}
    explicit = [s for s in shardings if isinstance(s, NamedSharding) and _is_explicit(s)]
    if len(shardings) > 1:
        return NamedSharding(explicit[0].mesh, PartitionSpec()) if explicit else None
    (one,) = shardings
    return one if explicit or (isinstance(one, NamedSharding) and not isinstance(arrays[0], Tracer)) else None


def for_shape(sharding: NamedSharding | None, spec: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding | None:
    """`sharding` with another spec, where it divides a result of `shape`; else none, but an explicit mesh replicates it."""
    if sharding is None:
        return None
    try:
        result = NamedSharding(sharding.mesh, spec)
        result.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, PartitionSpec()) if _is_explicit(sharding) else None
    return result


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compiled(function: Callable, options: tuple, sharding: NamedSharding | None, *arrays: Any) -> Any:
    """`function(*arrays, *options)` in one compiled program, its result sharded so."""

    def call(*arrays):
        return function(*arrays, *options)

    if sharding is None:
        return call(*arrays)
    if _is_explicit(sharding):
        return jax.sharding.auto_axes(call, out_sharding=sharding)(*arrays)
    return jax.lax.with_sharding_constraint(call(*arrays), sharding)


def apply(function: Callable, options: tuple, array: Any, shape: tuple[int, ...], dims: tuple[int | None, ...]) -> Any:
    """`function(array, *options)`, a new array of `shape`, whose dimensions are sharded as dimensions `dims` of `array`."""
    if isinstance(array, np.ndarray):
        result = function(array, *options)
        return result.copy() if np.may_share_memory(result, array) else result
    sharding = common_sharding([array])
    if sharding is None:
        return compiled(function, options, None, array)
    spec = (*sharding.spec, *(None,) * array.ndim)
    spec = PartitionSpec(*(None if dim is None else spec[dim] for dim in dims))
    return compiled(function, options, for_shape(sharding, spec, shape), array)
