"""`SparseCoreEmbed` for Flax NNX under the reference's names."""

from typing import Any

import jax

try:
    import optax
    from flax import nnx
except ImportError as error:
    raise ImportError("The layers of embax.compat need Flax and optax: pip install 'embax[flax]'") from error

from embax._lookup_vjp import note_differentiated, unchanged
from embax._witness import note_returned
from embax.compat._layer import Layer
from embax.compat.sparsecore.lib.nn import embedding
from embax.compat.sparsecore.utils import utils


class EmbeddingVariablesParam(nnx.Param):
    """Tables and slots of a `SparseCoreEmbed`. What differentiation returns for it is not a gradient: it is the new value."""


def is_embedding_variables(path: Any, value: Any) -> bool:
    """An NNX filter for the tables and slots of embedding layers."""
    del path
    return isinstance(value, EmbeddingVariablesParam)


def is_non_embedding_variables(path: Any, value: Any) -> bool:
    """An NNX filter for everything but the tables and slots of embedding layers."""
    return not is_embedding_variables(path, value)


def get_named_sharding(node: Any, mesh: jax.sharding.Mesh) -> nnx.StateSharding:
    """The shardings of a model or an optimizer, such as `nnx.jit` takes them.

    Args:
        node: an NNX module or optimizer.
        mesh: the mesh of its layers.

    Returns:
        The format of tables of each layer, and of all else the sharding that NNX says.

    Example:
        >>> shardings = get_named_sharding(model, mesh), get_named_sharding(optimizer, mesh)
        >>> nnx.jit(train_step, in_shardings=(*shardings, batch_sharding), donate_argnums=(0, 1))
    """

    def of_variable(path: Any, variable: nnx.Variable) -> Any:
        if is_embedding_variables(path, variable):
            return variable.get_metadata()["embedding_sharding"]
        return nnx.get_named_sharding(variable, mesh)

    return nnx.StateSharding(nnx.map_state(of_variable, nnx.state(node)))


class PartitionedOptimizer(nnx.Optimizer):
    """Steps the dense parameters of a model with optax, and copies the tables that the backward pass has updated.

    Refuses tables that were changed on the way, if the same trace differentiated their lookup. It does not see changes outside
    jit, nor changes of what a jitted function of its own, `jax.checkpoint` or a scan returned.

    Args:
        model: a model that holds any number of `SparseCoreEmbed`.
        dense_optimizer: optax transformation of all other `nnx.Param`.
    """

    def __init__(self, model: nnx.Module, dense_optimizer: optax.GradientTransformation):
        super().__init__(model, dense_optimizer, wrt=nnx.All(nnx.Param, is_non_embedding_variables))

    def update(self, model: nnx.Module, grads: Any, /, **kwargs: Any) -> Any:
        """Updates model and optimizer state from what `nnx.value_and_grad` returned, in place.

        Args:
            model: the model that was differentiated.
            grads: its gradients.
            **kwargs: passed on to optax.

        Returns:
            The updates of the dense parameters.

        Raises:
            ValueError: the tables are not those that the backward pass returned.
        """
        tables, dense = nnx.split_state(grads, is_embedding_variables, ...)
        old = dict(nnx.to_flat_state(nnx.state(model, is_embedding_variables)))
        for path, new in nnx.to_flat_state(tables):
            jax.tree.map(unchanged, old[path].get_value(), new.get_value())
        nnx.update(model, tables)
        return super().update(model, dense, **kwargs)


