"""The functional core: lookup of a packed batch, and the update of the rows it touched."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from embax._ops.geometry import make_geometry
from embax._ops.lookup import lookup_stacks
from embax._ops.unstack import stack_gradients, unstack_activations
from embax._ops.update import update_stacks
from embax._preprocess.buffers import PreprocessedInput
from embax._specs import FeatureSpec
from embax._stacking.layout import physical_rows
from embax._stacking.plan import Plan, make_plan
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


def check_variables(variables: Mapping[str, Any], plan: Plan) -> None:
    """Raises a ValueError unless `variables` hold table and slots of every stack, in shape and dtype."""
    expected, given = {stack.name for stack in plan.stacks}, set(variables)
    if expected != given:
        raise ValueError(f"The variables are of the stacks {sorted(given)}, the specs have {sorted(expected)}.")
    for stack in plan.stacks:
        arrays = jax.tree.leaves(variables[stack.name])
        if len(arrays) != stack.num_states:
            raise ValueError(
                f"Stack {stack.name!r} has {len(arrays)} arrays; {type(stack.optimizer).__name__} needs {stack.num_states}, "
                "the table and its slots. Make them with embax.init_embedding_variables."
            )
        for array in arrays:
            if array.shape != stack.shape or array.dtype != jnp.float32:
                raise ValueError(
                    f"Stack {stack.name!r} has an array {array.dtype}{list(array.shape)}; table and slots must be "
                    f"float32{list(stack.shape)}. Make them with embax.init_embedding_variables from these specs."
                )


def lookup_features(
    packed: PreprocessedInput, variables: Mapping[str, EmbeddingVariables], plan: Plan
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Activations of each feature in the order of the feature leaves, and of each stack."""
    check_variables(variables, plan)
    geometry = make_geometry(plan, packed.layout)
    tables = [jax.tree.leaves(variables[stack.name])[0] for stack in plan.stacks]
    stacked = lookup_stacks(packed, tables, geometry)
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
) -> dict[str, Any]:
    """New variables from the gradients of each feature's activations; `after` as in `update_stacks`."""
    check_variables(variables, plan)
    geometry = make_geometry(plan, packed.layout)
    stacked = []
    for stack, placed in zip(plan.stacks, packed.layout.stacks, strict=True):
        parts = []
        for feature, batch in zip(stack.features, placed.batch_sizes, strict=True):
            gradient = gradients[feature.leaf]
            if gradient.shape != (batch, feature.output_dim):
                raise ValueError(
                    f"Feature {feature.name!r}: the gradient has shape {gradient.shape}; that of its activations is "
                    f"{(batch, feature.output_dim)}."
                )
            parts.append(gradient.astype(jnp.float32))
        stacked.append(stack_gradients(parts, stack, placed, packed.layout))
    new = update_stacks(
        packed,
        stacked,
        [tuple(jax.tree.leaves(variables[stack.name])) for stack in plan.stacks],
        [stack.optimizer.get_hyperparameters(step) for stack in plan.stacks],
        after,
        geometry,
        tuple(stack.optimizer for stack in plan.stacks),
    )
    structures = [jax.tree.structure(variables[stack.name]) for stack in plan.stacks]
    return {
        stack.name: jax.tree.unflatten(structure, state)
        for stack, structure, state in zip(plan.stacks, structures, new, strict=True)
    }


def lookup(packed: PreprocessedInput, variables: Mapping[str, EmbeddingVariables], *, specs: Any) -> Any:
    """Looks up a packed batch: for each sample the combined rows of its ids.

    Args:
        packed: what `embax.preprocess` returned for these specs.
        variables: `EmbeddingVariables` of each stack by name.
        specs: pytree of placed `FeatureSpec`.

    Returns:
        The activations, float32[batch, output_dim] of each feature, in the structure of `specs`.

    Raises:
        ValueError: the batch or the variables do not belong to the specs.

    Example:
        >>> packed = embax.preprocess(ids, specs=specs)
        >>> activations = embax.lookup(packed, variables, specs=specs)
    """
    features, _ = lookup_features(packed, variables, make_plan(specs))
    return jax.tree.unflatten(feature_structure(specs), features)


def apply_gradients(
    gradients: Any,
    packed: PreprocessedInput,
    variables: Mapping[str, EmbeddingVariables],
    *,
    specs: Any,
    step: int | jax.Array | None = None,
    activations: Any = None,
) -> dict[str, EmbeddingVariables]:
    """Takes one optimizer step on every row that a packed batch touched, and on no other.

    Under `jax.jit` with the variables donated, tables and slots are updated in place.

    Args:
        gradients: gradient with respect to the activations: float32[batch, output_dim] of each feature, in the
            structure of `specs`.
        packed: the batch that was looked up.
        variables: `EmbeddingVariables` of each stack by name.
        specs: pytree of placed `FeatureSpec`.
        step: the number of the step, for learning rate schedules.
        activations: what `lookup` returned in the same jitted step. With them XLA sees that the lookup comes first; without
            them it may copy the tables, if the gradients do not depend on the activations (a loss linear in them).

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
        after = [by_leaf[stack.features[0].leaf] for stack in plan.stacks]
    leaves = _flatten_like(gradients, structure, "gradients")
    return update_features(leaves, packed, variables, plan, step, after)


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
    if table not in places:
        raise ValueError(f"There is no table {table!r}; the tables are {sorted(places)}.")
    check_variables(variables, plan)
    stack, planned = places[table]
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"Table {table!r}: ids are {ids.dtype}; they must be integers.")
    bad = (ids < 0) | (ids >= planned.vocabulary_size)
    if not isinstance(bad, jax.core.Tracer) and bad.any():
        raise ValueError(
            f"Table {table!r}: id {ids[bad].reshape(-1)[0]} is outside the vocabulary, 0 to {planned.vocabulary_size - 1}."
        )
    rows = physical_rows(ids, planned.rows, stack.shape[0], plan.num_sparsecores)
    values = jax.tree.leaves(variables[stack.name])[0].at[rows, : planned.embedding_dim].get()
    return jnp.where(bad[..., None], jnp.nan, values)
