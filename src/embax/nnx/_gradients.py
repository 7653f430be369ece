"""Gradients of whole NNX models, tables included, that are looked at or changed before they are applied."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("embax.nnx needs Flax and optax: pip install 'embax[flax]'") from error

from embax import _collected_gradients as collected_gradients
from embax._refs import inside_jit
from embax._sparse_gradients import SparseGradient, flat_gradient
from embax._types import Array, Float32
from embax.nnx.embed import SparseCoreEmbed

TableGradients = dict[str, dict[str, SparseGradient]]
"""`SparseGradient` of each stack by name, by the path of its layer in the model, such as "towers.0.embed". A pytree."""


def _layers(model: nnx.Module) -> dict[str, SparseCoreEmbed]:
    found = ((".".join(map(str, path)), node) for path, node in nnx.iter_graph(model))
    return {path: node for path, node in found if isinstance(node, SparseCoreEmbed)}


def value_and_grad(
    loss: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, tuple[nnx.State, TableGradients]]]:
    """A function like `nnx.value_and_grad(loss)`, which returns the gradients of tables too, and updates no table.

    The gradients of all lookups of a layer are summed, each row once. With them the gradients of a whole model can be clipped by
    their global norm, logged, or accumulated over microbatches, before `apply_sparse_gradients` applies them. The loss is traced
    twice. Call it inside `nnx.jit`: outside, JAX compiles each operation of the loss anew at every call.

    Args:
        loss: function of a model and other arguments, which returns a scalar, or with `has_aux` a scalar and anything else.
        has_aux: as in `nnx.value_and_grad`.

    Returns:
        A function of the same arguments. It returns the value of the loss, and `(dense, tables)`: the gradients of all
        `nnx.Param`, and `TableGradients`. A `gradient_scale` that a layer is called with divides the gradients of its tables. On
        a mesh, rows are counted on the device that owns them: add such gradients by `sum_sparse_gradients` of this module.

    Raises:
        ValueError: the loss looks a layer up in a while loop.

    Example:
        >>> @nnx.jit
        ... def train_step(model, optimizer, batch):
        ...     loss, (dense, tables) = embax.nnx.value_and_grad(loss_of)(model, batch)
        ...     factor = jnp.minimum(1.0, 1.0 / embax.nnx.global_norm(dense, tables))
        ...     dense, tables = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), (dense, tables))
        ...     optimizer.update(model, dense)
        ...     embax.nnx.apply_sparse_gradients(model, tables)
        ...     return loss
    """

    def differentiated(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        graph, state = nnx.split(model)
        for layer in _layers(model).values():
            layer.make_refs()

        def traced(state):
            return loss(nnx.merge(graph, state, copy=True), *args, **kwargs)

        with collected_gradients.finding() as found:
            jaxpr = jax.make_jaxpr(traced)(state)
        collected_gradients.make_bins(found.calls, jaxpr)
        with collected_gradients.storing(found.calls):
            value, dense = nnx.value_and_grad(loss, has_aux=has_aux)(model, *args, **kwargs)
        tables = {}
        for path, layer in _layers(model).items():
            calls = [call for call in found.calls if call.layer is layer.step.origin]
            settings = layer._shell.settings
            tables[path] = {} if settings.all_frozen else collected_gradients.collected(settings, calls)
        return value, (dense, tables)

    return differentiated


def sum_sparse_gradients(model: nnx.Module, gradients: Sequence[TableGradients]) -> TableGradients:
    """The sum of the gradients of several batches, each row once.

    Args:
        model: the model that was differentiated.
        gradients: what `value_and_grad` returned for each; arrays may have leading dimensions, as `jax.lax.scan` stacks them.

    Returns:
        `TableGradients` with distinct rows, of which `global_norm` gives the norm.

    Raises:
        ValueError: there is no such layer or stack, or a gradient has another shape than `SparseGradient` says.
    """
    layers = _layers(model)
    flat = [_flat(layers, one) for one in gradients]
    paths = dict.fromkeys(path for one in flat for path in one)
    return {
        path: collected_gradients.summed(layers[path]._shell.settings, [one[path] for one in flat if path in one])
        for path in paths
    }


def _flat(layers: Mapping[str, SparseCoreEmbed], tables: Any) -> TableGradients:
    """Gradients without leading dimensions.

    Raises:
        ValueError: they are not of these layers.
    """
    if not isinstance(tables, Mapping) or (unknown := sorted(set(tables) - set(layers))):
        given = unknown if isinstance(tables, Mapping) else type(tables).__name__
        raise ValueError(
            f"The gradients of tables are of {given}; they must be a dict by the path of a layer, and the layers are "
            f"{sorted(layers)}."
        )
    flat = {}
    for path, stacks in tables.items():
        shell = layers[path]._shell
        widths = {stack.name: stack.shape[1] for stack in shell.plan.stacks}
        if unknown := sorted(set(stacks) - set(widths)):
            raise ValueError(f"Layer {path!r} has no stacks {unknown}; its stacks are {sorted(widths)}.")
        flat[path] = {name: flat_gradient(name, part, widths[name], shell.mesh) for name, part in stacks.items()}
    return flat


def global_norm(dense: Any, tables: TableGradients) -> Float32[Array, ""]:
    """The Euclidean norm of the gradients of a whole model.

    Args:
        dense: pytree of the gradients of dense parameters.
        tables: gradients of tables with distinct rows, as `value_and_grad` returns them.
    """
    values = [part.values for stacks in tables.values() for part in stacks.values()]
    leaves = [*jax.tree.leaves(dense), *values]
    squares = sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves), start=jnp.zeros((), jnp.float32))
    return jnp.sqrt(squares)


def apply_sparse_gradients(
    model: nnx.Module, tables: Mapping[str, Mapping[str, SparseGradient]], *, step: int | jax.Array | None = None
) -> None:
    """Takes one optimizer step on the rows of a model's tables that have a gradient, in place.

    Args:
        model: the model, whose layers have the paths that the gradients name.
        tables: `TableGradients`. Gradients of one row are added. Arrays may have leading dimensions, as `jax.lax.scan` stacks
            them.
        step: the number of the step; None means the layer's own.

    Raises:
        ValueError: there is no such layer or stack, or a gradient has another shape than `SparseGradient` says.
    """
    layers = _layers(model)
    for path, parts in _flat(layers, tables).items():
        if parts:
            layer = layers[path]
            settings = layer._shell.settings
            inside_jit(collected_gradients.apply_collected, layer._refs(), parts, step, settings=settings)
