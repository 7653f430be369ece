"""What the mirrored layers share: the mirrored lookup and update, over the devices of a mesh."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from embax._lookup_vjp import note_differentiated
from embax._mesh import TableMesh, on_devices
from embax._witness import note_returned
from embax.compat import _matmul
from embax.compat.sparsecore.lib.nn import embedding
from embax.compat.sparsecore.utils import utils


def default_mesh(sharding_axis: str | tuple[str, ...]) -> Mesh:
    """The mesh in context, if it has the axis; else all devices along it.

    Raises:
        ValueError: all devices are not along one axis, or the mesh in context is not known since this is traced.
    """
    axes = [sharding_axis] if isinstance(sharding_axis, str) else list(sharding_axis)
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    in_context = set(axes) <= set(shape)
    if in_context:
        with contextlib.suppress(ValueError):  # Inside jit only its shape is known.
            return jax.sharding.get_mesh()
    if len(axes) > 1 or (in_context and shape != dict.fromkeys(axes, jax.device_count())):
        raise ValueError(
            f"SparseCoreEmbed: pass mesh=, a jax.sharding.Mesh whose axes {tuple(axes)} tables are sharded over."
        )
    return Mesh(np.array(jax.devices()), axes)


def as_float32(tree: Any) -> Any:
    """The tree with all arrays in float32."""
    return jax.tree.map(lambda array: array if array.dtype == jnp.float32 else array.astype(jnp.float32), tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """The arguments of a layer, and what follows from them. Compared by identity.

    Args:
        feature_specs: the placed feature tree.
        mesh: the devices, and the axes that tables are sharded over.
        num_sc_per_device: SparseCores of each.
        table_sharding_strategy: "MOD".
        enable_minibatching: whether batches are packed so.
    """

    feature_specs: Any
    mesh: TableMesh
    num_sc_per_device: int
    table_sharding_strategy: str
    enable_minibatching: bool

    @classmethod
    def checked(
        cls,
        feature_specs: Any,
        mesh: Mesh,
        sharding_axis: str | tuple[str, ...],
        table_sharding_strategy: str,
        enable_minibatching: bool,
        num_sc_per_device: int = -1,
    ) -> "Layer":
        """From the arguments of a layer; -1 means the SparseCores that the devices have.

        Raises:
            ValueError: the strategy is not "MOD", or the mesh does not have the axis.
        """
        embedding.sharding_strategy_to_enum(table_sharding_strategy)
        over: Any = TableMesh.checked(mesh, sharding_axis)
        if num_sc_per_device == -1:
            num_sc_per_device = utils.num_sparsecores_per_device(mesh.devices.item(0))
        return cls(feature_specs, over, num_sc_per_device, table_sharding_strategy, enable_minibatching)

    @property
    def table_partition(self) -> PartitionSpec:
        """How tables are sharded."""
        return PartitionSpec(*self.mesh.leading, None)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "devices": self.mesh.num_devices,
            "sparsecores": self.num_sc_per_device,
            "enable_minibatching": self.enable_minibatching,
            "axis_name": self.mesh.axis_name,
        }

    def init(self, rng: jax.Array) -> dict[str, embedding.EmbeddingVariables]:
        """The first variables."""
        mesh = self.mesh.mesh
        return embedding.init_embedding_variables(
            rng,
            embedding.get_table_specs(self.feature_specs),
            NamedSharding(mesh, self.table_partition),
            self.num_sc_per_device,
            bypass_mesh_check=mesh.devices.shape != (jax.device_count(),),
        )

    def pack(self, step: Any, features: Any, weights: Any, all_reduce_interface: Any) -> embedding.PreprocessedInput:
        """The packed batch of the devices of this process."""
        return embedding.preprocess_sparse_dense_matmul_input(
            features,
            weights,
            self.feature_specs,
            self.mesh.num_local_devices,
            self.mesh.num_devices,
            num_sc_per_device=self.num_sc_per_device,
            sharding_strategy=self.table_sharding_strategy,
            batch_number=int(step) if self.enable_minibatching else 0,
            enable_minibatching=self.enable_minibatching,
            all_reduce_interface=all_reduce_interface,
        )[0]

    def look_up(self, inputs: embedding.PreprocessedInput, variables: Any) -> tuple[Any, dict[str, jax.Array]]:
        """The activations of a batch in the structure of the specs, and by stack."""

        def on_device(inputs, variables):
            stacked = _matmul.look_up_stacks(inputs, variables, self.feature_specs, **self._options)
            features = embedding.unstack_embedding_activations(
                stacked, self.feature_specs, self.mesh.num_devices, self.num_sc_per_device
            )
            return features, stacked

        data = self.mesh.leading
        return on_devices(self.mesh, on_device, (data, self.table_partition), data)(inputs, as_float32(variables))

    def update(
        self, gradients: Any, inputs: embedding.PreprocessedInput, variables: Any, step: Any, activations: Any = None
    ) -> Any:
        """The new variables, float32 in a tree like the old ones.

        Args:
            gradients: with respect to the activations, in the structure of the specs.
            inputs: the packed batch.
            variables: float32, or other floating point arrays.
            step: the number of the step, or None.
            activations: by stack, what `look_up` returned; None where that was in another jitted step.
        """
        traced_step = step if isinstance(step, jax.Array) else None  # A number stays a constant.

        def on_device(gradients, inputs, variables, traced_step, activations):
            stacked = embedding.stack_embedding_gradients(gradients, self.feature_specs, self.num_sc_per_device)
            return _matmul.update_stacks(
                stacked,
                inputs,
                variables,
                self.feature_specs,
                step=step if traced_step is None else traced_step,
                activations=activations,
                **self._options,
            )

        data, tables = self.mesh.leading, self.table_partition
        update = on_devices(self.mesh, on_device, (data, data, tables, PartitionSpec(), data), tables)
        new = update(as_float32(gradients), inputs, as_float32(variables), traced_step, activations)
        # Of another type, where the old ones were in a frozen dict.
        return jax.tree.unflatten(jax.tree.structure(variables), jax.tree.leaves(new))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lookup_and_update(layer: Layer, variables: Any, inputs: embedding.PreprocessedInput, step: Any) -> Any:
    """The activations of a batch in the structure of the specs; the cotangent of the variables is the new variables."""
    del step
    return layer.look_up(inputs, variables)[0]


def _forward(layer, variables, inputs, step):
    note_differentiated(variables)
    features, stacked = layer.look_up(inputs, variables)
    return features, (variables, inputs, step, stacked)


def _backward(layer, residuals, gradients):
    variables, inputs, step, stacked = residuals
    new = layer.update(gradients, inputs, variables, step, stacked)
    new = jax.tree.map(lambda array, before: array.astype(before.dtype), new, variables)
    note_returned(new)
    return new, None, None


lookup_and_update.defvjp(_forward, _backward)
