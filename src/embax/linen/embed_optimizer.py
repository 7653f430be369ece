"""Optimizers of Linen models that hold a `SparseCoreEmbed`."""

from typing import Any

import jax
from jax.core import Tracer

try:
    import optax
except ImportError as error:
    raise ImportError("embax.linen needs Flax and optax: pip install 'embax[flax]'") from error

from embax._lookup_vjp import unchanged
from embax._witness import settle
from embax.linen._box import EMBEDDING_PARAM_NAME, WithSparseCoreLayout


def _is_box(node: Any) -> bool:
    return isinstance(node, WithSparseCoreLayout)


def _of_tables(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) == EMBEDDING_PARAM_NAME for key in path)


def create_optimizer_for_sc_model(
    params: Any, tc_optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    """An optimizer that steps the dense parameters, and passes the new tables on that a backward pass returned.

    Args:
        params: the parameters of the model, or its variables.
        tc_optimizer: optax transformation of all parameters but tables and slots.

    Returns:
        The transformation. Apply its updates by `apply_updates_for_sc_model`.

    Example:
        >>> optimizer = create_optimizer_for_sc_model(params, optax.adam(1e-3))
        >>> state = optimizer.init(params)
    """
    labels = jax.tree_util.tree_map_with_path(lambda path, _: "tables" if _of_tables(path) else "dense", params)
    return optax.multi_transform({"tables": optax.identity(), "dense": tc_optimizer}, labels)


def apply_updates_for_sc_model(params: Any, updates: Any) -> Any:
    """The parameters after a step: dense ones plus their updates, and the new tables and slots.

    Tables are taken over if exactly one lookup was differentiated, else they stay as they are: without a lookup their "gradient"
    is 0, and of several it is a sum that means nothing. After several the next call of the layer fails: with a ValueError, or
    inside jit by activations of NaN. Tables that were taken out of their box (`flax.linen.meta.unbox`) are taken over always.

    Args:
        params: the parameters that were differentiated.
        updates: what the optimizer of `create_optimizer_for_sc_model` returned.

    Raises:
        ValueError: outside jit, the tables were looked up several times.

    Example:
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> params = apply_updates_for_sc_model(params, updates)
    """

    def apply(path, old, new):
        if _is_box(old) and old.witness is not None:
            return _settled(old, new)
        if _of_tables(path):
            return jax.tree.map(unchanged, old, new)
        return optax.apply_updates(old, new)

    return jax.tree_util.tree_map_with_path(apply, params, updates, is_leaf=_is_box)


def _settled(old: WithSparseCoreLayout, new: WithSparseCoreLayout) -> WithSparseCoreLayout:
    """The box after a step."""
    value, witness = settle(old.table_mesh, old.value, new.value, old.witness, new.witness)
    if old.mesh is not None and isinstance(witness, Tracer) and witness is not old.witness:
        # Sharded as it was, so that the next step does not compile again.
        witness = jax.jit(lambda array: array, out_shardings=old.get_sharding(old.mesh).witness)(witness)
    return old.replace(value=value, witness=witness)
