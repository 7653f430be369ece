"""The functional core: lookup of a packed batch, and the update of the rows it touched."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._checks import is_finite_number
from embax._ops.across_devices import lookup_across, update_across
from embax._ops.geometry import axis_of, inside_shard_map, make_geometry
from embax._ops.row_update import NO_LIMITS, RowLimits
from embax._ops.unstack import stack_gradients, unstack_activations
from embax._preprocess.arrays import beyond_int64, find, to_numpy
from embax._preprocess.buffers import PreprocessedInput
from embax._specs import FeatureSpec
from embax._stacking.layout import physical_rows
from embax._stacking.plan import FeaturePlan, Plan, make_plan
from embax._types import PyTreeDef
from embax._variables import EmbeddingVariables


def _is_feature(leaf: Any) -> bool:
    return isinstance(leaf, FeatureSpec)


def feature_structure(specs: Any) -> PyTreeDef:
    """The structure of a feature tree."""
    return jax.tree.structure(specs, is_leaf=_is_feature)


def _flatten_like(tree: Any, structure: PyTreeDef, what: str) -> list[jax.Array]:
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


def check_variables(variables: Mapping[str, Any], plan: Plan) -> None:
    """Raises a ValueError unless `variables` hold table and slots of every stack, in shape and dtype."""
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
        if len(arrays) != len(shapes):
            raise ValueError(
                f"Stack {stack.name!r} has {len(arrays)} arrays; {type(stack.optimizer).__name__} needs {len(shapes)}, "
                "the table and its slots. Make them with embax.init_embedding_variables."
            )
        for number, (array, wanted) in enumerate(zip(arrays, shapes, strict=True)):
            shape, dtype = getattr(array, "shape", ()), getattr(array, "dtype", type(array).__name__)
            if shape != wanted or dtype != jnp.float32:
                what = f"slot {stack.optimizer.slot_names[number - 1]!r}" if number else "table"
                raise ValueError(
                    f"Stack {stack.name!r} has as {what} an array {dtype}{list(shape)}; {type(stack.optimizer).__name__} needs "
                    f"float32{list(wanted)}. Make it with embax.init_embedding_variables from these specs."
                )
            if isinstance(array, jax.Array) and not isinstance(array, Tracer) and len(array.devices()) > 1:
                raise ValueError(
                    f"Stack {stack.name!r} has an array spread over {len(array.devices())} devices; lookups and updates run on "
                    "one. Put it on one device with jax.device_put."
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
    """Activations of each feature in the order of the feature leaves, and of each stack."""
    check_variables(variables, plan)
    geometry = make_geometry(plan, packed)
    tables = [jax.tree.leaves(variables[stack.name])[0] for stack in plan.stacks]
    stacked = lookup_across(packed, tables, geometry, axis_of(plan, axis_name))
    features: dict[int, jax.Array] = {}
    for stack, placed, activations in zip(plan.stacks, packed.layout.stacks, stacked, strict=True):
        parts = unstack_activations(activations, stack, placed, packed.layout)
        features.update(zip((feature.leaf for feature in stack.features), parts, strict=True))
    return [features[leaf] for leaf in range(plan.num_features)], list(stacked)


def update_features(
    gradients: Sequence[jax.Array],
    packed: PreprocessedInput,
    variables: Mapping[str, EmbeddingVariables],
    plan: Plan,
    step: int | jax.Array | None,
    after: Sequence[jax.Array],
    limits: Sequence[RowLimits] | None = None,
    axis_name: Any = None,
) -> dict[str, Any]:
    """New variables from the gradients of each feature's activations; `after` and `limits` as in `update_stacks`."""
    check_variables(variables, plan)
    geometry = make_geometry(plan, packed)
    stacked = []
    for stack, placed in zip(plan.stacks, packed.layout.stacks, strict=True):
        parts = []
        for feature, batch in zip(stack.features, placed.batch_sizes, strict=True):
            check_activations("gradient", feature, batch, gradients[feature.leaf])
            parts.append(gradients[feature.leaf].astype(jnp.float32))
        stacked.append(stack_gradients(parts, stack, placed, packed.layout))
    new = update_across(
        packed,
        stacked,
        [tuple(jax.tree.leaves(variables[stack.name])) for stack in plan.stacks],
        after,
        geometry,
        axis_of(plan, axis_name),
        step,
        limits,
    )
    structures = [jax.tree.structure(variables[stack.name]) for stack in plan.stacks]
    return {
        stack.name: jax.tree.unflatten(structure, state)
        for stack, structure, state in zip(plan.stacks, structures, new, strict=True)
    }


