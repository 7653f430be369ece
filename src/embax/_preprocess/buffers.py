"""Where everything lies in a packed batch: the static layout, and the container of the arrays."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from embax import _native
from embax._checks import next_multiple
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax._stacking.plan import FeaturePlan, Plan, StackPlan

PADDING_VALUE = 2**31 - 1
"""Id and sample of an entry that only fills up a partition; its gain is NaN."""

PARTITION_ALIGNMENT = 8
"""Partitions start at multiples of this many entries."""

MAX_MINIBATCHES = 64
"""Minibatches that a batch can be divided into: as many as there are buckets of ids."""


def row_pointers_per_segment(num_sparsecores: int) -> int:
    """Row pointers of one SparseCore (of one minibatch on it) when there are `num_sparsecores` in all."""
    return max(num_sparsecores, 8)


def row_pointers_per_device(sparsecores_per_device: int, num_sparsecores: int, max_minibatches: int) -> int:
    """Row pointers of a stack on one device."""
    segments = sparsecores_per_device * max(max_minibatches, 1)
    return segments * row_pointers_per_segment(num_sparsecores)


def theoretical_capacity(
    max_ids_per_partition: int, sparsecores_per_device: int, num_sparsecores: int, minibatched: bool = False
) -> int:
    """Entries of a device's buffer that hold `max_ids_per_partition` ids in every partition (of every minibatch)."""
    ids = next_multiple(max_ids_per_partition, PARTITION_ALIGNMENT)
    return ids * sparsecores_per_device * num_sparsecores * (MAX_MINIBATCHES if minibatched else 1)


def suggested_capacity(
    stack: StackPlan, sparsecores_per_device: int, num_sparsecores: int, minibatched: bool = False
) -> int:
    """Entries of a device's buffer as the limits of the stack's spec ask for."""
    spec = stack.spec
    if spec.suggested_coo_buffer_size_per_device is None:
        return theoretical_capacity(spec.max_ids_per_partition, sparsecores_per_device, num_sparsecores, minibatched)
    return next_multiple(spec.suggested_coo_buffer_size_per_device, PARTITION_ALIGNMENT * sparsecores_per_device)


@dataclasses.dataclass(frozen=True)
class StackLayout:
    """Where a stack lies in the packed arrays of one device.

    Args:
        name: name of the stack.
        num_rows: rows of the stack, all devices together.
        combiner: combiner that the gains were made by.
        features: its features and their placement, in the order of the plan.
        row_pointers_start: its first row pointer; it has `S * max(N, 8)` of them, times `max_minibatches` of the layout.
        entries_start: its first entry (id, sample, gain).
        capacity: its entries, a multiple of `8 * S`; each of the `S` SparseCores owns an equal part.
        batch_sizes: samples of each of its features on a device, in the order of the plan.
        max_ids_per_partition: entries that a partition may hold.
        max_unique_ids_per_partition: distinct ids that a partition may hold.
    """

    name: str
    num_rows: int
    combiner: str
    features: tuple[FeaturePlan, ...]
    row_pointers_start: int
    entries_start: int
    capacity: int
    batch_sizes: tuple[int, ...]
    max_ids_per_partition: int
    max_unique_ids_per_partition: int

    def samples_per_sparsecore(self, sparsecores_per_device: int) -> int:
        """Samples of all features of the stack on one SparseCore, each feature's share rounded up."""
        return sum(-(-batch // sparsecores_per_device) for batch in self.batch_sizes)


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """The static layout of a packed batch: what compiled code knows about it beside the shapes of its arrays.

    `max_minibatches` is 0, 1 or 64. Where it is 0, each SparseCore owns an equal share of a stack on a device. Else the layout
    is `minibatched`: the entries lie SparseCore by SparseCore, and there minibatch by minibatch, one after another, and row
    pointers count from the start of the stack.
    """

    stacks: tuple[StackLayout, ...]
    num_local_devices: int
    num_devices: int
    num_sparsecores_per_device: int
    max_minibatches: int = 0

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        # jit hashes the layout at every call.
        fields = (self.num_local_devices, self.num_devices, self.num_sparsecores_per_device, self.max_minibatches)
        return hash((self.stacks, fields))

    def __getstate__(self) -> dict[str, Any]:
        # Another process hashes strings otherwise.
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def minibatched(self) -> bool:
        """Whether the SparseCores' entries follow one another, minibatch by minibatch."""
        return self.max_minibatches > 0

    @property
    def num_sparsecores(self) -> int:
        """SparseCores of all devices."""
        return self.num_devices * self.num_sparsecores_per_device

    @functools.cached_property
    def row_pointers_per_device(self) -> int:
        """Row pointers of one device, all stacks together."""
        per_stack = row_pointers_per_device(self.num_sparsecores_per_device, self.num_sparsecores, self.max_minibatches)
        return len(self.stacks) * per_stack

    @functools.cached_property
    def entries_per_device(self) -> int:
        """Entries of one device, all stacks together."""
        return sum(stack.capacity for stack in self.stacks)


def make_layout(
    plan: Plan,
    batch_sizes: tuple[int, ...],
    limits: np.ndarray,
    num_local_devices: int = 1,
    max_minibatches: int = 0,
) -> PackedLayout:
    """Lays the stacks of `plan` out one after another.

    Args:
        plan: the placed specs.
        batch_sizes: samples of each feature on a device, in the order of the feature leaves.
        limits: int64[stacks, 3], see `limits.py`; the entries of a device are multiples of `8 * S`.
        num_local_devices: devices of this process.
        max_minibatches: see `PackedLayout`.
    """
    per_stack = row_pointers_per_device(plan.num_sparsecores_per_device, plan.num_sparsecores, max_minibatches)
    stacks, entries_start = [], 0
    for number, (stack, (max_ids, max_unique_ids, capacity)) in enumerate(
        zip(plan.stacks, limits.tolist(), strict=True)
    ):
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
                max_ids_per_partition=max_ids,
                max_unique_ids_per_partition=max_unique_ids,
            )
        )
        entries_start += capacity
    return PackedLayout(
        tuple(stacks), num_local_devices, plan.num_devices, plan.num_sparsecores_per_device, max_minibatches
    )