class SparseCoreEmbed(nnx.Module):
    """Looks packed batches up, and updates the tables as it is differentiated: see `embax.nnx.embed.SparseCoreEmbed`.

    A step must call it once, and be taken by a `PartitionedOptimizer`.

    Args:
        feature_specs: the placed feature tree.
        sharding_axis: the axis of the mesh, or a tuple of axes, that tables and samples are sharded over.
        mesh: the devices.
        rngs: source of the key that draws the tables, `rngs.params()`.
        enable_minibatching: whether a batch beyond the limits of partitions is divided into minibatches.
        table_sharding_strategy: "MOD".

    Attributes:
        embedding_table: `EmbeddingVariables` of each stack by name.

    Raises:
        ValueError: the mesh does not have the axis, or the strategy is another.
    """

    def __init__(
        self,
        feature_specs: Any,
        sharding_axis: str | tuple[str, ...],
        mesh: jax.sharding.Mesh,
        rngs: nnx.Rngs,
        *,
        enable_minibatching: bool = False,
        table_sharding_strategy: str = "MOD",
    ):
        layer = Layer.checked(feature_specs, mesh, sharding_axis, table_sharding_strategy, enable_minibatching)
        self._layer = nnx.static(layer)
        self.embedding_table = EmbeddingVariablesParam(
            layer.init(rngs.params()), embedding_sharding=utils.embedding_table_format(mesh, layer.table_partition)
        )

    @property
    def feature_specs(self) -> Any:
        """The placed feature tree."""
        return self._layer.feature_specs

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices."""
        return self._layer.mesh.mesh

    @property
    def sharding_axis(self) -> str | tuple[str, ...]:
        """The axis that tables and samples are sharded over."""
        return self._layer.mesh.axis_name

    @property
    def table_sharding_strategy(self) -> str:
        """How rows are sharded."""
        return self._layer.table_sharding_strategy

    @property
    def enable_minibatching(self) -> bool:
        """Whether batches are packed in minibatches."""
        return self._layer.enable_minibatching

    @property
    def num_sc_per_device(self) -> int:
        """SparseCores of a device."""
        return self._layer.num_sc_per_device

    @property
    def num_shards(self) -> int:
        """Devices that the tables are sharded over."""
        return self._layer.mesh.num_devices

    @property
    def embedding_table_partition(self) -> jax.P:
        """How tables are sharded."""
        return self._layer.table_partition

    @property
    def data_partition(self) -> jax.P:
        """How packed batches and activations are sharded."""
        return self._layer.mesh.leading

    def __call__(
        self, embedding_lookup_inputs: embedding.PreprocessedInput, step: int | jax.Array | None = None
    ) -> Any:
        """The activations of a batch.

        Args:
            embedding_lookup_inputs: the packed batch.
            step: the number of the step, for schedules and for optimizers that depend on it; None counts as 0 for Adam and F2A.

        Returns:
            float32[batch, output dim] of each feature, in the structure of the specs.
        """
        return embedding_lookup(self, embedding_lookup_inputs, step)


@nnx.custom_vjp
def embedding_lookup(
    embedding_layer: SparseCoreEmbed,
    embedding_lookup_inputs: embedding.PreprocessedInput,
    step: int | jax.Array | None = None,
) -> Any:
    """The activations of a batch, see `SparseCoreEmbed`; the cotangent of the layer's table is the new table."""
    del step
    return embedding_layer._layer.look_up(embedding_lookup_inputs, embedding_layer.embedding_table.get_value())[0]


def _embedding_lookup_fwd(embedding_layer, embedding_lookup_inputs, step=None):
    variables = embedding_layer.embedding_table.get_value()
    note_differentiated(variables)
    features, stacked = embedding_layer._layer.look_up(embedding_lookup_inputs, variables)
    return features, (embedding_layer, embedding_lookup_inputs, step, stacked)


def embedding_lookup_bwd(res: Any, g: Any) -> tuple[Any, Any, Any]:
    """The cotangents of the arguments of `embedding_lookup`.

    Args:
        res: `(layer, packed batch, step)`, and the activations by stack where the lookup was in the same jitted step.
        g: `((cotangent of the layer, None, None), gradients of the activations)`.

    Returns:
        A copy of the cotangent of the layer that holds the new table; None; None.
    """
    layer, inputs, step, *stacked = res
    (of_layer, of_inputs, of_step), gradients = g
    old = layer.embedding_table.get_value()
    new = layer._layer.update(gradients, inputs, old, step, *stacked)
    of_layer = jax.tree.map(lambda leaf: leaf, of_layer)
    new = jax.tree.map(lambda array, before: array.astype(before.dtype), new, old)
    note_returned(new)
    of_layer["embedding_table"].set_value(new)
    return of_layer, of_inputs, of_step


embedding_lookup.defvjp(_embedding_lookup_fwd, embedding_lookup_bwd)
