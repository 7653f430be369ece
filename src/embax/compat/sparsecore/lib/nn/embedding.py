"""Specs, packing, lookups and updates under the reference's names."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import embax
from embax._mesh import TableMesh
from embax._preprocess import stats as _stats
from embax._stacking import stack as _stack
from embax._stacking.parameters import changed_limits
from embax._stacking.stack import get_default_limits as get_default_limits
from embax._variables import EmbeddingVariables as EmbeddingVariables
from embax.compat import _matmul, _packing, _placement
from embax.compat._peers import PeerAllReduce
from embax.compat.sparsecore.lib.core import pybind_input_preprocessing
from embax.compat.sparsecore.lib.nn import embedding_spec, table_stacking
from embax.compat.sparsecore.utils import utils

LimitsCallable = table_stacking.LimitsCallable

_PRIMITIVES = "embax.compat.sparsecore.lib.core.primitives"
_FROM_PROTO_UTILS = (
    "create_proto_from_feature_specs",
    "get_optimizer_class",
    "get_optimizer_type",
    "optimizer_spec_to_proto",
    "proto_to_optimizer_spec",
)


def __getattr__(name: str) -> Any:
    if name in _FROM_PROTO_UTILS:  # These need protobuf.
        return getattr(importlib.import_module("embax.compat.sparsecore.lib.nn.embedding_proto_utils"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_feature(leaf: Any) -> bool:
    return isinstance(leaf, embedding_spec.FeatureSpec)


def _flatten_with_path(tree: Any, is_leaf: Callable[..., bool]) -> tuple[list[Any], list[Any]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf, is_leaf_takes_path=True)
    return [path for path, _ in pairs], [leaf for _, leaf in pairs]


def _leaves_like(a: Any, b: Any, a_name: str, b_name: str) -> list[Any]:
    """The subtrees of `a` where `b` has leaves or features; nothing else may be in `a`."""
    wanted, _ = _flatten_with_path(b, lambda path, leaf: _is_feature(leaf))
    paths, leaves = _flatten_with_path(a, lambda path, leaf: path in wanted)
    if paths != wanted:
        structures = jax.tree.structure(a), jax.tree.structure(b, is_leaf=_is_feature)
        raise ValueError(
            f"Pytree structures of {a_name} and {b_name} do not match.\n{a_name}: {structures[0]}\n{b_name}: {structures[1]}"
        )
    return leaves


def _assert_same_structure(a: Any, b: Any, a_name: str = "a", b_name: str = "b") -> None:
    """Raises a ValueError unless the leaves of both trees have the same paths."""
    wanted, _ = _flatten_with_path(a, lambda path, leaf: _is_feature(leaf))
    if wanted != _flatten_with_path(b, lambda path, leaf: _is_feature(leaf))[0]:
        _leaves_like(a, b, a_name, b_name)
        _leaves_like(b, a, b_name, a_name)


def _num_sc_per_device(num_sc_per_device: int | None) -> int:
    """The number given, if a device may have so many SparseCores, or that of the first device."""
    if num_sc_per_device is None:
        return utils.num_sparsecores_per_device()
    if num_sc_per_device not in utils.NUM_SC_PER_DEVICE_MAP.values():
        raise ValueError(
            f"Invalid num_sc_per_device: {num_sc_per_device}; it must be one of "
            f"{sorted(set(utils.NUM_SC_PER_DEVICE_MAP.values()))}."
        )
    return num_sc_per_device


class EmbeddingVariablesInitializer(NamedTuple):
    """The initializers of a table and its slots."""

    table: Any
    slot: Any


class SparseDenseMatmulInput(NamedTuple):
    """The packed arrays, each by the name of the stack: see `embax.PreprocessedInput` for what they hold."""

    lhs_row_pointers: Mapping[str, Any]
    lhs_embedding_ids: Mapping[str, Any]
    lhs_sample_ids: Mapping[str, Any]
    lhs_gains: Mapping[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseDenseMatmulInputStats(_stats.SparseDenseMatmulInputStats):
    """Counts of one packed batch: see `embax.SparseDenseMatmulInputStats`. A pytree."""

    def replace(self, **changes: Any) -> "SparseDenseMatmulInputStats":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def of(cls, stats: _stats.SparseDenseMatmulInputStats) -> "SparseDenseMatmulInputStats":
        """The same counts as this class."""
        return cls(**{field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)})

    def get_required_buffer_size_per_device(self, table_name: str, num_sc_per_device: int | None = None) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Entries of a stack that fit the batch on every device, or None for a stack without values."""
        return super().get_required_buffer_size_per_device(table_name, num_sc_per_device)

    def set_required_buffer_size_per_device(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, table_name: str, required_buffer_size_per_device: int, num_sc_per_device: int | None = None
    ) -> None:
        """Sets the entries of a stack that a device needs, equally for each of its SparseCores."""
        super().set_required_buffer_size_per_device(table_name, required_buffer_size_per_device, num_sc_per_device)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreprocessedInput:
    """A packed batch. A pytree.

    Args:
        sparse_dense_matmul_input: its arrays.
        num_minibatches: the number of minibatches, a scalar or an array of equal values, one a local device.
    """

    sparse_dense_matmul_input: SparseDenseMatmulInput
    num_minibatches: Any = dataclasses.field(default_factory=lambda: np.array(1, np.int32))

    def replace(self, **changes: Any) -> "PreprocessedInput":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def lhs_row_pointers(self) -> Mapping[str, Any]:
        """Row pointers by stack."""
        return self.sparse_dense_matmul_input.lhs_row_pointers

    @property
    def lhs_embedding_ids(self) -> Mapping[str, Any]:
        """Embedding ids by stack."""
        return self.sparse_dense_matmul_input.lhs_embedding_ids

    @property
    def lhs_sample_ids(self) -> Mapping[str, Any]:
        """Sample ids by stack."""
        return self.sparse_dense_matmul_input.lhs_sample_ids

    @property
    def lhs_gains(self) -> Mapping[str, Any]:
        """Gains by stack."""
        return self.sparse_dense_matmul_input.lhs_gains


