"""The parameter of a `SparseCoreEmbed` for Linen."""

import functools
from typing import Any

import jax

try:
    from flax import linen as nn
    from flax import struct
except ImportError as error:
    raise ImportError("embax.linen needs Flax and optax: pip install 'embax[flax]'") from error

from embax._format import table_format
from embax._mesh import TableMesh, replicated
from embax.optimizers import OptimizerSpec

EMBEDDING_PARAM_NAME = "sc_embedding_variables"
"""Name of the parameter that holds the tables and slots of a layer."""


class WithSparseCoreLayout(nn.Partitioned):
    """The box around tables and slots: their sharding, and a witness of what steps did to them.

    What differentiation returns for the tables in it is no gradient: it is their new value, if there was one lookup.

    Args:
        value: `EmbeddingVariables` of each stack by name.
        names: mesh axes of the dimensions of tables, `(axis, None)`; () without a mesh.
        mesh: the mesh, or None.
        witness: float32[devices, 19]: shows what was done to the tables; see `apply_updates_for_sc_model`. None means that
            nothing is checked.
        optimizers: name and optimizer of each stack; they decide the format of tables on TPUs.
    """

    witness: Any = None
    optimizers: tuple[tuple[str, OptimizerSpec], ...] = struct.field(default=(), pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The tables and slots."""
        del apply_constraint  # They are sharded when they are made, and stay so.
        return self.value

    def _over(self, mesh: jax.sharding.Mesh) -> TableMesh | None:
        axes = self.names[0] if self.names else None
        return None if axes is None else TableMesh(mesh, (axes,) if isinstance(axes, str) else tuple(axes))

    @property
    def table_mesh(self) -> TableMesh | None:
        """The mesh and the axes of it that the tables are sharded over."""
        return None if self.mesh is None else self._over(self.mesh)

    def get_sharding(self, mesh: jax.sharding.Mesh) -> Any:
        """A box like this one that holds the sharding of every array; on TPUs the format of tables, see `embax.table_format`."""
        over = self._over(mesh)

        def of_array(array, optimizer=None):
            sharding = replicated(mesh, array.ndim) if over is None else over.sharding(array.ndim)
            return table_format(sharding, optimizer) if optimizer is not None and array.ndim == 2 else sharding

        optimizers = dict(self.optimizers)
        value = {
            name: jax.tree.map(functools.partial(of_array, optimizer=optimizers.get(name)), stack)
            for name, stack in self.value.items()
        }
        return self.replace(value=value, witness=None if self.witness is None else of_array(self.witness))
