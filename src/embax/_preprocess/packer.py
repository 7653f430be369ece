"""What packs batch after batch of one placement of the specs."""

import contextlib
import itertools
import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from embax import _native
from embax._checks import INT32_MAX, boolean, positive_int
from embax._ops.pack import pack_traced
from embax._preprocess.all_reduce import AllReduceInterface
from embax._preprocess.buffers import (
    MAX_MINIBATCHES,
    PackedLayout,
    PreprocessedInput,
    array_shapes,
    empty_arrays,
    make_layout,
)
from embax._preprocess.faults import Fault, fault_error
from embax._preprocess.inputs import FlatFeature, flatten_like, read_feature
from embax._preprocess.limits import Counts, DroppingLimits, FixedLimits, GrowingLimits, Limits
from embax._preprocess.minibatch import Agreement
from embax._preprocess.stats import SparseDenseMatmulInputStats
from embax._preprocess.traced import is_traced
from embax._specs import COMBINERS
from embax._stacking.plan import Plan, make_plan, sample_count

_LIMITS = {"raise": FixedLimits, "grow": GrowingLimits, "drop": DroppingLimits}
_VALIDATIONS = {"raise": 0, "drop": 1, "trust": 2}
"""The numbers are those of `Validation` in csrc/core/pack.h."""

_MAX_KEPT = 32
"""Layouts that a packer keeps for the next batch."""

_MAX_LIKEWISE = 4
"""Of so many sizes dense batches are packed in the short way."""


def num_threads() -> int:
    """Threads that pack: `EMBAX_NUM_THREADS`, else as many as this process may run on.

    Raises:
        ValueError: the variable is not a positive integer.
    """
    value = os.environ.get("EMBAX_NUM_THREADS", "")
    if not value:
        return _native.available_processors()
    if not (value.isascii() and value.isdigit() and len(value) <= 4 and 1 <= int(value) <= 1024):
        raise ValueError(f"EMBAX_NUM_THREADS is {value!r}; it must be an integer from 1 to 1024, or unset.")
    return int(value)


