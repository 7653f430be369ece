"""Feedback into placed specs: limits as the statistics of earlier batches ask for."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from embax._checks import INT32_MAX
from embax._specs import StackedTableSpec
from embax._stacking.plan import feature_leaves, make_plan

_LIMITS = {
    "max_ids_per_partition": "max_ids_per_partition",
    "max_unique_ids_per_partition": "max_unique_ids_per_partition",
    "required_buffer_size_per_sc": "suggested_coo_buffer_size_per_device",
}
"""Fields of the statistics, and of the stacked spec that follows from each."""


def _limit(stack: str, field: str, values: Any, factor: int) -> int:
    """The largest of some counts, times `factor`; a batch without ids leaves a limit of 1, the smallest there is."""
    try:
        array = np.asarray(values)
    except ValueError:  # Lists of different lengths.
        array = np.empty(0)
    good = array.size > 0 and array.dtype.kind in "iuf" and bool(np.isfinite(array).all() and array.min() >= 0)
    if good and array.dtype.kind == "f":
        # A size that was set for a device need not divide by its SparseCores.
        array = array.astype(np.float64) * factor
        good, factor = bool((array % 1 == 0).all()), 1
    largest = int(array.max()) * factor if good else None
    if largest is None or largest > INT32_MAX:
        raise ValueError(
            f"update_preprocessing_parameters: {field} of stack {stack!r} is {values!r}; it must be an integer from 0 to "
            f"{INT32_MAX // factor}, or an array of some."
        )
    return max(largest, factor)


def update_preprocessing_parameters(
    feature_specs: Any, updated_params: Any, num_sc_per_device: int | None = None
) -> Any:
    """Sets the limits of placed stacks to what statistics say: those of a packed batch, or of many through `embax.fdo`.

    Of each stack that the statistics name, `max_ids_per_partition` and `max_unique_ids_per_partition` become the largest of
    the given counts, and `suggested_coo_buffer_size_per_device` the largest need of a SparseCore times the SparseCores of
    a device. Whatever the statistics do not name stays. Compiled steps compile again when a limit has changed; packers and
    layers made before keep the limits that they were made with. Where several processes train together, all must update
    from the same statistics. Either all stacks are updated or, with an error, none.

    Args:
        feature_specs: pytree of placed `FeatureSpec`, with all tables of its stacks; changed in place. The limits in the
            `TableSpec` themselves, which placement started from, stay.
        updated_params: `SparseDenseMatmulInputStats`; its values are integers, or integer arrays of any rank.
        num_sc_per_device: None means the SparseCores of the placement; another number is an error.

    Returns:
        `feature_specs` itself.

    Raises:
        ValueError: the specs are not placed, or for another number of SparseCores; a stack is unknown; a value is negative,
            not an integer or above the range of int32.

    Example:
        >>> packed = embax.preprocess(ids, specs=features, limits="grow")  # doctest: +SKIP
        >>> embax.update_preprocessing_parameters(features, packed.stats)  # doctest: +SKIP
        >>> embax.preprocess(ids, specs=features, limits="raise")  # doctest: +SKIP
    """
    plan = make_plan(feature_specs)
    if num_sc_per_device not in (None, plan.num_sparsecores_per_device):
        raise ValueError(
            f"update_preprocessing_parameters: num_sc_per_device is {num_sc_per_device!r}, but the tables are placed for "
            f"{plan.num_sparsecores_per_device} SparseCores a device; leave it out, or place new specs."
        )
    specs = {stack.name: stack.spec for stack in plan.stacks}
    changes = changed_limits(updated_params, specs, plan.num_sparsecores_per_device)
    _replace(feature_specs, {stack: specs[stack].replace(**fields) for stack, fields in changes.items()})
    return feature_specs


def changed_limits(
    updated_params: Any, stacks: Mapping[str, Any], num_sparsecores_per_device: int
) -> dict[str, dict[str, int]]:
    """The fields of stacked specs that follow from statistics, by stack.

    Args:
        updated_params: see `update_preprocessing_parameters`.
        stacks: its keys are the stacks that may be named.
        num_sparsecores_per_device: SparseCores of a device.

    Raises:
        ValueError: see `update_preprocessing_parameters`.
    """
    changes: dict[str, dict[str, int]] = {}
    for field, limit in _LIMITS.items():
        given = getattr(updated_params, field, None)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"update_preprocessing_parameters: updated_params is a {type(updated_params).__name__} without a mapping "
                f"{field}; it must be SparseDenseMatmulInputStats, such as the stats of a batch that embax.preprocess has just "
                "packed, or what an FDO client loads."
            )
        factor = num_sparsecores_per_device if limit == "suggested_coo_buffer_size_per_device" else 1
        for stack, values in given.items():
            if stack not in stacks:
                raise ValueError(
                    f"update_preprocessing_parameters: {field} names the stack {stack!r}; the stacks of the feature specs are "
                    f"{sorted(stacks)}. Take statistics of these specs."
                )
            changes.setdefault(stack, {})[limit] = _limit(stack, field, values, factor)
    return changes


def _replace(feature_specs: Any, stacks: dict[str, StackedTableSpec]) -> None:
    """Gives every table of the tree the new version of its stack; one object for all of them."""
    for feature in feature_leaves(feature_specs):
        table = feature.table_spec
        old = table.stacked_table_spec
        new = stacks.get(old.stack_name, old)
        if new != old:  # Packers are kept by the identity of the specs.
            table._stacked_table_spec = new