def get_table_specs(feature_specs: Any) -> dict[str, embedding_spec.TableSpec]:
    """The tables of a feature tree by name, in order of first appearance.

    Raises:
        ValueError: two features have one name.
    """
    tables: dict[str, embedding_spec.TableSpec] = {}
    names: set[str] = set()
    for feature in _placement.feature_leaves(feature_specs):
        if feature.name in names:
            raise ValueError(f"Feature spec {feature.name} is already defined: the names of features must differ.")
        names.add(feature.name)
        tables.setdefault(feature.table_spec.name, feature.table_spec)
    return tables


def get_stacked_table_specs(feature_specs: Any) -> dict[str, embedding_spec.StackedTableSpec]:
    """The stacks of a placed feature tree by name, in order of first appearance.

    Raises:
        ValueError: a table has not been placed.
    """
    stacks = map(_placement.stack_of, get_table_specs(feature_specs).values())
    return {stack.stack_name: stack for stack in stacks}


def prepare_feature_specs_for_training(
    feature_specs: Any, global_device_count: int, num_sc_per_device: int | None = None
) -> None:
    """Places every table that is not stacked yet, and its features, in place: see `embax.prepare_feature_specs_for_training`."""
    sparsecores = _num_sc_per_device(num_sc_per_device)

    def place(copies: list[Any]) -> None:
        _stack.prepare_feature_specs_for_training(copies, global_device_count, sparsecores)

    _placement.place(_placement.feature_leaves(feature_specs), global_device_count, sparsecores, place)


def auto_stack_tables(
    feature_specs: Any,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    stack_to_max_ids_per_partition: LimitsCallable = get_default_limits,
    stack_to_max_unique_ids_per_partition: LimitsCallable = get_default_limits,
    use_short_stack_names: bool = True,
    *,
    activation_mem_bytes_limit: int | None = None,
) -> None:
    """Stacks all tables that are not stacked yet, in place: see `embax.auto_stack_tables`."""
    table_stacking.auto_stack_tables(
        feature_specs,
        global_device_count,
        _num_sc_per_device(num_sc_per_device),
        stack_to_max_ids_per_partition=stack_to_max_ids_per_partition,
        stack_to_max_unique_ids_per_partition=stack_to_max_unique_ids_per_partition,
        use_short_stack_names=use_short_stack_names,
        activation_mem_bytes_limit=activation_mem_bytes_limit,
    )


def compute_row_pointers_size_per_device(
    *, global_device_count: int, num_sc_per_device: int | None = None, enable_minibatching: bool = False
) -> int:
    """See `embax.compute_row_pointers_size_per_device`."""
    return pybind_input_preprocessing.compute_row_pointers_size_per_device(
        global_device_count, _num_sc_per_device(num_sc_per_device), enable_minibatching
    )


