"""Packs the ids of a batch: on the host, or inside jit."""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from embax._preprocess.all_reduce import AllReduceInterface, DistributedAllReduce
from embax._preprocess.buffers import PreprocessedInput
from embax._preprocess.packer import Packer
from embax._specs import FeatureSpec, last_change

_MAX_KEPT = 256
"""Packers that are kept for the next batch; then the oldest goes."""

_PARTS_OF_FEATURE = operator.attrgetter("name", "_id_transformation", "input_shape", "output_shape", "table_spec")
_PARTS_OF_TABLE = operator.attrgetter(
    "name", "vocabulary_size", "embedding_dim", "_stacked_table_spec", "_setting_in_stack"
)

_packers: dict[Any, tuple[Packer, list[Any]]] = {}
"""By what packing depends on, and what keeps it alive."""


class _Call(NamedTuple):
    """What a packer was found for."""

    change: int
    """The last change of any spec before."""
    options: list[Any]
    leaves: list[Any]
    treedef: Any
    packer: Packer

    def is_like(self, change: int, options: Iterable[Any], leaves: list[Any], treedef: Any) -> bool:
        """Whether another call is about the very same objects, which have not changed."""
        return (
            self.change == change
            and all(map(operator.is_, self.options, options))
            and len(self.leaves) == len(leaves)
            and all(map(operator.is_, self.leaves, leaves))
            and self.treedef == treedef
        )


_MAX_CALLS = 4

_latest: tuple[_Call, ...] = ()
"""The latest calls that differed: most are like one before."""


def _packer_for(specs: Any, **options: Any) -> Packer:
    """A packer for the specs as they are now, kept from an earlier call if nothing about them has changed.

    What packing depends on is immutable (placements, names, sizes), so that the identities of these objects tell
    cheaply whether it changed. The objects are kept alive with the packer, so that no other can get their identity.
    """
    global _latest
    leaves, treedef = jax.tree.flatten(specs)
    change, latest = last_change(), _latest
    for call in latest:
        if call.is_like(change, options.values(), leaves, treedef):
            return call.packer
    parts: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, FeatureSpec):
            return Packer(specs, **options)  # Says what is wrong.
        parts += _PARTS_OF_FEATURE(leaf)
        parts += _PARTS_OF_TABLE(leaf.table_spec)
    # With the types of options, since 1 equals True.
    key = (treedef, tuple(options.values()), tuple(map(type, options.values())), *map(id, parts))
    try:
        known = _packers.get(key)
    except TypeError:  # An option that is no hash is not valid either.
        return Packer(specs, **options)
    if known is None:
        while len(_packers) >= _MAX_KEPT:
            _packers.pop(next(iter(_packers), None), None)
        known = _packers.setdefault(key, (Packer(specs, **options), parts))
    call = _Call(change, list(options.values()), leaves, treedef, known[0])
    _latest = (call, *[other for other in latest if other.change == change][: _MAX_CALLS - 1])
    return known[0]


