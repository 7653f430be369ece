"""The parameter of a `SparseCoreEmbed` for Linen."""

from typing import Any

import jax

try:
    from flax import linen as nn
    from flax import struct
except ImportError as error:
    raise ImportError("embax.linen needs Flax and optax: pip install 'embax[flax]'") from error

from embax._format import table_format

EMBEDDING_PARAM_NAME = "sc_embedding_variables"
"""Name of the parameter that holds the tables and slots of a layer."""


class WithSparseCoreLayout(nn.Partitioned):
    """The box around tables and slots: their sharding, and how often their last step looked them up.

    What differentiation returns for the tables in it is no gradient: it is their new value, if there was one lookup.

    Args:
        value: `EmbeddingVariables` of each stack by name.
        names: mesh axes of the dimensions of the arrays.
        mesh: the mesh, or None.
        lookups: float32[devices, 1]; its "gradient" counts the lookups.
        optimizers: of the stacks; they decide the format of tables on TPUs.
    """

    lookups: Any = None
    optimizers: tuple[Any, ...] = struct.field(default=(), pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        """The tables and slots."""
        del apply_constraint  # They are sharded when they are made, and stay so.
        return self.value

    def get_sharding(self, mesh: jax.sharding.Mesh) -> Any:
        """The sharding of every array in the box; on TPUs the format of its tables, see `embax.table_format`."""
        sharding = jax.sharding.NamedSharding(mesh, self.get_partition_spec())
        formats = [table_format(sharding, optimizer) for optimizer in self.optimizers]
        return formats[0] if len(set(map(type, formats))) == 1 else sharding