def array_shapes(layout: PackedLayout) -> list[tuple[tuple[int], type]]:
    """Shape and dtype of row pointers, ids, sample ids and gains."""
    row_pointers = layout.num_local_devices * layout.row_pointers_per_device
    entries = layout.num_local_devices * layout.entries_per_device
    return [((row_pointers,), np.int32), ((entries,), np.int32), ((entries,), np.int32), ((entries,), np.float32)]


def empty_arrays(layout: PackedLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row pointers, ids, sample ids and gains of `layout`, without values, at addresses that are multiples of 64.

    Arrays with such addresses go into a jitted function on CPU without a copy. They lie in one allocation.
    """
    devices = layout.num_local_devices
    return _native.empty_arrays(devices * layout.row_pointers_per_device, devices * layout.entries_per_device)


@dataclasses.dataclass(frozen=True, eq=False)
class PreprocessedInput:
    """A packed batch: the ids of all stacks as CSR-wrapped COO arrays. A pytree; the statistics stay on the host.

    With `L` devices of this process, the arrays hold one equal part a device, in which `layout` says where a stack
    lies. Inside the part of a stack each SparseCore owns an equal share; it holds, for each SparseCore of all devices,
    the entries that look up rows there, sorted by row and sample; the row pointers say where they end. With minibatches a
    SparseCore has these for one minibatch after another (see `PackedLayout`).

    The arrays are flat, or have a leading dimension of `L` where packing was asked for it.

    Args:
        row_pointers: int32[L * layout.row_pointers_per_device].
        embedding_ids: int32[L * layout.entries_per_device], the row on the SparseCore that owns it.
        sample_ids: int32, like `embedding_ids`: the sample on the SparseCore that looks it up.
        gains: float32, like `embedding_ids`: the factor that the row enters the sample with.
        layout: static.
        num_minibatches: None, or where there may be several the number of minibatches: int32[L] of equal values.
        invalid_ids: None, or of a batch that was packed inside jit int32[features], in the order of the feature leaves: ids
            that were left out since they, their weights or their row splits are not valid.
        stats: what packing counted; None once the batch has gone through a JAX transformation.
    """

    row_pointers: jax.Array | np.ndarray
    embedding_ids: jax.Array | np.ndarray
    sample_ids: jax.Array | np.ndarray
    gains: jax.Array | np.ndarray
    layout: PackedLayout
    num_minibatches: jax.Array | np.ndarray | None = None
    invalid_ids: jax.Array | np.ndarray | None = None
    stats: SparseDenseMatmulInputStats | None = None

    def replace(self, **changes: Any) -> "PreprocessedInput":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


jax.tree_util.register_dataclass(
    PreprocessedInput,
    ["row_pointers", "embedding_ids", "sample_ids", "gains", "num_minibatches", "invalid_ids"],
    ["layout"],
    ["stats"],
)
