"""The functional core: lookup of a packed batch, and the update of the rows it touched."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._checks import boolean, is_finite_number
from embax._ops.across_devices import gain_gradients_across, gradients_across, lookup_across, update_across
from embax._ops.geometry import axis_of, inside_shard_map, make_geometry
from embax._ops.row_update import NO_LIMITS, RowLimits
from embax._ops.unstack import join_features
from embax._preprocess.buffers import PreprocessedInput
from embax._refs import has_refs, inside_jit, read, write
from embax._specs import FeatureSpec
from embax._stacking.plan import FeaturePlan, Plan, make_plan
from embax._types import Array, Bool, PyTreeDef
from embax._variables import EmbeddingVariables


def _is_feature(leaf: Any) -> bool:
    return isinstance(leaf, FeatureSpec)


def feature_structure(specs: Any) -> PyTreeDef:
    """The structure of a feature tree."""
    return jax.tree.structure(specs, is_leaf=_is_feature)


def flatten_like(tree: Any, structure: PyTreeDef, what: str) -> list[jax.Array]:
    """The leaves of a tree that must have a structure; `what` it holds is for the error."""
    leaves, given = jax.tree.flatten(tree)
    if given != structure:
        raise ValueError(
            f"The {what} have the structure {given}, the feature specs {structure}; they must be the same."
        )
    return leaves


def checked_limits(limits: Mapping[str, Any] | None, plan: Plan) -> tuple[RowLimits, ...]:
    """Limits of each stack's new rows, from a mapping by the names of some stacks.

    Raises:
        ValueError: a name is of no stack, or a pair is not (min, max).
    """
    names = [stack.name for stack in plan.stacks]
    if limits is None:
        return (NO_LIMITS,) * len(names)
    remedy = "Pass a dict of (min, max), either of which may be None, by the names of stacks."
    if not isinstance(limits, Mapping):
        raise ValueError(f"embedding_var_limits is a {type(limits).__name__}. {remedy}")
    if unknown := sorted(set(limits) - set(names)):
        raise ValueError(f"embedding_var_limits has {unknown}, which are no stacks; the stacks are {names}. {remedy}")
    checked = []
    for name in names:
        pair: Any = limits.get(name, NO_LIMITS)
        valid = (
            isinstance(pair, Sequence) and len(pair) == 2 and all(end is None or is_finite_number(end) for end in pair)
        )
        ends: list[Any] = [None if end is None else float(end) for end in pair] if valid else []
        if not valid or (None not in ends and ends != sorted(ends)):
            raise ValueError(
                f"embedding_var_limits of stack {name!r} is {pair!r}; it must be two finite numbers (min, max) in this order, "
                "or None for no limit."
            )
        checked.append(tuple(ends))
    return tuple(checked)


def check_variables(variables: Mapping[str, Any], plan: Plan, without_slots: Collection[str] = ()) -> None:
    """Raises a ValueError unless `variables` hold table and slots of every stack, in shape and dtype.

    Those of the stacks `without_slots` may hold the table alone.
    """
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"The variables are a {type(variables).__name__}; they must be a dict of EmbeddingVariables by stack."
        )
    expected, given = {stack.name for stack in plan.stacks}, set(variables)
    if expected != given:
        raise ValueError(f"The variables are of the stacks {sorted(given)}, the specs have {sorted(expected)}.")
    for stack in plan.stacks:
        arrays, shapes = jax.tree.leaves(variables[stack.name]), stack.state_shapes
        if inside_shard_map():
            shapes = tuple((rows // plan.num_devices, *columns) for rows, *columns in shapes)
        if len(arrays) == 1 and stack.name in without_slots:
            shapes = shapes[:1]
        if len(arrays) != len(shapes):
            raise ValueError(
                f"Stack {stack.name!r} has {len(arrays)} arrays; {type(stack.optimizer).__name__} needs {len(shapes)}, "
                "the table and its slots. Make them with embax.init_embedding_variables. Only lookups do without slots."
            )
        for number, (array, wanted) in enumerate(zip(arrays, shapes, strict=True)):
            shape, dtype = getattr(array, "shape", ()), getattr(array, "dtype", type(array).__name__)
            if shape != wanted or dtype != jnp.float32:
                what = f"slot {stack.optimizer.slot_names[number - 1]!r}" if number else "table"
                raise ValueError(
                    f"Stack {stack.name!r} has as {what} an array {dtype}{list(shape)}; {type(stack.optimizer).__name__} needs "
                    f"float32{list(wanted)}. Make it with embax.init_embedding_variables from these specs."
                )
            sharding = None if isinstance(array, Tracer | np.ndarray) else array.sharding
            if plan.num_devices == 1 and sharding is not None and not sharding.is_fully_replicated:
                raise ValueError(
                    f"Stack {stack.name!r} has an array spread over {len(sharding.device_set)} devices; its specs were "
                    "placed for one. Put it on one device with jax.device_put, or place the specs for as many devices."
                )


def check_activations(what: str, feature: FeaturePlan, batch: int, array: Any) -> None:
    """Raises a ValueError unless `array` may be the activations of a feature, or their gradient."""
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    if shape != (batch, feature.output_dim):
        raise ValueError(
            f"Feature {feature.name!r}: the {what} has shape {shape}; that of its activations is {(batch, feature.output_dim)}."
        )
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Feature {feature.name!r}: the {what} is {dtype}; it must be a real floating point array.")


def lookup_features(
    packed: PreprocessedInput, variables: Mapping[str, EmbeddingVariables], plan: Plan, axis_name: Any = None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Activations of each feature in the order of the feature leaves, and of each stack what `after` may hold of it."""
    check_variables(variables, plan, without_slots=[stack.name for stack in plan.stacks])
    axis = axis_of(plan, axis_name)
    geometry = make_geometry(plan, packed)
    tables = [jax.tree.leaves(variables[stack.name])[0] for stack in plan.stacks]
    by_stack = lookup_across(packed, tables, geometry, axis)
    features: dict[int, jax.Array] = {}
    for stack, activations in zip(plan.stacks, by_stack, strict=True):
        features.update(zip((feature.leaf for feature in stack.features), activations, strict=True))
    return [features[leaf] for leaf in range(plan.num_features)], list(map(_largest, by_stack))


