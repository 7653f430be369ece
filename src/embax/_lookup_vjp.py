"""The one differentiable lookup that is under every layer.

Its backward pass updates the tables: the "gradient" of the variables that it returns *is the new variables*. So a step may
look a table up once only, and what is done to gradients behind the backward pass (scaling, clipping, averaging) must leave
those of tables out. What scales the loss scales the gradients that the table's optimizer sees. The gains of the batch have
gradients as any array has, so that those of sample weights that were packed inside jit follow.
"""

import functools
import weakref
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from embax._matmul import gain_gradients_of_features, lookup_features, update_features
from embax._ops.row_update import RowLimits
from embax._preprocess.buffers import PreprocessedInput
from embax._stacking.plan import Plan

# Traced tables whose lookup was differentiated, by `id`, for as long as they live.
_differentiated: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def _note_differentiated(variables: dict[str, Any], plan: Plan) -> None:
    for stack in plan.stacks:
        table = jax.tree.leaves(variables[stack.name])[0]
        if not isinstance(table, jax.core.Tracer):
            continue
        if _differentiated.get(id(table)) is table:
            raise ValueError(
                f"Stack {stack.name!r} is looked up twice in one differentiated step. The backward pass of a lookup "
                "updates the tables, and two updates of one table cannot be added. Look both batches up in one call (as "
                "features that share the table, or as one larger batch), differentiate once, or use embax.lookup and "
                "embax.apply_gradients."
            )
        _differentiated[id(table)] = table


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lookup_and_update(
    plan: Plan,
    limits: tuple[RowLimits, ...],
    variables: dict[str, Any],
    lookups: jax.Array,
    packed: PreprocessedInput,
    step: jax.Array | int | None,
) -> list[jax.Array]:
    """Activations of each feature, in the order of the feature leaves.

    Args:
        plan: static.
        limits: of each stack, static: what the new rows of its table are clipped to.
        variables: table and slots of each stack; their cotangent is the new table and slots.
        lookups: float32 scalar; its cotangent is 1, so that a sum of several cotangents, or none, can be told.
        packed: the packed batch; its gains are differentiable, on one device.
        step: for schedules and for optimizers that need it.
    """
    del limits, lookups, step
    return lookup_features(packed, variables, plan)[0]


def _forward(plan, limits, variables, lookups, packed, step):
    del limits
    perturbed = functools.partial(jax.tree.reduce, lambda found, leaf: found or leaf.perturbed, initializer=False)
    updates, of_gains = perturbed((variables, lookups)), perturbed(packed)
    variables, packed, step = jax.tree.map(lambda leaf: leaf.value, (variables, packed, step))
    if of_gains and plan.num_devices > 1:
        raise ValueError(
            f"The specs were placed for {plan.num_devices} devices; gradients with respect to sample weights are there on one "
            "device. Take the weights out of what is differentiated, for example with jax.lax.stop_gradient, or place the specs "
            "with global_device_count=1."
        )
    if updates:
        _note_differentiated(variables, plan)
    features, stacked = lookup_features(packed, variables, plan)
    return features, (variables, packed, step, stacked, _flag(updates), _flag(of_gains))


def _flag(value: bool) -> tuple[()] | None:
    """A bool as a tree without leaves, so that it stays static among residuals."""
    return () if value else None


def _instantiated(cotangent: Any) -> jax.Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        shape: Any = cotangent.shape
        return jnp.zeros(shape, jnp.float32)
    return cotangent


def _backward(plan, limits, residuals, gradients):
    variables, packed, step, stacked, updates, of_gains = residuals
    gradients = list(map(_instantiated, gradients))
    new, of_packed, after = None, None, stacked
    if of_gains is not None:
        products = gain_gradients_of_features(gradients, packed, variables, plan)
        of_packed = jax.tree.map(lambda _: None, packed)
        of_packed = of_packed.replace(gains=jnp.concatenate(products).reshape(packed.gains.shape))
        # The update must wait for the rows that these products read as well.
        after = [
            read[:1, :1].reshape(-1) + product[:1] if read.size and product.size else read
            for read, product in zip(stacked, products, strict=True)
        ]
    if updates is not None:
        new = update_features(gradients, packed, variables, plan, step, after, limits)
    return new, jnp.ones((), jnp.float32), of_packed, None


lookup_and_update.defvjp(_forward, _backward, symbolic_zeros=True)
