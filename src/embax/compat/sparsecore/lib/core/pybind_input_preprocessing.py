"""Packing of lists of features; ids are not checked against the vocabulary here, but in `lib.nn.embedding`."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import embax
from embax._preprocess.all_reduce import AllReduceInterface as AllReduceInterface
from embax._preprocess.sizes import compute_row_pointers_size_per_device as _row_pointers_size
from embax._preprocess.sizes import compute_theoretical_max_coo_buffer_size as _theoretical_size
from embax.compat import _packing
from embax.compat._peers import PeerAllReduce


class ShardingStrategy(enum.Enum):
    """How rows are dealt out to SparseCores."""

    MOD = 1


@dataclasses.dataclass
class SparseDenseMatmulInputStats:
    """What packing counted: see `lib.nn.embedding.SparseDenseMatmulInputStats`, which `from_cc` makes of it."""

    max_ids_per_partition: dict[str, Any]
    max_unique_ids_per_partition: dict[str, Any]
    required_buffer_sizes: dict[str, Any]
    dropped_id_count: dict[str, int]


class MinibatchingNode:
    """One host among those that agree on minibatches.

    Args:
        task_id: the number of this host.
        num_tasks: the number of hosts.
        peer_addresses: "host:port" of every other host.
        minibatching_port: port that this host listens on.
    """

    def __init__(self, task_id: int, num_tasks: int, peer_addresses: Sequence[str], minibatching_port: int):
        self._interface = PeerAllReduce(peer_addresses, minibatching_port, task_id, num_tasks)

    def get_all_reduce_interface(self) -> AllReduceInterface:
        """The interface that packing takes."""
        return self._interface


def check_strategy(sharding_strategy: Any) -> None:
    """Raises a ValueError unless the strategy is `ShardingStrategy.MOD`."""
    if sharding_strategy is not ShardingStrategy.MOD:
        raise ValueError(f"sharding_strategy is {sharding_strategy!r}; it must be ShardingStrategy.MOD.")


def _result(packed: _packing.Packed) -> tuple[Any, ...]:
    counts = packed.stats
    assert counts is not None
    stats = SparseDenseMatmulInputStats(
        counts.max_ids_per_partition,
        counts.max_unique_ids_per_partition,
        counts.required_buffer_size_per_sc,
        counts.id_drop_counters,
    )
    return *packed[:4], int(packed.num_minibatches.reshape(-1)[0]), stats


def preprocess_sparse_dense_matmul_input(
    features: Sequence[Any],
    feature_weights: Sequence[Any] | None,
    feature_specs: Sequence[Any],
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int,
    sharding_strategy: ShardingStrategy = ShardingStrategy.MOD,
    has_leading_dimension: bool = False,
    allow_id_dropping: bool = False,
    batch_number: int = 0,
    enable_minibatching: bool = False,
    all_reduce_interface: AllReduceInterface | None = None,
) -> tuple[Any, ...]:
    """Packs a batch of dense or ragged ids.

    Args:
        features: ids of each feature on all local devices: 2-d integer arrays, or lists or object arrays of 1-d ones.
        feature_weights: likewise, or None for ones.
        feature_specs: the placed features, one for each.
        local_device_count: devices that are packed for.
        global_device_count: devices of all hosts.
        num_sc_per_device: SparseCores of each.
        sharding_strategy: MOD.
        has_leading_dimension: whether the arrays have a leading dimension of the local devices.
        allow_id_dropping: whether what is beyond a limit is dropped and counted; else it is an error.
        batch_number: the same on all hosts, another for each batch.
        enable_minibatching: whether there may be several minibatches.
        all_reduce_interface: how hosts agree on them.

    Returns:
        Row pointers, embedding ids, sample ids and gains, each by the name of the stack; the number of minibatches; and
        `SparseDenseMatmulInputStats`.

    Raises:
        ValueError: a count, an array or a spec is not what it should be, or a limit is exceeded.
    """
    check_strategy(sharding_strategy)
    if len(features) != len(feature_specs):
        raise ValueError(f"There are {len(features)} features for {len(feature_specs)} feature specs.")
    packed = _packing.pack(
        feature_specs,
        list(map(len, features)),
        features,
        feature_weights,
        local_device_count,
        global_device_count,
        num_sc_per_device=num_sc_per_device,
        any_id=True,
        has_leading_dimension=has_leading_dimension,
        allow_id_dropping=allow_id_dropping,
        batch_number=batch_number,
        enable_minibatching=enable_minibatching,
        all_reduce_interface=all_reduce_interface,
    )
    return _result(packed)


def preprocess_sparse_dense_matmul_sparse_coo_input(
    indices: Sequence[Any],
    values: Sequence[Any],
    dense_shapes: Sequence[Any],
    feature_specs: Sequence[Any],
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int,
    sharding_strategy: ShardingStrategy = ShardingStrategy.MOD,
    has_leading_dimension: bool = False,
    allow_id_dropping: bool = False,
    batch_number: int = 0,
    enable_minibatching: bool = False,
    all_reduce_interface: AllReduceInterface | None = None,
) -> tuple[Any, ...]:
    """Packs a batch of sparse ids, all of weight 1.

    Args:
        indices: of each feature integer[n, 2] of (sample, position).
        values: of each feature integer[n] ids.
        dense_shapes: of each feature (batch, width).
        feature_specs: as the others, see `preprocess_sparse_dense_matmul_input`.
        local_device_count: see there.
        global_device_count: see there.
        num_sc_per_device: see there.
        sharding_strategy: see there.
        has_leading_dimension: see there.
        allow_id_dropping: see there.
        batch_number: see there.
        enable_minibatching: see there.
        all_reduce_interface: see there.

    Returns:
        As `preprocess_sparse_dense_matmul_input`.

    Raises:
        ValueError: as there.
    """
    check_strategy(sharding_strategy)
    packed = _packing.pack(
        feature_specs,
        [int(shape[0]) for shape in dense_shapes],
        list(map(embax.SparseCoo, indices, values, dense_shapes)),
        None,
        local_device_count,
        global_device_count,
        num_sc_per_device=num_sc_per_device,
        any_id=True,
        has_leading_dimension=has_leading_dimension,
        allow_id_dropping=allow_id_dropping,
        batch_number=batch_number,
        enable_minibatching=enable_minibatching,
        all_reduce_interface=all_reduce_interface,
    )
    return _result(packed)


def compute_row_pointers_size_per_device(
    global_device_count: int, num_sc_per_device: int, enable_minibatching: bool = False
) -> int:
    """See `embax.compute_row_pointers_size_per_device`."""
    return _row_pointers_size(global_device_count, num_sc_per_device, enable_minibatching)


def compute_theoretical_max_coo_buffer_size(
    max_ids_per_partition: int, global_device_count: int, num_sc_per_device: int, enable_minibatching: bool = False
) -> int:
    """See `embax.compute_theoretical_max_coo_buffer_size`."""
    return _theoretical_size(max_ids_per_partition, global_device_count, num_sc_per_device, enable_minibatching)


def compute_coo_buffer_size_per_device(
    feature_specs: Sequence[Any], global_device_count: int, num_sc_per_device: int, enable_minibatching: bool = False
) -> dict[str, int]:
    """See `embax.compute_coo_buffer_size_per_device`; by the name of the stack."""
    return _packing.buffer_sizes(feature_specs, global_device_count, num_sc_per_device, enable_minibatching)