def _check_choice(name: str, value: Any, allowed: Mapping[str, Any]) -> None:
    if not (isinstance(value, str) and value in allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def _default_local_devices(plan: Plan) -> int:
    # Asking for the number of processes starts JAX's backends, so ask only where there can be several.
    processes = jax.process_count() if jax.distributed.is_initialized() else 1
    if plan.num_devices % processes:
        raise ValueError(
            f"The tables are placed on {plan.num_devices} devices, which {processes} processes cannot share equally; "
            "pass num_local_devices."
        )
    return plan.num_devices // processes


def _checked_batch_number(batch_number: Any) -> int:
    # Each has four keys of an all-reduce, which are below 2**63.
    with contextlib.suppress(TypeError):
        number = operator.index(batch_number)
        if not isinstance(batch_number, bool) and 0 <= number < 2**60:
            return number
    raise ValueError(f"batch_number is {batch_number!r}; it must be an integer from 0 to 2**60 - 1, or None.")


class _Target(NamedTuple):
    """Where a batch is written."""

    batch_sizes: tuple[int, ...]
    """Samples of each feature on a device."""
    limits: np.ndarray
    """int64[stacks, 3]."""
    layout: PackedLayout
    placements: np.ndarray
    """int64[stacks, 3]: where the native code finds each stack."""
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None
    """Row pointers, ids, sample ids and gains, if there are any yet."""


class Packer:
    """Packs batch after batch for one placement of the specs. Safe to call from several threads.

    Args:
        specs: the placed feature tree; a snapshot is taken, so later changes of the specs do not count.
        limits: "grow", "raise" or "drop", see `embax.preprocess`.
        validation: "raise", "drop" or "trust", see `embax.preprocess`.
        num_local_devices: devices that this process packs for, whose samples it gets; None means the devices of the
            placement, divided by the number of processes.
        has_leading_dimension: whether the arrays get a leading dimension of the local devices.
        enable_minibatching: whether a batch beyond the limits of partitions is divided into minibatches.
        all_reduce: how the hosts agree on minibatches; None where this process packs for all devices.

    Raises:
        ValueError: the specs are not placed; an argument is unknown; limits were to grow while there are other processes
            (which would have to grow alike, or else hang in different programs); or there are other processes, and
            minibatches were asked for without `all_reduce`.
    """

    def __init__(
        self,
        specs: Any,
        *,
        limits: str = "grow",
        validation: str = "raise",
        num_local_devices: int | None = None,
        has_leading_dimension: bool = False,
        enable_minibatching: bool = False,
        all_reduce: AllReduceInterface | None = None,
    ):
        _check_choice("limits", limits, _LIMITS)
        _check_choice("validation", validation, _VALIDATIONS)
        plan = make_plan(specs)
        self.plan = plan
        self.limits = limits
        self.validation = validation
        self.has_leading_dimension = boolean("Packer", "has_leading_dimension", has_leading_dimension)
        self.enable_minibatching = boolean("Packer", "enable_minibatching", enable_minibatching)
        if num_local_devices is None:
            num_local_devices = _default_local_devices(plan)
        self.num_local_devices = positive_int(
            "Packer", "num_local_devices", num_local_devices, maximum=plan.num_devices
        )
        if self.num_local_devices < plan.num_devices:
            where = f"with {self.num_local_devices} of {plan.num_devices} devices in this process"
            if limits == "grow":
                raise ValueError(
                    f'limits="grow" {where}: processes whose buffers grow on their own compile different programs and hang. '
                    'Use limits="raise".'
                )
            if enable_minibatching and all_reduce is None:
                raise ValueError(
                    f"enable_minibatching {where}: all processes must agree on the minibatches. Pass all_reduce, such as "
                    "embax.DistributedAllReduce()."
                )
        if all_reduce is not None and not isinstance(all_reduce, AllReduceInterface):
            raise ValueError(
                f"all_reduce is a {type(all_reduce).__name__}; it must be an embax.AllReduceInterface, such as "
                "embax.DistributedAllReduce(), or a member of an embax.ThreadAllReduce."
            )
        if all_reduce is not None and not enable_minibatching:
            raise ValueError("all_reduce is for minibatches: pass enable_minibatching=True with it, or leave it out.")
        self._all_reduce = all_reduce
        self._limits: Limits = _LIMITS[limits](plan, self.enable_minibatching)
        leaves, self._treedef = jax.tree.flatten(specs)
        self._spec_batches = tuple(map(sample_count, leaves))
        self._skeleton = self._treedef.unflatten([leaf.name for leaf in leaves])
        self._features = sorted((f for stack in plan.stacks for f in stack.features), key=lambda feature: feature.leaf)
        self._request = (
            np.array([(f.table.vocabulary_size, f.col_offset, f.col_shift) for f in self._features]),
            np.array(
                [(COMBINERS.index(s.spec.combiner), s.spec.stack_vocab_size, len(s.features)) for s in plan.stacks]
            ),
            np.array([feature.leaf for stack in plan.stacks for feature in stack.features]),
            self.num_local_devices,
            plan.num_sparsecores_per_device,
            plan.num_sparsecores,
            _VALIDATIONS[validation],
        )
        """What native code is told of every batch: features, stacks, the features of the stacks, and so on."""
        self._names = [stack.name for stack in plan.stacks]
        self._targets: dict[Any, _Target] = {}
        self._likewise: tuple[tuple[_Target, _native.DensePacker], ...] = ()
        """Where dense batches were written, the latest first, and what packs others like them."""

    def __getstate__(self) -> dict[str, Any]:
        # What packs in the short way does not go to other processes.
        self._note_needs()
        return self.__dict__ | {"_likewise": ()}

    def __call__(self, ids: Any, weights: Any = None, *, batch_number: int | None = None) -> PreprocessedInput:
        """Packs one batch, also inside jit; arguments, result and errors are those of `embax.preprocess`."""
        try:
            return self._pack(ids, weights, batch_number)
        except MemoryError as error:
            plan = self.plan
            entries = self._limits.current[:, 2].sum() * self.num_local_devices
            raise MemoryError(
                f"Packing needs more memory than there is: beside the ids, for {len(plan.stacks)} stacks of "
                f"{plan.num_sparsecores_per_device} SparseCores a device and {plan.num_sparsecores} in all, and buffers of "
                f"{entries} entries by the limits so far. Use fewer SparseCores a device, smaller batches, or lower "
                "limits in the specs."
            ) from error

    def _pack(self, ids: Any, weights: Any, batch_number: int | None) -> PreprocessedInput:
        if weights is None and batch_number is None and (packed := self._pack_likewise(ids)) is not None:
            return packed
        if batch_number is not None:
            batch_number = _checked_batch_number(batch_number)
        try:
            threads = num_threads()
            leaves = self._leaves(ids, weights)
        except Exception:
            if self.enable_minibatching:
                Agreement(self._all_reduce, batch_number).fail()
            raise
        if any(map(is_traced, itertools.chain(*leaves))):
            return pack_traced(self.plan, self._features, *leaves)
        if not self.enable_minibatching:
            self._note_needs()
            batch, target = self._sort(*leaves, threads)
            counts = Counts.of(batch, len(self._names), minibatched=False)
            if problem := self._limits.problem(counts):
                raise problem
            target = self._fitting(target, self._limits.fit(counts))
            packed = self._finish(batch, target, counts, None, threads)
            if weights is None and all(type(leaf) is np.ndarray and leaf.ndim == 2 for leaf in leaves[0]):
                self._expect_likewise(target)
            return packed
        agreement = Agreement(self._all_reduce, batch_number)
        try:
            batch, target = self._sort(*leaves, threads)
        except Exception:
            agreement.fail()
            raise
        counts = Counts.of(batch, len(self._names), minibatched=True)
        number, limits = agreement.settle(batch, counts, self._limits, threads)
        return self._finish(batch, self._fitting(target, limits), counts, number, threads)

    def _expect_likewise(self, target: "_Target") -> None:
        """Expects more dense batches of the sizes and within the limits of a target, to be packed in the short way."""
        layout = target.layout
        plain = not self.has_leading_dimension and "drop" not in (self.limits, self.validation)
        if not plain or any(known.layout is layout for known, _ in self._likewise):
            return
        packer = _native.DensePacker(
            *self._request,
            np.array(target.batch_sizes),
            target.placements,
            target.limits,
            self.num_local_devices * layout.row_pointers_per_device,
            self.num_local_devices * layout.entries_per_device,
        )
        self._note_needs()
        current = [known for known in self._likewise if known[0].limits is target.limits]
        self._likewise = ((target, packer), *current[: _MAX_LIKEWISE - 1])

    def _note_needs(self) -> None:
        for _, packer in self._likewise:
            self._limits.note(packer.needs.reshape(-1, 3))

    def _pack_likewise(self, ids: Any) -> PreprocessedInput | None:
        """Packs dense ids without weights if they are like a batch before. None says that this cannot be done, or not so."""
        likewise = self._likewise
        if not likewise or likewise[0][0].limits is not self._limits.current:
            return None
        leaves, threads = flatten_like(self._skeleton, self._treedef, ids, "ids"), num_threads()
        for target, packer in likewise:
            if (packed := packer.pack(leaves, threads)) is not None:
                row_pointers, embedding_ids, sample_ids, gains, counts = packed
                stats = SparseDenseMatmulInputStats.of_counts(self._names, counts)
                return PreprocessedInput(row_pointers, embedding_ids, sample_ids, gains, target.layout, stats=stats)
        return None

    def eval_shape(self) -> PreprocessedInput:
        """What `embax.eval_preprocess_shape` returns."""
        devices = self.plan.num_devices
        for feature, batch in zip(self._features, self._spec_batches, strict=True):
            if batch % devices:
                raise ValueError(
                    f"Feature {feature.name!r} has a batch of {batch} by its output_shape, which does not divide by the "
                    f"{devices} devices that its table is placed on; make it {-(-batch // devices) * devices}."
                )
        batch_sizes = tuple([batch // devices for batch in self._spec_batches])
        layout = self._target(batch_sizes, self._limits.current).layout
        shapes = [jax.ShapeDtypeStruct(*described) for described in array_shapes(layout)]
        if self.enable_minibatching:
            shapes.append(jax.ShapeDtypeStruct((self.num_local_devices,), np.int32))
        if self.has_leading_dimension:
            shapes = [
                jax.ShapeDtypeStruct((self.num_local_devices, s.size // self.num_local_devices), s.dtype)
                for s in shapes
            ]
        return PreprocessedInput(*shapes[:4], layout, *shapes[4:])

    def _leaves(self, ids: Any, weights: Any) -> tuple[list[Any], list[Any]]:
        """The ids and the weights of each feature."""
        of_ids = flatten_like(self._skeleton, self._treedef, ids, "ids")
        if weights is None:
            return of_ids, [None] * len(of_ids)
        return of_ids, flatten_like(self._skeleton, self._treedef, weights, "weights")

    def _sort(self, ids: list[Any], weights: list[Any], threads: int) -> tuple[_native.SortedBatch, "_Target"]:
        """The sorted batch, and where it is written if no limit changes; where one cannot be, it is written there already."""
        leaves = list(map(read_feature, self._features, ids, weights))
        target = self._target(self._batch_sizes(leaves), self._limits.current)
        expected = None
        if not self.enable_minibatching and self.limits != "drop":
            arrays = empty_arrays(target.layout)
            target, expected = target._replace(arrays=arrays), (target.placements, *arrays)
        batch = _native.sort_batch(
            [leaf.ids for leaf in leaves],
            [leaf.weights for leaf in leaves],
            [leaf.row_splits for leaf in leaves],
            *self._request,
            self.limits == "drop",
            threads,
            expected,
        )
        if isinstance(batch, tuple):
            raise fault_error(self.plan, leaves, Fault(*batch))
        return batch, target

    def _finish(
        self,
        batch: _native.SortedBatch,
        target: "_Target",
        counts: Counts,
        num_minibatches: int | None,
        threads: int,
    ) -> PreprocessedInput:
        """Drops what is beyond the limits, if that was asked for, and writes the batch.

        Args:
            batch: sorted, and in minibatches if there are any.
            target: where it is written; it may have been already.
            counts: of the batch as it was given.
            num_minibatches: None without minibatching.
            threads: threads to work with.
        """
        minibatched, num_devices = num_minibatches is not None, self.num_local_devices
        stats = counts.as_stats(self._names)
        if self.limits == "drop":
            self._count_dropped(stats, _native.drop(batch, target.limits, minibatched))
        if self.validation == "drop":
            names = (feature.name for feature in self._features)
            stats.invalid_ids.update(zip(names, batch.invalid.tolist(), strict=True))
        arrays = target.arrays or empty_arrays(target.layout)
        _native.write_batch(batch, target.placements, *arrays, minibatched, threads)
        number = np.full(num_devices, num_minibatches, np.int32) if minibatched else None
        packed = PreprocessedInput(*arrays, target.layout, number, stats=stats)
        if not self.has_leading_dimension:
            return packed
        return jax.tree.map(lambda array: array.reshape(num_devices, -1), packed).replace(stats=stats)

    def _count_dropped(self, stats: SparseDenseMatmulInputStats, dropped: np.ndarray) -> None:
        for stack in self.plan.stacks:
            stats.dropped_ids.update((table.name, 0) for table in stack.tables)
            stats.id_drop_counters[stack.name] = 0
            for feature in stack.features:
                stats.dropped_ids[feature.table.name] += int(dropped[feature.leaf])
                stats.id_drop_counters[stack.name] += int(dropped[feature.leaf])

    def _batch_sizes(self, leaves: list[FlatFeature]) -> tuple[int, ...]:
        """Samples of each feature on a device."""
        num_devices = self.num_local_devices
        for feature, leaf in zip(self._features, leaves, strict=True):
            if leaf.batch % num_devices:
                raise ValueError(
                    f"Feature {feature.name!r} has a batch of {leaf.batch}, which does not divide by the {num_devices} "
                    f"devices of this process; fill it up to {-(-leaf.batch // num_devices) * num_devices} samples "
                    "(dense ids of -1, or empty ragged samples, contribute nothing)."
                )
        return tuple([leaf.batch // num_devices for leaf in leaves])

    def _fitting(self, expected: "_Target", limits: np.ndarray) -> "_Target":
        """What was expected if it has these limits, else another without arrays."""
        target = self._target(expected.batch_sizes, limits)
        return expected if target.layout is expected.layout else target

    def _target(self, batch_sizes: tuple[int, ...], limits: np.ndarray) -> "_Target":
        """Where batches of these sizes are written, without arrays. The same layout for the same sizes and limits."""
        key = (batch_sizes, limits.tobytes())
        known = self._targets.get(key)
        if known is None:
            max_minibatches = MAX_MINIBATCHES if self.enable_minibatching else 0
            layout = make_layout(self.plan, batch_sizes, limits, self.num_local_devices, max_minibatches)
            _check_capacities(layout)
            placements = np.array([(s.row_pointers_start, s.entries_start, s.capacity) for s in layout.stacks])
            if len(self._targets) >= _MAX_KEPT:
                self._targets = {}
            known = self._targets.setdefault(key, _Target(batch_sizes, limits, layout, placements))
        return known


def _check_capacities(layout: PackedLayout) -> None:
    """Raises a ValueError if row pointers cannot count the entries that they point to."""
    shares = 1 if layout.minibatched else layout.num_sparsecores_per_device
    for stack in layout.stacks:
        if stack.capacity // shares > INT32_MAX:
            raise ValueError(
                f"Stack {stack.name!r}: a packed buffer of {stack.capacity} entries a device is more than int32 row pointers "
                f"count, {INT32_MAX} {'a device with minibatches' if layout.minibatched else 'a SparseCore'}. Lower "
                "max_ids_per_partition, or set suggested_coo_buffer_size_per_device."
            )
