"""Packs the ids of a batch on the host."""

import os
from typing import Any

import jax
import numpy as np

from embax import _native
from embax._checks import positive_int
from embax._preprocess.buffers import PackedLayout, PreprocessedInput, empty_arrays, make_layout
from embax._preprocess.faults import Fault, fault_error
from embax._preprocess.inputs import FlatFeature, flatten_like, read_feature
from embax._preprocess.limits import Counts, FixedCapacities, GrowingCapacities
from embax._specs import COMBINERS, FeatureSpec
from embax._stacking.plan import Plan, make_plan

_CAPACITIES = {"raise": FixedCapacities, "grow": GrowingCapacities}
_MAX_KEPT = 32
"""Layouts that a packer, and packers that `preprocess`, keep for the next batch."""


def num_threads() -> int:
    """Threads that pack: `EMBAX_NUM_THREADS`, else as many as this process may run on.

    Raises:
        ValueError: the variable is not a positive integer.
    """
    value = os.environ.get("EMBAX_NUM_THREADS", "")
    if not value:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not (value.isascii() and value.isdigit() and len(value) <= 4 and 1 <= int(value) <= 1024):
        raise ValueError(f"EMBAX_NUM_THREADS is {value!r}; it must be an integer from 1 to 1024, or unset.")
    return int(value)


def _check_limits(limits: str) -> None:
    if not (isinstance(limits, str) and limits in _CAPACITIES):
        raise ValueError(f'limits is {limits!r}; it must be "raise" or "grow".')


def _default_local_devices(plan: Plan) -> int:
    # Asking for the number of processes starts JAX's backends, so ask only where there can be several.
    processes = jax.process_count() if jax.distributed.is_initialized() else 1
    if plan.num_devices % processes:
        raise ValueError(
            f"The tables are placed on {plan.num_devices} devices, which {processes} processes cannot share equally; "
            "pass num_local_devices."
        )
    return plan.num_devices // processes


class Packer:
    """Packs batch after batch for one placement of the specs. Safe to call from several threads.

    Args:
        specs: the placed feature tree; a snapshot is taken, so later changes of the specs do not count.
        limits: "grow" lets the buffers grow with the batches, a logarithmic number of times, whatever the limits in the
            specs; "raise" makes the buffers as the specs say, and a batch beyond a limit an error.
        num_local_devices: devices that this process packs for, whose samples it gets; None means the devices of the
            placement, divided by the number of processes.

    Raises:
        ValueError: the specs are not placed, `limits` is unknown, or buffers were to grow while there are other processes
            (which would have to grow alike, or else hang in different programs).
    """

    def __init__(self, specs: Any, *, limits: str = "grow", num_local_devices: int | None = None):
        _check_limits(limits)
        plan = make_plan(specs)
        self.plan = plan
        self.limits = limits
        if num_local_devices is None:
            num_local_devices = _default_local_devices(plan)
        self.num_local_devices = positive_int(
            "Packer", "num_local_devices", num_local_devices, maximum=plan.num_devices
        )
        if limits == "grow" and self.num_local_devices < plan.num_devices:
            raise ValueError(
                f'limits="grow" with {self.num_local_devices} of {plan.num_devices} devices in this process: processes '
                'whose buffers grow on their own compile different programs and hang. Use limits="raise".'
            )
        self._capacities = _CAPACITIES[limits](plan)
        leaves, self._treedef = jax.tree.flatten(specs)
        self._skeleton = self._treedef.unflatten([leaf.name for leaf in leaves])
        self._features = sorted((f for stack in plan.stacks for f in stack.features), key=lambda feature: feature.leaf)
        self._feature_table = np.array([(f.table.vocabulary_size, f.col_offset, f.col_shift) for f in self._features])
        self._stack_table = np.array(
            [(COMBINERS.index(s.spec.combiner), s.spec.stack_vocab_size, len(s.features)) for s in plan.stacks]
        )
        self._order = np.array([feature.leaf for stack in plan.stacks for feature in stack.features])
        self._names = [stack.name for stack in plan.stacks]
        self._layouts: dict[Any, tuple[PackedLayout, np.ndarray]] = {}

    def __call__(self, ids: Any, weights: Any = None) -> PreprocessedInput:
        """Packs one batch; arguments, result and errors are those of `embax.preprocess`."""
        plan, num_devices = self.plan, self.num_local_devices
        ids_leaves = flatten_like(self._skeleton, self._treedef, ids, "ids")
        if weights is None:
            weights_leaves = [None] * len(ids_leaves)
        else:
            weights_leaves = flatten_like(self._skeleton, self._treedef, weights, "weights")
        leaves = list(map(read_feature, self._features, ids_leaves, weights_leaves))
        batch_sizes = self._batch_sizes(leaves)
        threads = num_threads()
        batch = _native.sort_batch(
            [leaf.ids for leaf in leaves],
            [leaf.weights for leaf in leaves],
            [leaf.row_splits for leaf in leaves],
            self._feature_table,
            self._stack_table,
            self._order,
            num_devices,
            plan.num_sparsecores_per_device,
            plan.num_sparsecores,
            threads,
        )
        if isinstance(batch, tuple):
            raise fault_error(plan, leaves, Fault(*batch))
        num_stacks = len(self._names)
        counts = Counts(*(a.reshape(num_stacks, -1) for a in (batch.max_ids, batch.max_unique_ids, batch.required)))
        layout, placements = self._layout(batch_sizes, self._capacities.fit(counts))
        row_pointers, embedding_ids, sample_ids, gains = empty_arrays(layout)
        _native.write_batch(batch, placements, row_pointers, embedding_ids, sample_ids, gains, num_devices, threads)
        return PreprocessedInput(row_pointers, embedding_ids, sample_ids, gains, layout, counts.as_stats(self._names))

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

    def _layout(self, batch_sizes: tuple[int, ...], capacities: tuple[int, ...]) -> tuple[PackedLayout, np.ndarray]:
        """The layout, and where the native code finds each stack. The same objects for the same sizes."""
        key = (batch_sizes, capacities)
        known = self._layouts.get(key)
        if known is None:
            layout = make_layout(self.plan, batch_sizes, capacities, self.num_local_devices)
            placements = np.array([(s.row_pointers_start, s.entries_start, s.capacity) for s in layout.stacks])
            if len(self._layouts) >= _MAX_KEPT:
                self._layouts = {}
            known = self._layouts.setdefault(key, (layout, placements))
        return known


