"""How large the packed arrays of a device are, from the limits alone: for whoever allocates or plans ahead of packing."""

from typing import Any

from embax._checks import positive_int
from embax._preprocess.buffers import MAX_MINIBATCHES, row_pointers_per_device, suggested_capacity, theoretical_capacity
from embax._stacking.plan import make_plan
from embax._topology import num_sparsecores_per_device


def _topology(owner: str, global_device_count: int, num_sc_per_device: int | None) -> tuple[int, int]:
    """SparseCores of a device, and of all devices."""
    devices = positive_int(owner, "global_device_count", global_device_count)
    given = num_sparsecores_per_device() if num_sc_per_device is None else num_sc_per_device
    sparsecores = positive_int(owner, "num_sc_per_device", given)
    return sparsecores, devices * sparsecores


def compute_row_pointers_size_per_device(
    global_device_count: int, num_sc_per_device: int | None = None, enable_minibatching: bool = False
) -> int:
    """Row pointers of a stack on a device: `S * max(N, 8)`, with minibatching 64 times as many.

    Args:
        global_device_count: devices that the tables are sharded over.
        num_sc_per_device: SparseCores of each, `S`; None means those of the first device. `N` is that of all devices.
        enable_minibatching: whether batches may be cut into minibatches.

    Raises:
        ValueError: a count is not a positive integer.
    """
    sparsecores, total = _topology("compute_row_pointers_size_per_device", global_device_count, num_sc_per_device)
    return row_pointers_per_device(sparsecores, total, MAX_MINIBATCHES if enable_minibatching else 0)


def compute_theoretical_max_coo_buffer_size(
    max_ids_per_partition: int,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
) -> int:
    """Entries of a stack on a device that hold any batch within `max_ids_per_partition`.

    That is the limit rounded up to a multiple of 8, times `S * N`; with minibatching 64 times as many.

    Args:
        max_ids_per_partition: ids that one SparseCore may send to another.
        global_device_count: devices that the tables are sharded over.
        num_sc_per_device: SparseCores of each, `S`; None means those of the first device. `N` is that of all devices.
        enable_minibatching: whether batches may be cut into minibatches.

    Raises:
        ValueError: the limit or a count is not a positive integer.
    """
    owner = "compute_theoretical_max_coo_buffer_size"
    limit = positive_int(owner, "max_ids_per_partition", max_ids_per_partition)
    sparsecores, total = _topology(owner, global_device_count, num_sc_per_device)
    return theoretical_capacity(limit, sparsecores, total, enable_minibatching)


def compute_coo_buffer_size_per_device(
    feature_specs: Any,
    global_device_count: int | None = None,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
) -> dict[str, int]:
    """Entries of each stack on a device, as the limits of the placed specs ask for.

    That is `suggested_coo_buffer_size_per_device` rounded up to a multiple of `8 * S` where a stack has one, minibatching
    or not, else what `compute_theoretical_max_coo_buffer_size` says.

    Args:
        feature_specs: the placed feature tree.
        global_device_count: None means the devices of the placement; another number is an error.
        num_sc_per_device: None means the SparseCores of the placement; another number is an error.
        enable_minibatching: whether batches may be cut into minibatches.

    Returns:
        The entries by name of the stack.

    Raises:
        ValueError: the specs are not placed, or for other devices.

    Example:
        >>> embax.compute_coo_buffer_size_per_device(features)  # doctest: +SKIP
        {'movie': 16384}
    """
    plan = make_plan(feature_specs)
    placed = (plan.num_devices, plan.num_sparsecores_per_device)
    asked = tuple(
        own if count is None else count
        for own, count in zip(placed, (global_device_count, num_sc_per_device), strict=True)
    )
    if asked != placed:
        raise ValueError(
            f"compute_coo_buffer_size_per_device: the tables are placed for (devices, SparseCores a device) {placed} and asked "
            f"for on {asked}; leave the counts out, or place new specs for them."
        )

    return {
        stack.name: suggested_capacity(stack, placed[1], plan.num_sparsecores, enable_minibatching)
        for stack in plan.stacks
    }