def _largest(arrays: Sequence[jax.Array]) -> jax.Array:
    """Of the activations of a stack those that tell when it has been looked up: they have elements, if any have."""
    return max(arrays, key=lambda array: array.size)


def gain_gradients_of_features(
    gradients: Sequence[jax.Array],
    packed: PreprocessedInput,
    variables: Mapping[str, EmbeddingVariables],
    plan: Plan,
    axis_name: Any = None,
) -> list[jax.Array]:
    """float32[capacity] of each stack, see `gain_gradients`, from the gradients of each feature's activations."""
    tables = [jax.tree.leaves(variables[stack.name])[0] for stack in plan.stacks]
    stacked, axis = stacked_gradients(gradients, packed, plan, range(len(plan.stacks))), axis_of(plan, axis_name)
    return gain_gradients_across(stacked, packed, tables, make_geometry(plan, packed), axis)


def update_features(
    gradients: Sequence[jax.Array],
    packed: PreprocessedInput,
    variables: Mapping[str, EmbeddingVariables],
    plan: Plan,
    step: int | jax.Array | None,
    after: Sequence[jax.Array],
    limits: Sequence[RowLimits] | None = None,
    axis_name: Any = None,
    *,
    frozen: Collection[str] = (),
    skip_nonfinite: bool = False,
) -> dict[str, Any]:
    """New variables from the gradients of each feature's activations.

    Args:
        gradients: of each feature, in the order of the feature leaves.
        packed: the batch that was looked up.
        variables: table and slots of each stack.
        plan: the placed specs.
        step: for schedules and for optimizers that need it.
        after: as in `update_stacks`.
        limits: as in `update_stacks`.
        axis_name: the axis of shard_map that the tables are sharded over, or a tuple of axes; None where there is one.
        frozen: names of stacks that stay as they are.
        skip_nonfinite: whether nothing is updated if a gradient, on any device, is not finite.
    """
    check_variables(variables, plan, without_slots=frozen)
    geometry = make_geometry(plan, packed)
    chosen = [number for number, stack in enumerate(plan.stacks) if stack.name not in frozen]
    stacks = [plan.stacks[number] for number in chosen]
    by_stack = _by_stack(gradients, packed, plan, chosen)
    axis = axis_of(plan, axis_name)
    if skip_nonfinite:
        packed = _without_entries(packed, ~all_finite(jax.tree.leaves(by_stack), axis))
    new = update_across(
        packed,
        by_stack,
        [tuple(jax.tree.leaves(variables[stack.name])) for stack in stacks],
        [after[number] for number in chosen if after],
        dataclasses.replace(geometry, stacks=tuple(geometry.stacks[number] for number in chosen)),
        axis,
        step,
        [limits[number] for number in chosen] if limits else None,
    )
    updated = {
        stack.name: jax.tree.unflatten(jax.tree.structure(variables[stack.name]), state)
        for stack, state in zip(stacks, new, strict=True)
    }
    return {name: updated.get(name, state) for name, state in variables.items()}