_packers: dict[Any, tuple[Packer, list[Any]]] = {}


def _packer_for(specs: Any, limits: str, num_local_devices: int | None) -> Packer:
    """A packer for the specs as they are now, kept from an earlier call if nothing about them has changed.

    What packing depends on is immutable (placements, names, sizes), so that the identities of these objects tell
    cheaply whether it changed. The objects are kept alive with the packer, so that no other can get their identity.
    """
    _check_limits(limits)
    leaves, treedef = jax.tree.flatten(specs)
    parts: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, FeatureSpec):
            return Packer(specs, limits=limits, num_local_devices=num_local_devices)  # Says what is wrong.
        table = leaf.table_spec
        parts += (
            *(leaf.name, leaf._id_transformation, leaf.input_shape, leaf.output_shape),
            *(table, table.name, table.vocabulary_size, table.embedding_dim),
            *(table._stacked_table_spec, table._setting_in_stack),
        )
    key = (treedef, limits, num_local_devices, tuple(map(id, parts)))
    known = _packers.get(key)
    if known is None:
        if len(_packers) >= _MAX_KEPT:
            _packers.clear()
        packer = Packer(specs, limits=limits, num_local_devices=num_local_devices)
        known = _packers.setdefault(key, (packer, parts))
    return known[0]


def preprocess(
    ids: Any, weights: Any = None, *, specs: Any, limits: str = "raise", num_local_devices: int | None = None
) -> PreprocessedInput:
    """Packs a batch of ids on the host: partitions them by the SparseCore that owns their rows, sorts, merges, pads.

    An id of a sample enters it with a gain: its weight `w` for combiner "sum", `w / sum(w)` for "mean" and
    `w / sqrt(sum(w^2))` for "sqrtn", with sums over the ids of the sample (in float32, one after another; 0 where a
    sum is 0). Gains of equal ids of a sample are added.

    Args:
        ids: a tree like `specs`. Each leaf holds the ids of a feature, for all devices of this process: an integer array
            `[batch, valency]` (NumPy or JAX) in which -1 is padding and contributes nothing, or `[batch]` where the
            feature has one id a sample; `embax.Ragged(values, row_splits)`; `embax.SparseCoo(indices, values,
            dense_shape)`; or a list or object array of 1-d integer arrays, one a sample. The batch divides by the number of
            devices of this process. Features may have different batches, and these may differ from the ones in the specs.
        weights: a tree like `specs` of finite weights in the form of the ids, or of a 1-d array in the order of ragged or
            sparse ones, None for a feature whose weights are all 1; or None. They are used as float32.
        specs: the placed feature tree (see `embax.prepare_feature_specs_for_training`).
        limits: what happens to a batch that exceeds the limits in the specs (`max_ids_per_partition`,
            `max_unique_ids_per_partition`, `suggested_coo_buffer_size_per_device`): "raise" an error, or "grow" the
            buffers as the batches need, which compiles the steps that use them again a logarithmic number of times.
        num_local_devices: devices that this process packs for; None means those of the placement, divided by the
            number of processes.

    Returns:
        The packed batch, in NumPy arrays that nothing else refers to, with its statistics.

    Raises:
        ValueError: the specs are not placed; a tree has another structure; ids are not integers, or outside of their
            vocabulary; weights are not finite; row splits are not ascending from 0 to the number of values; a batch
            does not divide; a limit is exceeded. The message names the feature, the sample and the value, and says
            what to do.

    Example:
        >>> packed = embax.preprocess({"watched": np.array([[3, 5], [8, -1]])}, specs=features)  # doctest: +SKIP
        >>> packed.stats.max_ids_per_partition  # doctest: +SKIP
    """
    return _packer_for(specs, limits, num_local_devices)(ids, weights)
