"""The packed format, defined by plain NumPy. Slow; what packs for real is compared with it, bit for bit."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embax._preprocess.buffers import PADDING_VALUE, PARTITION_ALIGNMENT, PreprocessedInput, make_layout
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax._stacking.plan import FeaturePlan, Plan, StackPlan

Rows = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]]


def row_gains(combiner: str, given: Sequence[float]) -> list[np.float32]:
    """The gains of the ids of one sample: their weights, divided as the combiner says.

    The sums run over the sample in float32, one weight after another, where squares are not rounded before they are added;
    a sample whose sum is 0 has gains of 0.
    """
    weights = [np.float32(weight) for weight in given]
    if combiner == "sum":
        return weights
    total = np.float32(0)
    for weight in weights:
        square = np.float64(weight) * np.float64(weight)  # Exact.
        total = total + weight if combiner == "mean" else np.float32(square + np.float64(total))
    divisor = total if combiner == "mean" else np.sqrt(total)
    assert np.isfinite(divisor)
    assert divisor != 0 or combiner == "mean" or not any(weights)
    return [weight / divisor if divisor != 0 else np.float32(0) for weight in weights]


def place_id(feature: FeaturePlan, stack: StackPlan, num_sparsecores: int, id_: int) -> tuple[int, int]:
    """The SparseCore that owns an id of `feature`, and its row there."""
    remainder = id_ % num_sparsecores
    column = (remainder + feature.col_shift) % num_sparsecores + (id_ - remainder) + feature.col_offset
    assert 0 <= column < stack.spec.stack_vocab_size
    return column % num_sparsecores, column // num_sparsecores


class Entry(NamedTuple):
    """What a SparseCore looks up: the sum of the gains of equal ids of a sample."""

    partition: int
    row: int
    sample: int
    gain: np.float32
    feature: FeaturePlan
    multiplicity: int


def sparsecore_entries(
    plan: Plan, stack: StackPlan, rows: Sequence[Rows], weights: Sequence[Weights | None], part: int, num_parts: int
) -> list[Entry]:
    """What local SparseCore `part` of `num_parts` looks up, sorted by partition, row and sample."""
    S = plan.num_sparsecores_per_device
    entries: dict[tuple[int, int, int], Entry] = {}
    first_sample = 0
    for feature in stack.features:
        samples = rows[feature.leaf]
        device, sparsecore = divmod(part, S)
        batch = len(samples) * S // num_parts
        share = -(-batch // S)  # Off TPU the last SparseCores may get fewer samples, or none.
        for sample in range(sparsecore * share, min((sparsecore + 1) * share, batch)):
            number = device * batch + sample
            given = weights[feature.leaf]
            row_weights = [1.0] * len(samples[number]) if given is None else given[number]
            valid = [(id_, weight) for id_, weight in zip(samples[number], row_weights, strict=True) if id_ != -1]
            gains = row_gains(stack.spec.combiner, [weight for _, weight in valid])
            for (id_, _), gain in zip(valid, gains, strict=True):
                place = place_id(feature, stack, plan.num_sparsecores, id_)
                key = (*place, first_sample + sample - sparsecore * share)
                known = entries.get(key)
                entries[key] = Entry(
                    *key, known.gain + gain if known else gain, feature, known.multiplicity + 1 if known else 1
                )
        first_sample += share
    return [entries[key] for key in sorted(entries)]


def within_limits(entries: list[Entry], max_ids: int, max_unique_ids: int) -> list[Entry]:
    """The entries of a partition that limits let through: the first ones."""
    rows = sorted({entry.row for entry in entries})[:max_unique_ids]
    return [entry for entry in entries[:max_ids] if entry.row in rows]


def pack_reference(
    plan: Plan,
    rows: Sequence[Rows],
    weights: Sequence[Weights | None],
    limits: np.ndarray,
    num_local_devices: int = 1,
    drop: bool = False,
) -> tuple[PreprocessedInput, np.ndarray]:
    """Packs `rows[leaf][sample]`, lists of ids in which -1 is padding. What is beyond the limits is dropped if `drop`.

    Returns:
        The packed batch, and bool[L * layout.entries_per_device]: which entries packing writes. The others hold
        padding.
    """
    L, S, N = num_local_devices, plan.num_sparsecores_per_device, plan.num_sparsecores
    layout = make_layout(plan, tuple(len(samples) // L for samples in rows), limits, L)
    pointers = np.zeros((L, layout.row_pointers_per_device), np.int32)
    ids = np.full((L, layout.entries_per_device), PADDING_VALUE, np.int32)
    samples = np.full_like(ids, PADDING_VALUE)
    gains = np.full(ids.shape, np.nan, np.float32)
    written = np.zeros(ids.shape, bool)
    max_ids = np.zeros((len(plan.stacks), L, N), np.int32)
    max_unique = np.zeros_like(max_ids)
    required = np.zeros((len(plan.stacks), L, S), np.int32)
    dropped = {table.name: 0 for stack in plan.stacks for table in stack.tables}
    dropped_of_stacks = {stack.name: 0 for stack in plan.stacks}
    for k, (stack, place) in enumerate(zip(plan.stacks, layout.stacks, strict=True)):
        for part in range(L * S):
            device, sparsecore = divmod(part, S)
            entries = sparsecore_entries(plan, stack, rows, weights, part, L * S)
            first = place.entries_start + sparsecore * (place.capacity // S)
            pointer = place.row_pointers_start + sparsecore * max(N, 8)
            end = 0
            for partition in range(N):
                mine = [entry for entry in entries if entry.partition == partition]
                max_ids[k, device, partition] = max(max_ids[k, device, partition], len(mine))
                distinct = len({entry.row for entry in mine})
                max_unique[k, device, partition] = max(max_unique[k, device, partition], distinct)
                required[k, device, sparsecore] += -(-len(mine) // PARTITION_ALIGNMENT) * PARTITION_ALIGNMENT
                kept = within_limits(mine, *limits[k, :2].tolist())[: place.capacity // S - end] if drop else mine
                for entry in mine[len(kept) :]:
                    dropped[entry.feature.table.name] += entry.multiplicity
                    dropped_of_stacks[stack.name] += entry.multiplicity
                for offset, entry in enumerate(kept, start=first + end):
                    ids[device, offset], samples[device, offset], gains[device, offset] = entry[1:4]
                pointers[device, pointer + partition] = end + len(kept)
                end += -(-len(kept) // PARTITION_ALIGNMENT) * PARTITION_ALIGNMENT
            pointers[device, pointer + N : pointer + max(N, 8)] = end
            written[device, first : first + end] = True
            assert end <= place.capacity // S
    names = [stack.name for stack in plan.stacks]
    by_stack = [dict(zip(names, a.reshape(len(names), -1), strict=True)) for a in (max_ids, max_unique, required)]
    stats = SparseDenseMatmulInputStats(by_stack[0], by_stack[1], by_stack[2])
    if drop:
        stats.id_drop_counters.update(dropped_of_stacks)
        stats.dropped_ids.update(dropped)
    packed = PreprocessedInput(
        pointers.reshape(-1), ids.reshape(-1), samples.reshape(-1), gains.reshape(-1), layout, stats=stats
    )
    return packed, written.reshape(-1)