def compute_theoretical_max_coo_buffer_size(
    max_ids_per_partition: int,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
) -> int:
    """See `embax.compute_theoretical_max_coo_buffer_size`."""
    return pybind_input_preprocessing.compute_theoretical_max_coo_buffer_size(
        max_ids_per_partition, global_device_count, _num_sc_per_device(num_sc_per_device), enable_minibatching
    )


def compute_coo_buffer_size_per_device(
    feature_specs: Any,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
) -> dict[str, int]:
    """See `embax.compute_coo_buffer_size_per_device`; by the name of the stack."""
    return pybind_input_preprocessing.compute_coo_buffer_size_per_device(
        _placement.feature_leaves(feature_specs),
        global_device_count,
        _num_sc_per_device(num_sc_per_device),
        enable_minibatching,
    )


def sharding_strategy_to_enum(sharding_strategy: str) -> pybind_input_preprocessing.ShardingStrategy:
    """The member of the low level's enum.

    Raises:
        ValueError: the strategy is not "MOD".
    """
    if sharding_strategy != "MOD":
        raise ValueError(f"Unsupported sharding strategy: {sharding_strategy}. Only MOD is supported.")
    return pybind_input_preprocessing.ShardingStrategy.MOD


def get_all_reduce_interface(
    peer_addresses: Sequence[str], minibatching_port: int, host_id: int | None = None, host_count: int | None = None
) -> pybind_input_preprocessing.AllReduceInterface:
    """How this host agrees with others on minibatches, over TCP. Hosts may be threads of one process.

    Args:
        peer_addresses: "host:port" of every other host, in any order.
        minibatching_port: port that this host listens on.
        host_id: the number of this host; None means that of the process in JAX.
        host_count: the number of hosts; None means that of the processes in JAX.

    Raises:
        ValueError: a number or an address is not what it should be.
        OSError: the port is taken.
    """
    return PeerAllReduce(
        peer_addresses,
        minibatching_port,
        jax.process_index() if host_id is None else host_id,
        jax.process_count() if host_count is None else host_count,
    )


def _as_preprocessed(packed: _packing.Packed) -> tuple[PreprocessedInput, SparseDenseMatmulInputStats]:
    assert packed.stats is not None
    batch = PreprocessedInput(SparseDenseMatmulInput(*packed[:4]), packed.num_minibatches)
    return batch, SparseDenseMatmulInputStats.of(packed.stats)


def preprocess_sparse_dense_matmul_input(
    features: Any,
    features_weights: Any,
    feature_specs: Any,
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int | None = None,
    sharding_strategy: str = "MOD",
    has_leading_dimension: bool = False,
    allow_id_dropping: bool = False,
    batch_number: int = 0,
    enable_minibatching: bool = False,
    all_reduce_interface: Any = None,
) -> tuple[PreprocessedInput, SparseDenseMatmulInputStats]:
    """Packs a batch of dense or ragged ids.

    Args:
        features: a tree like `feature_specs` of the ids of all local devices, in any form that `embax.preprocess` takes.
        features_weights: likewise, or None for ones.
        feature_specs: the placed feature tree.
        local_device_count: devices of this host.
        global_device_count: devices of all hosts.
        num_sc_per_device: SparseCores of each; None means those of the first device.
        sharding_strategy: "MOD".
        has_leading_dimension: whether arrays have a leading dimension of the local devices, as `jax.pmap` takes them.
        allow_id_dropping: whether what is beyond a limit is dropped and counted; else it is an error.
        batch_number: the same on all hosts, another for each batch.
        enable_minibatching: whether there may be several minibatches.
        all_reduce_interface: how hosts agree on them: see `get_all_reduce_interface`.

    Returns:
        The packed batch, in NumPy arrays, and its statistics.

    Raises:
        ValueError: an argument is not what it should be; an id is outside its vocabulary; or a limit is exceeded.
    """
    specs = _placement.feature_leaves(feature_specs)
    ids = _leaves_like(features, feature_specs, "features", "feature_specs")
    weights = None
    if features_weights is not None:
        weights = _leaves_like(features_weights, feature_specs, "features_weights", "feature_specs")
    sharding_strategy_to_enum(sharding_strategy)
    sparsecores = _num_sc_per_device(num_sc_per_device)
    packed = _packing.pack(
        specs,
        list(map(_batch_of, specs, ids)),
        ids,
        weights,
        local_device_count,
        global_device_count,
        num_sc_per_device=sparsecores,
        any_id=False,
        has_leading_dimension=has_leading_dimension,
        allow_id_dropping=allow_id_dropping,
        batch_number=batch_number,
        enable_minibatching=enable_minibatching,
        all_reduce_interface=all_reduce_interface,
    )
    return _as_preprocessed(packed)


