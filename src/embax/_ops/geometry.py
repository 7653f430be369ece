"""What the primitives know statically about a packed batch and the tables it looks up."""

import dataclasses

import numpy as np

from embax._preprocess.buffers import PackedLayout, row_pointers_per_sparsecore
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


def make_geometry(plan: Plan, layout: PackedLayout) -> Geometry:
    """The geometry of a batch that was packed for `plan`.

    Raises:
        ValueError: the batch was packed for other stacks or another topology.
    """
    expected = [(stack.name, len(stack.features)) for stack in plan.stacks]
    packed = [(stack.name, len(stack.batch_sizes)) for stack in layout.stacks]
    topology = (plan.num_devices, plan.num_sparsecores_per_device)
    packed_topology = (layout.num_devices, layout.num_sparsecores_per_device)
    if expected != packed or topology != packed_topology:
        raise ValueError(
            f"The batch was packed for (stack, features) {packed} on (devices, SparseCores a device) {packed_topology}, "
            f"the specs describe {expected} on {topology}; pack it with these specs."
        )
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