def stacked_gradients(
    gradients: Sequence[jax.Array], packed: PreprocessedInput, plan: Plan, chosen: Sequence[int]
) -> list[jax.Array]:
    """float32[samples, dim] of the chosen stacks, from the gradients of each feature, which are checked."""
    return [
        join_features(parts, plan.stacks[number].shape[1], packed.layout.num_sparsecores_per_device)
        for number, parts in zip(chosen, _by_stack(gradients, packed, plan, chosen), strict=True)
    ]


def _by_stack(
    gradients: Sequence[jax.Array], packed: PreprocessedInput, plan: Plan, chosen: Sequence[int]
) -> list[list[jax.Array]]:
    """float32[batch, output_dim] of the features of the chosen stacks, from the gradients of all, which are checked."""
    by_stack = []
    for number in chosen:
        stack, batch_sizes, parts = plan.stacks[number], packed.layout.stacks[number].batch_sizes, []
        for feature, batch in zip(stack.features, batch_sizes, strict=True):
            check_activations("gradient", feature, batch, gradients[feature.leaf])
            parts.append(gradients[feature.leaf].astype(jnp.float32))
        by_stack.append(parts)
    return by_stack


def gradients_of_stacks(
    gradients: Sequence[jax.Array],
    packed: PreprocessedInput,
    plan: Plan,
    axis_name: Any = None,
    after: Sequence[jax.Array] = (),
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Distinct rows of each stack on this device, and their gradients; see `embax.sparse_gradients`."""
    geometry = make_geometry(plan, packed)
    stacked = stacked_gradients(gradients, packed, plan, range(len(plan.stacks)))
    num_rows = [stack.shape[0] // plan.num_devices for stack in plan.stacks]
    found = gradients_across(packed, stacked, num_rows, after, geometry, axis_of(plan, axis_name))
    return dict(zip([stack.name for stack in plan.stacks], found, strict=True))


def ordered_after(activations: Any, packed: PreprocessedInput, plan: Plan, structure: PyTreeDef) -> list[jax.Array]:
    """Activations of one feature of each stack, which an update is to wait for, or nothing where `activations` is None."""
    if activations is None:
        return []
    after, by_leaf = [], flatten_like(activations, structure, "activations")
    for stack, placed in zip(plan.stacks, packed.layout.stacks, strict=True):
        for feature, batch in zip(stack.features, placed.batch_sizes, strict=True):
            check_activations("activation", feature, batch, by_leaf[feature.leaf])
        after.append(_largest([by_leaf[feature.leaf] for feature in stack.features]))
    return after


def all_finite(gradients: Sequence[jax.Array], axis: Any) -> Bool[Array, ""]:
    """Whether all gradients are finite, on all devices of the axis; None is one device."""
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(gradient)) for gradient in gradients]))
    return finite if axis is None else jax.lax.pmin(finite.astype(jnp.int32), axis) > 0


def _without_entries(packed: PreprocessedInput, none: Bool[Array, ""]) -> PreprocessedInput:
    """The batch, where `none` with empty partitions: then no row is touched, and no table has to be chosen from."""
    return packed.replace(row_pointers=jnp.where(none, jnp.int32(0), jnp.asarray(packed.row_pointers)))


def lookup(
    packed: PreprocessedInput, variables: Mapping[str, EmbeddingVariables], *, specs: Any, axis_name: Any = None
) -> Any:
    """Looks up a packed batch: for each sample the combined rows of its ids.

    With specs that were placed for several devices it is called inside `jax.shard_map`, with the parts of the batch and of the
    variables that one device has, and returns the activations of its samples. Rows travel between the devices.

    Args:
        packed: what `embax.preprocess` returned for these specs.
        variables: `EmbeddingVariables` of each stack by name, of arrays or of refs (`jax.Ref`).
        specs: pytree of placed `FeatureSpec`.
        axis_name: of specs that were placed for several devices, the mesh axis that the tables are sharded over, or a tuple of
            axes in the order of the `PartitionSpec` that shards them: another order finds other rows. None where
            `jax.shard_map` has only one axis.

    Returns:
        The activations, float32[batch, output_dim] of each feature, in the structure of `specs`.

    Raises:
        ValueError: the batch or the variables do not belong to the specs.

    Example:
        >>> packed = embax.preprocess(ids, specs=specs)
        >>> activations = embax.lookup(packed, variables, specs=specs)
    """
    plan = make_plan(specs)
    if has_refs(variables):
        make_geometry(plan, packed)  # Checks the batch before jit does.
        features = inside_jit(_lookup_in_refs, variables, packed, plan=plan, axis_name=axis_name)
    else:
        features, _ = lookup_features(packed, variables, plan, axis_name)
    return jax.tree.unflatten(feature_structure(specs), features)


def _lookup_in_refs(variables: Any, packed: PreprocessedInput, *, plan: Plan, axis_name: Any) -> list[jax.Array]:
    return lookup_features(packed, read(variables), plan, axis_name)[0]


def apply_gradients(
    gradients: Any,
    packed: PreprocessedInput,
    variables: Mapping[str, EmbeddingVariables],
    *,
    specs: Any,
    step: int | jax.Array | None = None,
    activations: Any = None,
    embedding_var_limits: Mapping[str, tuple[float | None, float | None]] | None = None,
    axis_name: Any = None,
    skip_nonfinite: bool = False,
) -> dict[str, EmbeddingVariables]:
    """Takes one optimizer step on every row that a packed batch touched, and on no other.

    Under `jax.jit` with the variables donated, tables and slots are updated in place. Refs are updated in place without donation,
    inside and outside jit.

    Args:
        gradients: gradient with respect to the activations: float32[batch, output_dim] of each feature, in the
            structure of `specs`.
        packed: the batch that was looked up.
        variables: `EmbeddingVariables` of each stack by name, of arrays or of refs (`jax.Ref`).
        specs: pytree of placed `FeatureSpec`.
        step: the number of the step, for schedules and for optimizers that need it (Adam, F2A).
        activations: what `lookup` returned in the same jitted step. With them XLA sees that the lookup comes first; without
            them it may copy the tables, if the gradients do not depend on the activations (a loss linear in them). Where
            all gradients do, leave them out: a gradient can then take over the memory of its activation.
        embedding_var_limits: `(min, max)` by the name of a stack: the new rows of its table are clipped to this range; slots
            and rows that the batch did not touch are not. None, or a stack that is left out, is no limit.
        axis_name: see `lookup`.
        skip_nonfinite: whether tables and slots stay as they are if any gradient, on any device, is not finite.

    Returns:
        The new variables. With refs, `variables` itself; jit cannot return refs.

    Raises:
        ValueError: gradients, activations, batch or variables do not belong to the specs, or a schedule needs `step`.

    Example:
        >>> @functools.partial(jax.jit, donate_argnames="variables")
        ... def train_step(variables, packed, labels):
        ...     activations = embax.lookup(packed, variables, specs=specs)
        ...     gradients = jax.grad(loss)(activations, labels)
        ...     return embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)
    """
    plan, structure = make_plan(specs), feature_structure(specs)
    make_geometry(plan, packed)  # Checks the batch, whose sizes come next.
    after = ordered_after(activations, packed, plan, structure)
    leaves = flatten_like(gradients, structure, "gradients")
    skip_nonfinite = boolean("apply_gradients", "skip_nonfinite", skip_nonfinite)
    row_limits = checked_limits(embedding_var_limits, plan)
    if has_refs(variables):
        static = {"plan": plan, "limits": row_limits, "axis_name": axis_name, "skip_nonfinite": skip_nonfinite}
        inside_jit(_update_refs, variables, leaves, packed, step, after, **static)
        return dict(variables)
    return update_features(
        leaves, packed, variables, plan, step, after, row_limits, axis_name, skip_nonfinite=skip_nonfinite
    )


def _update_refs(
    variables: Any,
    gradients: list[jax.Array],
    packed: PreprocessedInput,
    step: Any,
    after: list[jax.Array],
    *,
    plan: Plan,
    limits: tuple[RowLimits, ...],
    axis_name: Any,
    skip_nonfinite: bool,
) -> None:
    new = update_features(
        gradients, packed, read(variables), plan, step, after, limits, axis_name, skip_nonfinite=skip_nonfinite
    )
    write(variables, new)