def _batch_of(feature: embedding_spec.FeatureSpec, ids: Any) -> int:
    if isinstance(ids, embax.Ragged):
        return len(ids.row_splits) - 1
    if isinstance(ids, embax.SparseCoo):
        return int(ids.dense_shape[0])
    try:
        return len(ids)
    except TypeError:
        raise ValueError(
            f"Feature {feature.name!r}: its ids are a {type(ids).__name__}; they must be an array."
        ) from None


def preprocess_sparse_dense_matmul_input_from_sparse_tensor(
    indices: Any,
    values: Any,
    dense_shapes: Any,
    feature_specs: Any,
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int | None = None,
    sharding_strategy: str = "MOD",
    has_leading_dimension: bool = False,
    allow_id_dropping: bool = False,
    batch_number: int = 0,
    enable_minibatching: bool = False,
    all_reduce_interface: Any = None,
) -> tuple[PreprocessedInput, SparseDenseMatmulInputStats]:
    """Packs a batch of sparse ids, all of weight 1.

    Args:
        indices: a tree like `feature_specs` of integer[n, 2] of (sample, position).
        values: likewise of integer[n] ids.
        dense_shapes: likewise of (batch, width).
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
    trees = {"indices": indices, "values": values, "dense_shapes": dense_shapes}
    leaves = [_leaves_like(tree, feature_specs, name, "feature_specs") for name, tree in trees.items()]
    specs = _placement.feature_leaves(feature_specs)
    sharding_strategy_to_enum(sharding_strategy)
    ids = list(map(embax.SparseCoo, *leaves))
    packed = _packing.pack(
        specs,
        list(map(_batch_of, specs, ids)),
        ids,
        None,
        local_device_count,
        global_device_count,
        num_sc_per_device=_num_sc_per_device(num_sc_per_device),
        any_id=False,
        has_leading_dimension=has_leading_dimension,
        allow_id_dropping=allow_id_dropping,
        batch_number=batch_number,
        enable_minibatching=enable_minibatching,
        all_reduce_interface=all_reduce_interface,
    )
    return _as_preprocessed(packed)


def eval_preprocess_sparse_dense_matmul_input_shape(
    feature_specs: Any,
    local_device_count: int,
    global_device_count: int,
    *,
    num_sc_per_device: int | None = None,
    has_leading_dimension: bool = False,
    enable_minibatching: bool = False,
) -> PreprocessedInput:
    """The shapes of a packed batch, without data. Those of its arrays are flat, with a leading dimension or without.

    Args:
        feature_specs: the placed feature tree.
        local_device_count: devices of this host.
        global_device_count: devices of all hosts.
        num_sc_per_device: SparseCores of each; None means those of the first device.
        has_leading_dimension: whether `num_minibatches` has a second dimension.
        enable_minibatching: whether there may be several minibatches.

    Returns:
        A batch of `jax.ShapeDtypeStruct`.
    """
    shapes = _packing.eval_shape(
        _placement.feature_leaves(feature_specs),
        local_device_count,
        global_device_count,
        num_sc_per_device=_num_sc_per_device(num_sc_per_device),
        has_leading_dimension=has_leading_dimension,
        enable_minibatching=enable_minibatching,
    )
    return PreprocessedInput(SparseDenseMatmulInput(*shapes[:4]), shapes.num_minibatches)


def _unflatten(feature_specs: Any, stacks: Mapping[str, _matmul.Stack], parts: Mapping[str, Sequence[Any]]) -> Any:
    """A tree like the specs, from the parts of the features of each stack."""
    by_leaf = {
        leaf: part
        for name, stack in stacks.items()
        for (leaf, _), part in zip(stack.features, parts[name], strict=True)
    }
    structure = jax.tree.structure(feature_specs, is_leaf=_is_feature)
    return structure.unflatten([by_leaf[leaf] for leaf in range(len(by_leaf))])


def _primitive(name: str) -> Any:
    return getattr(importlib.import_module(f"{_PRIMITIVES}.{name}"), f"tpu_{name}_primitive")


def _sparsecores_parameter(sparsecores: int) -> dict[str, int]:
    """What the stacking primitives are told beside the reference's parameters, where shapes do not tell it."""
    return {} if sparsecores == utils.num_sparsecores_per_device() else {"num_sparsecores_per_device": sparsecores}