def lookup(
    packed: PreprocessedInput, variables: Mapping[str, EmbeddingVariables], *, specs: Any, axis_name: Any = None
) -> Any:
    """Looks up a packed batch: for each sample the combined rows of its ids.

    With specs that were placed for several devices it is called inside `jax.shard_map`, with the parts of the batch and of the
    variables that one device has, and returns the activations of its samples. Rows travel between the devices.

    Args:
        packed: what `embax.preprocess` returned for these specs.
        variables: `EmbeddingVariables` of each stack by name.
        specs: pytree of placed `FeatureSpec`.
        axis_name: of specs that were placed for several devices, the mesh axis that the tables are sharded over, or a tuple of
            axes; None where `jax.shard_map` has only one.

    Returns:
        The activations, float32[batch, output_dim] of each feature, in the structure of `specs`.

    Raises:
        ValueError: the batch or the variables do not belong to the specs.

    Example:
        >>> packed = embax.preprocess(ids, specs=specs)
        >>> activations = embax.lookup(packed, variables, specs=specs)
    """
    features, _ = lookup_features(packed, variables, make_plan(specs), axis_name)
    return jax.tree.unflatten(feature_structure(specs), features)


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
) -> dict[str, EmbeddingVariables]:
    """Takes one optimizer step on every row that a packed batch touched, and on no other.

    Under `jax.jit` with the variables donated, tables and slots are updated in place.

    Args:
        gradients: gradient with respect to the activations: float32[batch, output_dim] of each feature, in the
            structure of `specs`.
        packed: the batch that was looked up.
        variables: `EmbeddingVariables` of each stack by name.
        specs: pytree of placed `FeatureSpec`.
        step: the number of the step, for schedules and for optimizers that need it (Adam, F2A).
        activations: what `lookup` returned in the same jitted step. With them XLA sees that the lookup comes first; without
            them it may copy the tables, if the gradients do not depend on the activations (a loss linear in them).
        embedding_var_limits: `(min, max)` by the name of a stack: the new rows of its table are clipped to this range; slots
            and rows that the batch did not touch are not. None, or a stack that is left out, is no limit.
        axis_name: see `lookup`.

    Returns:
        The new variables.

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
    after = []
    if activations is not None:
        by_leaf = _flatten_like(activations, structure, "activations")
        make_geometry(plan, packed)  # Checks the batch, whose sizes come next.
        for stack, placed in zip(plan.stacks, packed.layout.stacks, strict=True):
            for feature, batch in zip(stack.features, placed.batch_sizes, strict=True):
                check_activations("activation", feature, batch, by_leaf[feature.leaf])
            after.append(by_leaf[stack.features[0].leaf])
    leaves = _flatten_like(gradients, structure, "gradients")
    row_limits = checked_limits(embedding_var_limits, plan)
    return update_features(leaves, packed, variables, plan, step, after, row_limits, axis_name)


def read_rows(variables: Mapping[str, EmbeddingVariables], table: str, ids: Any, *, specs: Any) -> jax.Array:
    """Rows of one table by id, as they are stored: not combined, weighted or quantized.

    Args:
        variables: `EmbeddingVariables` of each stack by name.
        table: name of the table.
        ids: integer array of any shape; outside jit every id must be in `[0, vocabulary_size)`.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        float32[*ids.shape, embedding_dim]; inside jit NaN for an id outside the vocabulary.

    Raises:
        ValueError: the table is unknown, or an id is not an integer or is outside the vocabulary.
    """
    plan = make_plan(specs)
    places = {planned.name: (stack, planned) for stack in plan.stacks for planned in stack.tables}
    if not isinstance(table, str) or table not in places:
        raise ValueError(f"There is no table {table!r}; the tables are {sorted(places)}.")
    check_variables(variables, plan)
    stack, planned = places[table]
    rows = _valid_ids(ids, table, planned.vocabulary_size)
    values = jax.tree.leaves(variables[stack.name])[0]
    values = values[physical_rows(jnp.maximum(rows, 0), planned.rows, stack.shape[0], plan.num_sparsecores)]
    return jnp.where((rows < 0)[..., None], jnp.nan, values[..., : planned.embedding_dim])


def _valid_ids(ids: Any, table: str, vocabulary_size: int) -> jax.Array:
    """Ids as int32; -1 for one outside the vocabulary inside jit, where none can be refused."""
    owner, traced = f"Table {table!r}", isinstance(ids, Tracer)
    if not traced and find(ids, Tracer) is not None:
        raise ValueError(f"{owner}: ids are a list of values traced by JAX; make one array of it with jnp.stack.")
    array = ids if traced else to_numpy(owner, ids, "ids", "Make lists of one length, or read one after another.")
    if array.size == 0:
        return jnp.zeros(array.shape, jnp.int32)
    if beyond_int64(array):
        bad = (array < 0) | (array >= vocabulary_size)  # Some are, so that this ends in the error below.
    elif jnp.issubdtype(array.dtype, jnp.integer):
        limit = min(vocabulary_size - 1, jnp.iinfo(array.dtype).max)
        bad = (array < 0) | (array > array.dtype.type(limit))
    else:
        raise ValueError(f"{owner}: ids are {array.dtype}; they must be integers.")
    if not traced and bad.any():
        place = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(
            f"Table {table!r}: id {array[place]} at position {place} is outside the vocabulary, 0 to {vocabulary_size - 1}. Ask "
            "for rows that exist."
        )
    return jnp.where(bad, jnp.int32(-1), array.astype(jnp.int32))
