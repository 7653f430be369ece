"""What the primitives know statically about a packed batch and the tables it looks up."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from embax._checks import INT32_MAX
from embax._preprocess.buffers import (
    MAX_MINIBATCHES,
    PARTITION_ALIGNMENT,
    PackedLayout,
    PreprocessedInput,
    make_layout,
    row_pointers_per_segment,
)
from embax._stacking.plan import FeaturePlan, Plan
from embax.optimizers import OptimizerSpec


class FeatureGeometry(NamedTuple):
    """The activations of a feature on a device: float32[num_samples, dim].

    `first_row`: on each SparseCore, where the rows of this feature and those behind it in its stack begin, and those of features
    before it have ended; None where rows of the two are mixed.
    """

    num_samples: int
    dim: int
    first_row: int | None


@dataclasses.dataclass(frozen=True)
class StackGeometry:
    """Where a stack lies in the packed arrays (see `StackLayout`), and how its rows are quantized.

    `features` are in the order of their samples; without them, activations and gradients are those of the whole stack. `width` is
    the columns that its tables have, where all have the same; else those of the stack. The optimizer also decides
    whether a TPU's SparseCores hold the table (see `sparsecore.holds`); without one they do, and there are no updates.
    """

    name: str
    row_pointers_start: int
    entries_start: int
    capacity: int
    samples_per_sparsecore: int
    quantization: tuple[float, float, int] | None
    width: int
    max_ids_per_partition: int
    max_unique_ids_per_partition: int
    optimizer: OptimizerSpec | None = None
    features: tuple[FeatureGeometry, ...] = ()


def optimizer_of(stack: StackGeometry) -> OptimizerSpec:
    """The optimizer of a stack that is updated."""
    if stack.optimizer is None:
        raise ValueError(f"Stack {stack.name!r} has no optimizer, and cannot be updated.")
    return stack.optimizer


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The stacks of a packed batch on one device.

    `num_sparsecores` SparseCores of `num_devices` devices hold the rows. With several devices all shapes are those of one.
    `max_minibatches` is 0 where SparseCores have equal shares of a buffer (see `PackedLayout`). If `gathered`, the ids are not
    those of rows on a SparseCore, but of rows of the tables at hand, which were gathered from their owners.
    """

    stacks: tuple[StackGeometry, ...]
    num_sparsecores: int
    max_minibatches: int
    num_devices: int = 1
    gathered: bool = False

    @property
    def sparsecores_per_device(self) -> int:
        """SparseCores of the device."""
        return self.num_sparsecores // self.num_devices

    @property
    def row_pointers_per_segment(self) -> int:
        """Row pointers of one SparseCore, of one minibatch, in one stack."""
        return row_pointers_per_segment(self.num_sparsecores)

    @property
    def max_segments(self) -> int:
        """Minibatches of all SparseCores that a stack has row pointers for."""
        return self.sparsecores_per_device * max(self.max_minibatches, 1)

    def num_samples(self, stack: StackGeometry) -> int:
        """Samples of a stack on the device."""
        return self.sparsecores_per_device * stack.samples_per_sparsecore

    def with_features(self, of_stacks: Sequence[bool]) -> "Geometry":
        """The same, with activations and gradients of whole stacks but for those that are chosen."""
        each = zip(self.stacks, of_stacks, strict=True)
        stacks = (stack if chosen else dataclasses.replace(stack, features=()) for stack, chosen in each)
        return dataclasses.replace(self, stacks=tuple(stacks))

    def without_features(self) -> "Geometry":
        """The same, with activations and gradients of whole stacks."""
        return self.with_features([False] * len(self.stacks))

    def num_arrays(self) -> list[int]:
        """Of each stack the number of arrays of activations, and of gradients."""
        return [max(len(stack.features), 1) for stack in self.stacks]

    def offsets(self) -> np.ndarray:
        """int64[4 * stacks]: what the C++ `PackedBatch::Stack` holds."""
        fields = ((s.row_pointers_start, s.entries_start, s.capacity, s.samples_per_sparsecore) for s in self.stacks)
        return np.array(list(fields), np.int64).reshape(-1)


