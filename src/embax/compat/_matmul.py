"""Lookups and updates of stacks, whose arrays the reference keeps apart: one at a time, by the functions of embax."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import embax
from embax._matmul import checked_limits, lookup_features, update_features
from embax._ops.unstack import join_features, split_features
from embax._preprocess.buffers import MAX_MINIBATCHES, PreprocessedInput, make_layout
from embax._stacking.plan import FeaturePlan, Plan, RowPlacement, StackPlan, TablePlan
from embax.compat import _batches
from embax.compat._batches import SparseDenseMatmulInput, arrays_of
from embax.compat._placement import feature_leaves, sample_count, stack_of
from embax.compat.sparsecore.lib.nn.embedding_spec import (
    CustomOptimizerSpec,
    FeatureSpec,
    OptimizerSpec,
    StackedTableSpec,
)


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack, and its features with their numbers among the leaves of the feature tree, in the order of their samples."""

    spec: StackedTableSpec
    features: tuple[tuple[int, FeatureSpec], ...]

    @property
    def sample_count(self) -> int:
        """Samples of all features in a global batch."""
        return sum(sample_count(feature) for _, feature in self.features)

    @property
    def width(self) -> int:
        """Columns of its tables, where all have the same; else those of the stack."""
        widths = {feature.table_spec.embedding_dim for _, feature in self.features}
        return widths.pop() if len(widths) == 1 else self.spec.stack_embedding_dim

    def check_samples(self, devices: int, sparsecores: int) -> None:
        """Raises a ValueError unless the batches divide by the SparseCores."""
        for _, feature in self.features:
            if (batch := sample_count(feature)) % (devices * sparsecores):
                raise ValueError(
                    f"Feature {feature.name!r} has a batch of {batch} by its output_shape, which does not divide by {devices} "
                    f"devices of {sparsecores} SparseCores."
                )


def stacks_of(feature_specs: Any) -> dict[str, Stack]:
    """The stacks of a feature tree by name.

    Raises:
        ValueError: a table is not placed.
    """
    members: dict[str, list[tuple[int, FeatureSpec]]] = {}
    specs: dict[str, StackedTableSpec] = {}
    for number, feature in enumerate(feature_leaves(feature_specs)):
        spec = stack_of(feature.table_spec)
        specs.setdefault(spec.stack_name, spec)
        members.setdefault(spec.stack_name, []).append((number, feature))

    def row_offset(member: tuple[int, FeatureSpec]) -> int:
        place = member[1]._id_transformation
        return place.row_offset if place else 0

    return {name: Stack(specs[name], tuple(sorted(members[name], key=row_offset))) for name in specs}


def _plan(stack: Stack, table: jax.Array, devices: int, sparsecores: int, optimizer: embax.OptimizerSpec) -> Plan:
    """A plan of this stack alone, with one feature of all its samples over one table of all its rows."""
    rows, dim = table.shape[0] * devices, table.shape[1]
    spec = embax.StackedTableSpec(
        stack_name=stack.spec.stack_name,
        stack_vocab_size=rows,
        stack_embedding_dim=dim,
        optimizer=optimizer,
        combiner=stack.spec.combiner,
        total_sample_count=stack.sample_count,
        max_ids_per_partition=stack.spec.max_ids_per_partition,
        max_unique_ids_per_partition=stack.spec.max_unique_ids_per_partition,
        quantization_config=stack.spec.quantization_config,
        num_devices=devices,
        num_sparsecores_per_device=sparsecores,
    )
    whole = TablePlan(spec.stack_name, min(stack.width, dim), RowPlacement(rows, 0, 0))
    feature = FeaturePlan(spec.stack_name, 0, whole, dim, row_offset=0, col_offset=0, col_shift=0)
    return Plan((StackPlan(spec, (whole,), (feature,)),), devices, sparsecores, 1)


