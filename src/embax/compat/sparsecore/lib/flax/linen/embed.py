"""`SparseCoreEmbed` for Flax Linen under the reference's names."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError("The layers of embax.compat need Flax and optax: pip install 'embax[flax]'") from error

from flax.core import meta

from embax.compat._layer import Layer, as_float32, default_mesh, lookup_and_update
from embax.compat.sparsecore.lib.nn import embedding
from embax.compat.sparsecore.utils import utils
from embax.linen._box import EMBEDDING_PARAM_NAME as EMBEDDING_PARAM_NAME

EmbeddingLookupInput = embedding.PreprocessedInput


class WithSparseCoreLayout(nn.Partitioned):
    """The box around tables and slots. What differentiation returns for those in it is no gradient, but their new value."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The tables and slots."""
        del apply_constraint  # They are sharded when they are made, and stay so.
        return self.value

    def get_sharding(self, mesh: jax.sharding.Mesh) -> Any:
        """The format of all tables and slots: see `utils.embedding_table_format`."""
        return utils.embedding_table_format(mesh, self.get_partition_spec())


def with_sparsecore_layout(
    fn: Callable[..., Any], names: tuple[Any, ...], mesh: jax.sharding.Mesh
) -> Callable[..., WithSparseCoreLayout]:
    """An initializer like `fn` whose result is boxed.

    Args:
        fn: returns variables.
        names: the mesh axes of the dimensions of tables, `(axis, None)`; `axis` may be a tuple.
        mesh: the mesh.
    """

    @functools.wraps(fn)
    def boxed(*args: Any, **kwargs: Any) -> WithSparseCoreLayout:
        return WithSparseCoreLayout(fn(*args, **kwargs), names, mesh=mesh)

    return boxed


class SparseCoreEmbed(nn.Module):
    """Looks packed batches up, and updates the tables as it is differentiated: see `embax.linen.embed.SparseCoreEmbed`.

    A step may call it once. Its optimizer is made by `create_optimizer_for_sc_model`.

    The parameter has the leaves of the reference, and no witness beside the tables. `apply_updates_for_sc_model` refuses tables
    that were scaled, averaged, clipped or added to, if it is in the trace that differentiated the lookup, as in a jitted step.
    It does not see such changes outside jit, of gradients that a jitted function of its own, `jax.checkpoint` or a scan returned,
    nor in parameters that another optimizer stepped. A step that differentiates no lookup sets the tables to 0.

    Args:
        feature_specs: the placed feature tree.
        sharding_axis: the axis of the mesh, or a tuple of axes, that tables and samples are sharded over.
        mesh: the devices; None means the mesh in context (`jax.set_mesh`) if it has the axis, else all devices along it.
        table_sharding_strategy: "MOD".
        enable_minibatching: whether a batch beyond the limits of partitions is divided into minibatches.
        num_sc_per_device: SparseCores of a device; -1 means its own.

    Raises:
        ValueError: the mesh does not have the axis, or the strategy is another.
    """

    feature_specs: Any
    sharding_axis: str | tuple[str, ...] = "sparsecore_sharding"
    mesh: jax.sharding.Mesh | None = None
    table_sharding_strategy: str = "MOD"
    enable_minibatching: bool = False
    num_sc_per_device: int = -1

    def __post_init__(self) -> None:
        if self.mesh is None:
            self.mesh = default_mesh(self.sharding_axis)
        self.num_sc_per_device = self._layer.num_sc_per_device
        super().__post_init__()

    @property
    def _layer(self) -> Layer:
        mesh: Any = self.mesh
        return Layer.checked(
            self.feature_specs,
            mesh,
            self.sharding_axis,
            self.table_sharding_strategy,
            self.enable_minibatching,
            self.num_sc_per_device,
        )

    @property
    def embedding_table_partition(self) -> jax.P:
        """How tables are sharded."""
        return self._layer.table_partition

    @property
    def data_partition(self) -> jax.P:
        """How packed batches and activations are sharded."""
        return self._layer.mesh.leading

    @property
    def num_shards(self) -> int:
        """Devices that the tables are sharded over."""
        return self._layer.mesh.num_devices

    @property
    def embedding_table(self) -> Any:
        """`EmbeddingVariables` of each stack by name, of a bound module; None before it is initialized."""
        if not self.has_variable("params", EMBEDDING_PARAM_NAME):
            return None
        return meta.unbox(self.get_variable("params", EMBEDDING_PARAM_NAME))

    def setup(self) -> None:
        """Makes the parameter, where it is missing."""
        if not self.has_variable("params", EMBEDDING_PARAM_NAME):
            self.param(EMBEDDING_PARAM_NAME, self._wrap_initializer(self._layer.init))

    def _wrap_initializer(self, initializer: Callable[..., Any]) -> Callable[..., WithSparseCoreLayout]:
        mesh: Any = self.mesh
        return with_sparsecore_layout(initializer, (self.sharding_axis, None), mesh)

    def preprocess_inputs(
        self, step: int, features: Any, features_weights: Any, all_reduce_interface: Any | None = None
    ) -> embedding.PreprocessedInput:
        """Packs a batch on the host: see `embedding.preprocess_sparse_dense_matmul_input`. The module need not be bound.

        Args:
            step: the number of the batch.
            features: ids of each feature, of the samples of this process.
            features_weights: None, or weights of the same structure.
            all_reduce_interface: how several processes agree on minibatches.

        Returns:
            The packed batch, in NumPy arrays.
        """
        return self._layer.pack(step, features, features_weights, all_reduce_interface)

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
        return lookup_and_update(self._layer, self.embedding_table, embedding_lookup_inputs, step)

    def _ensure_float32(self, table: Any) -> Any:
        return as_float32(table)

    def apply_gradient(
        self,
        gradients: Any,
        embedding_lookup_inputs: embedding.PreprocessedInput,
        step: int | jax.Array | None = None,
    ) -> Mapping[str, Any]:
        """The variables after one optimizer step, of a bound module.

        Args:
            gradients: with respect to the activations, in the structure of the specs.
            embedding_lookup_inputs: the packed batch.
            step: the number of the step.

        Returns:
            A dict of one item: the path of the parameter in the model, joined by "/", and the new variables, float32.
        """
        new = self._layer.update(gradients, embedding_lookup_inputs, self.embedding_table, step)
        return {"/".join((*self.path, EMBEDDING_PARAM_NAME)): new}