def unstack_embedding_activations(
    activations: Mapping[str, jax.Array],
    feature_specs: Any,
    global_device_count: int,
    num_sc_per_device: int,
    use_activation_unstack_primitive: bool = False,
) -> Any:
    """The activations of features from those of stacks, on a device.

    Args:
        activations: float32[samples of the stack on the device, dim] by stack.
        feature_specs: the placed feature tree.
        global_device_count: devices of all hosts.
        num_sc_per_device: SparseCores of each.
        use_activation_unstack_primitive: whether the primitive of that name does it.

    Returns:
        A tree like `feature_specs` of float32[batch on the device, output dim].

    Raises:
        ValueError: a feature is wider than its table, or the samples are not those of the features.
    """
    stacks = _matmul.stacks_of(feature_specs)
    parts = {}
    for name, stack in stacks.items():
        if use_activation_unstack_primitive:
            parts[name] = _primitive("sparse_dense_matmul_activation_unstack").bind(
                activations[name],
                per_feature_batch_sizes=tuple(
                    _placement.sample_count(feature) // global_device_count for _, feature in stack.features
                ),
                per_feature_dims=tuple(feature.table_spec.embedding_dim for _, feature in stack.features),
                **_sparsecores_parameter(num_sc_per_device),
            )
        else:
            parts[name] = _matmul.unstack(stack, activations[name], global_device_count, num_sc_per_device)
    return _unflatten(feature_specs, stacks, parts)


def _arrays_of(
    preprocessed_inputs: PreprocessedInput | SparseDenseMatmulInput,
    stacks: Mapping[str, Any],
    variables: Mapping[str, Any],
    enable_minibatching: bool,
) -> tuple[dict[str, list[Any]], Any]:
    """The packed arrays of each stack, and the number of minibatches, None without minibatching."""
    if isinstance(preprocessed_inputs, SparseDenseMatmulInput):
        preprocessed_inputs = PreprocessedInput(preprocessed_inputs)
    arrays = preprocessed_inputs.sparse_dense_matmul_input
    expected = set(stacks)
    for what, given in (("preprocessed inputs", arrays.lhs_row_pointers), ("embedding variables", variables)):
        if set(given) != expected:
            raise ValueError(
                f"The {what} are of the stacks {sorted(given)}, the feature specs have {sorted(expected)}; they must be the same."
            )
    number = preprocessed_inputs.num_minibatches if enable_minibatching else None
    return {name: [array[name] for array in arrays] for name in stacks}, number


def look_up_stacks(
    preprocessed_inputs: PreprocessedInput | SparseDenseMatmulInput,
    embedding_variables: Mapping[str, Any],
    feature_specs: Any,
    *,
    devices: int,
    sparsecores: int,
    enable_minibatching: bool,
    axis_name: Any = None,
) -> dict[str, jax.Array]:
    """`tpu_sparse_dense_matmul` without unstacking, where the axis of the mesh may be given that tables are sharded over."""
    stacks = _matmul.stacks_of(feature_specs)
    arrays, number = _arrays_of(preprocessed_inputs, stacks, embedding_variables, enable_minibatching)
    return {
        name: _matmul.look_up(
            stack, arrays[name], number, embedding_variables[name][0], devices, sparsecores, axis_name
        )
        for name, stack in stacks.items()
    }


