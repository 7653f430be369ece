"""Where everything lies in a packed batch: the static layout, and the container of the arrays."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from embax._checks import next_multiple
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax._stacking.plan import FeaturePlan, Plan, StackPlan

PADDING_VALUE = 2**31 - 1
"""Id and sample of an entry that only fills up a partition; its gain is NaN."""

PARTITION_ALIGNMENT = 8
"""Partitions start at multiples of this many entries."""

BUFFER_ALIGNMENT = 64
"""Bytes; XLA takes NumPy arrays without a copy on CPU exactly when their addresses are multiples of this."""


def row_pointers_per_sparsecore(num_sparsecores: int) -> int:
    """Row pointers of one SparseCore when there are `num_sparsecores` in all."""
    return max(num_sparsecores, 8)


def theoretical_capacity(max_ids_per_partition: int, sparsecores_per_device: int, num_sparsecores: int) -> int:
    """Entries of a device's buffer that hold `max_ids_per_partition` ids in every partition."""
    ids = next_multiple(max_ids_per_partition, PARTITION_ALIGNMENT)
    return ids * sparsecores_per_device * num_sparsecores


def suggested_capacity(stack: StackPlan, sparsecores_per_device: int, num_sparsecores: int) -> int:
    """Entries of a device's buffer as the limits of the stack's spec ask for."""
    spec = stack.spec
    if spec.suggested_coo_buffer_size_per_device is None:
        return theoretical_capacity(spec.max_ids_per_partition, sparsecores_per_device, num_sparsecores)
    return next_multiple(spec.suggested_coo_buffer_size_per_device, PARTITION_ALIGNMENT * sparsecores_per_device)


