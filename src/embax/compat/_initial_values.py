"""The first values of tables and slots as the reference draws them, with a key for each SparseCore."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from embax._mesh import TableMesh
from embax._variables import EmbeddingVariables
from embax.compat._placement import checked_num_sc
from embax.compat.sparsecore.lib.nn import embedding_spec, table_stacking
from embax.compat.sparsecore.utils import utils


def _checked_axis(global_sharding: NamedSharding, bypass_mesh_check: bool) -> Any:
    """The axis, or tuple of axes, that tables are sharded over."""
    spec: Any = tuple(global_sharding.spec)
    mesh: Any = global_sharding.mesh
    if len(spec) not in (2, 3) or spec[0] is None or any(part is not None for part in spec[1:]):
        axis = mesh.axis_names[0] if len(mesh.axis_names) == 1 else tuple(mesh.axis_names)
        raise ValueError(
            f"PartitionSpec of the global sharding either needs to be in the format {PartitionSpec(axis, None, None)} or "
            f"{PartitionSpec(axis, None)}. Got {global_sharding.spec}"
        )
    if not bypass_mesh_check and list(mesh.devices.flat) != jax.devices():
        raise ValueError(
            "global_sharding needs to be created with default device order from jax.devices(), but its mesh has "
            f"{list(mesh.devices.flat)} and jax.devices() are {jax.devices()}. Pass bypass_mesh_check=True to use it as it is."
        )
    return spec[0]


def init_embedding_variables(
    rng: jax.Array,
    table_specs: Any,
    global_sharding: NamedSharding,
    num_sparsecore_per_device: int | None = None,
    bypass_mesh_check: bool = False,
) -> dict[str, EmbeddingVariables]:
    """The first values of all tables and slots. They depend on the number of devices and SparseCores.

    Each SparseCore of each stack has a key of its own, with which the initializers make, table after table, what it holds.

    Args:
        rng: a PRNG key.
        table_specs: tree of tables, stacked or not.
        global_sharding: over which devices tables are sharded: `P(axis, None)`, or `P(axis, None, None)` for arrays with a
            leading dimension of the devices, as `jax.pmap` takes them. `axis` may be a tuple.
        num_sparsecore_per_device: SparseCores of each; None means those of the first device.
        bypass_mesh_check: whether the mesh may have other devices than `jax.devices()`, or another order.

    Returns:
        For each stack its variables, float32[rows, dim] or float32[devices, rows of a device, dim], with this sharding.

    Raises:
        ValueError: the partition spec or the mesh is another.
    """
    axis = _checked_axis(global_sharding, bypass_mesh_check)
    sparsecores = checked_num_sc(num_sparsecore_per_device)
    mesh: Any = global_sharding.mesh
    spec = global_sharding.spec
    over: Any = TableMesh.checked(mesh, axis)
    stacks = table_stacking.get_table_stacks(table_specs)
    num_keys = over.num_devices * sparsecores
    variables = {}
    for number, (name, tables) in enumerate(stacks.items()):
        tables = sorted(tables, key=lambda table: table.setting_in_stack.row_offset_in_shard)
        slots = tables[0].optimizer.slot_variables_initializers()

        def on_device(
            keys: jax.Array, tables: list[embedding_spec.TableSpec] = tables, slots: Any = slots
        ) -> EmbeddingVariables:
            def make(initializer_of: Callable[[embedding_spec.TableSpec], Any]) -> jax.Array:
                def on_sparsecore(key: jax.Array) -> jax.Array:
                    parts = []
                    for table in tables:
                        setting = table.setting_in_stack
                        shape = (setting.padded_vocab_size // num_keys, setting.padded_embedding_dim)
                        parts.append(jnp.asarray(initializer_of(table)(key, shape), jnp.float32))
                    return jnp.concatenate(parts)

                # One after another, so that what initializers need beside their result is small.
                array = jax.lax.map(on_sparsecore, keys)
                array = array.reshape(-1, array.shape[-1])
                return array if len(spec) == 2 else array[None]

            table = make(lambda table: table.initializer)
            return EmbeddingVariables(table, jax.tree.map(lambda slot: make(lambda _: slot), slots))

        def init(
            rng: jax.Array, number: int = number, on_device: Callable[..., EmbeddingVariables] = on_device
        ) -> EmbeddingVariables:
            keys = jax.random.split(rng, num_keys * len(stacks))[number * num_keys : (number + 1) * num_keys]
            return over.shard_map(on_device, (PartitionSpec(axis),), spec)(keys)

        variables[name] = jax.jit(init, out_shardings=utils.embedding_table_format(mesh, spec))(rng)
    return variables
