"""Messages for what packing finds wrong with ids, weights and row splits."""

from typing import NamedTuple

from embax._checks import INT32_MAX
from embax._preprocess.inputs import FlatFeature
from embax._stacking.plan import FeaturePlan, Plan

ID, WEIGHT, GAIN, FIRST_SPLIT, SPLIT, LAST_SPLIT, TOO_MANY_IDS, REQUEST, CHANGED, MERGED_GAIN = range(1, 11)


class Fault(NamedTuple):
    """The first fault of a batch, as the native code reports it (`PackFault` in csrc/core/pack.h)."""

    kind: int
    leaf: int
    sample: int
    position: int
    value: int
    number: float


def fault_error(plan: Plan, leaves: list[FlatFeature], fault: Fault) -> Exception:
    """The exception to raise for `fault`: a ValueError, unless the fault is embax's own."""
    if fault.kind == REQUEST:
        return RuntimeError(f"embax: the placement of the features contradicts itself (check {fault.value}).")
    if fault.kind == CHANGED:
        return ValueError(
            "The ids, weights or row_splits changed while they were packed; do not write to them meanwhile."
        )
    feature, combiner = next(
        (feature, stack.spec.combiner)
        for stack in plan.stacks
        for feature in stack.features
        if feature.leaf == fault.leaf
    )
    if fault.kind == TOO_MANY_IDS:
        return ValueError(f"Feature {feature.name!r}: {_too_many_text(plan.num_sparsecores, fault.value)}")
    return ValueError(f"Feature {feature.name!r}{_text(feature, combiner, leaves[fault.leaf], fault)}")


def _text(feature: FeaturePlan, combiner: str, flat: FlatFeature, fault: Fault) -> str:
    if fault.kind == ID:
        return _id_text(feature, flat, fault)
    if fault.kind == WEIGHT:
        return (
            f", sample {fault.sample}, position {_position(flat, fault)}: the weight is {fault.number}; weights must be finite "
            "float32 numbers. Use 0 for an id that should not count."
        )
    if fault.kind == GAIN:
        return (
            f", sample {fault.sample}: combiner {combiner!r} divides its weights by {fault.number:.9g}, and the divisor or "
            "the result is beyond the range of float32. Scale the weights, or use combiner 'sum'."
        )
    if fault.kind == MERGED_GAIN:
        return (
            f", sample {fault.sample}, position {_position(flat, fault)}: the gains of id {fault.value}, which the sample names "
            f"several times, add up to {fault.number}. Scale the weights."
        )
    if fault.kind == FIRST_SPLIT:
        return f": row_splits starts at {fault.value}; it must start at 0."
    if fault.kind == SPLIT:
        assert flat.row_splits is not None
        return (
            f", sample {fault.sample}: row_splits decreases from {flat.row_splits[fault.sample]} to {fault.value}; it "
            "must never decrease."
        )
    return f": row_splits ends at {fault.value}, but there are {flat.ids.size} values; it must end at their number."


def _too_many_text(num_sparsecores: int, ids: int) -> str:
    # Of the int32 of a row pointer each minibatch (64) of each partition may take 8 entries of padding.
    most = max(INT32_MAX - 64 * 8 * num_sparsecores, 0)
    if ids < INT32_MAX // 2:
        remedy = "Place the tables on fewer devices or SparseCores"
    else:
        remedy = "Split the batch, or use more SparseCores"
    return (
        f"one SparseCore gets {ids} ids of its stack; with {num_sparsecores} SparseCores in all, int32 row pointers count at "
        f"most {most}. {remedy}."
    )


def _entry(flat: FlatFeature, fault: Fault) -> int:
    """The number of the faulty id among all ids of the feature."""
    row = fault.sample * flat.ids.shape[1] if flat.row_splits is None else int(flat.row_splits[fault.sample])
    return row + fault.position


def _position(flat: FlatFeature, fault: Fault) -> int:
    """Where in its sample the faulty id is, by what the user gave."""
    return fault.position if flat.coo is None else flat.coo.position(_entry(flat, fault))


def _id_text(feature: FeaturePlan, flat: FlatFeature, fault: Fault) -> str:
    value = fault.value if flat.given_ids is None else int(flat.given_ids[_entry(flat, fault)])
    padding = "only in dense 2-d ids is -1 padding, ragged ids leave out what is not there."
    if flat.coo is not None:
        padding = "only in dense 2-d ids is -1 padding, sparse ids leave out what is not there."
    elif flat.row_splits is None:
        padding = "in dense ids -1 is padding."
    rows = feature.table.vocabulary_size
    return (
        f", sample {fault.sample}, position {_position(flat, fault)}: id {value} is outside the vocabulary of table "
        f"{feature.table.name!r}, which has {rows} rows (ids 0 to {rows - 1}). Remove it, map it (for example id % "
        f"vocabulary_size), or give the table more rows; {padding}"
    )