def _packed(stack: Stack, plan: Plan, arrays: Sequence[Any], num_minibatches: Any) -> PreprocessedInput:
    """The arrays of a stack as a batch of `plan`; `num_minibatches` is None without minibatching."""
    spec = stack.spec
    limits = np.array([[spec.max_ids_per_partition, spec.max_unique_ids_per_partition, arrays[1].size]], np.int64)
    batch = stack.sample_count // plan.num_devices
    layout = make_layout(plan, (batch,), limits, max_minibatches=0 if num_minibatches is None else MAX_MINIBATCHES)
    if num_minibatches is not None:
        num_minibatches = jnp.asarray(num_minibatches).reshape(-1)[:1].astype(jnp.int32)
    return PreprocessedInput(*arrays, layout=layout, num_minibatches=num_minibatches)


def _check_table(name: str, table: Any, num_sparsecores_per_device: int) -> None:
    shape = getattr(table, "shape", ())
    if len(shape) != 2 or shape[0] % num_sparsecores_per_device:
        raise ValueError(
            f"Stack {name!r} has a table of shape {shape}; it must be [rows, dim], with rows that divide by the "
            f"{num_sparsecores_per_device} SparseCores of a device."
        )


def _axis(devices: int, axis_name: Any) -> Any:
    """The axes that tables are sharded over: those given, or where `jax.shard_map` has several those of so many devices.

    Raises:
        ValueError: they cannot be told.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(mesh.manual_axes)
    if devices == 1 or axis_name is not None or len(axes) < 2:
        return axis_name
    if math.prod(mesh.shape[axis] for axis in axes) == devices:
        return axes
    matching = [axis for axis in axes if mesh.shape[axis] == devices]
    if len(matching) != 1:
        raise ValueError(
            f"The tables are sharded over {devices} devices, and which of the axes {axes} of jax.shard_map, "
            f"of sizes {tuple(mesh.shape[axis] for axis in axes)}, these are cannot be told. Give it one axis, or all of theirs."
        )
    return matching[0]


def _backend(stack: Stack) -> contextlib.AbstractContextManager:
    """Quantized rows are of 8 bits in JAX operations, and on a TPU; the native kernels round them in float32."""
    if stack.spec.quantization_config is None or jax.default_backend() == "tpu":
        return contextlib.nullcontext()
    return embax.use_backend("portable")


def look_up(
    stack: Stack,
    arrays: Sequence[Any],
    num_minibatches: Any,
    table: jax.Array,
    devices: int,
    sparsecores: int,
    axis_name: Any = None,
) -> jax.Array:
    """The activations of a stack on a device: float32[samples, dim].

    Args:
        stack: the stack.
        arrays: its row pointers, embedding ids, sample ids and gains.
        num_minibatches: None without minibatching.
        table: float32[rows on the device, dim].
        devices: devices that the table is sharded over.
        sparsecores: SparseCores of each.
        axis_name: the axis of the mesh that it is sharded over, or a tuple of axes; None where these can be told.
    """
    stack.check_samples(devices, sparsecores)
    _check_table(stack.spec.stack_name, table, sparsecores)
    plan = _plan(stack, table, devices, sparsecores, embax.SGDOptimizerSpec())
    packed = _packed(stack, plan, arrays, num_minibatches)
    with _backend(stack):
        variables: Any = {stack.spec.stack_name: (table,)}
        activations, _ = lookup_features(packed, variables, plan, _axis(devices, axis_name))
    return activations[0]


def update(
    stack: Stack,
    arrays: Sequence[Any],
    num_minibatches: Any,
    gradient: jax.Array,
    variables: Any,
    devices: int,
    sparsecores: int,
    step: int | jax.Array | None,
    limits: tuple[float | None, float | None],
    axis_name: Any = None,
    after: Sequence[jax.Array] = (),
) -> Any:
    """The new variables of a stack on a device, a tree like the old ones.

    Args:
        stack: the stack.
        arrays: its row pointers, embedding ids, sample ids and gains.
        num_minibatches: None without minibatching.
        gradient: float32[samples, dim].
        variables: tree of the table and its slots, in this order.
        devices: devices that the table is sharded over.
        sparsecores: SparseCores of each.
        step: the number of the step, or None.
        limits: what new rows of the table are clipped to.
        axis_name: see `look_up`.
        after: the activations, if XLA is to see that their lookup comes first.
    """
    stack.check_samples(devices, sparsecores)
    name, table = stack.spec.stack_name, jax.tree.leaves(variables)[0]
    _check_table(name, table, sparsecores)
    plan = _plan(stack, table, devices, sparsecores, stack.spec.optimizer.as_embax())
    packed = _packed(stack, plan, arrays, num_minibatches)
    row_limits = checked_limits({name: limits}, plan)
    axis = _axis(devices, axis_name)
    return update_features([gradient], packed, {name: variables}, plan, step, after, row_limits, axis)[name]


def look_up_stacks(
    preprocessed_inputs: _batches.PreprocessedInput | SparseDenseMatmulInput,
    embedding_variables: Mapping[str, Any],
    feature_specs: Any,
    *,
    devices: int,
    sparsecores: int,
    enable_minibatching: bool,
    axis_name: Any = None,
) -> dict[str, jax.Array]:
    """`tpu_sparse_dense_matmul` without unstacking, where the axis of the mesh may be given that tables are sharded over."""
    stacks = stacks_of(feature_specs)
    arrays, number = arrays_of(preprocessed_inputs, stacks, embedding_variables, enable_minibatching)
    return {
        name: look_up(stack, arrays[name], number, embedding_variables[name][0], devices, sparsecores, axis_name)
        for name, stack in stacks.items()
    }


def update_stacks(
    gradients: Mapping[str, jax.Array],
    preprocessed_inputs: _batches.PreprocessedInput | SparseDenseMatmulInput,
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
    stacks = stacks_of(feature_specs)
    arrays, number = arrays_of(preprocessed_inputs, stacks, embedding_variables, enable_minibatching)
    return {
        name: update(
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


def _limits_of(name: str, optimizer: OptimizerSpec, limits: Mapping[str, Any] | None) -> Any:
    if limits is None or (isinstance(optimizer, CustomOptimizerSpec) and name not in limits):
        return None, None
    return limits[name]


def unstack(stack: Stack, activations: jax.Array, devices: int, sparsecores: int) -> list[jax.Array]:
    """The activations of the features of a stack, in the order of its samples: float32[batch, output dim] on a device."""
    stack.check_samples(devices, sparsecores)
    for _, feature in stack.features:
        if feature.output_shape[-1] > feature.table_spec.embedding_dim:
            raise ValueError(
                f"Feature {feature.name!r}: output_shape is {tuple(feature.output_shape)}, wider than the "
                f"{feature.table_spec.embedding_dim} columns of table {feature.table_spec.name!r}."
            )
    batches = [sample_count(feature) // devices for _, feature in stack.features]
    if activations.shape[0] != sum(batches):
        raise ValueError(
            f"Stack {stack.spec.stack_name!r} has {activations.shape[0]} activations; its features have {sum(batches)} samples "
            f"on each of {devices} devices."
        )
    dims = [feature.output_shape[-1] for _, feature in stack.features]
    return split_features(activations, batches, dims, sparsecores)


def prepare_gradients(stack: Stack, gradients: Sequence[jax.Array]) -> list[jax.Array]:
    """The gradients of the features of a stack as matrices, in the order of its samples; `gradients` are by leaf."""
    matrices = []
    for leaf, feature in stack.features:
        width = min(feature.output_shape[-1], feature.table_spec.embedding_dim)
        matrices.append(gradients[leaf].reshape(-1, width))
    return matrices


def stack_up(stack: Stack, gradients: Sequence[jax.Array], sparsecores: int) -> jax.Array:
    """The gradient of a stack from those of its features by leaf, with zeros where they have no columns."""
    matrices = prepare_gradients(stack, gradients)
    batches = [matrix.shape[0] for matrix in matrices]
    for (_, feature), batch in zip(stack.features, batches, strict=True):
        if batch % sparsecores:
            raise ValueError(
                f"Feature {feature.name!r}: its gradient has {batch} samples, which do not divide by {sparsecores} SparseCores."
            )
    return join_features(matrices, stack.spec.stack_embedding_dim, sparsecores)