def preprocess(
    ids: Any,
    weights: Any = None,
    *,
    specs: Any,
    limits: str = "raise",
    validation: str = "raise",
    num_local_devices: int | None = None,
    has_leading_dimension: bool = False,
    enable_minibatching: bool = False,
    all_reduce: AllReduceInterface | None = None,
    batch_number: int | None = None,
) -> PreprocessedInput:
    """Packs a batch of ids: partitions them by the SparseCore that owns their rows, sorts, merges, pads.

    On the host; where some ids or weights are traced by JAX, inside the jitted step, with room for all ids.

    An id of a sample enters it with a gain: its weight `w` for combiner "sum", `w / sum(w)` for "mean" and
    `w / sqrt(sum(w^2))` for "sqrtn", with sums over the ids of the sample (in float32, one after another, squares not
    rounded before they are added; 0 where a sum is 0). Gains of equal ids of a sample are added.

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
            `max_unique_ids_per_partition`, `suggested_coo_buffer_size_per_device`): "raise" an error; "grow" the limits
            as the batches need, which compiles the steps that use them again a logarithmic number of times; or "drop" what
            is beyond them, counted in `stats.id_drop_counters` and `stats.dropped_ids`: of each partition the ids behind the
            first ones in order of (row, sample), and what the buffer does not hold.
        validation: what happens to ids outside their vocabulary and to weights that are not finite: "raise" an error;
            "drop" them, counted in `stats.invalid_ids` (a sample whose gains are not finite keeps its ids with gains of
            0); or "trust" that there are none: such an id then names any row or none, such a weight is used.
        num_local_devices: devices that this process packs for; None means those of the placement, divided by the
            number of processes.
        has_leading_dimension: whether the arrays get a leading dimension of the local devices, as `jax.pmap` takes them.
        enable_minibatching: whether a batch beyond the limits of partitions is divided into up to 64 minibatches, by a
            hash of the ids, so that each is within them. All stacks, devices and hosts have the same number. A limit that
            the ids of one bucket exceed is treated as `limits` says. Lookups and updates give the same results.
        all_reduce: how the hosts agree on minibatches, `embax.DistributedAllReduce()` or the like; None for one host.
        batch_number: names the batch among the hosts, the same on all of them; None counts the batches that were packed with
            `all_reduce`, which all hosts must then pack in one order.

    Inside jit traced ids are one integer array, dense or `[batch]`, or an `embax.Ragged` of two arrays, of whose values those
    behind the last row split are not used, so that batches of other lengths compile nothing anew. Traced weights are an array
    or `embax.Ragged` of their form, and may be differentiated (see `docs/packing.md`). The batch is one device's, and may have
    any size; inside `jax.shard_map` it is this device's part. All other arguments but `specs` mean nothing there: no id is
    lost to a limit, and ids, weights and row splits that are not valid contribute nothing and are counted in `invalid_ids`.

    Returns:
        The packed batch, in NumPy arrays that nothing else refers to, with its statistics; inside jit in traced arrays, without
        statistics, with `invalid_ids`, int32[features] in the order of the feature leaves.

    Raises:
        ValueError: the specs are not placed; a tree has another structure; ids are not integers, or outside of their
            vocabulary; weights are not finite; row splits are not ascending from 0 to the number of values; a batch
            does not divide. The message names the feature, the sample and the value, and says what to do.
        embax.LimitExceededError: a limit is exceeded (a ValueError).
        RuntimeError: another host could not pack its part of the batch.
        MemoryError: the buffers do not fit into memory; says what made them so large.

    Example:
        >>> packed = embax.preprocess({"watched": np.array([[3, 5], [8, -1]])}, specs=features)  # doctest: +SKIP
        >>> packed.stats.max_ids_per_partition  # doctest: +SKIP
    """
    packer = _packer_for(
        specs,
        limits=limits,
        validation=validation,
        num_local_devices=num_local_devices,
        has_leading_dimension=has_leading_dimension,
        enable_minibatching=enable_minibatching,
        all_reduce=all_reduce,
    )
    return packer(ids, weights, batch_number=batch_number)


def eval_preprocess_shape(
    specs: Any,
    *,
    num_local_devices: int | None = None,
    has_leading_dimension: bool = False,
    enable_minibatching: bool = False,
) -> PreprocessedInput:
    """The shapes of what `embax.preprocess` makes of a batch as the specs describe it, without data.

    Args:
        specs: the placed feature tree; a feature's global batch is the product of all sizes of its `output_shape` but the last.
        num_local_devices: devices that this process packs for; None means those of the placement, divided by the
            number of processes.
        has_leading_dimension: as `embax.preprocess` will be called.
        enable_minibatching: as `embax.preprocess` will be called.

    Returns:
        A batch of `jax.ShapeDtypeStruct`, to trace, lower or compile a step with ahead of its data. Batches with the limits of
        the specs (`limits="raise"` and `"drop"`) have the same shapes and layout.

    Raises:
        ValueError: the specs are not placed, or a batch does not divide by the number of devices.

    Example:
        >>> step.lower(variables, embax.eval_preprocess_shape(specs)).compile()  # doctest: +SKIP
    """
    packer = Packer(
        specs,
        limits="drop",
        num_local_devices=num_local_devices,
        has_leading_dimension=has_leading_dimension,
        enable_minibatching=enable_minibatching,
        all_reduce=DistributedAllReduce() if enable_minibatching else None,  # Nothing is packed, so nothing is reduced.
    )
    return packer.eval_shape()