@dataclasses.dataclass(frozen=True)
class StackLayout:
    """Where a stack lies in the packed arrays of one device.

    Args:
        name: name of the stack.
        num_rows: rows of the stack, all devices together.
        combiner: combiner that the gains were made by.
        features: its features and their placement, in the order of the plan.
        row_pointers_start: its first row pointer; it has `S * max(N, 8)` of them.
        entries_start: its first entry (id, sample, gain).
        capacity: its entries, a multiple of `8 * S`; each of the `S` SparseCores owns an equal part.
        batch_sizes: samples of each of its features on a device, in the order of the plan.
    """

    name: str
    num_rows: int
    combiner: str
    features: tuple[FeaturePlan, ...]
    row_pointers_start: int
    entries_start: int
    capacity: int
    batch_sizes: tuple[int, ...]

    def samples_per_sparsecore(self, sparsecores_per_device: int) -> int:
        """Samples of all features of the stack on one SparseCore, each feature's share rounded up."""
        return sum(-(-batch // sparsecores_per_device) for batch in self.batch_sizes)


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """The static layout of a packed batch: what compiled code knows about it beside the shapes of its arrays."""

    stacks: tuple[StackLayout, ...]
    num_local_devices: int
    num_devices: int
    num_sparsecores_per_device: int

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # jit hashes the layout at every call.
        return hash((self.stacks, self.num_local_devices, self.num_devices, self.num_sparsecores_per_device))

    @property
    def num_sparsecores(self) -> int:
        """SparseCores of all devices."""
        return self.num_devices * self.num_sparsecores_per_device

    @property
    def row_pointers_per_device(self) -> int:
        """Row pointers of one device, all stacks together."""
        per_stack = self.num_sparsecores_per_device * row_pointers_per_sparsecore(self.num_sparsecores)
        return len(self.stacks) * per_stack

    @property
    def entries_per_device(self) -> int:
        """Entries of one device, all stacks together."""
        return sum(stack.capacity for stack in self.stacks)


def make_layout(
    plan: Plan, batch_sizes: tuple[int, ...], capacities: tuple[int, ...], num_local_devices: int = 1
) -> PackedLayout:
    """Lays the stacks of `plan` out one after another.

    Args:
        plan: the placed specs.
        batch_sizes: samples of each feature on a device, in the order of the feature leaves.
        capacities: entries of each stack on a device, multiples of `8 * S`.
        num_local_devices: devices of this process.
    """
    per_stack = plan.num_sparsecores_per_device * row_pointers_per_sparsecore(plan.num_sparsecores)
    stacks, entries_start = [], 0
    for number, (stack, capacity) in enumerate(zip(plan.stacks, capacities, strict=True)):
        stacks.append(
            StackLayout(
                name=stack.name,
                num_rows=stack.spec.stack_vocab_size,
                combiner=stack.spec.combiner,
                features=stack.features,
                row_pointers_start=number * per_stack,
                entries_start=entries_start,
                capacity=capacity,
                batch_sizes=tuple(batch_sizes[feature.leaf] for feature in stack.features),
            )
        )
        entries_start += capacity
    return PackedLayout(tuple(stacks), num_local_devices, plan.num_devices, plan.num_sparsecores_per_device)


def empty_arrays(layout: PackedLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row pointers, ids, sample ids and gains of `layout`, without values, at addresses that are multiples of 64.

    Arrays with such addresses go into a jitted function on CPU without a copy. They lie in one allocation.
    """
    row_pointers = layout.num_local_devices * layout.row_pointers_per_device
    entries = layout.num_local_devices * layout.entries_per_device
    sizes = ((row_pointers, np.int32), (entries, np.int32), (entries, np.int32), (entries, np.float32))
    strides = [next_multiple(4 * size, BUFFER_ALIGNMENT) for size, _ in sizes]
    memory = np.empty(sum(strides) + BUFFER_ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % BUFFER_ALIGNMENT
    arrays = []
    for (size, dtype), stride in zip(sizes, strides, strict=True):
        arrays.append(np.frombuffer(memory, dtype, size, start))
        start += stride
    return tuple(arrays)


@dataclasses.dataclass(frozen=True)
class PreprocessedInput:
    """A packed batch: the ids of all stacks as CSR-wrapped COO arrays. A pytree; the statistics stay on the host.

    With `L` devices of this process, the arrays hold one equal part a device, in which `layout` says where a stack
    lies. Inside the part of a stack each SparseCore owns an equal share; it holds, for each SparseCore of all devices,
    the entries that look up rows there, sorted by row and sample; the row pointers say where they end.

    Args:
        row_pointers: int32[L * layout.row_pointers_per_device].
        embedding_ids: int32[L * layout.entries_per_device], the row on the SparseCore that owns it.
        sample_ids: int32, like `embedding_ids`: the sample on the SparseCore that looks it up.
        gains: float32, like `embedding_ids`: the factor that the row enters the sample with.
        layout: static.
        stats: what packing counted; None once the batch has gone through a JAX transformation.
    """

    row_pointers: jax.Array | np.ndarray
    embedding_ids: jax.Array | np.ndarray
    sample_ids: jax.Array | np.ndarray
    gains: jax.Array | np.ndarray
    layout: PackedLayout
    stats: SparseDenseMatmulInputStats | None = None

    def replace(self, **changes: Any) -> "PreprocessedInput":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _flatten(packed: PreprocessedInput):
    return (packed.row_pointers, packed.embedding_ids, packed.sample_ids, packed.gains), packed.layout


def _flatten_with_keys(packed: PreprocessedInput):
    arrays, layout = _flatten(packed)
    names = ("row_pointers", "embedding_ids", "sample_ids", "gains")
    return tuple(zip(map(jax.tree_util.GetAttrKey, names), arrays, strict=True)), layout


def _unflatten(layout: PackedLayout, arrays) -> PreprocessedInput:
    return PreprocessedInput(*arrays, layout=layout)


jax.tree_util.register_pytree_with_keys(PreprocessedInput, _flatten_with_keys, _unflatten, _flatten)