def inside_shard_map() -> bool:
    """Whether what is traced is one device's part of a computation, so that shapes are those of one device."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _check_inside(plan: Plan) -> None:
    """Raises a ValueError if the tables are spread over devices, and this is not one device's part."""
    if plan.num_devices != 1 and not inside_shard_map():
        raise ValueError(
            f"The specs were placed for {plan.num_devices} devices: each looks up and updates its part of the batch inside "
            "jax.shard_map. Use a layer with mesh=, call from inside jax.shard_map, or place the specs with "
            "global_device_count=1."
        )


def axis_of(plan: Plan, axis_name: Any = None) -> Any:
    """The name of the mesh axis (or a tuple of names) that the tables are sharded over, None where one device has them all.

    Args:
        plan: the placed specs.
        axis_name: what the user said, or None: then the only axis there is.

    Raises:
        ValueError: there is no such axis, or it has another size than the devices that the specs were placed for.
    """
    if plan.num_devices == 1:
        return None
    _check_inside(plan)
    mesh = jax.sharding.get_abstract_mesh()
    manual = mesh.manual_axes
    if axis_name is None:
        if len(manual) != 1:
            raise ValueError(
                f"The specs were placed for {plan.num_devices} devices and there are {len(manual)} manual mesh axes, {manual}: "
                "pass axis_name, the axis that tables are sharded over, or a tuple of axes in the order of its PartitionSpec."
            )
        axis_name = manual[0]
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if unknown := [name for name in names if name not in manual]:
        raise ValueError(
            f"axis_name is {axis_name!r}, but {unknown} are no manual axes of this jax.shard_map: {manual}."
        )
    size = math.prod(jax.lax.axis_size(name) for name in names)
    if size != plan.num_devices:
        raise ValueError(
            f"Axis {axis_name!r} has {size} devices, the specs were placed for {plan.num_devices}: place them with "
            f"global_device_count={size}, or use a mesh whose axis has {plan.num_devices} devices."
        )
    return axis_name


def _check_arrays(packed: PreprocessedInput) -> None:
    """Raises a ValueError unless the arrays of a packed batch have the shapes and dtypes that its layout says."""
    layout = packed.layout
    devices = 1 if inside_shard_map() else layout.num_local_devices
    entries = layout.entries_per_device
    for name, size, dtype in (
        ("row_pointers", layout.row_pointers_per_device, jnp.int32),
        ("embedding_ids", entries, jnp.int32),
        ("sample_ids", entries, jnp.int32),
        ("gains", entries, jnp.float32),
        ("num_minibatches", 1 if layout.max_minibatches > 1 else None, jnp.int32),
    ):
        array = getattr(packed, name)
        if size is None and array is None:
            continue
        shape, given = getattr(array, "shape", None), getattr(array, "dtype", None)
        if size is None or shape not in ((devices * size,), (devices, size)) or given != dtype:
            wanted = "None" if size is None else f"({devices * size},) and {jnp.dtype(dtype).name}"
            raise ValueError(
                f"The packed batch has {name} of shape {shape} and dtype {given}; its layout says {wanted}. Pass on what "
                "embax.preprocess returned as it is."
            )


def packed_operands(packed: PreprocessedInput) -> list[jax.Array | np.ndarray]:
    """The arrays of a batch on one device as the primitives take them: flat, the number of minibatches int32[1]."""
    num_minibatches = np.ones(1, np.int32) if packed.num_minibatches is None else packed.num_minibatches
    arrays = (packed.row_pointers, packed.embedding_ids, packed.sample_ids, packed.gains, num_minibatches)
    return [array if array.ndim == 1 else array.reshape(-1) for array in arrays]


