"""Specs, packing, lookups and updates under the reference's names."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import embax
from embax._stacking import stack as _stack
from embax._stacking.parameters import changed_limits
from embax._stacking.stack import get_default_limits as get_default_limits
from embax._variables import EmbeddingVariables as EmbeddingVariables
from embax.compat import _matmul, _packing, _placement
from embax.compat._batches import PreprocessedInput as PreprocessedInput
from embax.compat._batches import SparseDenseMatmulInput as SparseDenseMatmulInput
from embax.compat._batches import SparseDenseMatmulInputStats as SparseDenseMatmulInputStats
from embax.compat._initial_values import init_embedding_variables as init_embedding_variables
from embax.compat._peers import PeerAllReduce
from embax.compat._placement import checked_num_sc
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


class EmbeddingVariablesInitializer(NamedTuple):
    """The initializers of a table and its slots."""

    table: Any
    slot: Any


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
    sparsecores = checked_num_sc(num_sc_per_device)

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
        checked_num_sc(num_sc_per_device),
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
        global_device_count, checked_num_sc(num_sc_per_device), enable_minibatching
    )


def compute_theoretical_max_coo_buffer_size(
    max_ids_per_partition: int,
    global_device_count: int,
    num_sc_per_device: int | None = None,
    enable_minibatching: bool = False,
) -> int:
    """See `embax.compute_theoretical_max_coo_buffer_size`."""
    return pybind_input_preprocessing.compute_theoretical_max_coo_buffer_size(
        max_ids_per_partition, global_device_count, checked_num_sc(num_sc_per_device), enable_minibatching
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
        checked_num_sc(num_sc_per_device),
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
    sparsecores = checked_num_sc(num_sc_per_device)
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
        num_sc_per_device=checked_num_sc(num_sc_per_device),
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
        num_sc_per_device=checked_num_sc(num_sc_per_device),
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
    sparsecores = checked_num_sc(num_sc_per_device)
    activations = _matmul.look_up_stacks(
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
    sparsecores = checked_num_sc(num_sc_per_device)
    devices = jax.device_count() if global_device_count is None else global_device_count
    gradients = activation_gradients
    if perform_stacking:
        gradients = stack_embedding_gradients(
            activation_gradients, feature_specs, sparsecores, devices, use_gradient_stacking_primitive
        )
    with jax.named_scope(label or "sparse_dense_matmul_grad"):
        return _matmul.update_stacks(
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
