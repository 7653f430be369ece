"""The lookup primitive: packed ids and tables to the activations of every stack."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from embax._ops import native, sparsecore
from embax._ops.backend import backend_on, chosen_backend
from embax._ops.geometry import Geometry, StackGeometry, packed_operands
from embax._ops.refusals import refuse_transformations
from embax._ops.segments import count_up_to, entries_of, physical_rows, sum_runs
from embax._preprocess.buffers import PreprocessedInput

lookup_p = Primitive("embax_lookup")
lookup_p.multiple_results = True


def lookup_stacks(packed: PreprocessedInput, tables: Sequence[jax.Array], geometry: Geometry) -> list[jax.Array]:
    """Activations of every stack.

    Args:
        packed: a batch packed for one device.
        tables: float32[rows, dim] of each stack, or float32[rows].
        geometry: static.

    Returns:
        float32[num_sparsecores * samples_per_sparsecore, dim] of each stack, without dim where its table has none.
    """
    return lookup_p.bind(
        *packed_operands(packed),
        *tables,
        geometry=geometry,
        backend=chosen_backend(),
    )


def _quantize(rows: jax.Array, quantization: tuple[float, float, int] | None) -> jax.Array:
    if quantization is None:
        return rows
    low, high, buckets = quantization
    step = jnp.float32((high - low) / (buckets - 1))
    codes = jnp.round((jnp.clip(rows, low, high) - low) / step)
    if buckets <= 256:  # Of 8 bits, which hold no NaN.
        codes = jnp.where(jnp.isnan(codes), codes, codes.astype(jnp.uint8).astype(rows.dtype))
    return codes * step + low


def _portable_stack(arrays, table: jax.Array, geometry: Geometry, stack: StackGeometry) -> jax.Array:
    num_samples = geometry.num_samples(stack)
    if stack.capacity == 0 or num_samples == 0:
        return jnp.zeros((num_samples, *table.shape[1:]), table.dtype)
    partition, ids, sample, gain = entries_of(*arrays, geometry=geometry, stack=stack)
    order = jnp.argsort(sample, stable=True)
    sample = sample[order]
    rows = physical_rows(partition[order], ids[order], sample < num_samples, geometry.num_sparsecores, table.shape[0])
    values = _quantize(table.at[rows].get(mode="fill", fill_value=0), stack.quantization).reshape(len(rows), -1)
    values = jnp.where((rows < table.shape[0])[:, None], gain[order][:, None] * values, 0.0)
    _, sums = sum_runs(sample, values)
    wanted = jnp.arange(num_samples, dtype=sample.dtype)
    last = count_up_to(sample, wanted) - 1
    present = (last >= 0) & (sample[last] == wanted)
    return jnp.where(present[:, None], sums[last], 0.0).reshape(num_samples, *table.shape[1:])


def _portable(arrays: Sequence[jax.Array], tables: Sequence[jax.Array], geometry: Geometry) -> list[jax.Array]:
    geometry.check_one_device()
    return [
        _portable_stack(arrays, table, geometry, stack) for table, stack in zip(tables, geometry.stacks, strict=True)
    ]


def _native(arrays: Sequence[jax.Array], tables: Sequence[jax.Array], geometry: Geometry) -> Sequence[jax.Array]:
    geometry.check_one_device()
    return native.lookup(arrays, tables, geometry)


def _sparsecore(arrays: Sequence[jax.Array], tables: Sequence[jax.Array], geometry: Geometry) -> list[jax.Array]:
    activations: list[jax.Array] = []
    for table, stack in zip(tables, geometry.stacks, strict=True):
        look_up = sparsecore.lookup if sparsecore.holds(stack, table, geometry) else _portable
        activations += look_up(arrays, [table], dataclasses.replace(geometry, stacks=(stack,)))
    return activations


def _lowering(lookup):
    """`lookup(arrays, tables, geometry)` as a lowering."""

    def wrapped(row_pointers, ids, samples, gains, num_minibatches, *tables, geometry: Geometry, backend: str | None):
        del backend
        return lookup((row_pointers, ids, samples, gains, num_minibatches), tables, geometry)

    return mlir.lower_fun(wrapped, multiple_results=True)


@functools.cache
def _jitted(**params):
    return jax.jit(functools.partial(lookup_p.bind, **params))


@lookup_p.def_impl
def _run(*operands, **params):
    return _jitted(**params)(*operands)


@lookup_p.def_abstract_eval
def _shapes(row_pointers, ids, samples, gains, num_minibatches, *tables, geometry: Geometry, backend: str | None):
    del row_pointers, ids, samples, gains, num_minibatches, backend
    return [
        table.update(shape=(geometry.num_samples(stack), *table.shape[1:]))
        for table, stack in zip(tables, geometry.stacks, strict=True)
    ]


refuse_transformations(
    lookup_p,
    derivative="Differentiate with respect to the activations and pass the gradients to embax.apply_gradients, or use a layer.",
    batching="Make one larger batch instead, or several features.",
)

_lower_portable = _lowering(_portable)
_lower_native = _lowering(_native)
_lower_sparsecore = _lowering(_sparsecore)


def _lower_cpu(context, *operands, backend: str | None, **params):
    lower = _lower_native if backend_on("cpu", backend) == "native" else _lower_portable
    return lower(context, *operands, backend=backend, **params)


def _lower_tpu(context, *operands, backend: str | None, **params):
    lower = _lower_sparsecore if backend_on("tpu", backend) == "sparsecore" else _lower_portable
    return lower(context, *operands, backend=backend, **params)


mlir.register_lowering(lookup_p, _lower_portable)
mlir.register_lowering(lookup_p, _lower_cpu, platform="cpu")
mlir.register_lowering(lookup_p, _lower_tpu, platform="tpu")