def _check_layout(layout: PackedLayout, plan: Plan) -> None:
    """Raises a ValueError unless a batch of this layout was packed for `plan`."""
    topology = (plan.num_devices, plan.num_sparsecores_per_device)
    packed_topology = (layout.num_devices, layout.num_sparsecores_per_device)
    if topology != packed_topology:
        raise ValueError(
            f"The batch was packed for (devices, SparseCores a device) {packed_topology}, the specs were placed for "
            f"{topology}; pack it with these specs."
        )
    names, packed_names = [s.name for s in plan.stacks], [s.name for s in layout.stacks]
    if names != packed_names:
        raise ValueError(
            f"The batch was packed for the stacks {packed_names}, the specs have {names}; pack it with these specs."
        )
    for stack, packed in zip(plan.stacks, layout.stacks, strict=True):
        for what, wanted, given in (
            ("features", stack.features, packed.features),
            ("combiner", stack.spec.combiner, packed.combiner),
            ("rows", stack.spec.stack_vocab_size, packed.num_rows),
        ):
            if wanted != given:
                raise ValueError(
                    f"Stack {stack.name!r}: the batch was packed for other specs. Their {what}: {given}; those of these specs: "
                    f"{wanted}. Pack it with these specs."
                )
    # What is left to differ is a layout that was changed by hand.
    batch_sizes = {f.leaf: size for s in layout.stacks for f, size in zip(s.features, s.batch_sizes, strict=False)}
    limits = np.array(
        [(s.max_ids_per_partition, s.max_unique_ids_per_partition, s.capacity) for s in layout.stacks], np.int64
    )
    share = PARTITION_ALIGNMENT * plan.num_sparsecores_per_device
    sound = len(batch_sizes) == plan.num_features and all(0 <= size <= INT32_MAX for size in batch_sizes.values())
    sound = sound and all(0 <= s.capacity <= INT32_MAX and s.capacity % share == 0 for s in layout.stacks)
    sound = sound and layout.max_minibatches in (0, 1, MAX_MINIBATCHES)
    if sound:
        sizes = tuple(batch_sizes[leaf] for leaf in range(plan.num_features))
        sound = make_layout(plan, sizes, limits, layout.num_local_devices, layout.max_minibatches) == layout
    if not sound:
        raise ValueError(
            "The layout of the packed batch contradicts itself; pass on what embax.preprocess returned as it is."
        )


def _features(features: Sequence[FeaturePlan], batch_sizes: Sequence[int]) -> tuple[FeatureGeometry, ...]:
    rows = [feature.table.rows.row_offset_in_shard for feature in features]
    last_before = itertools.accumulate(rows[:-1], max, initial=-1)
    least_from_here = reversed([*itertools.accumulate(reversed(rows), min)])
    each = zip(features, batch_sizes, rows, last_before, least_from_here, strict=True)
    return tuple(
        FeatureGeometry(batch, feature.output_dim, row if row > last and row == least else None)
        for feature, batch, row, last, least in each
    )


def make_geometry(plan: Plan, packed: PreprocessedInput) -> Geometry:
    """The geometry of a batch that was packed for `plan`.

    Raises:
        ValueError: it was packed for other specs, or its arrays are not those that were packed.
    """
    if not isinstance(packed, PreprocessedInput):
        raise ValueError(f"The batch is a {type(packed).__name__}; it must be what embax.preprocess returned.")
    layout = packed.layout
    _check_layout(layout, plan)
    _check_arrays(packed)
    _check_inside(plan)
    return Geometry(
        stacks=tuple(
            StackGeometry(
                name=stack.name,
                row_pointers_start=stack.row_pointers_start,
                entries_start=stack.entries_start,
                capacity=stack.capacity,
                samples_per_sparsecore=stack.samples_per_sparsecore(layout.num_sparsecores_per_device),
                quantization=config.as_tuple() if (config := planned.spec.quantization_config) else None,
                width=planned.width,
                max_ids_per_partition=stack.max_ids_per_partition,
                max_unique_ids_per_partition=stack.max_unique_ids_per_partition,
                optimizer=planned.optimizer,
                features=_features(planned.features, stack.batch_sizes),
            )
            for planned, stack in zip(plan.stacks, layout.stacks, strict=True)
        ),
        num_sparsecores=plan.num_sparsecores,
        max_minibatches=layout.max_minibatches,
        num_devices=plan.num_devices,
    )


def update_geometry(plan: Plan, chosen: Sequence[int]) -> Geometry:
    """What updates of rows of the chosen stacks need to know, where there is no batch."""
    stacks = tuple(
        StackGeometry(
            name=stack.name,
            row_pointers_start=0,
            entries_start=0,
            capacity=0,
            samples_per_sparsecore=0,
            quantization=None,
            width=stack.width,
            max_ids_per_partition=0,
            max_unique_ids_per_partition=0,
            optimizer=stack.optimizer,
        )
        for stack in (plan.stacks[number] for number in chosen)
    )
    return Geometry(stacks, plan.num_sparsecores, 0, plan.num_devices)