def tpu_sparse_dense_matmul(
    preprocessed_inputs: PreprocessedInput | SparseDenseMatmulInput,
    embedding_variables: Mapping[str, EmbeddingVariables],
    feature_specs: Any,
    *,
    global_device_count: int,
    sharding_strategy: str = "MOD",
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
    perform_unstacking: bool = True,
    use_activation_unstack_primitive: bool = False,
) -> Any:
    """Looks up a packed batch, on one device: inside `jax.shard_map` or `jax.pmap`, or anywhere if it is the only one.

    Args:
        preprocessed_inputs: the part of the packed batch of this device.
        embedding_variables: of each stack the rows of this device; only the table is read.
        feature_specs: the placed feature tree.
        global_device_count: devices that tables are sharded over.
        sharding_strategy: "MOD".
        num_sc_per_device: SparseCores of each; None means those of the first device.
        enable_minibatching: whether the batch was packed so.
        perform_unstacking: whether the activations are returned by feature, and not by stack.
        use_activation_unstack_primitive: see `unstack_embedding_activations`.

    Returns:
        A tree like `feature_specs` of float32[batch on the device, output dim], or by stack float32[samples, dim].

    Raises:
        ValueError: inputs, variables and specs have different stacks, or sizes that do not fit.
    """
    sharding_strategy_to_enum(sharding_strategy)
    sparsecores = _num_sc_per_device(num_sc_per_device)
    activations = look_up_stacks(
        preprocessed_inputs,
        embedding_variables,
        feature_specs,
        devices=global_device_count,
        sparsecores=sparsecores,
        enable_minibatching=enable_minibatching,
    )
    if not perform_unstacking:
        return activations
    return unstack_embedding_activations(
        activations, feature_specs, global_device_count, sparsecores, use_activation_unstack_primitive
    )


def stack_embedding_gradients(
    activation_gradients: Any,
    feature_specs: Any,
    num_sc_per_device: int,
    global_device_count: int | None = None,
    use_gradient_stacking_primitive: bool = False,
) -> dict[str, jax.Array]:
    """The gradients of stacks from those of features: the transpose of `unstack_embedding_activations`.

    Args:
        activation_gradients: a tree like `feature_specs` of float32[batch on the device, ...].
        feature_specs: the placed feature tree.
        num_sc_per_device: SparseCores of a device.
        global_device_count: devices of all hosts, which the primitive needs.
        use_gradient_stacking_primitive: whether the primitive of that name does it.

    Returns:
        By stack float32[samples on the device, dim].

    Raises:
        ValueError: the trees differ, or `global_device_count` is needed and None.
    """
    gradients = _leaves_like(activation_gradients, feature_specs, "activation_gradients", "feature_specs")
    stacked = {}
    for name, stack in _matmul.stacks_of(feature_specs).items():
        if not use_gradient_stacking_primitive:
            stacked[name] = _matmul.stack_up(stack, gradients, num_sc_per_device)
            continue
        if global_device_count is None:
            raise ValueError("global_device_count must be given with use_gradient_stacking_primitive=True.")
        stacked[name] = _primitive("sparse_dense_matmul_gradient_stack").bind(
            *_matmul.prepare_gradients(stack, gradients),
            stacked_batch_size=stack.sample_count // global_device_count,
            stacked_feature_dim=stack.spec.stack_embedding_dim,
            **_sparsecores_parameter(num_sc_per_device),
        )
    return stacked


