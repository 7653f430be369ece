"""What the primitives know statically about a packed batch and the tables it looks up."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from embax._checks import INT32_MAX
from embax._preprocess.buffers import (
    PARTITION_ALIGNMENT,
    PackedLayout,
    PreprocessedInput,
    make_layout,
    row_pointers_per_sparsecore,
)
from embax._stacking.plan import Plan


@dataclasses.dataclass(frozen=True)
class StackGeometry:
    """Where a stack lies in the packed arrays (see `StackLayout`), and how its rows are quantized."""

    name: str
    row_pointers_start: int
    entries_start: int
    capacity: int
    samples_per_sparsecore: int
    quantization: tuple[float, float, int] | None


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The stacks of a packed batch on one device, whose `num_sparsecores` SparseCores hold all rows."""

    stacks: tuple[StackGeometry, ...]
    num_sparsecores: int

    @property
    def row_pointers_per_sparsecore(self) -> int:
        """Row pointers of one SparseCore in one stack."""
        return row_pointers_per_sparsecore(self.num_sparsecores)

    def num_samples(self, stack: StackGeometry) -> int:
        """Samples of a stack on the device."""
        return self.num_sparsecores * stack.samples_per_sparsecore

    def offsets(self) -> np.ndarray:
        """int64[4 * stacks]: what the C++ `PackedBatch::Stack` holds."""
        fields = ((s.row_pointers_start, s.entries_start, s.capacity, s.samples_per_sparsecore) for s in self.stacks)
        return np.array(list(fields), np.int64).reshape(-1)


def _check_arrays(packed: PreprocessedInput) -> None:
    """Raises a ValueError unless the arrays of a packed batch have the shapes and dtypes that its layout says."""
    layout = packed.layout
    entries = layout.num_local_devices * layout.entries_per_device
    for name, size, dtype in (
        ("row_pointers", layout.num_local_devices * layout.row_pointers_per_device, jnp.int32),
        ("embedding_ids", entries, jnp.int32),
        ("sample_ids", entries, jnp.int32),
        ("gains", entries, jnp.float32),
    ):
        array = getattr(packed, name)
        shape, given = getattr(array, "shape", None), getattr(array, "dtype", None)
        if shape != (size,) or given != dtype:
            raise ValueError(
                f"The packed batch has {name} of shape {shape} and dtype {given}; its layout says ({size},) and "
                f"{jnp.dtype(dtype).name}. Pass on what embax.preprocess returned as it is."
            )


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
    capacities = tuple(stack.capacity for stack in layout.stacks)
    share = PARTITION_ALIGNMENT * plan.num_sparsecores_per_device
    sound = len(batch_sizes) == plan.num_features and all(0 <= size <= INT32_MAX for size in batch_sizes.values())
    sound = sound and all(0 <= capacity <= INT32_MAX and capacity % share == 0 for capacity in capacities)
    if sound:
        sizes = tuple(batch_sizes[leaf] for leaf in range(plan.num_features))
        sound = make_layout(plan, sizes, capacities, layout.num_local_devices) == layout
    if not sound:
        raise ValueError(
            "The layout of the packed batch contradicts itself; pass on what embax.preprocess returned as it is."
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
    if plan.num_devices != 1:
        raise ValueError(
            f"The specs were placed for {plan.num_devices} devices; lookups and updates run on one device. Place them "
            "with global_device_count=1."
        )
    return Geometry(
        stacks=tuple(
            StackGeometry(
                name=stack.name,
                row_pointers_start=stack.row_pointers_start,
                entries_start=stack.entries_start,
                capacity=stack.capacity,
                samples_per_sparsecore=stack.samples_per_sparsecore(layout.num_sparsecores_per_device),
                quantization=config.as_tuple() if (config := planned.spec.quantization_config) else None,
            )
            for planned, stack in zip(plan.stacks, layout.stacks, strict=True)
        ),
        num_sparsecores=plan.num_sparsecores,
    )
