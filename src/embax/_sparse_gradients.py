"""Gradients of tables as the rows that a batch touched: to be looked at, changed or kept before they are applied."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from embax._checks import INT32_MAX
from embax._matmul import (
    check_variables,
    checked_limits,
    feature_structure,
    flatten_like,
    gradients_of_stacks,
    ordered_after,
)
from embax._mesh import TableMesh
from embax._ops.geometry import make_geometry, update_geometry
from embax._ops.row_sums import group, sum_groups
from embax._ops.row_update import RowLimits
from embax._ops.update import apply_rows
from embax._preprocess.buffers import PreprocessedInput
from embax._refs import has_refs, inside_jit, read, write
from embax._stacking.plan import Plan, make_plan
from embax._types import Array, Float32
from embax._variables import EmbeddingVariables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseGradient:
    """The gradient of some rows of one stack. A pytree.

    Args:
        rows: int32[..., n], rows of the stack's table on this device; 2**31 - 1 where there is none. With specs that were
            placed for one device, `embax.logical_row_ids` tells what they hold.
        values: float32[..., n, dim], the gradient of each; zeros where there is no row.
    """

    rows: jax.Array
    values: jax.Array

    def scale(self, factor: Any) -> "SparseGradient":
        """The gradient times a number, such as the one that clips it to a norm."""
        return SparseGradient(self.rows, self.values * jnp.asarray(factor, self.values.dtype))


def sparse_gradients(
    gradients: Any,
    packed: PreprocessedInput,
    *,
    specs: Any,
    activations: Any = None,
    axis_name: Any = None,
) -> dict[str, SparseGradient]:
    """The gradients of the rows that a packed batch touched, each row once; the tables stay as they are.

    What `embax.apply_gradients` does is this and `embax.apply_sparse_gradients` behind it.

    With specs that were placed for several devices it is called inside `jax.shard_map`, like `embax.lookup`; each device gets
    the rows that it owns, with the sums over all devices. It has room for all that the limits of the batch allow.

    Args:
        gradients: gradient with respect to the activations: float32[batch, output_dim] of each feature, in the structure of
            `specs`.
        packed: the batch that was looked up.
        specs: pytree of placed `FeatureSpec`.
        activations: as in `embax.apply_gradients`, where the update comes in the same jitted step.
        axis_name: as in `embax.lookup`.

    Returns:
        For each stack its `SparseGradient`, with distinct ascending rows.

    Raises:
        ValueError: gradients, activations or batch do not belong to the specs.

    Example:
        >>> sparse = embax.sparse_gradients(gradients, packed, specs=specs, activations=activations)
        >>> norm = embax.global_norm(sparse)
        >>> sparse = {name: one.scale(jnp.minimum(1.0, 1.0 / norm)) for name, one in sparse.items()}
        >>> variables = embax.apply_sparse_gradients(sparse, variables, specs=specs)
    """
    plan, structure = make_plan(specs), feature_structure(specs)
    make_geometry(plan, packed)  # Checks the batch, whose sizes come next.
    leaves = flatten_like(gradients, structure, "gradients")
    after = ordered_after(activations, packed, plan, structure)
    found = gradients_of_stacks(leaves, packed, plan, axis_name, after)
    return {name: SparseGradient(*pair) for name, pair in found.items()}


def sum_sparse_gradients(sparse: Sequence[Mapping[str, SparseGradient]]) -> dict[str, SparseGradient]:
    """The sum of the gradients of several batches, such as microbatches, with each row once.

    Args:
        sparse: what `embax.sparse_gradients` returned for each; arrays may have leading dimensions, as `jax.lax.scan` stacks
            them.

    Returns:
        For each stack its gradient: distinct ascending rows, as many as all gradients have room for.

    Raises:
        ValueError: there is none, or they are of different stacks.
    """
    if not sparse or any(set(one) != set(sparse[0]) for one in sparse):
        raise ValueError(
            f"The sparse gradients are of the stacks {[sorted(one) for one in sparse]}; give at least one, and all of the same "
            "stacks."
        )
    total = {}
    for name in sparse[0]:
        parts = [_flat(name, one[name]) for one in sparse]
        rows = jnp.concatenate([part.rows for part in parts])
        values = jnp.concatenate([part.values for part in parts])
        if rows.shape[0]:
            grouped = group(jnp.where(rows == INT32_MAX, 1, 0), rows, 1)
            rows, values = grouped.rows, sum_groups(grouped, values[grouped.order])
        total[name] = SparseGradient(rows, values)
    return total


def global_norm(sparse: Mapping[str, SparseGradient], *, axis_name: Any = None) -> Float32[Array, ""]:
    """The Euclidean norm of the gradients of all stacks: the square root of the sum of squares.

    Args:
        sparse: gradients with distinct rows, as `embax.sparse_gradients` and `embax.sum_sparse_gradients` return them.
        axis_name: inside `jax.shard_map` the mesh axis (or a tuple of axes) that tables are sharded over: the norm is that of
            the rows of all devices.
    """
    squares = sum((jnp.sum(jnp.square(one.values)) for one in sparse.values()), start=jnp.zeros((), jnp.float32))
    return jnp.sqrt(squares if axis_name is None else jax.lax.psum(squares, axis_name))


def apply_sparse_gradients(
    sparse: Mapping[str, SparseGradient],
    variables: Mapping[str, EmbeddingVariables],
    *,
    specs: Any,
    step: int | jax.Array | None = None,
    embedding_var_limits: Mapping[str, tuple[float | None, float | None]] | None = None,
) -> dict[str, EmbeddingVariables]:
    """Takes one optimizer step on every row that has a gradient, and on no other.

    Under `jax.jit` with the variables donated, tables and slots are updated in place. Refs are updated in place without donation,
    inside and outside jit.

    Args:
        sparse: the gradients of each stack, or of some; those of a row that is in it several times are added. Arrays may have
            leading dimensions.
        variables: `EmbeddingVariables` of each stack by name, of arrays or of refs; inside `jax.shard_map` those of this device.
        specs: pytree of placed `FeatureSpec`.
        step: the number of the step, for schedules and for optimizers that need it (Adam, F2A).
        embedding_var_limits: as in `embax.apply_gradients`.

    Returns:
        The new variables. With refs, `variables` itself.

    Raises:
        ValueError: gradients or variables do not belong to the specs, or a schedule needs `step`.
    """
    plan = make_plan(specs)
    names = [stack.name for stack in plan.stacks]
    if not isinstance(sparse, Mapping) or (unknown := sorted(set(sparse) - set(names))):
        given = unknown if isinstance(sparse, Mapping) else type(sparse).__name__
        raise ValueError(
            f"The sparse gradients have {given}; they must be a dict by stack, and the stacks are {names}."
        )
    check_variables(variables, plan)
    limits = checked_limits(embedding_var_limits, plan)
    parts = {
        stack.name: _flat(stack.name, sparse[stack.name], stack.shape[1])
        for stack in plan.stacks
        if stack.name in sparse
    }
    if has_refs(variables):
        inside_jit(_apply_to_refs, variables, parts, step, plan=plan, limits=limits)
        return dict(variables)
    return apply_to_stacks(variables, parts, step, plan, limits)


def apply_to_stacks(
    variables: Mapping[str, EmbeddingVariables],
    parts: Mapping[str, SparseGradient],
    step: int | jax.Array | None,
    plan: Plan,
    limits: Sequence[RowLimits],
    after: jax.Array | None = None,
) -> dict[str, EmbeddingVariables]:
    """The variables after one optimizer step on the rows of some stacks; gradients have no leading dimensions.

    The update waits for `after`, if it is given.
    """
    chosen = [number for number, stack in enumerate(plan.stacks) if stack.name in parts]
    names = [plan.stacks[number].name for number in chosen]
    new = apply_rows(
        [parts[name].rows for name in names],
        [parts[name].values for name in names],
        [tuple(jax.tree.leaves(variables[name])) for name in names],
        () if after is None else [after] * len(names),
        update_geometry(plan, chosen),
        step,
        [limits[number] for number in chosen],
    )
    updated = dict(variables)
    for name, state in zip(names, new, strict=True):
        updated[name] = jax.tree.unflatten(jax.tree.structure(variables[name]), state)
    return updated


def _apply_to_refs(variables: Any, parts: Any, step: Any, *, plan: Plan, limits: tuple[RowLimits, ...]) -> None:
    write(variables, apply_to_stacks(read(variables), parts, step, plan, limits))


def flat_gradient(name: str, one: Any, dim: int, mesh: TableMesh | None) -> SparseGradient:
    """A gradient without leading dimensions, of a mesh or of one device."""
    if mesh is None or getattr(getattr(one, "rows", None), "ndim", 1) == 1:
        return _flat(name, one, dim)
    # The last dimension of rows is the one that is divided over the devices.
    spec = mesh.leading
    parts: Any = jax.P(*(None,) * (one.rows.ndim - 1), *spec)
    in_spec = SparseGradient(parts, parts)
    return mesh.shard_map(functools.partial(_flat, name, dim=dim), (in_spec,), spec)(one)


def _flat(name: str, one: Any, dim: int | None = None) -> SparseGradient:
    """A gradient without leading dimensions.

    Raises:
        ValueError: it is none, or of other columns than `dim`.
    """
    rows: Any = getattr(one, "rows", None)
    values: Any = getattr(one, "values", None)
    shapes = tuple(getattr(array, "shape", None) for array in (rows, values))
    fits = isinstance(one, SparseGradient) and rows.dtype == jnp.int32 and values.dtype == jnp.float32
    if not fits or values.shape[:-1] != rows.shape or (dim is not None and values.shape[-1] != dim):
        columns = "dim" if dim is None else dim
        raise ValueError(
            f"Stack {name!r}: the gradient is a {type(one).__name__} with rows and values of shapes {shapes}; it must be an "
            f"embax.SparseGradient of int32[..., n] and float32[..., n, {columns}], as embax.sparse_gradients returns it."
        )
    return SparseGradient(rows.reshape(-1), values.reshape(-1, values.shape[-1]))