def tpu_sparse_dense_matmul_grad(
    activation_gradients: Any,
    preprocessed_inputs: PreprocessedInput | SparseDenseMatmulInput,
    embedding_variables: Mapping[str, Any],
    feature_specs: Any,
    *,
    global_device_count: int | None = None,
    sharding_strategy: str = "MOD",
    label: str = "",
    step: int | jax.Array | None = None,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
    perform_stacking: bool = True,
    use_gradient_stacking_primitive: bool = False,
    embedding_var_limits: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> dict[str, Any]:
    """Takes one optimizer step on the rows that a packed batch touched, on one device (see `tpu_sparse_dense_matmul`).

    Under `jax.jit` with the variables donated, tables and slots are updated in place. Where the gradients do not depend on
    the activations (a loss linear in them) XLA may copy the tables, since it does not see that the lookup comes first;
    `embax.apply_gradients` can be told.

    Args:
        activation_gradients: a tree like `feature_specs` of float32[batch on the device, ...]; without stacking, by stack.
        preprocessed_inputs: the batch that was looked up.
        embedding_variables: of each stack the rows of this device: a tree of the table and its slots, in this order.
        feature_specs: the placed feature tree.
        global_device_count: devices that tables are sharded over; None means the devices that JAX has.
        sharding_strategy: "MOD".
        label: names the computation.
        step: the number of the step, for schedules and for optimizers that depend on it.
        num_sc_per_device: SparseCores of each device; None means those of the first one.
        enable_minibatching: whether the batch was packed so.
        perform_stacking: whether the gradients are given by feature, and not by stack.
        use_gradient_stacking_primitive: see `stack_embedding_gradients`.
        embedding_var_limits: by stack `(min, max)`, either of which may be None: new rows of the table are clipped to that.

    Returns:
        By stack the new variables, a tree like the old ones.

    Raises:
        ValueError: gradients, inputs, variables and specs do not fit, or the optimizer lacks a row rule or the step.
        KeyError: `embedding_var_limits` lacks a stack whose optimizer is not custom.
    """
    sharding_strategy_to_enum(sharding_strategy)
    sparsecores = _num_sc_per_device(num_sc_per_device)
    devices = jax.device_count() if global_device_count is None else global_device_count
    gradients = activation_gradients
    if perform_stacking:
        gradients = stack_embedding_gradients(
            activation_gradients, feature_specs, sparsecores, devices, use_gradient_stacking_primitive
        )
    with jax.named_scope(label or "sparse_dense_matmul_grad"):
        return update_stacks(
            gradients,
            preprocessed_inputs,
            embedding_variables,
            feature_specs,
            devices=devices,
            sparsecores=sparsecores,
            enable_minibatching=enable_minibatching,
            step=step,
            embedding_var_limits=embedding_var_limits,
        )


def update_stacks(
    gradients: Mapping[str, jax.Array],
    preprocessed_inputs: PreprocessedInput | SparseDenseMatmulInput,
    embedding_variables: Mapping[str, Any],
    feature_specs: Any,
    *,
    devices: int,
    sparsecores: int,
    enable_minibatching: bool,
    step: int | jax.Array | None = None,
    embedding_var_limits: Mapping[str, tuple[float | None, float | None]] | None = None,
    axis_name: Any = None,
    activations: Mapping[str, jax.Array] | None = None,
) -> dict[str, Any]:
    """`tpu_sparse_dense_matmul_grad` of stacked gradients, where more may be given.

    Args:
        gradients: by stack float32[samples on the device, dim].
        preprocessed_inputs: see `tpu_sparse_dense_matmul_grad`, as all that follow.
        embedding_variables: of each stack the rows of this device.
        feature_specs: the placed feature tree.
        devices: devices that tables are sharded over.
        sparsecores: SparseCores of each.
        enable_minibatching: whether the batch was packed so.
        step: the number of the step.
        embedding_var_limits: what new rows are clipped to.
        axis_name: the axis of the mesh that tables are sharded over, or a tuple of axes; None where these can be told.
        activations: what `look_up_stacks` returned in the same jitted step, so that XLA sees that the lookup comes first.
    """
    stacks = _matmul.stacks_of(feature_specs)
    arrays, number = _arrays_of(preprocessed_inputs, stacks, embedding_variables, enable_minibatching)
    return {
        name: _matmul.update(
            stack,
            arrays[name],
            number,
            gradients[name],
            embedding_variables[name],
            devices,
            sparsecores,
            step,
            _limits_of(name, stack.spec.optimizer, embedding_var_limits),
            axis_name,
            () if activations is None else (activations[name],),
        )
        for name, stack in stacks.items()
    }


def _limits_of(name: str, optimizer: embedding_spec.OptimizerSpec, limits: Mapping[str, Any] | None) -> Any:
    if limits is None or (isinstance(optimizer, embedding_spec.CustomOptimizerSpec) and name not in limits):
        return None, None
    return limits[name]


def _checked_axis(global_sharding: NamedSharding, bypass_mesh_check: bool) -> Any:
    """The axis, or tuple of axes, that tables are sharded over."""
    spec: Any = tuple(global_sharding.spec)
    mesh: Any = global_sharding.mesh
    if len(spec) not in (2, 3) or spec[0] is None or any(part is not None for part in spec[1:]):
        axis = mesh.axis_names[0] if len(mesh.axis_names) == 1 else tuple(mesh.axis_names)
        raise ValueError(
            f"PartitionSpec of the global sharding either needs to be in the format {PartitionSpec(axis, None, None)} or "
            f"{PartitionSpec(axis, None)}. Got {global_sharding.spec}"
        )
    if not bypass_mesh_check and list(mesh.devices.flat) != jax.devices():
        raise ValueError(
            "global_sharding needs to be created with default device order from jax.devices(), but its mesh has "
            f"{list(mesh.devices.flat)} and jax.devices() are {jax.devices()}. Pass bypass_mesh_check=True to use it as it is."
        )
    return spec[0]


def init_embedding_variables(
    rng: jax.Array,
    table_specs: Any,
    global_sharding: NamedSharding,
    num_sparsecore_per_device: int | None = None,
    bypass_mesh_check: bool = False,
) -> dict[str, EmbeddingVariables]:
    """The first values of all tables and slots. They depend on the number of devices and SparseCores.

    Each SparseCore of each stack has a key of its own, with which the initializers make, table after table, what it holds.

    Args:
        rng: a PRNG key.
        table_specs: tree of tables, stacked or not.
        global_sharding: over which devices tables are sharded: `P(axis, None)`, or `P(axis, None, None)` for arrays with a
            leading dimension of the devices, as `jax.pmap` takes them. `axis` may be a tuple.
        num_sparsecore_per_device: SparseCores of each; None means those of the first device.
        bypass_mesh_check: whether the mesh may have other devices than `jax.devices()`, or another order.

    Returns:
        For each stack its variables, float32[rows, dim] or float32[devices, rows of a device, dim], with this sharding.

    Raises:
        ValueError: the partition spec or the mesh is another.
    """
    axis = _checked_axis(global_sharding, bypass_mesh_check)
    sparsecores = _num_sc_per_device(num_sparsecore_per_device)
    mesh: Any = global_sharding.mesh
    spec = global_sharding.spec
    over: Any = TableMesh.checked(mesh, axis)
    stacks = table_stacking.get_table_stacks(table_specs)
    num_keys = over.num_devices * sparsecores
    variables = {}
    for number, (name, tables) in enumerate(stacks.items()):
        tables = sorted(tables, key=lambda table: table.setting_in_stack.row_offset_in_shard)
        slots = tables[0].optimizer.slot_variables_initializers()

        def on_device(
            keys: jax.Array, tables: list[embedding_spec.TableSpec] = tables, slots: Any = slots
        ) -> EmbeddingVariables:
            def make(initializer_of: Callable[[embedding_spec.TableSpec], Any]) -> jax.Array:
                def on_sparsecore(key: jax.Array) -> jax.Array:
                    parts = []
                    for table in tables:
                        setting = table.setting_in_stack
                        shape = (setting.padded_vocab_size // num_keys, setting.padded_embedding_dim)
                        parts.append(jnp.asarray(initializer_of(table)(key, shape), jnp.float32))
                    return jnp.concatenate(parts)

                # One after another, so that what initializers need beside their result is small.
                array = jax.lax.map(on_sparsecore, keys)
                array = array.reshape(-1, array.shape[-1])
                return array if len(spec) == 2 else array[None]

            table = make(lambda table: table.initializer)
            return EmbeddingVariables(table, jax.tree.map(lambda slot: make(lambda _: slot), slots))

        def init(
            rng: jax.Array, number: int = number, on_device: Callable[..., EmbeddingVariables] = on_device
        ) -> EmbeddingVariables:
            keys = jax.random.split(rng, num_keys * len(stacks))[number * num_keys : (number + 1) * num_keys]
            return over.shard_map(on_device, (PartitionSpec(axis),), spec)(keys)

        variables[name] = jax.jit(init, out_shardings=utils.embedding_table_format(mesh, spec))(rng)
    return variables


def update_preprocessing_parameters(
    feature_specs: Any, updated_params: SparseDenseMatmulInputStats, num_sc_per_device: int
) -> None:
    """Sets the limits of placed stacks to what statistics say, in place: see `embax.update_preprocessing_parameters`.

    Statistics of stacks that the specs do not have are left out.
    """
    stacks = get_stacked_table_specs(feature_specs)
    known = {
        field: {name: values for name, values in getattr(updated_params, field).items() if name in stacks}
        for field in ("max_ids_per_partition", "max_unique_ids_per_partition", "required_buffer_size_per_sc")
    }
    changes = changed_limits(SparseDenseMatmulInputStats(**known), stacks, num_sc_per_device)
    new = {name: stacks[name].replace(**fields) for name, fields in changes.items()}
    for feature in _placement.feature_leaves(feature_specs):
        table = feature.table_spec
        table._stacked_table_spec = new.get(table.stacked_table_spec.stack_name, table.stacked_table_spec)
